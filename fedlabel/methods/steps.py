"""What a loss sees of one batch and what it returns, and the losses and metrics that many methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Model = Callable[..., Tensor]
"""Images (batch, channels, height, width) -> logits (batch, classes). A second argument runs a part of the network, see
`fedlabel.models.Net`."""

StateDict = dict[str, Tensor]
"""Weights and buffers of one model, by name."""

State = dict[str, Tensor]
"""Named tensors that a method keeps: in a client's memory, or shared by all through the server."""


class Part(NamedTuple):
    """The labelled or the unlabelled samples of one batch; a part that a phase does not ask for has batch 0."""

    views: dict[str, Tensor]
    """"clean", "weak", "strong" or "strong2" -> normalised images (batch, channels, height, width), float."""
    candidates: Tensor
    """(batch, classes) bool: the classes the sample may have; exactly one True where it is labelled."""
    targets: dict[str, Tensor]
    """What the phase's `prepare` said of these samples: name -> (batch, ...)."""
    noisy: Tensor
    """(batch,) bool, see `Supervision`."""
    annotations: Tensor
    """(batch, annotators) int64, see `Supervision`."""
    rows: Tensor
    """(batch,) int64, positions in the client's data, for what is remembered of each sample."""
    size: Tensor
    """() float, how many samples of the client this part is drawn from."""
    members: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, k) int64, positions in this part of each bag's samples, -1 where a bag has fewer than k; there are 0 bags
    in a phase without `Phase.bags`."""
    bag_counts: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, classes) int64, samples of each bag in each class; all 0 where it is not known."""


class Batch(NamedTuple):
    """What one local step sees."""

    labeled: Part
    unlabeled: Part
    mix: Part
    """Further unlabelled samples, to mix with: see `Phase.mix`."""
    mixing: Tensor
    """() float in [0, 1], this batch's draw from Beta(`Phase.mix_alpha`, `Phase.mix_alpha`); 1 without `Phase.mix`."""
    memory: State
    """What the client carries from step to step: see `Method.initial_memory`."""


class PseudoLabels(NamedTuple):
    """What a method believed of the unlabelled samples of one batch (of a phase with `Phase.informed`: of the labelled
    and then of the unlabelled ones); all detached, all (batch,).
    """

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
    """Metric name -> (2,) float, detached: (sum, count), added over steps and clients and divided at the end. Names and
    the range of sum / count are those of `fedlabel/metric_tags.py`, or of `Method.metrics`."""
    examples: Tensor
    """() number of samples that the loss used; a step with 0 moves nothing."""
    pseudo: PseudoLabels | None = None
    memory: State | None = None
    """What to carry to the next step; None: what came with the batch."""


LossFunction = Callable[[Model, Mapping[str, Model], Batch], Step]


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Returns (n, classes) float32 from (n,) int64; unlike torch's own it works under `torch.func.vmap`."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def mean_metric(values: Tensor, mask: Tensor) -> Tensor:
    """Returns (sum of values where mask, number of True) as a detached (2,) tensor; see `Step.metrics`."""
    mask = mask.to(values.dtype)
    return torch.stack([(values * mask).sum(), mask.sum()]).detach()


def cross_entropy_on_labels(student: Model, part: Part) -> Step:
    """Returns the mean cross-entropy of a labelled part's weak view; 0 for an empty part.

    A sample counts only if exactly one candidate is left.
    """
    return labeled_step(student(part.views["weak"]), part.candidates)


def labeled_step(logits: Tensor, candidates: Tensor) -> Step:
    """Returns the mean cross-entropy over the rows with one candidate; logits and candidates are (n, classes)."""
    return label_step(-(logits.log_softmax(-1) * candidates).sum(-1), candidates)


def label_step(values: Tensor, candidates: Tensor, memory: State | None = None) -> Step:
    """Returns the mean loss over the samples with one candidate, 0 for none; with the metrics that labelled parts have.

    Args:
        values: (n,) loss per sample.
        candidates: (n, classes) bool.
        memory: see `Step.memory`.
    """
    labeled = candidates.sum(-1) == 1
    values = torch.where(labeled, values, torch.zeros_like(values))
    metrics = {"train/loss_supervised": mean_metric(values, labeled), "train/loss": mean_metric(values, labeled)}
    count = labeled.sum()
    return Step(values.sum() / count.clamp_min(1), metrics, count, memory=memory)


def labeled_and(student: Model, batch: Batch, view: str) -> tuple[Step, Tensor]:
    """Sends labelled samples and one view of the unlabelled ones through the student at once.

    Returns:
        The labelled part's step; (n, classes) logits of the unlabelled part.
    """
    labeled, unlabeled = batch.labeled.views["weak"], batch.unlabeled.views[view]
    labeled_logits, logits = student(torch.cat([labeled, unlabeled])).split([len(labeled), len(unlabeled)])
    return labeled_step(labeled_logits, batch.labeled.candidates), logits


def pseudo_cross_entropy(log_probs: Tensor, label: Tensor, keep: Tensor) -> Tensor:
    """Returns the cross-entropy of each kept sample, 0 for the others.

    Args:
        log_probs: (n, classes) of the student.
        label: (n,) int64 pseudo-labels.
        keep: (n,) bool.

    Returns:
        (n,) float.
    """
    nll = -log_probs.gather(-1, label[:, None]).squeeze(-1)
    return torch.where(keep, nll, torch.zeros_like(nll))


def batch_mean(values: Tensor) -> Tensor:
    """Returns the mean of (n,) values, 0 for none: the dropped samples of a batch count as zeros (FixMatch, USB)."""
    return values.sum() / max(len(values), 1)


def pseudo_metrics(pseudo: PseudoLabels) -> dict[str, Tensor]:
    """Returns the metrics that every method's pseudo-labels have."""
    everyone, dtype = torch.ones_like(pseudo.keep), pseudo.confidence.dtype
    return {
        "pseudo/coverage": mean_metric(pseudo.keep.to(dtype), everyone),
        "pseudo/confidence": mean_metric(pseudo.confidence, everyone),
        "pseudo/from_global": mean_metric(pseudo.from_global.to(dtype), everyone),
    }


def semi_supervised_step(
    supervised: Step,
    unsupervised: Tensor,
    weight: float,
    keep: Tensor,
    pseudo: PseudoLabels | None = None,
    memory: State | None = None,
) -> Step:
    """Returns labelled loss + weight * batch mean of the unlabelled one, with the metrics all such methods log.

    Args:
        supervised: the labelled part's step.
        unsupervised: (n,) loss per unlabelled sample, 0 where dropped.
        weight: lambda_u.
        keep: (n,) bool, which of them were used.
        pseudo: the pseudo-labels of these samples, where they were made in this step.
        memory: see `Step.memory`.
    """
    metrics = dict(supervised.metrics)
    metrics["train/loss_unsupervised"] = mean_metric(unsupervised, torch.ones_like(keep))
    if pseudo is not None:
        metrics |= pseudo_metrics(pseudo)
    loss = supervised.loss + weight * batch_mean(unsupervised)
    metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
    return Step(loss, metrics, supervised.examples + keep.sum(), pseudo, memory)
