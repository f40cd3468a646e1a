"""The results of a run, from its rounds: which are averaged, best and last values, and what a better value is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlabel.metric_tags import LOWER, Tag, find_tag

LEAST_AVERAGED = 5
"""Rounds over which results are averaged, where a tenth of the run is less."""


def last_tenth(num_rounds: int) -> range:
    """Returns the rounds over which results are averaged: the last tenth, at least 5, all if there are fewer.

    60 rounds: 55 to 60; 16: 12 to 16; 2: 1 and 2.
    """
    count = max(LEAST_AVERAGED, -(-num_rounds // 10))
    return range(max(1, num_rounds + 1 - count), num_rounds + 1)


def is_evaluated(round_number: int, num_rounds: int, every: int) -> bool:
    """Returns whether the global model is evaluated after a round: each `every`-th one, and all of the last tenth.

    So neither how often a run is evaluated nor how fast it starts decides over which rounds its results are averaged.
    60 rounds with `every` 4: 4, 8, ..., 52, and 55 to 60.
    """
    return round_number % every == 0 or round_number in last_tenth(num_rounds)


def averaged_rounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns first and last round of the last tenth, and the number of its rounds with an evaluation.

    All of them do, but where a method has no model as yet (interim/accuracy), or in a run that was resumed with another
    number of rounds: one of 20 rounds with evaluation.every=10, stopped after the 12th and resumed for 15, has 13 to 15
    of 11 to 15.

    Args:
        rows: as `read_metrics` returns them.
    """
    window = last_tenth(rows[-1]["round"] if rows else 0)
    return {"first": window.start, "last": window.stop - 1, "count": len(_averaged(rows))}


def _averaged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    window = last_tenth(rows[-1]["round"] if rows else 0)
    return [row for row in rows if row["round"] in window and row.get("eval/accuracy") is not None]


def name_mean(rounds: Mapping[str, int]) -> str:
    """Returns the description of a mean over `averaged_rounds`: "mean of rounds 55–60"."""
    first, last, count = rounds["first"], rounds["last"], rounds["count"]
    if first >= last:
        return f"mean of round {last}"
    return f"mean of {f'{count} of ' if count < last + 1 - first else ''}rounds {first}–{last}"


def summarize(
    rows: Sequence[Mapping[str, Any]], key: str = "eval/accuracy", own: Sequence[Tag] = ()
) -> dict[str, float]:
    """Returns last and best value of a metric and its mean over the last tenth of the rounds (see `last_tenth`).

    The mean of every metric is over the same rounds: those of the last tenth with an evaluation. Only rows that have
    the key with a finite value count; without such rows, or without one among these, it is NaN. Best is the lowest
    where `lower_is_better`, else the highest.

    Values 0.1, 0.2, ..., 1.2 and then 0.5 in 13 rounds: last 0.5, best 1.2, and the last five are 0.9, 1.0, 1.1, 1.2
    and 0.5, of mean 0.94.

    Args:
        rows: as `read_metrics` returns them; the last one tells how many rounds there are.
        key: the metric's tag.
        own: see `lower_is_better`.
    """
    values, recent = ([float(row[key]) for row in rs if row.get(key) is not None] for rs in (rows, _averaged(rows)))
    if not values:
        return dict.fromkeys(("last", "best", "mean_last_tenth"), math.nan)
    best: Callable[[list[float]], float] = min if lower_is_better(key, own) else max
    mean = math.fsum(recent) / len(recent) if recent else math.nan
    return {"last": values[-1], "best": best(values), "mean_last_tenth": mean}


def best_row(rows: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    """Returns the first row with the best value of a metric; None if no row has one."""
    sign = 1 if lower_is_better(key) else -1
    return min((row for row in rows if row.get(key) is not None), key=lambda row: sign * row[key], default=None)


def lower_is_better(key: str, own: Sequence[Tag] = ()) -> bool:
    """Returns whether lower values of a metric are better, see `metric_tags`; False for an undeclared one.

    Args:
        key: the metric's tag.
        own: what the run's method declares, see `Method.metrics`.
    """
    tag = find_tag(key, own)
    return tag is not None and tag.direction == LOWER
