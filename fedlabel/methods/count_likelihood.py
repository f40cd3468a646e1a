"""The exact likelihood of a bag's counts (Shukla et al., "A Unified Approach to Count-Based Weakly Supervised
Learning", NeurIPS 2023). With several classes, one-vs-rest, as in GLWS (arXiv 2402.01922).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.inference.cardinality import count_log_likelihood
from fedlabel.methods.bags import bag_recipe, by_bag, of_bags
from fedlabel.methods.batch import Batch
from fedlabel.methods.recipe import Method, Recipe, Task


def one_against_rest(logits: Tensor) -> Tensor:
    """Returns log p(class) / p(other classes), (..., classes), of logits (..., classes), at least two classes."""
    others = []
    for c in range(logits.shape[-1]):
        others.append(torch.cat([logits[..., :c], logits[..., c + 1 :]], -1).logsumexp(-1))
    return logits - torch.stack(others, -1)


def count_bag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns -log p(count) of every bag and, with more than two classes, in the mean over them, see `BagLoss`."""
    odds, there = by_bag(one_against_rest(logits), batch.labeled.members)
    classes = range(1, 2) if logits.shape[-1] == 2 else range(logits.shape[-1])
    absent = torch.full_like(odds[..., 0], -math.inf)
    losses = [
        -count_log_likelihood(torch.where(there, odds[..., c], absent), batch.labeled.bag_counts[:, c]) for c in classes
    ]
    return torch.stack(losses).mean(0)


@dataclass(frozen=True)
class CountLikelihood(Method):
    """-log p(count), per bag and, with more than two classes, in the mean over them."""

    name: str = "count_likelihood"
    description: ClassVar[str] = "bags: exact likelihood of their counts"

    def recipe(self, task: Task) -> Recipe:
        return bag_recipe(of_bags(count_bag_loss))
