"""Images in users' arrays: converts any supported pixel format to uint8 (n, channels, height, width)."""

from __future__ import annotations

import math

import numpy as np

from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.loaders import check_memory

DARK = 32
"""If no pixel is above, of 255, this is said: values may have been meant of another scale."""
NEAR = 0.1
"""How far from a whole number a pixel may lie and still count as one: float16 keeps eight bits no better."""
TOLERANCE = 1e-6
"""How far outside a range a value may lie by rounding."""
BLOCK = 1 << 22
"""Values that are converted at a time."""


def to_pixels(
    train: np.ndarray, test: np.ndarray, where: str, channel_axis: int | None = None
) -> tuple[list[np.ndarray], list[str]]:
    """Returns both sets of images as uint8 (n, channels, height, width), and notes on the conversion.

    Values may be whole numbers from 0 to 255 of any integer or float type, floats in [0, 1], which are multiplied by
    255, or True (255) and False (0); which of these is decided over both sets together. Channels are the last axis if
    its size is 1 or 3, and else the second.

    Args:
        train: training images, at least one.
        test: test images, at least one.
        where: they come from, for messages; there they are called `x_train` and `x_test`.
        channel_axis: 1 or 3, of images with any number of channels; None: it is found, see above.

    Raises:
        DataError: values or shapes that are none of these, or that could be read in two ways.
    """
    both = f"{where}: `x_train` and `x_test`"
    arrays = {f"{where}: `x_train`": train, f"{where}: `x_test`": test}
    layouts = [channels_first(array, name, channel_axis) for name, array in arrays.items()]
    kinds = [_kind(array, name) for name, array in arrays.items()]
    if kinds[0] != kinds[1]:
        raise DataError(f"{both} are {train.dtype} and {test.dtype}, which may be of two scales. Write both alike.")
    if layouts[0].shape[1:] != layouts[1].shape[1:]:
        raise DataError(
            f"{both} hold images of the shapes {layouts[0].shape[1:]} and {layouts[1].shape[1:]} (channels, height, "
            "width). They must be alike."
        )
    ranges = [_range(array, name) for name, array in arrays.items()]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    scale = 255 if kinds[0] == "b" or (kinds[0] == "f" and high <= 1 + TOLERANCE) else 1
    if low < -TOLERANCE or high > 255:
        raise DataError(
            f"{both} hold values from {low:g} to {high:g}; they must lie in [0, 255], or as floats in [0, 1]. Convert "
            "both alike: `numpy.rint((x - low) / (high - low) * 255).astype('uint8')`."
        )
    check_memory(train.size + test.size, f"The images of {where}")
    made = [_as_uint8(layout, scale) for layout in layouts]
    notes = []
    if any(rounded for _, rounded in made):
        notes.append(f"{both}: values are rounded to the 256 steps of a pixel.")
    if high * scale < DARK:
        notes.append(
            f"{both}: no pixel is above {high * scale:g} of 255. If that is meant to be white, multiply all: "
            "augmentation goes by brightness."
        )
    return [pixels for pixels, _ in made], notes


def _kind(array: np.ndarray, name: str) -> str:
    """Returns "b", "i" or "f", the kinds of values that have a scale."""
    kind = {"b": "b", "i": "i", "u": "i", "f": "f"}.get(array.dtype.kind)
    if kind is None:
        raise DataError(
            f"{name} has dtype {array.dtype}; images must be uint8, other whole numbers up to 255, or floats."
        )
    return kind


def _range(array: np.ndarray, name: str) -> tuple[float, float]:
    """Returns the smallest and the largest value."""
    low, high = float(array.min()), float(array.max())
    if not math.isfinite(high - low):
        wrong = [sample for sample, image in enumerate(array) if not np.isfinite(image).all()]
        raise DataError(
            f"{name}: {len(wrong)} of {len(array)} images have pixels that are NaN or infinite, first sample "
            f"{wrong[0]}. Leave these images out, or fill the pixels."
        )
    return low, high


def _as_uint8(images: np.ndarray, scale: int) -> tuple[np.ndarray, bool]:
    """Returns images * scale, and whether any value was rounded."""
    made = np.empty(images.shape, np.uint8)
    rounded = False
    step = max(1, BLOCK // math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        block = images[start : start + step]
        if block.dtype.kind == "f":
            values = block.astype(np.float64) * scale
            whole = np.rint(values)
            rounded |= bool((np.abs(values - whole) > NEAR).any())
            made[start : start + step] = whole.clip(0, 255)
        else:
            made[start : start + step] = block * np.uint8(scale) if block.dtype.kind == "b" else block
    return made, rounded


def channels_first(images: np.ndarray, name: str, channel_axis: int | None = None) -> np.ndarray:
    """Returns a view of shape (n, channels, height, width)."""
    shape = images.shape
    if channel_axis is not None and images.ndim != 4:
        raise DataError(f"{name} has shape {shape}; with a channel axis it must be (n, c, h, w) or (n, h, w, c).")
    if images.ndim == 2:
        raise DataError(f"{name} has shape {shape}: rows of numbers, no images. {_as_images(shape[1])}")
    if channel_axis is not None:
        found = np.moveaxis(images, channel_axis, 1)
    elif images.ndim == 3:
        found = images[:, None]
    elif images.ndim == 4 and shape[3] in (1, 3) and shape[1] in (1, 3):
        raise DataError(
            f"{name} has shape {shape}, where the second or the last axis may be the channels. Write (n, height, "
            "width, channels) of images that are higher and wider than 3, or of grey ones (n, height, width)."
        )
    elif images.ndim == 4 and shape[3] in (1, 3):
        found = images.transpose(0, 3, 1, 2)
    elif images.ndim == 4 and shape[1] in (1, 3):
        found = images
    else:
        alpha = images.ndim == 4 and (4 in (shape[1], shape[3]) or 2 in (shape[1], shape[3]))
        raise DataError(
            f"{name} has shape {shape}; it must be (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3."
            + (" Leave out the alpha channel: `x[..., :-1]`, or `x[:, :-1]`." if alpha else "")
        )
    if min(found.shape[2:]) < 2:
        raise DataError(
            f"{name} has shape {shape}: images of {found.shape[2]}x{found.shape[3]} pixels. "
            + _as_images(math.prod(shape[1:]))
        )
    return found


def _as_images(values: int) -> str:
    """Returns a hint how to arrange `values` numbers per sample as an image."""
    for channels, start in ((1, "-1"), (3, "-1, 3")):
        side = math.isqrt(values // channels)
        if side > 3 and channels * side * side == values:
            return (
                f"If these are images of {side}x{side}: `x.reshape({start}, {side}, {side})`; rows of a table come as "
                "CSV or Parquet, by data.name=table."
            )
    return "Images: `x.reshape(-1, height, width)`; rows of a table come as CSV or Parquet, by data.name=table."
