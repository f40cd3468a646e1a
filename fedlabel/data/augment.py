"""Weak and strong views of a whole batch at once, as pure functions of images and a generator.

The strong view is RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719) as `torchvision.transforms.v2`
implements it, then crop and flip, then, if asked, Cutout (DeVries & Taylor, 2017, https://arxiv.org/abs/1708.04552).

What differs from torchvision, and why:

* Samples that drew the same operation are transformed together. With one fixed magnitude an operation has at most two
  forms, one per sign. A geometric one moves every pixel to a place known beforehand, a pointwise one is a table of 256
  values, so each of these families is one `gather`; the rest are torchvision's own functions on a group of samples.
* The tables are made by running torchvision's functions on an image of pixel indices (or of all 256 values), on the
  CPU. So pixels equal torchvision's by construction, and are the same whatever device uses the tables.
* Random numbers come only from the generators that are passed in, never from torch's global state. They can be drawn
  before the pixels are there (`weak_numbers`, `strong_numbers`), for several batches whose views are then made at once.

What differs from Cutout as published: the square always lies wholly inside the image, so its area never varies, and it
is mid-grey, as usual with FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685), so it shows on black ground.

Rows of tables, which are float32, get noise and lose features instead: see `fedlabel.data.augment_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedlabel.data.augment_tables import drop_features, jitter
from fedlabel.seeding import Draws
from fedlabel.transfer import to_device

NUM_MAGNITUDE_BINS = 31
"""Magnitudes are 0 to 30, as in torchvision's `RandAugment`."""

CUTOUT_FILL = 127
"""Value of the pixels inside the cutout square."""

# The families are contiguous, so that samples sorted by operation are also sorted by family.
_GEOMETRIC = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_POINTWISE = ("Brightness", "Posterize", "Solarize")
_PER_IMAGE = ("Color", "Contrast", "Sharpness", "AutoContrast", "Equalize")
OPERATIONS = _GEOMETRIC + _POINTWISE + _PER_IMAGE
"""RandAugment's operations by torchvision's names. Code `2 * i` is the i-th with sign +, `2 * i + 1` with sign -."""

NUM_CODES = 2 * len(OPERATIONS)
"""Operations without a sign do the same under both codes, so uniform codes make uniform operations and signs."""

