"""What a client of few samples keeps to itself, see `PrivacyConfig.min_count`.

A sum over one sample is that sample's, a histogram of a tiny client lists its labels, and a statistic of one bag is
about its counts. What is left out depends on how many samples there are alone, never on what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedlabel.data.labels.supervision import KIND_NAMES, Supervision
from fedlabel.learning.client import ClientData, ClientUpdate
from fedlabel.learning.metrics import Counts
from fedlabel.methods.batch import State
from fedlabel.methods.recipe import Recipe
from fedlabel.metric_tags import Tag


def without_tiny(data: ClientData, least: int) -> ClientData:
    """Returns a client's data, or none of them if they are fewer than `least` samples: then it takes no part."""
    if len(data.images) >= least:
        return data
    return ClientData(data.images[:0], data.supervision.rows(torch.zeros(0, dtype=torch.int64)))


def without_few(
    update: ClientUpdate,
    supervision: Supervision,
    recipe: Recipe,
    shared: State,
    tags: Mapping[str, Tag],
    least: int,
    audit: bool,
) -> ClientUpdate:
    """Returns an update without what is made of fewer than `least` samples.

    Args:
        update: of a round.
        supervision: the client's.
        recipe: the method's.
        shared: the shared state that the client got.
        tags: name -> tag of each metric.
        least: see `PrivacyConfig.min_count`.
        audit: whether the client is simulated: its votes are then the evaluator's, and stay.
    """
    if not _has_small_group(supervision, least):
        enough = {name: fewest(tags[name], least, update.times, recipe.num_functions) for name in update.sums}
        return replace(update, sums={name: pair for name, pair in update.sums.items() if pair[1] >= enough[name]})
    nobody = recipe.memory.start(supervision.candidates[:0].to(_device(update)))
    statistics = recipe.shared.statistics({**nobody, **shared})
    nothing: Counts = {}
    kept = update.kept if len(supervision.candidates) >= least else {}
    return replace(update, sums=nothing, statistics=statistics, kept=kept, votes=update.votes if audit else None)


def _has_small_group(supervision: Supervision, least: int) -> bool:
    """Returns whether a client has some, but fewer than `least` samples with one kind of label, or bags."""
    sizes = [*torch.bincount(supervision.kind.cpu(), minlength=len(KIND_NAMES)).tolist()]
    sizes += [len(supervision.bag_counts), int(supervision.voted_on.sum())]
    return any(0 < size < least for size in sizes)


def fewest(tag: Tag, least: int, times: int, functions: int) -> int:
    """Returns the count from which on a metric must be of `least` different samples.

    Args:
        tag: the metric's. One of pairs counts those of so many samples, one of functions each sample for all of them.
        least: see above.
        times: see `ClientUpdate.times`.
        functions: how many labelling functions, or heads that vote, there are.
    """
    if tag.of_pairs:
        return least**2 * times
    return least * times * (max(1, functions) if tag.name.startswith("functions/") else 1)


def _device(update: ClientUpdate) -> torch.device:
    model = next(iter(update.parts.values())).state
    return next(iter(model.values())).device
