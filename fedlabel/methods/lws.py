"""LWS: raises the probability of candidates and lowers that of other classes, with a leverage between the two.

Source: Wen, Cui, Hang, Liu, Wang, Lin, "Leveraged Weighted Loss for Partial Label Learning", ICML 2021 (arXiv
2106.05731), with its cross-entropy form. Setting: candidate sets that hold the truth, at the clients.

The loss of a sample is sum_{z in S} w_z (-log p_z) + beta sum_{z not in S} w_z (-log(1 - p_z)), where w is p normalised
over S, and over the complement of S.

What differs, and why:
- w is of the same forward pass as the loss, detached. The paper has w of the epoch before: for a client that trains
  once in many rounds that would be a model long gone.
- The paper's other form, with sigmoid losses of the scores, is left out.
- Noisy sets are taken for sets that hold the truth, as the paper knows no others; a set of all classes says nothing and
  is left out, and annotators' labels are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import finite
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.cc import candidate_posterior, candidate_step, candidates_recipe
from fedlabel.methods.recipe import Method, Recipe, Task


def log_complement(log_probs: Tensor) -> Tensor:
    """Returns log(1 - p) of each class, (n, classes), from (n, classes) log p.

    It is summed up from the other classes: the difference 1 - p would drown the gradient in rounding where p is near 1.
    """
    itself = torch.eye(log_probs.shape[-1], dtype=torch.bool, device=log_probs.device)
    return torch.where(itself, -torch.inf, log_probs[:, None]).logsumexp(-1)


def leveraged_loss(logits: Tensor, candidates: Tensor, beta: float) -> Tensor:
    """Returns the loss of each sample, (n,).

    Args:
        logits: (n, classes), with gradient.
        candidates: S (n, classes) bool, at least one True in a row; where all are, the second sum is 0.
        beta: the leverage.
    """
    outside = ~candidates
    inner = candidate_posterior(logits, candidates)
    # With nothing outside, all classes stand in for an empty set, and their weights are then set to 0.
    outer = candidate_posterior(logits, outside | candidates.all(-1, keepdim=True)) * outside
    log_probs = logits.log_softmax(-1)
    return -(inner * log_probs).sum(-1) - beta * (outer * log_complement(log_probs)).sum(-1)


@dataclass(frozen=True)
class LWS(Method):
    """Hyper-parameters of LWS."""

    name: str = "lws"
    beta: float = 2.0
    """The leverage: weight of the classes outside the set (1 or 2 in the paper)."""

    description: ClassVar[str] = "candidate sets: leveraged weighted loss (Wen et al., ICML 2021)"

    def __post_init__(self) -> None:
        finite(self, "method", "beta")

    def recipe(self, task: Task) -> Recipe:
        return candidates_recipe(self.loss)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean leveraged weighted loss."""
        candidates = batch.labeled.candidates
        logits = student(batch.labeled.views["weak"])
        values = leveraged_loss(logits, candidates, self.beta)
        return candidate_step(values, candidate_posterior(logits, candidates), candidates)
