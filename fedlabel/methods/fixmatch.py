"""FixMatch: the weak view's confident prediction is the strong view's label.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020
(arXiv 2001.07685), equations (3) and (4). With `mask.kind` flexmatch, freematch or cbafed it is the same loop under
those methods' thresholds. Setting: labels at the clients, or wherever they are.

What differs: the batch is drawn on one client; the mean runs over all its unlabelled samples, as in the paper.
`training.unlabeled_ratio` is the paper's mu, `training.unlabeled_includes_labeled` its authors' advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlabel.methods.base import Phase
from fedlabel.methods.masks import MaskedMethod
from fedlabel.methods.steps import Batch, Model, Step, labeled_and, pseudo_cross_entropy, semi_supervised_step


@dataclass(frozen=True)
class FixMatch(MaskedMethod):
    """Hyper-parameters of FixMatch."""

    name: str = "fixmatch"
    confidence_threshold: float = 0.95
    """tau: a pseudo-label is used if the largest probability reaches it."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""

    description: ClassVar[str] = "weak view labels the strong view (Sohn et al., 2020); mask.kind=flexmatch|cbafed too"

    def __post_init__(self) -> None:
        self.check_mask()
        if not 0 <= self.lambda_u < float("inf"):
            raise ValueError(f"`method.lambda_u` (={self.lambda_u}) must be a finite number of at least 0.")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        return (self.masked_phase(self.loss, ("weak", "strong")),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns CE(labels, weak) + lambda_u * mean(keep * CE(pseudo-label of the weak view, strong view))."""
        with torch.no_grad():
            weak_logits = student(batch.unlabeled.views["weak"])
        chosen = self.mask.select(weak_logits, self.confidence_threshold, batch.memory)
        supervised, strong_logits = labeled_and(student, batch, "strong")
        unsupervised = pseudo_cross_entropy(strong_logits.log_softmax(-1), chosen.label, chosen.keep)
        return semi_supervised_step(
            supervised, unsupervised, self.lambda_u, chosen.keep, chosen.pseudo_labels(False), chosen.memory
        )
