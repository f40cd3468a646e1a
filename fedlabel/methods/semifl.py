"""SemiFL: the received global model pseudo-labels a client's data once a round; confident samples are trained on, and
mixed.

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlabel.checks import finite, in_unit_interval, positive
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, Step, Survey
from fedlabel.methods.losses import labeled_step, labels_loss, mean_metric, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.recipe import BySample, LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.uploads import unweighted_sum_of_updates


@dataclass(frozen=True)
class SemiFL(Method):
    """Hyper-parameters of SemiFL."""

    name: str = "semifl"
    confidence_threshold: float = 0.95
    """A sample is confident if the received model's largest probability reaches it. A client without a confident sample
    skips the round with labels at the server; with labels of its own it trains on these."""
    mix_alpha: float = 0.75
    """The mixing weight is drawn from Beta(mix_alpha, mix_alpha), once per batch."""
    lambda_mix: float = 1.0
    """Weight of the mixed batch's loss; 0: no mixed batches."""

    description: ClassVar[str] = (
        "global model labels once a round, mixup, server fine-tunes (Diao et al., NeurIPS 2022)"
    )

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        positive(self, "method", "mix_alpha")
        finite(self, "method", "lambda_mix")

    def recipe(self, task: Task) -> Recipe:
        mix = ("weak",) if self.lambda_mix > 0 else ()
        train = Phase(
            "train",
            self.loss,
            draw=BySample(unlabeled=("weak", "strong"), mix=mix, mix_alpha=self.mix_alpha),
            teachers=("global",),
            start="supervised",
            prepare=self.prepare,
        )
        return Recipe(
            stages=(Stage((Phase("supervised", labels_loss), train)),),
            uses=LabelKinds.SINGLE,
            upload=unweighted_sum_of_updates,
        )

    def prepare(self, survey: Survey) -> Prepared:
        """Pseudo-labels all of a client's samples with the received model; only confident ones are drawn, any may be
        mixed in.
        """
        confidence, label = survey.predict("global", "clean").softmax(-1).max(-1)
        keep = confidence >= self.confidence_threshold
        pseudo = PseudoLabels(label, keep, torch.ones_like(keep), confidence)
        return Prepared({"label": label}, keep, pseudo=pseudo)

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
