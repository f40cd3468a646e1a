"""Losses and metrics shared by many methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlabel.methods.batch import Batch, Model, Part, PseudoLabels, State, Step

LEFT_OUT = -1e4
"""Added to the logit of a class that a softmax leaves out: its probability is exactly 0, and no gradient is NaN."""


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


def labels_loss(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    """Returns `cross_entropy_on_labels` of the labelled part, as a `LossFunction`."""
    return cross_entropy_on_labels(student, batch.labeled)


def labeled_step(logits: Tensor, candidates: Tensor) -> Step:
    """Returns the mean cross-entropy over the rows with one candidate; logits and candidates are (n, classes)."""
    return label_step(-(logits.log_softmax(-1) * candidates).sum(-1), candidates)


def class_counts(candidates: Tensor) -> State:
    """Returns a memory with "class_counts", (classes,) float: how many samples have this class as their only candidate.

    Args:
        candidates: (n, classes) bool, of all of a client's samples.
    """
    alone = candidates.sum(-1, keepdim=True) == 1
    return {"class_counts": (candidates & alone).sum(0).float()}


def label_step(values: Tensor, candidates: Tensor, memory: State | None = None) -> Step:
    """Returns the mean loss over the samples with one candidate, 0 if there are none; with the metrics of labelled
    parts.

    Args:
        values: (n,) loss per sample.
        candidates: (n, classes) bool.
        memory: see `Step.memory`.
    """
    labeled = candidates.sum(-1) == 1
    values = torch.where(labeled, values, torch.zeros_like(values))
    pair, count = mean_metric(values, labeled), labeled.sum()
    metrics = {"train/loss_supervised": pair, "train/loss": pair}
    return Step(values.sum() / count.clamp_min(1), metrics, count, memory=memory)


def labeled_and(student: Model, batch: Batch, view: str) -> tuple[Step, Tensor]:
    """Passes labelled samples and one view of the unlabelled ones through the student in one batch.

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
    """Returns the mean of (n,) values, 0 if n is 0: dropped samples of a batch count as zeros (FixMatch, USB)."""
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

    Raises:
        ValueError: `unsupervised` or `keep` is not one value per sample.
    """
    if unsupervised.dim() != 1 or keep.shape != unsupervised.shape:
        raise ValueError(
            f"`unsupervised` (of shape {tuple(unsupervised.shape)}) and `keep` (of shape {tuple(keep.shape)}) must "
            "both be (n,): one value for each unlabelled sample."
        )
    metrics = dict(supervised.metrics)
    metrics["train/loss_unsupervised"] = mean_metric(unsupervised, torch.ones_like(keep))
    if pseudo is not None:
        metrics |= pseudo_metrics(pseudo)
    loss = supervised.loss + weight * batch_mean(unsupervised)
    metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
    return Step(loss, metrics, supervised.examples + keep.sum(), pseudo, memory)
