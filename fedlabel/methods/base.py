"""What a method is: a frozen dataclass of hyper-parameters whose methods are the paper's equations.

A method sees models as functions `images -> logits`, never as modules, optimisers, messages or devices, so the same
code runs for one client or for a stack of clients under `torch.func.vmap`. `fedlabel/training.py` runs the phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]
"""Images (batch, channels, height, width) -> logits (batch, classes)."""

StateDict = dict[str, Tensor]
"""Weights and buffers of one model, by name."""


class Part(NamedTuple):
    """The labelled or the unlabelled samples of one batch; a part that a phase does not ask for has batch 0."""

    views: dict[str, Tensor]
    """"clean", "weak" or "strong" -> normalised images (batch, channels, height, width), float."""
    candidates: Tensor
    """(batch, classes) bool: the classes the sample may have; exactly one True where it is labelled."""


class Batch(NamedTuple):
    """What one local step sees."""

    labeled: Part
    unlabeled: Part


class PseudoLabels(NamedTuple):
    """What a method believed of the unlabelled samples of one batch; all detached, all (batch,)."""

    label: Tensor
    """int64, the class chosen."""
    keep: Tensor
    """bool, whether the sample was trained on."""
    from_global: Tensor
    """bool, whether the expert was the global model (False: the local one)."""
    confidence: Tensor
    """float in [0, 1], the expert's largest probability."""


class Step(NamedTuple):
    """The result of one loss evaluation."""

    loss: Tensor
    """() float, differentiable with respect to the student only."""
    metrics: dict[str, Tensor]
    """Metric name -> (2,) float, detached: (sum, count), added over steps and clients and divided at the end."""
    examples: Tensor
    """() number of samples that the loss used; a step with 0 moves nothing."""
    pseudo: PseudoLabels | None = None


LossFunction = Callable[[Model, Mapping[str, Model], Batch], Step]


@dataclass(frozen=True)
class Phase:
    """One local training run inside a round. Every phase starts from the received global weights."""

    name: str
    loss: LossFunction
    labeled: tuple[str, ...] = ()
    """Views wanted of labelled samples; empty: none are drawn."""
    unlabeled: tuple[str, ...] = ()
    """Views wanted of unlabelled samples; empty: none are drawn."""
    teachers: tuple[str, ...] = ()
    """"global" (the received weights) or the name of an earlier phase (its final weights), frozen in eval mode."""
    steps: int | None = None
    """Local steps of this phase; None: as `training.local_steps` or `training.local_epochs` says."""
    proximal: Callable[[Tensor], float] | None = None
    """Parameter tensor p -> c, where c * (p - p_start) is added to its gradient; None: no proximal term."""


class PhaseResult(NamedTuple):
    """What a phase left behind."""

    name: str
    state: StateDict
    examples: float
    """Samples used over all steps (see `Step.examples`)."""


class ModelPart(NamedTuple):
    """One model that a client uploads, with its weight in the server's mean of that part."""

    state: StateDict
    weight: float


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is final: it is never subclassed again."""

    name: str = ""

    description: ClassVar[str] = ""
    """One line for `fedlabel list`."""
    oracle_labels: ClassVar[bool] = False
    """True only where the method is defined as an upper bound that sees every training label."""

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the local phases of a round (1-based). Default: one phase over labelled and unlabelled samples."""
        return (Phase("train", self.loss, labeled=("weak",), unlabeled=("weak", "strong")),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the loss of one batch (the M step, with the E step inside where it is per batch).

        Pure: no global random numbers, no data-dependent Python branch, teachers detached, empty masks give exactly 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss`.")

    def upload(
        self, global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
    ) -> dict[str, ModelPart]:
        """Returns what the client sends: by default one model, the start plus the sum of the phases' updates.

        Args:
            global_state: the weights every phase started from.
            results: what the phases that ran left behind, in order.
            parameters: names in the state that are trained; the others are buffers.
            weight: the client's weight in the server's mean, as `training.weight_by` says.

        Returns:
            Part name -> model and weight. The server averages each part over the clients by its weights and then takes
            the plain mean of the parts.
        """
        return {"model": ModelPart(sum_updates(global_state, [r.state for r in results], parameters), weight)}


def sum_updates(start: StateDict, states: Sequence[StateDict], parameters: frozenset[str]) -> StateDict:
    """Returns start + sum of (state - start); exactly the only state where the others did not move.

    Buffers (BatchNorm's running statistics) are averaged instead: a sum of two changes of a variance can be negative.
    Integer buffers (BatchNorm's batch counter) are taken from the last state.
    """
    if not states:
        return dict(start)
    if len(states) == 1:
        return dict(states[0])
    merged: StateDict = {}
    for key, first in states[0].items():
        if key in parameters:
            merged[key] = first + sum(state[key] - start[key] for state in states[1:])
        elif first.is_floating_point():
            merged[key] = torch.stack([state[key] for state in states]).mean(0)
        else:
            merged[key] = states[-1][key]
    return merged


def mean_metric(values: Tensor, mask: Tensor) -> Tensor:
    """Returns (sum of values where mask, number of True) as a detached (2,) tensor; see `Step.metrics`."""
    mask = mask.to(values.dtype)
    return torch.stack([(values * mask).sum(), mask.sum()]).detach()


def cross_entropy_on_labels(student: Model, part: Part) -> Step:
    """Returns the mean cross-entropy of a labelled part's weak view; 0 for an empty part.

    A sample counts only if exactly one candidate is left.
    """
    labeled = part.candidates.sum(-1) == 1
    log_probs = student(part.views["weak"]).log_softmax(-1)
    nll = -(log_probs * part.candidates).sum(-1)
    nll = torch.where(labeled, nll, torch.zeros_like(nll))
    count = labeled.sum()
    loss = nll.sum() / count.clamp_min(1)
    metrics = {"train/loss_supervised": mean_metric(nll, labeled), "train/loss": mean_metric(nll, labeled)}
    return Step(loss, metrics, count)
