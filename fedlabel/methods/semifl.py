"""SemiFL: the received global model labels a client's data once a round; sure samples are trained on, and mixed.

Source: Diao, Ding, Tarokh, "SemiFL: Semi-Supervised Federated Learning for Unlabeled Clients with Alternate Training",
NeurIPS 2022 (arXiv 2106.01432), and its released code.

Its own setting is labels at the server (supervision.labels_at=server): clients train on "fix" batches, CE(pseudo-label,
strong view), and "mix" batches, mixup of a sure sample with any other; the server then fine-tunes the mean on its
labels. The released code combines them with strategy FedAvgM (server_learning_rate 1, server_momentum .5) and cuts
gradients at norm 1 (`training.max_grad_norm`).

**SemiFL adapted to labels at the clients** (what runs with labels_at=clients; not the paper's algorithm): a client
first trains on its labels from the received weights, then labels its unlabelled samples once with the *received*
model, then trains on all three losses from where the first part ended. The adaptation is ours; papers of this setting
leave SemiFL out for want of labels at the server.

What differs: the number of steps is `training`'s (`local_epochs` counts passes over the sure samples); the mix set is
drawn without repetition within a pass; BatchNorm's statistics are averaged with the weights and not gathered anew by
the server (GroupNorm has none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlabel.methods.base import Method, ModelPart, Phase, PhaseResult, Prepared, Survey
from fedlabel.methods.steps import (
    Batch,
    Model,
    PseudoLabels,
    StateDict,
    Step,
    cross_entropy_on_labels,
    labeled_step,
    mean_metric,
    pseudo_cross_entropy,
    semi_supervised_step,
)


@dataclass(frozen=True)
class SemiFL(Method):
    """Hyper-parameters of SemiFL."""

    name: str = "semifl"
    confidence_threshold: float = 0.95
    """A sample is sure if the received model's largest probability reaches it. A client without a sure sample sits out
    with labels at the server; with labels of its own it trains on these."""
    mix_alpha: float = 0.75
    """The mixing weight is drawn from Beta(mix_alpha, mix_alpha), once a batch."""
    lambda_mix: float = 1.0
    """Weight of the mixed batch's loss; 0: no mixed batches."""

    description: ClassVar[str] = (
        "global model labels once a round, mixup, server fine-tunes (Diao et al., NeurIPS 2022)"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"`method.confidence_threshold` (={self.confidence_threshold}) must lie in [0, 1].")
        if not 0 < self.mix_alpha < float("inf"):
            raise ValueError(f"`method.mix_alpha` (={self.mix_alpha}) must be a positive number.")
        if not 0 <= self.lambda_mix < float("inf"):
            raise ValueError(f"`method.lambda_mix` (={self.lambda_mix}) must be a finite number of at least 0.")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        return (
            Phase("supervised", self.supervised_loss, labeled=("weak",)),
            Phase(
                "train",
                self.loss,
                labeled=("weak",),
                unlabeled=("weak", "strong"),
                teachers=("global",),
                start="supervised",
                prepare=self.prepare,
                mix=("weak",) if self.lambda_mix > 0 else (),
                mix_alpha=self.mix_alpha,
            ),
        )

    def prepare(self, survey: Survey) -> Prepared:
        """Labels all of a client's samples with the received model; only the sure ones are drawn, any is mixed in."""
        confidence, label = survey.predict("global", "clean").softmax(-1).max(-1)
        keep = confidence >= self.confidence_threshold
        pseudo = PseudoLabels(label, keep, torch.ones_like(keep), confidence)
        return Prepared({"label": label}, keep, pseudo=pseudo)

    def supervised_loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the cross-entropy on labels."""
        return cross_entropy_on_labels(student, batch.labeled)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns CE(labels) + CE(y, strong) + lambda_mix * (s CE(y, x_mix) + (1 - s) CE(y', x_mix)).

        x_mix = s * weak(x) + (1 - s) * weak(x') with s = `Batch.mixing`, (x, y) a sure sample and (x', y') any.
        """
        labeled, strong = batch.labeled.views["weak"], batch.unlabeled.views["strong"]
        label = batch.unlabeled.targets["label"]
        keep = torch.ones_like(label, dtype=torch.bool)
        images = [labeled, strong]
        if self.lambda_mix > 0:
            share = batch.mixing
            images.append(share * batch.unlabeled.views["weak"] + (1 - share) * batch.mix.views["weak"])
        logits = student(torch.cat(images)).split([len(part) for part in images])
        supervised = labeled_step(logits[0], batch.labeled.candidates)
        fixed = pseudo_cross_entropy(logits[1].log_softmax(-1), label, keep)
        step = semi_supervised_step(supervised, fixed, 1.0, keep)
        if self.lambda_mix == 0:
            return step
        log_probs = logits[2].log_softmax(-1)
        mixed = batch.mixing * pseudo_cross_entropy(log_probs, label, keep)
        mixed = mixed + (1 - batch.mixing) * pseudo_cross_entropy(log_probs, batch.mix.targets["label"], keep)
        loss = step.loss + self.lambda_mix * mixed.sum() / max(len(mixed), 1)
        metrics = {**step.metrics, "train/loss_mix": mean_metric(mixed, keep)}
        metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
        return step._replace(loss=loss, metrics=metrics)

    def upload(
        self, global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
    ) -> dict[str, ModelPart]:
        """As every method; the mean is uniform over the clients that trained, whatever `training.weight_by`."""
        model = super().upload(global_state, results, parameters, weight)["model"]
        return {"model": ModelPart(model.state, float(weight > 0))}
