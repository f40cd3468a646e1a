"""LLP-VAT: class shares of bags and virtual adversarial training (Tsai & Lin, "Learning from Label Proportions with
Consistency Regularization", ACML 2020; Miyato et al., "Virtual Adversarial Training", TPAMI 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import finite, positive
from fedlabel.methods.bags import bag_recipe, bag_step
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.dllp import dllp_bag_loss
from fedlabel.methods.losses import batch_mean, mean_metric
from fedlabel.methods.recipe import Method, Recipe, Task
from fedlabel.models.wrap import one_network


def unit(vectors: Tensor) -> Tensor:
    """Returns the samples (n, ...) scaled to Euclidean length 1."""
    length = vectors.flatten(1).norm(dim=1).clamp_min(1e-12)
    return vectors / length.view(-1, *[1] * (vectors.dim() - 1))


def divergence(log_target: Tensor, log_probs: Tensor) -> Tensor:
    """Returns KL(target || probs) of each row, (n,); both (n, classes) logarithms."""
    return (log_target.exp() * (log_target - log_probs)).sum(-1)


@dataclass(frozen=True)
class LLPVAT(Method):
    """DLLP's loss plus the divergence between the predictions of a sample and of its adversarial perturbation."""

    name: str = "llp_vat"
    description: ClassVar[str] = "bags: mean prediction against class shares, and virtual adversarial training"

    lambda_vat: float = 0.05
    """Weight of the divergence."""
    radius: float = 1.0
    """Euclidean length of the perturbation, of normalised inputs."""
    xi: float = 1e-2
    """Length of the probe in the single power iteration that finds the adversarial direction."""

    def __post_init__(self) -> None:
        finite(self, "method", "lambda_vat")
        positive(self, "method", "radius", "xi")

    def recipe(self, task: Task) -> Recipe:
        network = replace(one_network, input_gradients=self.lambda_vat > 0)
        return replace(bag_recipe(self.loss), network=network)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean loss over bags plus the weighted divergence of the batch's samples."""
        inputs = batch.labeled.views["weak"]
        logits = student(inputs)
        step = bag_step(dllp_bag_loss(logits, batch), logits, batch.labeled)
        if self.lambda_vat == 0:
            return step
        target = logits.detach().log_softmax(-1)
        # Any fixed start does that is not orthogonal to the worst direction; the input's own needs no random numbers.
        start = unit(inputs + torch.linspace(-1, 1, inputs[:1].numel(), device=inputs.device).view_as(inputs[:1]))

        def moved(direction: Tensor) -> Tensor:
            return divergence(target, student(inputs + self.xi * direction).log_softmax(-1)).sum()

        worst = unit(torch.func.grad(moved)(start)).detach() if len(inputs) else start
        values = divergence(target, student(inputs + self.radius * worst).log_softmax(-1))
        metrics = {**step.metrics, "train/loss_vat": mean_metric(values, torch.ones_like(values))}
        return step._replace(loss=step.loss + self.lambda_vat * batch_mean(values), metrics=metrics)
