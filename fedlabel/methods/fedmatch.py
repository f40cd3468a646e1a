"""FedMatch: weights split into a labelled and an unlabelled part, and agreement with the models of similar clients.

Source: Jeong, Yoon, Yang, Hwang, "Federated Semi-Supervised Learning with Inter-Client Consistency & Disjoint
Learning", ICLR 2021 (arXiv 2006.12097), and its released code. Setting: labels at the clients.

The model is sigma + psi. Every batch takes two optimiser steps:
  A. sigma only: lambda_s * CE(labels).
  B. psi only, over samples u with max p(u) >= tau: lambda_i * mean over helpers of KL(p_helper || p) +
     lambda_a * CE(vote, strong view), where the client's own and the helpers' classes vote; plus
     lambda_l1 * |psi|_1 + lambda_l2 * |sigma - psi|^2.
A helper is the psi of another client on top of one's own sigma (`server/helpers.py` chooses whose).

The server keeps the last psi of every client that trained: memory of one model per client, in checkpoints, too.

What differs: the released code sets 10 samples a step and the number of steps by the labelled set; here both are
`training`'s, like every method's. A helper borrows sigma as it is at each step (there: as it was received). A batch
without a sure sample takes no step B (there: one down the penalty alone). Both of B's terms are means over the sure
samples of the batch, and votes that tie go to the smallest class, as there. Learning rate: the term in lambda_l2 pulls
psi to sigma by 2 * lambda_l2 * lr of their distance in every step, which diverges from lr = .1 on at the default; the
released code has lr = .001.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.methods.base import Helpers, Method, ModelPart, Phase, PhaseResult, Update
from fedlabel.methods.steps import (
    Batch,
    Model,
    PseudoLabels,
    StateDict,
    Step,
    cross_entropy_on_labels,
    mean_metric,
    one_hot,
    pseudo_cross_entropy,
    pseudo_metrics,
)

VARIANTS = ("full", "disjoint", "inter_client")
BYTES = 4
"""Of one float32."""


def vote(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Returns the class with most votes per sample, (n,) int64, the smallest of them on a tie; all are (n, classes)."""
    votes = torch.stack([one_hot(logits.argmax(-1), logits.shape[-1]) for logits in (own, *others)])
    return votes.sum(0).argmax(-1)


def sparse_update(received: Tensor, new: Tensor, change: float) -> Tensor:
    """Returns `new` where it differs from `received` by more than `change` (only that is sent), else `received`."""
    return torch.where((new - received).abs() > change, new, received)


