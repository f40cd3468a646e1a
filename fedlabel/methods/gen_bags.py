"""GenBags: bags combined with Gaussian weights (Saket et al., "On Combining Bags to Better Learn from Label
Proportions", AISTATS 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.methods.bags import bag_recipe, bag_sums, known_bags, of_bags
from fedlabel.methods.batch import Batch
from fedlabel.methods.recipe import Method, Recipe, Task

BLOCK = 4
"""Bags that are combined."""
OWN, SHARED = 1.331, -0.33
"""The weights' covariance is OWN on the diagonal plus SHARED everywhere: eigenvalues .011, 1.331, 1.331, 1.331."""


def expected_square(errors: Tensor) -> Tensor:
    """Returns E (sum of w_b d_b)^2 over the Gaussian weights w, d' (OWN I + SHARED 1 1') d: (...) of (..., bags).

    d = (.8, -.5, .2, .1) gives 1.13234. The paper draws 60 weights; this is what their mean tends to.
    """
    return OWN * errors.square().sum(-1) + SHARED * errors.sum(-1).square()


def combined_bag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns the expected square of each block of bags, divided among them, see `BagLoss`."""
    part = batch.labeled
    sums, sizes = bag_sums(logits.softmax(-1), part.members)
    errors = (sums - part.bag_counts) / sizes.clamp_min(1)[:, None]
    errors = torch.where(known_bags(part)[:, None], errors, torch.zeros_like(errors))
    bags, has_counts = len(errors), known_bags(part).to(errors.dtype)
    blocks = -(-bags // BLOCK)
    filled = torch.cat([errors, errors.new_zeros(blocks * BLOCK - bags, errors.shape[1])])
    by_class = filled.view(blocks, BLOCK, errors.shape[1]).transpose(1, 2)
    per_block = expected_square(by_class).mean(-1)
    padded = torch.cat([has_counts, has_counts.new_zeros(blocks * BLOCK - bags)])
    in_block = padded.view(blocks, BLOCK).sum(1).clamp_min(1)
    return (per_block / in_block).repeat_interleave(BLOCK)[:bags]


@dataclass(frozen=True)
class GenBags(Method):
    """The squared error of combined bags, in shares of a bag: d is (sum of p - count) / size. Every step draws at least
    four bags.
    """

    name: str = "gen_bags"
    description: ClassVar[str] = "bags: squared error of random combinations of four"

    def recipe(self, task: Task) -> Recipe:
        return bag_recipe(of_bags(combined_bag_loss), least=BLOCK)
