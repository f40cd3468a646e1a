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

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, within
from fedlabel.methods.batch import Batch, Model, PseudoLabels, StateDict, Step
from fedlabel.methods.losses import cross_entropy_on_labels, mean_metric, one_hot, pseudo_cross_entropy, pseudo_metrics
from fedlabel.methods.recipe import BySample, Helpers, LabelKinds, Method, Phase, Recipe, Stage, Task, Update
from fedlabel.methods.uploads import ModelPart, PhaseResult, Upload, send_unweighted
from fedlabel.models.wrap import one_network, sum_of_parts

VARIANTS = ("full", "disjoint", "inter_client")
BYTES = 4
"""Of one float32."""


def vote(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Returns the class with most votes per sample, (n,) int64, the smallest of them on a tie; all are (n, classes)."""
    votes = torch.stack([one_hot(logits.argmax(-1), logits.shape[-1]) for logits in (own, *others)])
    return votes.sum(0).argmax(-1)


def sparse_update(received: Tensor, new: Tensor, change: float) -> Tensor:
    """Returns `new` where it differs from `received` by more than `change` (only these entries are sent), else
    `received`.
    """
    return torch.where((new - received).abs() > change, new, received)


def _starting(prefix: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def changed_bytes(received: StateDict, uploaded: StateDict, helpers: int) -> tuple[float, float]:
    """Counts bytes as the paper does: up, the changed entries; down, sigma and the non-zero entries of psi.

    Positions of the entries are not counted. A helper's psi is taken to have as many entries that are not 0 as the
    received one.
    """
    changed = sum(int((uploaded[name] != value).sum()) for name, value in received.items())
    sigma = sum(value.numel() for name, value in received.items() if name.startswith("sigma."))
    psi = sum(int(value.count_nonzero()) for name, value in received.items() if name.startswith("psi."))
    return BYTES * float(changed), BYTES * float(sigma + psi * (1 + helpers))


def all_bytes(received: StateDict, uploaded: StateDict, helpers: int) -> tuple[float, float]:
    """Counts the bytes of an undivided model, and of each helper's, in full."""
    size = sum(value.numel() for value in received.values())
    return BYTES * float(size), BYTES * float(size * (1 + helpers))


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
    """Weight of the inter-client consistency; no effect in rounds without helpers."""
    lambda_l1: float = 1e-4
    """Weight of the sum of |psi|."""
    lambda_l2: float = 10.0
    """Weight of the sum of (sigma - psi)^2."""
    psi_factor: float = 0.2
    """Scale of psi's initial value relative to the initial sigma."""
    num_helpers: int = 2
    """Helpers per client."""
    helper_interval: int = 10
    """Rounds between two rounds with helpers."""
    zero_below: float = 5e-6
    """Entries of psi smaller than this are set to 0 before they are sent."""
    change_above: float = 5e-5
    """Entries that changed by no more than this are not sent: the server keeps what it had."""

    description: ClassVar[str] = "disjoint learning and inter-client consistency (Jeong et al., ICLR 2021)"

    def __post_init__(self) -> None:
        one_of(self, "method", variant=VARIANTS)
        in_unit_interval(self, "method", "confidence_threshold")
        finite(self, "method", "lambda_s", "lambda_a", "lambda_i", "lambda_l1", "lambda_l2")
        finite(self, "method", "psi_factor", "zero_below", "change_above")
        within(self, "method", 1, MAX_HELPERS, "num_helpers")
        at_least(self, "method", 1, "helper_interval")

    def recipe(self, task: Task) -> Recipe:
        divided, helped = self.variant != "inter_client", self.variant != "disjoint"
        # With labels at the server it trains sigma, and clients train psi.
        sigma = partial(_starting, "sigma.") if divided else None
        train = Phase(
            "train",
            self.supervised_loss if divided else self.loss,
            draw=BySample(unlabeled=("weak", "strong")),
            teachers=tuple(f"helper{i}" for i in range(self.num_helpers)) if helped else (),
            trains=sigma,
            then=(Update(self.unsupervised_loss, partial(_starting, "psi."), self.penalty),) if divided else (),
        )
        return Recipe(
            stages=(Stage((train,)),),
            uses=LabelKinds.SINGLE,
            network=sum_of_parts({"sigma": 1.0, "psi": self.psi_factor}) if divided else one_network,
            upload=Upload(self.send_changes, changed_bytes) if divided else Upload(send_unweighted, all_bytes),
            server_phases=(Phase("server", self.supervised_loss, trains=sigma),),
            helpers=Helpers(self.num_helpers, self.helper_interval, "psi." if divided else "") if helped else None,
        )

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

    def send_changes(
        self, global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
    ) -> dict[str, ModelPart]:
        """Sends the weights that changed, to an unweighted mean; arguments and result: see `Upload.send`."""
        model = send_unweighted(global_state, results, parameters, weight)["model"]
        sent = dict(model.state)
        for name in parameters:
            new = model.state[name]
            if name.startswith("psi."):
                new = torch.where(new.abs() < self.zero_below, torch.zeros_like(new), new)
            sent[name] = sparse_update(global_state[name], new, self.change_above)
        return {"model": ModelPart(sent, model.weight)}
