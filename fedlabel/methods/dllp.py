"""DLLP: the mean prediction of a bag against its class shares (Ardehaly & Culotta, ICDM Workshops 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlabel.methods.bags import BagMethod, log_bag_means, shares
from fedlabel.methods.steps import Batch


def dllp_loss(log_mean: Tensor, share: Tensor) -> Tensor:
    """Returns -sum over classes of share * log of the mean prediction, (bags,); both (bags, classes).

    p = (.9, .6, .2, .1) with share .25: mean .45, loss .6480047.
    """
    return -(share * log_mean).sum(-1)


@dataclass(frozen=True)
class DLLP(BagMethod):
    """The cross-entropy of a bag's class shares to the mean of its samples' predicted probabilities."""

    name: str = "dllp"
    description: ClassVar[str] = "bags: mean prediction against class shares"

    def bag_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return dllp_loss(log_bag_means(logits.log_softmax(-1), batch.labeled.members), shares(batch.labeled))
