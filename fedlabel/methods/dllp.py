"""DLLP: the mean prediction of a bag against its class shares (Ardehaly & Culotta, ICDM Workshops 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlabel.methods.bags import bag_recipe, log_bag_means, of_bags, shares
from fedlabel.methods.batch import Batch
from fedlabel.methods.recipe import Method, Recipe, Task


def dllp_loss(log_mean: Tensor, share: Tensor) -> Tensor:
    """Returns -sum over classes of share * log of the mean prediction, (bags,); both (bags, classes).

    p = (.9, .6, .2, .1) with share .25: mean .45, loss .6480047.
    """
    return -(share * log_mean).sum(-1)


def dllp_bag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns `dllp_loss` of every bag, see `BagLoss`."""
    return dllp_loss(log_bag_means(logits.log_softmax(-1), batch.labeled.members), shares(batch.labeled))


@dataclass(frozen=True)
class DLLP(Method):
    """The cross-entropy of a bag's class shares to the mean of its samples' predicted probabilities."""

    name: str = "dllp"
    description: ClassVar[str] = "bags: mean prediction against class shares"

    def recipe(self, task: Task) -> Recipe:
        return bag_recipe(of_bags(dllp_bag_loss))
