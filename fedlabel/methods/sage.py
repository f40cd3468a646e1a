"""SAGE: mixes local and global pseudo-labels by the gap between their confidences.

Source: Liu et al., "Mind the Gap: Confidence Discrepancy Can Guide Federated Semi-Supervised Learning Across
Pseudo-Mismatch", CVPR 2025, and its released code. Setting: labels at the clients. FedLabel's closest relative: a
soft mixture where FedLabel chooses.

What differs: the decay kappa is ln 2 / .05 as in the released code (whose command-line value .5 is unused).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedlabel.checks import finite, in_unit_interval
from fedlabel.methods.batch import Batch, Model, PseudoLabels, Step
from fedlabel.methods.losses import labeled_and, one_hot, semi_supervised_step
from fedlabel.methods.recipe import BySample, LabelKinds, Method, Phase, Recipe, Stage, Task


class Mixture(NamedTuple):
    """Targets from two models' pseudo-labels; all detached."""

    target: Tensor
    """(n, classes) float, rows are probabilities."""
    keep: Tensor
    """(n,) bool, one of the two models passes the threshold."""
    local_share: Tensor
    """(n,) float in [0, 1], the share of the local model's label."""


def mix(local_probs: Tensor, global_probs: Tensor, threshold: float, kappa: float) -> Mixture:
    """Mixes the one-hot labels of a local and a global model.

    Args:
        local_probs: (n, classes) probabilities of the local model.
        global_probs: (n, classes) probabilities of the global model.
        threshold: a model passes where its largest probability reaches it.
        kappa: the local label's share is exp(-kappa * |difference of the largest probabilities|), and 0 where the local
            model does not pass.
    """
    classes = local_probs.shape[-1]
    local_max, local_label = local_probs.detach().max(-1)
    global_max, global_label = global_probs.detach().max(-1)
    passes = local_max >= threshold
    share = torch.where(passes, (-kappa * (local_max - global_max).abs()).exp(), torch.zeros_like(local_max))
    local_hot = one_hot(local_label, classes)
    global_hot = one_hot(global_label, classes)
    target = share[:, None] * local_hot + (1 - share)[:, None] * global_hot
    return Mixture(target, passes | (global_max >= threshold), share)


@dataclass(frozen=True)
class SAGE(Method):
    """Hyper-parameters of SAGE."""

    name: str = "sage"
    confidence_threshold: float = 0.95
    """Either model's largest probability has to reach it."""
    kappa: float = math.log(2) / 0.05
    """Decay of the local share: it is halved by a confidence gap of ln 2 / kappa (.05 by default)."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""

    description: ClassVar[str] = "local and global pseudo-labels mixed by their confidence gap (Liu et al., CVPR 2025)"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        finite(self, "method", "kappa", "lambda_u")

    def recipe(self, task: Task) -> Recipe:
        phase = Phase("train", self.loss, BySample(unlabeled=("weak", "strong")), teachers=("global",))
        return Recipe((Stage((phase,)),), uses=LabelKinds.SINGLE)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns CE(labels) + lambda_u * mean(keep * KL(mixture || strong view))."""
        weak = batch.unlabeled.views["weak"]
        with torch.no_grad():
            local_probs = student(weak).softmax(-1)
        global_probs = teachers["global"](weak).detach().softmax(-1)
        mixed = mix(local_probs, global_probs, self.confidence_threshold, self.kappa)
        supervised, strong_logits = labeled_and(student, batch, "strong")
        divergence = (
            torch.special.xlogy(mixed.target, mixed.target) - mixed.target * strong_logits.log_softmax(-1)
        ).sum(-1)
        unsupervised = torch.where(mixed.keep, divergence, torch.zeros_like(divergence))
        from_global = mixed.local_share < 0.5
        expert = torch.where(from_global[:, None], global_probs, local_probs)
        pseudo = PseudoLabels(mixed.target.argmax(-1), mixed.keep, from_global, expert.max(-1).values)
        return semi_supervised_step(supervised, unsupervised, self.lambda_u, mixed.keep, pseudo)
