"""Views of a batch."""

from __future__ import annotations

import torch

from fedlabel.data.augment import AugmentConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.seeding import Draws


def test_weak_views_can_be_strong_ones() -> None:
    images = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def view(name: str, weak_as_strong: bool) -> torch.Tensor:
        config = AugmentConfig(num_ops=2, cutout=0.5, weak_as_strong=weak_as_strong)
        transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), config, False)
        return transform.views(images, (name,), Draws(torch.Generator().manual_seed(1)))[name]

    assert torch.equal(view("weak", True), view("strong", False))
    assert not torch.equal(view("weak", False), view("strong", False))
    assert torch.equal(view("clean", True), view("clean", False))


def test_pixels_are_normalised_per_channel_and_cells_of_tables_are_no_pixels() -> None:
    """(255 / 255 - .5) / .25 = 2 and (51 / 255 - 0) / .1 = 2; of a table (255 - .5) / .25 = 1018."""
    mean, std = torch.tensor([0.5, 0.0]).view(2, 1, 1), torch.tensor([0.25, 0.1]).view(2, 1, 1)
    transform = ImageTransform(mean, std, AugmentConfig(), False)
    pixels = torch.tensor([255, 51], dtype=torch.uint8).view(1, 2, 1, 1)
    torch.testing.assert_close(transform.normalize(pixels).flatten(), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(transform.normalize(pixels.float()).flatten(), torch.tensor([1018.0, 510.0]))


def test_two_strong_views_are_drawn_apart() -> None:
    images = torch.randint(256, (4, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(num_ops=2, cutout=0.5), False)
    views = transform.views(images, ("strong", "strong2"), Draws(torch.Generator().manual_seed(1)))
    assert list(views) == ["strong", "strong2"]
    assert not torch.equal(views["strong"], views["strong2"])
    assert transform.views(images, (), Draws(torch.Generator())) == {}
