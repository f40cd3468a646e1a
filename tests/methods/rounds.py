"""Views without chance, so that a round can be written out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlabel.data.augment import AugmentConfig, Numbers
from fedlabel.learning.views import ImageTransform


class _Flipped(ImageTransform):
    def views_with(self, images: Tensor, numbers: Mapping[str, Numbers]) -> dict[str, Tensor]:
        return {name: self.normalize(images.flip(-1) if name == "strong" else images) for name in numbers}


TRANSFORM: ImageTransform = _Flipped(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(), allow_flip=False)
"""Clean and weak views are the image / 255, strong ones are mirrored."""
