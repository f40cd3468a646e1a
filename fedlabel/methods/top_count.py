"""Top-count pseudo-labels: in every bag the samples that the model finds likeliest get the label, as many as counted:
the optimal transport of a bag's samples to its labels (Liu et al., "Two-stage Training for Learning from Label
Proportions", IJCAI 2021; OT-LLP in LLP-Bench, arXiv 2310.10096). For two classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlabel.methods.bags import bag_recipe, by_bag, of_bags
from fedlabel.methods.batch import Batch
from fedlabel.methods.recipe import Method, Recipe, Task


def top_counts(scores: Tensor, there: Tensor, counts: Tensor) -> Tensor:
    """Returns (bags, k) bool, the counts[b] highest of each bag's scores; ties go to the first.

    Args:
        scores: (bags, k).
        there: (bags, k) bool, whom to choose from.
        counts: (bags,) integers.
    """
    order = scores.masked_fill(~there, -float("inf")).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) < counts[:, None]) & there


def top_count_bag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy of each bag's samples to their top-count labels, see `BagLoss`."""
    part = batch.labeled
    rows, there = by_bag(logits.log_softmax(-1), part.members)
    odds, _ = by_bag((logits[:, 1] - logits[:, 0]).detach(), part.members)
    chosen = top_counts(odds, there, part.bag_counts[:, 1])
    picked = rows[..., 1].masked_fill(~chosen, 0) + rows[..., 0].masked_fill(chosen, 0)
    return -picked.sum(1) / there.sum(1).clamp_min(1)


@dataclass(frozen=True)
class TopCount(Method):
    """Cross-entropy on top-count pseudo-labels of the batch; the mean over a bag's samples, then over bags."""

    name: str = "top_count"
    description: ClassVar[str] = "bags: the likeliest samples get the labels (OT-LLP); two classes"

    def recipe(self, task: Task) -> Recipe:
        if task.num_classes != 2:
            raise ValueError(
                f"`method.name` (=top_count) is for two classes, and there are {task.num_classes}: take "
                "method.name=dllp, or data.positive_classes."
            )
        return bag_recipe(of_bags(top_count_bag_loss))
