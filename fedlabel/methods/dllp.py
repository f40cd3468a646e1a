"""DLLP: the mean prediction of a bag against its class shares (Ardehaly & Culotta, ICDM Workshops 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlabel.methods.bags import BagMethod, bag_means, shares
from fedlabel.methods.base import Batch

SMALLEST = 1e-7
"""Mean predictions are not taken for smaller than this in a logarithm."""


def dllp_loss(predicted: Tensor, share: Tensor) -> Tensor:
    """Returns -sum over classes of share log predicted, (bags,); both (bags, classes).

    p = (.9, .6, .2, .1) with share .25: mean .45, loss .6480047.
    """
    return -(share * predicted.clamp_min(SMALLEST).log()).sum(-1)


@dataclass(frozen=True)
class DLLP(BagMethod):
    """The cross-entropy of a bag's class shares to the mean of its samples' predicted probabilities."""

    name: str = "dllp"
    description: ClassVar[str] = "bags: mean prediction against class shares"

    def bag_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return dllp_loss(bag_means(logits.softmax(-1), batch.labeled.members), shares(batch.labeled))