_POINTWISE_START = 2 * len(_GEOMETRIC)
_PER_IMAGE_START = 2 * len(_GEOMETRIC + _POINTWISE)


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly samples are augmented. Image options have no effect on tables, and table options none on images; a
    crop, a flip or Cutout of tables is an error.
    """

    crop_padding: int | None = None
    """Pixels of reflect padding on each side before a random crop of the original size; 0 = no crop; None = an eighth
    of the shorter side (the usual 4 for 32 pixels)."""

    flip: bool | None = None
    """Whether half of the images are mirrored left to right; None = as the data set allows."""

    num_ops: int = 1
    """RandAugment operations applied to each image, one after the other (strong view only)."""

    magnitude: int = 10
    """Strength of every operation, 0 to 30 (strong view only)."""

    cutout: float = 0.0
    """Side of the grey square as a fraction of the shorter image side; 0 = no square (strong view only)."""

    weak_as_strong: bool = False
    """Whether weak views are strong ones, too: gives a method that only trains on weak views the augmentation of one
    that trains on strong ones, so that the two can be compared."""

    jitter: float = 0.1
    """Tables: standard deviation of the Gaussian noise on every feature, relative to a numeric column's standard
    deviation over the training samples; 0 = no noise."""

    feature_dropout: float = 0.2
    """Tables: probability with which a feature is set to 0, the mean of a numeric column (strong view only)."""

    def __post_init__(self) -> None:
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"`augment.crop_padding` (={self.crop_padding}) must be at least 0; 0 turns cropping off.")
        if not 1 <= self.num_ops <= len(OPERATIONS):
            raise ValueError(f"`augment.num_ops` (={self.num_ops}) must lie in [1, {len(OPERATIONS)}].")
        if not 0 <= self.magnitude < NUM_MAGNITUDE_BINS:
            raise ValueError(f"`augment.magnitude` (={self.magnitude}) must lie in [0, {NUM_MAGNITUDE_BINS - 1}].")
        if not 0.0 <= self.cutout <= 1.0:
            raise ValueError(f"`augment.cutout` (={self.cutout}) must lie in [0, 1]; 0 turns it off.")
        if not 0.0 <= self.jitter < math.inf:
            raise ValueError(f"`augment.jitter` (={self.jitter}) must be a finite number of at least 0.")
        if not 0.0 <= self.feature_dropout <= 1.0:
            raise ValueError(f"`augment.feature_dropout` (={self.feature_dropout}) must lie in [0, 1]; 0 turns it off.")

    def check_table(self) -> None:
        """Raises a ValueError if an option is set that only images can have."""
        for key in ("crop_padding", "flip", "cutout"):
            if getattr(self, key):
                raise ValueError(
                    f"`augment.{key}` (={getattr(self, key)}) is for images, not for tables: leave it out; "
                    "augment.jitter and augment.feature_dropout are for tables."
                )


Numbers = tuple[Tensor, ...]
"""The random numbers of a view, on the CPU: the first dimension of each tensor counts the samples, so that those of
several batches can be joined."""


def weak(images: Tensor, draws: Draws, config: AugmentConfig, flip: bool) -> Tensor:
    """Returns a random crop of every image, half of them mirrored; of a table, rows with jitter.

    Args:
        images: (batch, channels, height, width), uint8; or (batch, features, 1, 1), float32. The batch may be empty.
        draws: source of all random numbers.
        config: of images `crop_padding` and `flip` are used, of tables `jitter`.
        flip: whether the data set allows mirroring; `config.flip`, if not None, overrides it.

    Returns:
        Images of the same shape, type and device.

    Raises:
        ValueError: if `config.crop_padding` is not smaller than height and width; see also `check_table`.
    """
    return weak_with(images, weak_numbers(images, len(images), draws, config, flip), config, flip)


def weak_numbers(images: Tensor, count: int, draws: Draws, config: AugmentConfig, flip: bool) -> Numbers:
    """Returns the numbers for the weak view of `count` images of the type and shape of `images`; see `weak`."""
    if images.is_floating_point():
        config.check_table()
        return (draws.normal((count, *images.shape[1:])),)
    padding, flip = _crop_and_flip(images, config, flip)
    if padding >= min(images.shape[-2:]):
        raise ValueError(
            f"`augment.crop_padding` (={padding}) must be smaller than the image side (={min(images.shape[-2:])}), "
            "since the padding mirrors the image."
        )
    numbers: Numbers = ()
    if padding:
        numbers += (draws.integers(0, 2 * padding + 1, (2, count, 1), dim=1).movedim(1, 0),)
    return (*numbers, draws.uniform((count, 1)) < 0.5) if flip else numbers


def weak_with(images: Tensor, numbers: Numbers, config: AugmentConfig, flip: bool) -> Tensor:
    """Returns the weak view of images with the result of `weak_numbers`; see `weak`."""
    if images.is_floating_point():
        return jitter(images, numbers[0], config.jitter)
    assert images.dtype == torch.uint8, images.dtype
    height, width = images.shape[-2:]
    padding, flip = _crop_and_flip(images, config, flip)
    if not padding and not flip:
        return images.clone()

    batch, device = len(images), images.device
    rows, columns = _places(height, 0, device), _places(width, 0, device)
    if padding:
        shift = to_device(numbers[0], device)
        rows = _places(height, padding, device)[rows + shift[:, 0]]
        columns = _places(width, padding, device)[columns + shift[:, 1]]
    rows, columns = rows.expand(batch, height), columns.expand(batch, width)
    if flip:
        mirrored = to_device(numbers[-1], device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    sources = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return _take_pixels(images.flatten(2), sources).view_as(images)


def _crop_and_flip(images: Tensor, config: AugmentConfig, flip: bool) -> tuple[int, bool]:
    """Returns the padding of a crop, 0 for none, and whether images are mirrored."""
    padding = min(images.shape[-2:]) // 8 if config.crop_padding is None else config.crop_padding
    return padding, flip if config.flip is None else config.flip


def strong(images: Tensor, draws: Draws, config: AugmentConfig, flip: bool) -> Tensor:
    """Returns RandAugment of every image, then cropped and mirrored as by `weak`, then with Cutout if configured.

    Each image gets its own operations and signs. A row of a table gets jitter as by `weak`, and then loses features.

    Args:
        images: (batch, channels, height, width), uint8; or (batch, features, 1, 1), float32. The
            batch may be empty.
        draws: source of all random numbers.
        config: all fields are used.
        flip: whether the data set allows mirroring; `config.flip`, if not None, overrides it.

    Returns:
        Images of the same shape, type and device.

    Raises:
        ValueError: as by `weak`.
    """
    return strong_with(images, strong_numbers(images, len(images), draws, config, flip), config, flip)


def strong_numbers(images: Tensor, count: int, draws: Draws, config: AugmentConfig, flip: bool) -> Numbers:
    """Returns the numbers for the strong view of `count` images of the type and shape of `images`; see `strong`."""
    if images.is_floating_point():
        noise = weak_numbers(images, count, draws, config, flip)
        return *noise, draws.uniform((count, *images.shape[1:])) < config.feature_dropout
    numbers: Numbers = tuple(draws.integers(0, NUM_CODES, (count,)) for _ in range(config.num_ops))
    numbers += weak_numbers(images, count, draws, config, flip)
    if config.cutout:
        side = _cutout_side(images, config.cutout)
        numbers += tuple(draws.integers(0, size - side + 1, (count, 1)) for size in images.shape[-2:])
    return numbers


def strong_with(images: Tensor, numbers: Numbers, config: AugmentConfig, flip: bool) -> Tensor:
    """Returns the strong view of images with the result of `strong_numbers`; see `strong`."""
    if images.is_floating_point():
        return drop_features(weak_with(images, numbers[:-1], config, flip), numbers[-1])
    assert images.dtype == torch.uint8, images.dtype
    for codes in numbers[: config.num_ops]:
        if images.shape[1] in (1, 3):
            images = apply_operations(images, codes, config.magnitude)
        else:  # torchvision knows grey and RGB alone: each channel as a grey image, by the same operation
            grey, each = images.flatten(0, 1)[:, None], codes.repeat_interleave(images.shape[1])
            images = apply_operations(grey, each, config.magnitude).view_as(images)
    places = numbers[len(numbers) - 2 :] if config.cutout else ()
    images = weak_with(images, numbers[config.num_ops : len(numbers) - len(places)], config, flip)
    return _cutout(images, places, config.cutout) if config.cutout else images


def apply_operations(images: Tensor, codes: Tensor, magnitude: int) -> Tensor:
    """Returns each image transformed by the operation of its code.

    Args:
        images: (batch, channels, height, width), uint8, 1 or 3 channels.
        codes: (batch,), int64 in [0, NUM_CODES); see `OPERATIONS`. On the CPU: else the grouping waits for the device.
        magnitude: strength of every operation, 0 to 30.

    Returns:
        Images of the same shape, type and device, equal to torchvision's functions applied one image at a time.
    """
    height, width = images.shape[-2:]
    codes, order = codes.cpu().sort()
    start = torch.searchsorted(codes, torch.arange(NUM_CODES + 1)).tolist()  # where each code's samples begin
    codes, order = to_device(codes, images.device), to_device(order, images.device)
    images = images[order]
    result = torch.empty_like(images)

    group = slice(0, start[_POINTWISE_START])
    sources = _source_tables(height, width, magnitude, images.device)[codes[group]]
    with_outside = torch.nn.functional.pad(images[group].flatten(2), (1, 0))  # pixel 0 is black, all others move by one
    result[group] = _take_pixels(with_outside, sources).view_as(images[group])

    group = slice(start[_POINTWISE_START], start[_PER_IMAGE_START])
    tables = _value_tables(magnitude, images.device)[codes[group] - _POINTWISE_START]
    result[group] = tables.gather(1, images[group].flatten(1).long()).view_as(images[group])

    for code in range(_PER_IMAGE_START, NUM_CODES):
        if start[code] < start[code + 1]:
            group = slice(start[code], start[code + 1])
            result[group] = _torchvision_operation(code, magnitude, height, width)(images[group])
    return torch.empty_like(result).index_copy_(0, order, result)


def _take_pixels(pixels: Tensor, sources: Tensor) -> Tensor:
    """Returns `pixels` (batch, channels, n) at the indices `sources` (batch, m) in [0, n): (batch, channels, m)."""
    return pixels.gather(2, sources[:, None, :].expand(-1, pixels.shape[1], -1))


@lru_cache(maxsize=64)
def _places(size: int, padding: int, device: torch.device) -> Tensor:
    """The pixels along a side with `padding` mirrored ones at both ends: (size + 2 * padding,) int64 in [0, size).

    The edge pixel is not repeated.
    """
    position = torch.arange(-padding, size + padding, device=device)
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _cutout_side(images: Tensor, fraction: float) -> int:
    """Returns the side of a square of a fraction of the shorter image side, rounded to whole pixels."""
    return round(fraction * min(images.shape[-2:]))


def _cutout(images: Tensor, places: Numbers, fraction: float) -> Tensor:
    """Fills one square of `CUTOUT_FILL` in each image, wholly inside it.

    Args:
        images: (batch, channels, height, width), uint8.
        places: (batch, 1) int64 each: the squares' first rows and columns.
        fraction: side of the square, see `_cutout_side`.
    """
    side = _cutout_side(images, fraction)

    def covered(size: int, first: Tensor) -> Tensor:
        offset = torch.arange(size, device=images.device) - to_device(first, images.device)
        return (offset >= 0) & (offset < side)

    rows, columns = (covered(size, first) for size, first in zip(images.shape[-2:], places, strict=True))
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], CUTOUT_FILL)


@lru_cache(maxsize=64)
def _source_tables(height: int, width: int, magnitude: int, device: torch.device) -> Tensor:
    """The source of each pixel, by geometric code: (12, height * width), int64; 0 = outside, i + 1 = pixel i."""
    index = torch.arange(1, height * width + 1, dtype=torch.float32, device="cpu").view(1, 1, height, width)
    tables = [_torchvision_operation(code, magnitude, height, width)(index) for code in range(_POINTWISE_START)]
    return torch.cat(tables).flatten(1).long().to(device)


@lru_cache(maxsize=64)
def _value_tables(magnitude: int, device: torch.device) -> Tensor:
    """The result for each pixel value, by pointwise code: (6, 256), uint8."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, 1, 1, 256)
    codes = range(_POINTWISE_START, _PER_IMAGE_START)
    return torch.cat([_torchvision_operation(code, magnitude, 1, 256)(values) for code in codes]).flatten(1).to(device)


