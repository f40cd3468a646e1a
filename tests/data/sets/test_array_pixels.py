"""Images in arrays: which values and shapes are read, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest

from fedlabel.data.sets.array_pixels import to_pixels
from fedlabel.data.sets.config import DataError

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 6, 7), dtype=np.uint8)
BYTES[0, 0, :2] = 0, 255


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint64", ">u2", "float16", "float32", "float64"])
def test_values_from_0_to_255_of_any_type(dtype: str) -> None:
    (train, test), notes = to_pixels(BYTES.astype(dtype), BYTES[:2].astype(dtype), "f")
    assert np.array_equal(train[:, 0], BYTES)
    assert np.array_equal(test[:, 0], BYTES[:2])
    assert train.dtype == np.uint8
    assert notes == []


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_up_to_1_give_back_the_bytes_they_were_made_of(dtype: str) -> None:
    values = (BYTES / 255).astype(dtype)
    (train, _), notes = to_pixels(values, values[1:], "f")
    assert np.array_equal(train[:, 0], BYTES)
    assert notes == []


def test_one_scale_for_both_sets() -> None:
    """A dark test set in [0, 1] beside training images up to 255 is not stretched."""
    dark = np.ones((2, 6, 7), np.float32)
    (_, test), _ = to_pixels(BYTES.astype(np.float32), dark, "f")
    assert test.max() == 1
    (_, test), notes = to_pixels(np.ones((2, 6, 7), np.float32), dark / 2, "f")
    assert test.max() == 128  # 127.5, rounded to even
    assert notes == ["f: `x_train` and `x_test`: values are rounded to the 256 steps of a pixel."]


def test_floats_above_1_are_not_stretched() -> None:
    (train, _), notes = to_pixels(BYTES / 255 * 1.5, BYTES / 255, "f")
    assert train.max() == 2
    assert "values are rounded" in notes[0]
    assert "no pixel is above 1.5 of 255" in notes[1]


def test_black_and_white() -> None:
    (train, _), notes = to_pixels(BYTES > 127, BYTES > 127, "f")
    assert np.array_equal(train[:, 0], np.where(BYTES > 127, 255, 0))
    assert notes == []


def test_dark_images_are_said() -> None:
    _, notes = to_pixels(BYTES // 16, BYTES // 16, "f")
    assert notes == [
        "f: `x_train` and `x_test`: no pixel is above 15 of 255. If that is meant to be white, multiply all: "
        "augmentation goes by brightness."
    ]


def test_more_images_than_are_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlabel.data.sets.array_pixels.BLOCK", 100)  # two images of 42 values
    (train, _), _ = to_pixels(BYTES / 255, BYTES / 255, "f")
    assert np.array_equal(train[:, 0], BYTES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_channels_are_found(channels: int, last: bool) -> None:
    images = RNG.integers(0, 256, (4, channels, 6, 7), dtype=np.uint8)
    stored = np.asfortranarray(images.transpose(0, 2, 3, 1) if last else images)
    (train, _), _ = to_pixels(stored, stored, "f")
    assert np.array_equal(train, images)
    assert train.flags.c_contiguous


def made(*shape: int) -> np.ndarray:
    return np.full(shape, 200, np.uint8)


NAN = np.full((4, 6, 7), 0.5)
NAN[[1, 3], 2, 2] = np.nan, np.inf


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            made(4, 784),
            r"`x_train` has shape \(4, 784\): rows of numbers, no images. .*`x.reshape\(-1, 28, 28\)`; .*table",
        ),
        (made(4, 3072), r"`x.reshape\(-1, 3, 32, 32\)`"),
        (made(4, 30), r"Images: `x.reshape\(-1, height, width\)`; rows of a table come .* by data.name=table"),
        (made(4, 1, 784), r"images of 1x784 pixels. If these are images of 28x28"),
        (made(4, 3, 32, 3), r"shape \(4, 3, 32, 3\), where the second or the last axis may be the channels"),
        (made(4, 1, 32, 3), r"where the second or the last axis may be the channels"),
        (made(4, 6, 7, 4), r"\(4, 6, 7, 4\); it must be .* Leave out the alpha channel: `x\[..., :-1\]`"),
        (made(4, 2, 6, 7), "Leave out the alpha channel"),
        (made(4, 6, 7, 5), r"it must be \(n, h, w\), \(n, h, w, c\) or \(n, c, h, w\), c = 1 or 3\.$"),
        (made(4, 6, 7, 3, 1), r"it must be \(n, h, w\)"),
        (made(4), r"it must be \(n, h, w\)"),
        (made(4, 0, 7), r"images of 0x7 pixels"),
        (made(4, 6, 8), r"images of the shapes \(1, 6, 8\) and \(1, 6, 7\)"),
        (made(4, 6, 7) / 255, "are float64 and uint8, which may be of two scales. Write both alike"),
        (made(4, 6, 7).astype(np.uint16) * 2, r"values from 200 to 400; they must lie in \[0, 255\].*rint"),
        (made(4, 6, 7).astype(int) - 201, "values from -1 to 200; they must lie in"),
        (np.full((4, 6, 7), 1 + 2j), "`x_train` has dtype complex128; images must be uint8"),
        (np.full((4, 6, 7), "a"), "`x_train` has dtype <U1; images must be uint8"),
    ],
)
def test_what_is_no_image_is_refused(train: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_pixels(train, made(2, 6, 7), "f")


def test_standardised_floats_and_missing_pixels_are_refused() -> None:
    with pytest.raises(
        DataError, match="`x_train`: 2 of 4 images have pixels that are NaN or infinite, first sample 1\\."
    ):
        to_pixels(NAN, np.zeros((2, 6, 7)), "f")
    with pytest.raises(DataError, match="values from -1.5 to 1.5"):
        to_pixels(np.full((2, 6, 7), -1.5), np.full((2, 6, 7), 1.5), "f")


def test_more_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlabel.data.sets.loaders.machine_memory", lambda: 100.0)
    with pytest.raises(DataError, match="The images of f would take .* more than the memory of this machine"):
        to_pixels(BYTES, BYTES, "f")
