"""FixMatch: the confident prediction on the weak view is the label of the strong view.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020
(arXiv 2001.07685), equations (3) and (4). With `mask.kind` flexmatch, freematch or cbafed it is the same loop under
those methods' thresholds. Setting: labels at the clients, or wherever they are.

What differs: the batch is drawn on one client; the mean runs over all its unlabelled samples, as in the paper.
`training.unlabeled_ratio` is the paper's mu, `training.unlabeled_includes_labeled` its authors' advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedlabel.checks import finite, in_unit_interval
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import labeled_and, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.masks import Mask, masked_phase, masked_recipe
from fedlabel.methods.recipe import Method, Recipe, Task


@dataclass(frozen=True)
class FixMatch(Method):
    """Hyper-parameters of FixMatch."""

    name: str = "fixmatch"
    mask: Mask = field(default_factory=Mask)
    """Thresholds per class, debiasing."""
    confidence_threshold: float = 0.95
    """tau: a pseudo-label is used if the largest probability reaches it."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""

    description: ClassVar[str] = "weak view labels the strong view (Sohn et al., 2020); mask.kind=flexmatch|cbafed too"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        finite(self, "method", "lambda_u")

    def recipe(self, task: Task) -> Recipe:
        phase = masked_phase(self.mask, self.loss, self.confidence_threshold)
        return masked_recipe(self.mask, task.num_classes, (phase,))

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