def _torchvision_operation(code: int, magnitude: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """Returns the torchvision function, on images (..., channels, height, width), of an operation's code.

    The table of magnitudes is that of `torchvision.transforms.v2.RandAugment` with 31 bins.

    Args:
        code: in [0, NUM_CODES); see `OPERATIONS`.
        magnitude: 0 to 30.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    from torchvision.transforms.v2 import functional as F  # here: it takes as long to import as torch

    def level(maximum: float) -> float:
        # linspace, as torchvision does, so that float32 rounding is the same.
        value = torch.linspace(0.0, maximum, NUM_MAGNITUDE_BINS, device="cpu")[magnitude].item()
        return -value if code % 2 else value

    def affine(images: Tensor, translate: tuple[float, float], shear: tuple[float, float]) -> Tensor:
        degrees = [math.degrees(math.atan(slope)) for slope in shear]
        # Shears leave the upper left corner in place; for shifts the centre does not matter.
        return F.affine(images, angle=0.0, translate=list(translate), scale=1.0, shear=degrees, center=[0, 0])

    match OPERATIONS[code // 2]:
        case "Identity":
            return lambda images: images
        case "ShearX":
            return lambda images: affine(images, (0, 0), (level(0.3), 0))
        case "ShearY":
            return lambda images: affine(images, (0, 0), (0, level(0.3)))
        case "TranslateX":
            return lambda images: affine(images, (int(level(150.0 / 331.0 * width)), 0), (0, 0))
        case "TranslateY":
            return lambda images: affine(images, (0, int(level(150.0 / 331.0 * height))), (0, 0))
        case "Rotate":
            return lambda images: F.rotate(images, angle=level(30.0))
        case "Brightness":
            return lambda images: F.adjust_brightness(images, 1.0 + level(0.9))
        case "Color":
            return lambda images: F.adjust_saturation(images, 1.0 + level(0.9))
        case "Contrast":
            return lambda images: F.adjust_contrast(images, 1.0 + level(0.9))
        case "Sharpness":
            return lambda images: F.adjust_sharpness(images, 1.0 + level(0.9))
        case "Posterize":
            return lambda images: F.posterize(images, 8 - round(magnitude / ((NUM_MAGNITUDE_BINS - 1) / 4)))
        case "Solarize":
            threshold = torch.linspace(1.0, 0.0, NUM_MAGNITUDE_BINS, device="cpu")[magnitude].item()
            return lambda images: F.solarize(images, 255 * threshold)
        case "AutoContrast":
            return F.autocontrast
        case "Equalize":
            return F.equalize
    raise AssertionError(code)
