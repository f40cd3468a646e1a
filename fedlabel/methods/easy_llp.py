"""EasyLLP: an unbiased estimate of the loss on the labels, from bags drawn at random (Busa-Fekete et al., "Easy
Learning from Label Proportions", NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.methods.bags import bag_recipe, by_bag, of_bags, shares
from fedlabel.methods.batch import Batch, Prepared, State, Survey
from fedlabel.methods.recipe import Memory, Method, Recipe, Task


def easy_weights(share: Tensor, size: Tensor, prior: Tensor) -> Tensor:
    """Returns k (share - prior) + prior, (bags, classes): the weight of the loss of each class for every sample of a
    bag.

    Its expectation given a sample's label y, over bags whose other samples are drawn from the prior, is 1 for y and 0
    for the others. Of two classes with share .25, k = 4, prior .3: (.9, .1).

    Args:
        share: (bags, classes).
        size: (bags,) float.
        prior: (classes,).
    """
    return size[:, None] * (share - prior) + prior


def easy_bag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns the weighted losses summed over classes, in the mean over each bag's samples, see `BagLoss`."""
    rows, there = by_bag(-logits.log_softmax(-1), batch.labeled.members)
    size = there.sum(1).to(logits.dtype)
    weights = easy_weights(shares(batch.labeled), size, batch.memory["prior"].to(logits.dtype))
    return (rows.sum(1) * weights).sum(-1) / size.clamp_min(1)


def with_prior(survey: Survey) -> Prepared:
    """Stores the client's class shares, over all its bags and labels, in the memory."""
    supervision = survey.supervision
    labels = supervision.candidates[supervision.labeled & ~supervision.noisy & (supervision.bag < 0)]
    counts = supervision.bag_counts.sum(0) + labels.sum(0)
    return Prepared({}, memory={**survey.memory, "prior": counts / counts.sum().clamp_min(1)})


def even_prior(candidates: Tensor) -> State:
    """Returns the memory of a client that never trained, see `Memory.start`."""
    classes = candidates.shape[1]
    return {"prior": torch.full((classes,), 1 / classes, device=candidates.device)}


@dataclass(frozen=True)
class EasyLLP(Method):
    """The prior is that of the client's bags, since its samples are drawn from its own class mix."""

    name: str = "easy_llp"
    description: ClassVar[str] = "bags: unbiased estimate of the loss on the labels"

    def recipe(self, task: Task) -> Recipe:
        return replace(bag_recipe(of_bags(easy_bag_loss), prepare=with_prior), memory=Memory(start=even_prior))
