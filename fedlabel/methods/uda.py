"""UDA: the prediction on the strong view is trained to match the sharpened prediction on the weak view.

Source: Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020 (arXiv 1904.12848):
consistency with sharpening and confidence masking, training-signal annealing. Setting: labels at the clients, or
wherever they are.

What differs: training-signal annealing runs over `tsa_rounds` communication rounds instead of over steps; it is off by
default, as one client's few labels are soon learnt by heart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import finite, in_unit_interval, one_of, positive
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import labeled_step, semi_supervised_step
from fedlabel.methods.masks import Mask, masked_phase, masked_recipe
from fedlabel.methods.recipe import Method, Phase, Recipe, Task

TSA = ("none", "linear", "log", "exp")


def tsa_threshold(schedule: str, progress: float, num_classes: int) -> float:
    """Returns eta_t = alpha_t * (1 - 1/C) + 1/C: labelled samples with a higher confidence are dropped.

    Args:
        schedule: "linear": alpha_t = t; "log": 1 - exp(-5 t); "exp": exp(5 (t - 1)).
        progress: t in [0, 1].
        num_classes: C.
    """
    alpha = {"linear": progress, "log": 1 - math.exp(-5 * progress), "exp": math.exp(5 * (progress - 1))}[schedule]
    return alpha * (1 - 1 / num_classes) + 1 / num_classes


def soft_target_divergence(target_logits: Tensor, temperature: float, log_probs: Tensor) -> Tensor:
    """Returns KL(softmax(target_logits / T) || p) per row, (n,); both arguments are (n, classes)."""
    target = (target_logits / temperature).log_softmax(-1)
    return (target.exp() * (target - log_probs)).sum(-1)


@dataclass(frozen=True)
class UDA(Method):
    """Hyper-parameters of UDA."""

    name: str = "uda"
    mask: Mask = field(default_factory=Mask)
    """Thresholds per class, debiasing."""
    confidence_threshold: float = 0.8
    """A sample is used if the weak view's largest probability, before sharpening, reaches it."""
    temperature: float = 0.4
    """T: the target is softmax(logits / T)."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""
    tsa: str = "none"
    """none | linear | log | exp: training-signal annealing."""
    tsa_rounds: int = 0
    """Rounds over which the annealing runs; needed unless tsa is none."""

    description: ClassVar[str] = "strong view pulled to the sharpened weak view (Xie et al., 2020)"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        positive(self, "method", "temperature")
        finite(self, "method", "lambda_u")
        one_of(self, "method", tsa=TSA)
        if (self.tsa == "none") != (self.tsa_rounds == 0) or self.tsa_rounds < 0:
            raise ValueError(
                f"`method.tsa_rounds` (={self.tsa_rounds}) must be above 0 if and only if `method.tsa` (={self.tsa}) "
                "is not none."
            )

    def recipe(self, task: Task) -> Recipe:
        return masked_recipe(self.mask, task.num_classes, self.phases)

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the phase of a round (1-based), with its annealed threshold."""
        progress = min(1.0, round_number / self.tsa_rounds) if self.tsa_rounds else 1.0
        return (masked_phase(self.mask, partial(self.loss, progress=progress), self.confidence_threshold),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, progress: float = 1.0) -> Step:
        """Returns CE(labels) + lambda_u * mean(keep * KL(sharpened weak view || strong view))."""
        with torch.no_grad():
            weak_logits = student(batch.unlabeled.views["weak"])
        chosen = self.mask.select(weak_logits, self.confidence_threshold, batch.memory)
        labeled, strong = batch.labeled.views["weak"], batch.unlabeled.views["strong"]
        labeled_logits, strong_logits = student(torch.cat([labeled, strong])).split([len(labeled), len(strong)])
        supervised = labeled_step(labeled_logits, self._annealed(labeled_logits, batch.labeled.candidates, progress))
        divergence = soft_target_divergence(chosen.logits, self.temperature, strong_logits.log_softmax(-1))
        unsupervised = torch.where(chosen.keep, divergence, torch.zeros_like(divergence))
        return semi_supervised_step(
            supervised, unsupervised, self.lambda_u, chosen.keep, chosen.pseudo_labels(False), chosen.memory
        )

    def _annealed(self, logits: Tensor, candidates: Tensor, progress: float) -> Tensor:
        """Returns the candidates, set to all True (no label) if the model is already confident of the label."""
        if self.tsa == "none":
            return candidates
        sure = (logits.detach().softmax(-1) * candidates).sum(-1)
        return candidates | (sure > tsa_threshold(self.tsa, progress, logits.shape[-1]))[:, None]
