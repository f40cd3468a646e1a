"""EasyLLP: an unbiased estimate of the loss on the labels, from bags drawn at random (Busa-Fekete et al., "Easy
Learning from Label Proportions", NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.methods.bags import BagMethod, by_bag, shares
from fedlabel.methods.base import Phase, Prepared, Survey
from fedlabel.methods.steps import Batch


def easy_weights(share: Tensor, size: Tensor, prior: Tensor) -> Tensor:
    """Returns k (share - prior) + prior, (bags, classes): what the loss of each class weighs for every sample of a bag.

    Its expectation given a sample's label y, over bags whose other samples are drawn from the prior, is 1 for y and 0
    for the others. Of two classes with share .25, k = 4, prior .3: (.9, .1).

    Args:
        share: (bags, classes).
        size: (bags,) float.
        prior: (classes,).
    """
    return size[:, None] * (share - prior) + prior


@dataclass(frozen=True)
class EasyLLP(BagMethod):
    """The prior is that of the client's bags, since its samples are drawn from its own class mix."""

    name: str = "easy_llp"
    description: ClassVar[str] = "bags: unbiased estimate of the loss on the labels"

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        return (Phase("train", self.loss, labeled=("weak",), bags=True, prepare=self.prepare),)

    def prepare(self, survey: Survey) -> Prepared:
        """Finds the client's class shares in all its bags and its labels."""
        known = survey.supervision
        labels = known.candidates[known.labeled & ~known.noisy & (known.bag < 0)]
        counts = known.bag_counts.sum(0) + labels.sum(0)
        return Prepared({}, memory={**survey.memory, "prior": counts / counts.sum().clamp_min(1)})

    def initial_memory(self, candidates: Tensor) -> dict[str, Tensor]:
        classes = candidates.shape[1]
        return {"prior": torch.full((classes,), 1 / classes, device=candidates.device)}

    def bag_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        rows, there = by_bag(-logits.log_softmax(-1), batch.labeled.members)
        size = there.sum(1).to(logits.dtype)
        weights = easy_weights(shares(batch.labeled), size, batch.memory["prior"].to(logits.dtype))
        return (rows.sum(1) * weights).sum(-1) / size.clamp_min(1)
