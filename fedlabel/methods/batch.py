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
    """The labelled or the unlabelled samples of one batch; a part that a phase does not ask for has batch 0."""

    views: dict[str, Tensor]
    """"clean", "weak", "strong" or "strong2" -> normalised images (batch, channels, height, width), float."""
    candidates: Tensor
    """(batch, classes) bool: the classes the sample may have; exactly one True where it is labelled."""
    targets: dict[str, Tensor]
    """Targets that the phase's `prepare` made for these samples: name -> (batch, ...)."""
    noisy: Tensor
    """(batch,) bool, see `Supervision`."""
    annotations: Tensor
    """(batch, annotators) int64, see `Supervision`."""
    rows: Tensor
    """(batch,) int64, positions in the client's data, for memory of each sample."""
    size: Tensor
    """() float, how many samples of the client this part is drawn from."""
    members: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, k) int64, positions in this part of each bag's samples, -1 where a bag has fewer than k; there are 0 bags
    unless the phase draws `ByBag`."""
    bag_counts: Tensor = torch.zeros(0, 0, dtype=torch.int64)
    """(bags, classes) int64, samples of each bag in each class; all 0 where the counts are unknown."""


class Batch(NamedTuple):
    """The input of one local step."""

    labeled: Part
    unlabeled: Part
    mix: Part
    """Further unlabelled samples, to mix with: see `BySample.mix`."""
    mixing: Tensor
    """() float in [0, 1], this batch's draw from Beta(mix_alpha, mix_alpha) of `BySample`; 1 without `mix`."""
    memory: State
    """What the client carries from step to step: see `Memory`."""


class PseudoLabels(NamedTuple):
    """Pseudo-labels of the unlabelled samples of one batch (of a phase that draws `BySupervision` or `ByBag`: of the
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
    """() number of samples that the loss used; a step with 0 moves nothing."""
    pseudo: PseudoLabels | None = None
    memory: State | None = None
    """What to carry to the next step; None: what came with the batch."""


LossFunction = Callable[[Model, Mapping[str, Model], Batch], Step]
"""(student, teachers by name, batch) -> Step. Pure: no global random numbers, no data-dependent Python branch, teachers
detached, empty masks give exactly 0; so that it runs for one client or for a stack of them (`torch.func.vmap`)."""


class Survey(NamedTuple):
    """All of a client's samples at once, for `Phase.prepare`."""

    predict: Callable[..., Tensor]
    """(teacher, view, part="all") -> logits (n, classes) of the client's n samples, without gradient; with part="embed"
    their embeddings (n, features), see `fedlabel.models.Net`."""
    supervision: Supervision
    """Of these samples."""
    memory: State
    inputs: Callable[[], Tensor] = torch.Tensor
    """() -> the n samples themselves as a model sees them, (n, channels, height, width) normalised float."""


class Votes(NamedTuple):
    """Votes of K labelling functions on n samples."""

    cast: Tensor
    """(n, K) int64, -1 = abstained; rows of -2 were not given to them."""
    class_sets: Tensor
    """(K, classes) bool, what each of them may vote for."""


class Prepared(NamedTuple):
    """The result of an E step over a client's whole data, for the phase that follows."""

    targets: dict[str, Tensor]
    """Name -> (n, ...), one row per sample; a batch gets the rows of its samples."""
    draw: Tensor | None = None
    """(n,) bool, the unlabelled samples that are to be drawn; None: all of them."""
    memory: State | None = None
    """What to carry on; None: unchanged."""
    pseudo: PseudoLabels | None = None
    """Pseudo-labels of all n samples, for the evaluator, which looks at the unlabelled ones; None: none made here."""
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    """See `Step.metrics`."""
    pairs: Tensor | None = None
    """(e, 2) int64, samples taken for alike, for the evaluator, which looks at their labels; None: none."""
    votes: Votes | None = None
    """Votes of labelling functions on all samples, for the evaluator; None: there are none."""
