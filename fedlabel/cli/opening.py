"""What a run says of itself before its first round: method, data, clients, and who holds which labels."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np

from fedlabel.config import ExperimentConfig
from fedlabel.data.federation import Federation
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.partition import COLUMN
from fedlabel.experiment import Experiment
from fedlabel.names import counted
from fedlabel.shown import shown

WIDTH = 80
"""Columns of the lines, so that they fit any terminal and read well in a file."""
LABELS = {
    "label": ("a true label", "true labels"),
    "candidates": ("a candidate set", "candidate sets"),
    "noisy label": ("a label that may be wrong", "labels that may be wrong"),
    "noisy candidates": ("a candidate set that may miss the truth", "candidate sets that may miss the truth"),
    "annotators": ("labels of annotators", "labels of annotators"),
    "candidates and labels": ("a candidate set and labels of annotators", "candidate sets and labels of annotators"),
    "bag": ("a bag with class counts", "bags with class counts"),
    "votes": ("votes of labelling functions", "votes of labelling functions"),
}
"""Kind of label -> what one sample has, and what a client holds."""


def opening(experiment: Experiment, width: int = WIDTH) -> list[str]:
    """Returns the lines of text, none longer than `width` where words allow it."""
    rows = [*_setting(experiment), *_labels(experiment.federation)]
    margin = max(len(head) for head, _ in rows) + 2
    lines = []
    for head, text in rows:
        lines += textwrap.wrap(
            text, width, initial_indent=head.ljust(margin), subsequent_indent=" " * margin, break_on_hyphens=False
        )
    return lines


def _setting(experiment: Experiment) -> Iterator[tuple[str, str]]:
    config, dataset = experiment.config, experiment.federation.dataset
    described = config.method.description
    yield "method", shown(config.method.name) + (f": {described}" if described else "")
    evaluated = f"{len(experiment.evaluates_on.split.labels):,} to evaluate on ({config.evaluation.split})"
    samples = f"{counted(len(dataset.train.labels), 'sample')} of {dataset.num_classes:,} classes"
    held_out = len(dataset.validation.labels) if config.evaluation.split != "validation" else 0
    validation = f", {held_out:,} held out for validation (data.validation_fraction)" if held_out else ""
    yield "data", f"{shown(dataset.name)}: {samples} to train on, {evaluated}{validation}"
    yield "clients", f"{_split(config)}; {_cohort(config)} in each of {counted(config.num_rounds, 'round')}"


def _cohort(config: ExperimentConfig) -> str:
    size = config.cohort_size
    return (
        "all of them train" if size == config.num_clients else f"{size:,} of them {'train' if size > 1 else 'trains'}"
    )


def _split(config: ExperimentConfig) -> str:
    law, clients = config.partition, counted(config.num_clients, "client")
    if law.kind.startswith("dirichlet"):
        return f"{clients}, classes spread by Dirichlet {law.dirichlet_alpha:g}"
    if law.kind == "classes_per_client":
        return f"{clients} of {law.classes_per_client} classes each"
    if law.kind == COLUMN:
        return f"{clients}, by the column {shown(law.column)}"
    return f"{clients}, split {shown(law.kind)}"


def _labels(federation: Federation) -> Iterator[tuple[str, str]]:
    """Yields the label card: which clients hold what, how many samples have it, and how evenly it is spread."""
    parts, kind = federation.parts, federation.record.kind.numpy()[federation.parts.rows]
    held = {KIND_NAMES[each]: parts.sums(kind == each) for each in np.unique(kind) if each}
    with_any = parts.sums(kind > 0)
    holders = [_holding(int((counts > 0).sum()), LABELS[name][1]) for name, counts in held.items()]
    if not with_any.all():
        holders.append(_holding(int((with_any == 0).sum()), "none"))
    if at_server := len(federation.server_rows):
        holders.append(f"the server holds {counted(at_server, 'labelled sample')}")
    yield "labels", ", ".join(holders)
    amounts = [f"{_share(int(counts.sum()), len(kind))} have {LABELS[name][0]}" for name, counts in held.items()]
    if nothing := int((kind == 0).sum()):
        amounts.append(f"{_share(nothing, len(kind))} have nothing")
    yield "", f"of {counted(len(kind), 'sample')} at clients {', '.join(amounts)}"
    record = federation.record
    per_class = record.candidates.numpy()[record.labeled.numpy()].sum(0)
    spread = f"a client has {_range(with_any)} samples with labels"
    yield "", f"{spread}, a class {_range(per_class)} labels" if per_class.any() else spread


def _holding(clients: int, what: str) -> str:
    return f"{counted(clients, 'client')} {'holds' if clients == 1 else 'hold'} {what}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f}%)"


def _range(counts: np.ndarray) -> str:
    least, most = int(counts.min()), int(counts.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
