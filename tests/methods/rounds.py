"""Views without chance, so that a round can be written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlabel.data.augment import AugmentConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.seeding import Draws


class _Flipped(ImageTransform):
    def views(self, images: Tensor, names: tuple[str, ...], draws: Draws) -> dict[str, Tensor]:
        return {name: self.normalize(images.flip(-1) if name == "strong" else images) for name in names}


TRANSFORM: ImageTransform = _Flipped(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(), allow_flip=False)
"""Clean and weak views are the image / 255, strong ones are mirrored."""