def _starting(prefix: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


MAX_HELPERS = 100
"""Each is a model that every client receives and runs."""


@dataclass(frozen=True)
class FedMatch(Method):
    """Hyper-parameters of FedMatch; the defaults are the released code's for labels at the clients."""

    name: str = "fedmatch"
    variant: str = "full"
    """full; disjoint: no helpers; inter_client: one undivided model, which learns both losses in one step."""
    confidence_threshold: float = 0.75
    """tau, on the client's own weak view."""
    lambda_s: float = 10.0
    """Weight of the labelled loss."""
    lambda_a: float = 0.01
    """Weight of the cross-entropy to the vote."""
    lambda_i: float = 0.01
    """Weight of the inter-client consistency; nothing in rounds without helpers."""
    lambda_l1: float = 1e-4
    """Weight of the sum of |psi|."""
    lambda_l2: float = 10.0
    """Weight of the sum of (sigma - psi)^2."""
    psi_factor: float = 0.2
    """psi starts as this times the initial sigma."""
    num_helpers: int = 2
    """Helpers per client."""
    helper_interval: int = 10
    """Rounds between two of which helpers are sent."""
    zero_below: float = 5e-6
    """Entries of psi smaller than this are set to 0 before they are sent."""
    change_above: float = 5e-5
    """Entries that changed by no more than this are not sent: the server keeps what it had."""

    description: ClassVar[str] = "disjoint learning and inter-client consistency (Jeong et al., ICLR 2021)"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"`method.variant` (={self.variant}) must be one of {', '.join(VARIANTS)}.")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"`method.confidence_threshold` (={self.confidence_threshold}) must lie in [0, 1].")
        weights = ("lambda_s", "lambda_a", "lambda_i", "lambda_l1", "lambda_l2", "psi_factor")
        for key in (*weights, "zero_below", "change_above"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must be a finite number of at least 0.")
        if not 1 <= self.num_helpers <= MAX_HELPERS:
            raise ValueError(f"`method.num_helpers` (={self.num_helpers}) must lie in [1, {MAX_HELPERS}].")
        if self.helper_interval < 1:
            raise ValueError(f"`method.helper_interval` (={self.helper_interval}) must be at least 1.")

    @property
    def additive(self) -> Mapping[str, float]:
        return {} if self.variant == "inter_client" else {"sigma": 1.0, "psi": self.psi_factor}

    @property
    def helpers(self) -> Helpers | None:
        if self.variant == "disjoint":
            return None
        return Helpers(self.num_helpers, self.helper_interval, "psi." if self.additive else "")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        names = tuple(f"helper{i}" for i in range(self.num_helpers)) if self.helpers is not None else ()
        if not self.additive:
            return (Phase("train", self.loss, ("weak",), ("weak", "strong"), names),)
        second = Update(self.unsupervised_loss, partial(_starting, "psi."), self.penalty)
        return (
            Phase(
                "train",
                self.supervised_loss,
                labeled=("weak",),
                unlabeled=("weak", "strong"),
                teachers=names,
                trains=partial(_starting, "sigma."),
                then=(second,),
            ),
        )

    def server_phases(self, round_number: int) -> tuple[Phase, ...]:
        """With labels at the server it trains sigma, clients train psi."""
        trains = partial(_starting, "sigma.") if self.additive else None
        return (Phase("server", self.supervised_loss, labeled=("weak",), trains=trains),)

    def supervised_loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns step A's loss: lambda_s * CE(labels)."""
        step = cross_entropy_on_labels(student, batch.labeled)
        return step._replace(loss=self.lambda_s * step.loss)

    def unsupervised_loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns step B's loss without the penalty; means over the kept samples."""
        weak, strong = batch.unlabeled.views["weak"], batch.unlabeled.views["strong"]
        log_probs, strong_log_probs = student(torch.cat([weak, strong])).log_softmax(-1).tensor_split(2)
        confidence = log_probs.detach().exp().max(-1).values
        keep = confidence >= self.confidence_threshold
        count = keep.sum().clamp_min(1)
        others = [helper(weak).detach().log_softmax(-1) for helper in teachers.values()]
        label = vote(log_probs.detach(), others)
        cross_entropy = pseudo_cross_entropy(strong_log_probs, label, keep)
        zero = torch.zeros_like(cross_entropy)
        divergence = sum(((other.exp() * (other - log_probs)).sum(-1) for other in others), zero) / max(len(others), 1)
        divergence = torch.where(keep, divergence, zero)
        loss = (self.lambda_a * cross_entropy.sum() + self.lambda_i * divergence.sum()) / count
        pseudo = PseudoLabels(label, keep, torch.zeros_like(keep), confidence)
        metrics = pseudo_metrics(pseudo) | {
            "train/loss_unsupervised": mean_metric(cross_entropy, keep),
            "train/loss_inter_client": mean_metric(divergence, keep),
        }
        return Step(loss, metrics, keep.sum(), pseudo)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns both losses at once, for a model that is not divided (variant inter_client)."""
        first = self.supervised_loss(student, teachers, batch)
        second = self.unsupervised_loss(student, teachers, batch)
        return Step(
            first.loss + second.loss,
            {**first.metrics, **second.metrics},
            first.examples + second.examples,
            second.pseudo,
        )

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns lambda_l1 * |psi|_1 + lambda_l2 * |sigma - psi|^2 over all weights."""
        names = [name.removeprefix("psi.") for name in parameters if name.startswith("psi.")]
        psi = torch.cat([parameters[f"psi.{name}"].flatten() for name in names])
        sigma = torch.cat([parameters[f"sigma.{name}"].flatten() for name in names])
        return self.lambda_l1 * psi.abs().sum() + self.lambda_l2 * (sigma - psi).square().sum()

    def upload(
        self, global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
    ) -> dict[str, ModelPart]:
        """Sends the weights that changed; the server's mean is uniform over clients, whatever `training.weight_by`."""
        model = super().upload(global_state, results, parameters, weight)["model"]
        if not self.additive:
            return {"model": ModelPart(model.state, float(weight > 0))}
        sent = dict(model.state)
        for name in parameters:
            new = model.state[name]
            if name.startswith("psi."):
                new = torch.where(new.abs() < self.zero_below, torch.zeros_like(new), new)
            sent[name] = sparse_update(global_state[name], new, self.change_above)
        return {"model": ModelPart(sent, float(weight > 0))}

    def claimed_bytes(self, received: StateDict, uploaded: StateDict, helpers: int) -> tuple[float, float] | None:
        """Counts as the paper does: up, the entries that changed; down, sigma and the entries of psi that are not 0.

        Positions of the entries are not counted. A helper's psi is taken to have as many entries that are not 0 as the
        received one. An undivided model counts in full.
        """
        size = sum(value.numel() for value in received.values())
        if not self.additive:
            return BYTES * float(size), BYTES * float(size * (1 + helpers))
        changed = sum(int((uploaded[name] != value).sum()) for name, value in received.items())
        sigma = sum(value.numel() for name, value in received.items() if name.startswith("sigma."))
        psi = sum(int(value.count_nonzero()) for name, value in received.items() if name.startswith("psi."))
        return BYTES * float(changed), BYTES * float(sigma + psi * (1 + helpers))
