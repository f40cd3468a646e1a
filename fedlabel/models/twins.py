"""Networks of one architecture that are trained side by side and evaluated together (Co-teaching)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Twins(nn.Module):
    """Returns every network's logits in training, and the log of their mean probability in evaluation.

    Args:
        models: the networks, at least two, of the same number of classes; nothing is shared between them.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(models) < 2:
            raise ValueError(f"`models` ({len(models)} of them) must be at least two networks; use one as it is.")
        self.networks = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, networks, classes) in training mode, (batch, classes) in evaluation mode.

        Args:
            images: (batch, channels, height, width).
        """
        logits = torch.stack([network(images) for network in self.networks], 1)
        if self.training:
            return logits
        return logits.log_softmax(-1).logsumexp(1) - math.log(len(self.networks))
