"""Batched views against torchvision's transforms, one image at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandAugment
from torchvision.transforms.v2 import functional as F

from fedlabel.data.augment import (
    CUTOUT_FILL,
    NUM_CODES,
    OPERATIONS,
    AugmentConfig,
    apply_operations,
    strong,
    weak,
)
from fedlabel.seeding import Draws

PLAIN = AugmentConfig(crop_padding=0, flip=False)
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 17, 30)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_of(seed: int = 0) -> Draws:
    return Draws(generator(seed))


def images_of(shape: tuple[int, int, int], batch: int) -> Tensor:
    """Noise, low contrast, a smooth ramp and one constant image: all that equalize and autocontrast treat apart."""
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator(1))
    images[1::4] = images[1::4] // 4 + 90
    ramp = torch.linspace(0, 255, shape[1] * shape[2]).view(shape[1:]).to(torch.uint8)
    images[2::4] = ramp
    images[3::4] = 77
    return images


def reference(image: Tensor, code: int, magnitude: int) -> Tensor:
    """torchvision's own RandAugment step on one image (channels, height, width), with `code` for its random choice."""
    transform = RandAugment(num_ops=1, magnitude=magnitude)
    name = OPERATIONS[code // 2]
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    levels = magnitudes(31, *image.shape[-2:])
    level = 0.0 if levels is None else float(levels[magnitude])
    if signed and code % 2:
        level *= -1
    return transform._apply_image_or_video_transform(image, name, level, InterpolationMode.NEAREST, {Tensor: None})


def test_operations_are_those_of_torchvision() -> None:
    """Fails if an operation is missing, or torchvision adds one."""
    assert set(OPERATIONS) == set(RandAugment._AUGMENTATION_SPACE)
    assert len(OPERATIONS) == 14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", range(NUM_CODES))
def test_each_operation_equals_torchvision_one_image_at_a_time(code: int, shape: tuple[int, int, int]) -> None:
    """Fails if an operation, its magnitude, sign, fill or centre differs, or an image's result depends on others."""
    images = images_of(shape, 24)
    batched = apply_operations(images, torch.full((24,), code), 10)
    assert batched.dtype == torch.uint8
    assert torch.equal(batched, torch.stack([reference(image, code, 10) for image in images]))


@pytest.mark.parametrize("magnitude", range(31))
def test_every_magnitude_equals_torchvision(magnitude: int) -> None:
    """Fails if a magnitude's table is off, e.g. a rounding of bits, or tables of two magnitudes or sizes get mixed."""
    for shape in SHAPES:
        images = images_of(shape, NUM_CODES)
        codes = torch.randperm(NUM_CODES, generator=generator(magnitude))
        expected = [reference(image, int(code), magnitude) for image, code in zip(images, codes, strict=True)]
        assert torch.equal(apply_operations(images, codes, magnitude), torch.stack(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batch_returns_samples_in_their_places(shape: tuple[int, int, int]) -> None:
    """Fails if grouping by operation loses the order of samples, or the input is written to."""
    images = images_of(shape, 100)
    before = images.clone()
    codes = torch.randint(NUM_CODES, (100,), generator=generator(3))
    expected = [reference(image, int(code), 7) for image, code in zip(images, codes, strict=True)]
    assert torch.equal(apply_operations(images, codes, 7), torch.stack(expected))
    assert torch.equal(images, before)


def test_signs_differ() -> None:
    """Fails if the sign is dropped: the test above would not see it where both signs of the reference were equal."""
    image = images_of((3, 32, 32), 4)[:1]
    for index, name in enumerate(OPERATIONS):
        positive, negative = (apply_operations(image, torch.tensor([2 * index + sign]), 10) for sign in (0, 1))
        _, signed = RandAugment._AUGMENTATION_SPACE[name]
        assert torch.equal(positive, negative) is not signed, name


def test_operations_and_signs_are_uniform_and_per_sample() -> None:
    """Fails if a batch shares one operation or sign, or some are drawn more often.

    Every sample is the same image, so its result tells its operation. 23 results are possible: 5 operations without
    sign with probability 1/14, 9 x 2 with 1/28. Of 5600 samples that is 400 and 200, with standard deviations of 19 and
    14; the largest deviation at this seed is measured as 1.8 standard deviations.
    """
    image = torch.randint(30, 220, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    batch = 5600
    results = strong(image.expand(batch, -1, -1, -1), draws_of(5), PLAIN, flip=False)
    possible = apply_operations(image.expand(NUM_CODES, -1, -1, -1), torch.arange(NUM_CODES), 10)
    found = 0
    for candidate in possible.unique(dim=0):
        share = int((possible == candidate).flatten(1).all(1).sum()) / NUM_CODES
        count = int((results == candidate).flatten(1).all(1).sum())
        assert abs(count - share * batch) < 3 * (batch * share * (1 - share)) ** 0.5
        found += count
    assert len(possible.unique(dim=0)) == 23
    assert found == batch


def test_two_operations_are_two_steps() -> None:
    """Fails if `num_ops` is ignored, or the second round repeats the draw of the first."""
    images = images_of((3, 32, 32), 64)
    two = strong(images, draws_of(), dataclasses.replace(PLAIN, num_ops=2), flip=False)
    assert not torch.equal(two, strong(images, draws_of(), PLAIN, flip=False))
    draws = draws_of()
    first, second = (draws.integers(0, NUM_CODES, (64,)) for _ in range(2))
    assert torch.equal(two, apply_operations(apply_operations(images, first, 10), second, 10))


@pytest.mark.parametrize("padding", [1, 4, 6])
def test_weak_crop_is_a_window_of_the_reflected_image(padding: int) -> None:
    """Fails if the index arithmetic differs from reflect padding and slicing, or places are not drawn per sample."""
    config = AugmentConfig(crop_padding=padding, flip=False)
    images = torch.randint(0, 256, (200, 1, 7, 9), dtype=torch.uint8, generator=generator(2))
    views = weak(images, draws_of(), config, flip=True)
    places = set()
    for image, view in zip(images, views, strict=True):
        padded = F.pad(image, [padding] * 4, padding_mode="reflect")
        windows = {
            (top, left): padded[:, top : top + 7, left : left + 9]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        }
        matches = [place for place, window in windows.items() if torch.equal(window, view)]
        assert matches
        places.update(matches)
    tops, lefts = zip(*places, strict=True)
    assert set(tops) == set(lefts) == set(range(2 * padding + 1))


def test_flip() -> None:
    """Fails if mirroring is not left to right, not for about half of the samples, or not overridden by the config.

    With 400 samples the standard deviation of the share is 0.025.
    """
    images = images_of((3, 12, 10), 1).expand(400, -1, -1, -1)
    for allowed, override, flips in [
        (True, None, True),
        (False, None, False),
        (False, True, True),
        (True, False, False),
    ]:
        config = AugmentConfig(crop_padding=0, flip=override)
        views = weak(images, draws_of(), config, flip=allowed)
        kept = (views == images).flatten(1).all(1)
        mirrored = (views == images.flip(3)).flatten(1).all(1)
        assert bool((kept ^ mirrored).all())
        if flips:
            assert abs(mirrored.float().mean().item() - 0.5) < 0.075
        else:
            assert bool(kept.all())


def test_strong_is_operations_then_weak() -> None:
    """Fails if the order changes: after a crop, a rotation's black corners would never be mirrored into the image."""
    images = images_of((3, 32, 32), 64)
    config = AugmentConfig()
    draws = draws_of(8)
    codes = draws.integers(0, NUM_CODES, (64,))
    expected = weak(apply_operations(images, codes, config.magnitude), draws, config, flip=True)
    assert torch.equal(strong(images, draws_of(8), config, flip=True), expected)


@pytest.mark.parametrize(("shape", "fraction", "side"), [((3, 32, 32), 0.5, 16), ((1, 28, 20), 0.26, 5)])
def test_cutout_fills_one_square_of_exact_area(shape: tuple[int, int, int], fraction: float, side: int) -> None:
    """Fails if the square is cut off at the border, not square, differs by channel, or is at one place for all.

    No operation turns a constant image of 200 into the fill's value, so the square is where the two views differ.
    """
    images = torch.full((300, *shape), 200, dtype=torch.uint8)
    plain = strong(images, draws_of(6), PLAIN, flip=False)
    cut = strong(images, draws_of(6), dataclasses.replace(PLAIN, cutout=fraction), flip=False)
    corners = set()
    for before, after in zip(plain, cut, strict=True):
        rows, columns = torch.where((before != after).any(0))
        top, left = int(rows.min()), int(columns.min())
        corners.add((top, left))
        expected = before.clone()
        expected[:, top : top + side, left : left + side] = CUTOUT_FILL
        assert torch.equal(after, expected)
        assert len(rows) == side * side
    tops, lefts = (set(places) for places in zip(*corners, strict=True))
    assert tops == set(range(shape[1] - side + 1))
    assert lefts == set(range(shape[2] - side + 1))


@pytest.mark.parametrize("view", [weak, strong])
def test_seed_decides_and_global_state_is_untouched(view: Callable[..., Tensor]) -> None:
    """Fails if a view draws from torch's global generator, or depends on anything but generator and images."""
    images = images_of((3, 32, 32), 32)
    config = AugmentConfig(num_ops=2, cutout=0.5)
    state = torch.get_rng_state()
    first = view(images, draws_of(9), config, True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(view(images, draws_of(9), config, True), first)
    assert not torch.equal(view(images, draws_of(10), config, True), first)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("view", [weak, strong])
@pytest.mark.parametrize("shape", SHAPES)
def test_empty_and_single_batches(shape: tuple[int, int, int], view: Callable[..., Tensor], batch: int) -> None:
    """Fails if a client's last, short batch, or one without any unlabelled data, breaks a view."""
    images = images_of(shape, 4)[:batch]
    result = view(images, draws_of(), AugmentConfig(num_ops=2, cutout=0.5), True)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8


def test_input_is_neither_changed_nor_shared() -> None:
    """Fails if a view returns or writes into the data set's memory, also where it has nothing to do."""
    images = images_of((3, 32, 32), 32)
    before = images.clone()
    for config in (PLAIN, AugmentConfig(cutout=0.5)):
        for view in (weak, strong):
            view(images, draws_of(), config, flip=True).fill_(0)
            assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_geometric_and_pointwise_operations_are_the_same_on_cuda() -> None:
    """Fails if a table is built or left on the wrong device."""
    images = images_of((3, 32, 32), 18)
    on_cuda = apply_operations(images.cuda(), torch.arange(18).cuda(), 10)
    assert torch.equal(on_cuda.cpu(), apply_operations(images, torch.arange(18), 10))
    view = strong(images.cuda(), draws_of(), AugmentConfig(cutout=0.5), flip=True)
    assert view.is_cuda


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop_padding", -1, r"`augment.crop_padding` \(=-1\) must be at least 0"),
        ("num_ops", 0, r"`augment.num_ops` \(=0\) must lie in \[1, 14\]"),
        ("magnitude", 31, r"`augment.magnitude` \(=31\) must lie in \[0, 30\]\."),
        ("magnitude", -1, r"`augment.magnitude` \(=-1\) must lie in \[0, 30\]\."),
        ("cutout", 1.5, r"`augment.cutout` \(=1.5\) must lie in \[0, 1\]"),
        ("cutout", float("nan"), r"`augment.cutout` \(=nan\) must lie in \[0, 1\]"),
    ],
)
def test_config_errors_name_key_and_value(field: str, value: float, message: str) -> None:
    """Fails if a wrong value gets through to a run, or the message does not say which key to mend."""
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value})


def test_padding_as_large_as_the_image_is_refused() -> None:
    """Fails if the mirror index leaves the image, which would gather wrong pixels."""
    images = torch.zeros(2, 1, 8, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`augment.crop_padding` \(=6\) must be smaller than the image side \(=6\)"):
        weak(images, draws_of(), AugmentConfig(crop_padding=6), flip=False)
    assert weak(images, draws_of(), AugmentConfig(crop_padding=5), flip=False).shape == images.shape


@pytest.mark.parametrize(("side", "padding"), [(8, 1), (28, 3), (32, 4)])
def test_default_padding_is_an_eighth_of_the_side(side: int, padding: int) -> None:
    images = torch.randint(256, (64, 1, side, side), dtype=torch.uint8)
    default = weak(images, draws_of(), AugmentConfig(), flip=False)
    assert torch.equal(default, weak(images, draws_of(), AugmentConfig(crop_padding=padding), flip=False))
    assert not torch.equal(default, images)
