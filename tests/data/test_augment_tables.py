"""Views of rows of tables: how much noise, how many features lost, and nothing that only images can have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlabel.data.augment import AugmentConfig, strong, weak
from fedlabel.learning.client import ImageTransform
from fedlabel.seeding import Draws

N, FEATURES = 4000, 25


def rows(n: int = N) -> Tensor:
    return torch.randn(n, FEATURES, 1, 1, generator=torch.Generator().manual_seed(7)) + 5


def generator(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed))


def test_weak_views_are_jittered() -> None:
    """100,000 draws of sd 0.3: mean 0 and sd 0.3 with standard errors of 0.001 and 0.0007."""
    before = rows()
    view = weak(before, generator(), AugmentConfig(jitter=0.3), flip=False)
    noise = view - before
    assert torch.equal(before, rows())
    assert noise.mean().item() == pytest.approx(0, abs=0.004)
    assert noise.std().item() == pytest.approx(0.3, abs=0.003)
    assert noise[0, 0] != noise[0, 1]
    assert noise[0, 0] != noise[1, 0]


def test_strong_views_are_weak_ones_that_lost_features() -> None:
    """With probability 0.2 each: of 100,000 features 20 % with a standard error of 0.13 %."""
    config = AugmentConfig(jitter=0.3, feature_dropout=0.2)
    mild, view = (make(rows(), generator(), config, flip=False) for make in (weak, strong))
    dropped = view == 0
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert dropped.flatten(1).sum(1).unique().numel() > 5  # each row for itself
    assert torch.equal(view, mild.masked_fill(dropped, 0))


def test_nothing_and_everything() -> None:
    off = AugmentConfig(jitter=0.0, feature_dropout=0.0)
    assert torch.equal(weak(rows(), generator(), off, False), rows())
    assert torch.equal(strong(rows(), generator(), off, False), rows())
    assert not strong(rows(), generator(), AugmentConfig(feature_dropout=1.0), False).any()
    for make in (weak, strong):
        assert make(rows(0), generator(), AugmentConfig(), False).shape == (0, FEATURES, 1, 1)


def test_views_are_a_function_of_the_generator() -> None:
    for make in (weak, strong):
        first, again, other = (make(rows(50), generator(seed), AugmentConfig(), False) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_rows_are_not_divided_by_255_and_pixels_are() -> None:
    one = torch.full((1, 1, 1), 2.0)
    transform = ImageTransform(0 * one, one, AugmentConfig(), allow_flip=False)
    assert torch.equal(transform.normalize(rows()), rows() / 2)
    assert transform.normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item() == 0.5
    assert torch.equal(transform.views(rows(), ("clean",), generator())["clean"], rows() / 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": 2}, r"`augment.crop_padding` \(=2\) is for images, not for tables"),
        ({"flip": True}, r"`augment.flip` \(=True\) is for images, not for tables"),
        ({"cutout": 0.5}, r"`augment.cutout` \(=0.5\) is for images, not for tables"),
    ],
)
def test_what_only_images_can_have_is_refused(fields: dict, message: str) -> None:
    config = AugmentConfig(**fields)
    for make in (weak, strong):
        with pytest.raises(ValueError, match=message):
            make(rows(2), generator(), config, flip=False)


def test_what_is_off_is_not_refused() -> None:
    config = AugmentConfig(crop_padding=0, flip=False, cutout=0.0, num_ops=3, magnitude=30)
    assert torch.equal(
        strong(rows(), generator(), config, flip=False), strong(rows(), generator(), AugmentConfig(), flip=False)
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("jitter", -0.1, r"`augment.jitter` \(=-0.1\) must be a finite number of at least 0"),
        ("jitter", float("inf"), r"`augment.jitter` \(=inf\)"),
        ("jitter", float("nan"), r"`augment.jitter` \(=nan\)"),
        ("feature_dropout", 1.1, r"`augment.feature_dropout` \(=1.1\) must lie in \[0, 1\]"),
        ("feature_dropout", float("nan"), r"`augment.feature_dropout` \(=nan\)"),
    ],
)
def test_configuration_errors(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value})
