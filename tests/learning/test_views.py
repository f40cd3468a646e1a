"""Views of a batch."""

from __future__ import annotations

import torch

from fedlabel.data.augment import AugmentConfig
from fedlabel.learning.views import ImageTransform


def test_weak_views_can_be_strong_ones() -> None:
    images = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def view(name: str, weak_as_strong: bool) -> torch.Tensor:
        config = AugmentConfig(num_ops=2, cutout=0.5, weak_as_strong=weak_as_strong)
        transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), config, False)
        return transform.views(images, (name,), torch.Generator().manual_seed(1))[name]

    assert torch.equal(view("weak", True), view("strong", False))
    assert not torch.equal(view("weak", False), view("strong", False))
    assert torch.equal(view("clean", True), view("clean", False))
