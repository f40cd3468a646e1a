"""FreeMatch: FixMatch with thresholds that adapt to the model's confidence, and a term for fair predictions.

Source: Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023 (arXiv
2205.07246): self-adaptive thresholding (in `masks.py`) and self-adaptive fairness. Setting: labels at the clients, or
wherever they are.

What differs: the moving averages are the federation's (see `masks.py`). With a few steps per round, .999 moves them
little in a hundred rounds; lower `mask.ema` for short runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import finite
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import labeled_and, mean_metric, one_hot, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.masks import Mask, masked_phase, masked_recipe
from fedlabel.methods.recipe import Method, Recipe, Task


def fairness(strong_probs: Tensor, keep: Tensor, class_mean: Tensor, class_share: Tensor) -> Tensor:
    """Returns -H(SumNorm(p / h), SumNorm(p_batch / h_batch)), the self-adaptive fairness term.

    Args:
        strong_probs: (n, classes) of the student on strong views, with gradient.
        keep: (n,) bool; p_batch and h_batch are taken over the kept samples.
        class_mean: p (classes,), the moving average of predicted probabilities.
        class_share: h (classes,), the moving average of predicted classes' shares.

    Returns:
        () float; exactly 0 if nothing is kept. A class of share 0 has ratio 0, in both ratios (so the released code).
    """
    classes = strong_probs.shape[-1]
    kept = keep.sum()
    weight = keep.to(strong_probs.dtype)[:, None]
    mean = (strong_probs * weight).sum(0) / kept.clamp_min(1)
    hot = one_hot(strong_probs.argmax(-1), classes)
    share = (hot * weight).sum(0) / kept.clamp_min(1)
    target = _ratio(class_mean, class_share)
    ratio = _ratio(mean, share)
    target = target / target.sum()
    ratio = ratio / ratio.sum().clamp_min(1e-12)
    value = (target * (ratio + 1e-12).log()).sum()
    return torch.where(kept > 0, value, torch.zeros_like(value))


def _ratio(mean: Tensor, share: Tensor) -> Tensor:
    """Returns mean / share, (classes,); 0 where the share is 0."""
    present = share > 0
    return torch.where(present, mean / torch.where(present, share, torch.ones_like(share)), torch.zeros_like(mean))


@dataclass(frozen=True)
class FreeMatch(Method):
    """Hyper-parameters of FreeMatch."""

    name: str = "freematch"
    mask: Mask = field(default_factory=lambda: Mask(kind="freematch"))
    """mask.kind must stay freematch; mask.ema, mask.debias may change."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""
    lambda_f: float = 0.05
    """Weight of the fairness term."""

    description: ClassVar[str] = "FixMatch with self-adaptive thresholds and fairness (Wang et al., 2023)"

    def __post_init__(self) -> None:
        finite(self, "method", "lambda_u", "lambda_f")
        if self.mask.kind != "freematch":
            raise ValueError(
                f"`method.mask.kind` (={self.mask.kind}) must be freematch for method freematch; for other thresholds "
                "take method.name=fixmatch."
            )

    def recipe(self, task: Task) -> Recipe:
        return masked_recipe(self.mask, task.num_classes, (masked_phase(self.mask, self.loss),))

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns CE(labels) + lambda_u * mean(keep * CE(pseudo-label, strong)) + lambda_f * fairness."""
        with torch.no_grad():
            weak_logits = student(batch.unlabeled.views["weak"])
        chosen = self.mask.select(weak_logits, 0.0, batch.memory)
        supervised, strong_logits = labeled_and(student, batch, "strong")
        unsupervised = pseudo_cross_entropy(strong_logits.log_softmax(-1), chosen.label, chosen.keep)
        step = semi_supervised_step(
            supervised, unsupervised, self.lambda_u, chosen.keep, chosen.pseudo_labels(False), chosen.memory
        )
        memory = chosen.memory
        fair = fairness(strong_logits.softmax(-1), chosen.keep, memory["class_mean"], memory["class_share"])
        loss = step.loss + self.lambda_f * fair
        metrics = {
            **step.metrics,
            "train/loss": torch.stack([loss, torch.ones_like(loss)]).detach(),
            "train/loss_fairness": mean_metric(fair[None], torch.ones_like(chosen.keep.any())[None]),
            "pseudo/threshold": mean_metric(memory["threshold"][None], torch.ones_like(chosen.keep.any())[None]),
        }
        return step._replace(loss=loss, metrics=metrics)
