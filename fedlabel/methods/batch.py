"""The inputs and results of a loss (M step, one batch) and of an E step over a client's whole data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision

Model = Callable[..., Tensor]
"""Images (batch, channels, height, width) -> logits (batch, classes). A second argument runs a part of the network, see
`fedlabel.models.Net`."""

StateDict = dict[str, Tensor]
"""Weights and buffers of one model, by name."""

State = dict[str, Tensor]
"""Named tensors that a method keeps: in a client's memory, or shared by all through the server."""


class Part(NamedTuple):
    """The labelled or the unlabelled samples of one batch; a part that a phase does not draw has batch 0."""

    views: dict[str, Tensor]
    """"clean", "weak", "strong" or "strong2" -> normalised images (batch, channels, height, width), float."""
    candidates: Tensor
    """(batch, classes) bool: the candidate classes of each sample; exactly one True if it is labelled."""
    targets: dict[str, Tensor]
    """Targets that the phase's `prepare` made for these samples: name -> (batch, ...)."""
    noisy: Tensor
    """(batch,) bool, see `Supervision`."""
    annotations: Tensor
    """(batch, annotators) int64, see `Supervision`."""
    rows: Tensor
    """(batch,) int64, positions in the client's data, for memory of each sample."""
    size: Tensor
    """() float, size of the pool that this part is drawn from."""
    members: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, k) int64, positions in this part of each bag's samples, -1 where a bag has fewer than k; there are 0 bags
    unless the phase draws `ByBag`."""
    bag_counts: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, classes) int64, number of samples of each class in each bag; all 0 if the counts are unknown."""


class Batch(NamedTuple):
    """The input of one local step."""

    labeled: Part
    unlabeled: Part
    mix: Part
    """Further unlabelled samples, to mix with: see `BySample.mix`."""
    mixing: Tensor
    """() float in [0, 1], this batch's draw from Beta(mix_alpha, mix_alpha) of `BySample`; 1 without `mix`."""
    memory: State
    """The client's memory from step to step: see `Memory`."""
    log_prior: Tensor = torch.zeros(0)
    """(classes,) what is added to the logits of all models before a loss sees them (fedlabel/learning/prior.py); (0,):
    nothing."""


class PseudoLabels(NamedTuple):
    """Pseudo-labels of the unlabelled samples of one batch (in a phase that draws `ByKnowledge` or `ByBag`: of the
    labelled and then of the unlabelled ones); all detached, all (batch,).
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
    """() number of samples that the loss used; a step with 0 changes nothing."""
    pseudo: PseudoLabels | None = None
    memory: State | None = None
    """Memory for the next step; None: unchanged."""


LossFunction = Callable[[Model, Mapping[str, Model], Batch], Step]
"""(student, teachers by name, batch) -> Step. Pure: no global random numbers, no data-dependent Python branch, teachers
detached, empty masks give exactly 0; so that it runs for one client or for a stack of them (`torch.func.vmap`)."""


class Survey(NamedTuple):
    """All of a client's samples at once, the input of `Phase.prepare`."""

    predict: Callable[..., Tensor]
    """(teacher, view, part="all") -> logits (n, classes) of the client's n samples, without gradient; with part="embed"
    their embeddings (n, features), see `fedlabel.models.Net`."""
    supervision: Supervision
    """Supervision record of these samples."""
    memory: State
    inputs: Callable[[], Tensor] = torch.Tensor
    """() -> the n samples as model inputs, (n, channels, height, width) normalised float."""


class Votes(NamedTuple):
    """Votes of K labelling functions on n samples."""

    cast: Tensor
    """(n, K) int64, -1 = abstained; -2 = not applied to this sample."""
    class_sets: Tensor
    """(K, classes) bool, the classes that each function may vote for."""


class Prepared(NamedTuple):
    """The result of an E step over a client's whole data, for the phase that follows."""

    targets: dict[str, Tensor]
    """Name -> (n, ...), one row per sample; a batch gets the rows of its samples."""
    draw: Tensor | None = None
    """(n,) bool, the unlabelled samples that may be drawn; None: all of them."""
    memory: State | None = None
    """Memory after the E step; None: unchanged."""
    pseudo: PseudoLabels | None = None
    """Pseudo-labels of all n samples, for the evaluator, which uses those of unlabelled samples; None: none made
    here."""
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    """See `Step.metrics`."""
    pairs: Tensor | None = None
    """(e, 2) int64, pairs of samples treated as similar, for the evaluator, which compares their labels; None: none."""
    votes: Votes | None = None
    """Votes of labelling functions on all samples, for the evaluator; None without functions."""
