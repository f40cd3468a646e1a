"""The metrics of a run as a report shows them: curves, clients by accuracy, classes, time and bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedlabel.data.federation import SHOWN_CLIENTS, shown_clients
from fedlabel.metric_tags import Tag, find_tag
from fedlabel.record.layout import Margin, shown_charts
from fedlabel.record.names import SECONDS
from fedlabel.study.holdings import Facts, evenly

Rows = Sequence[Mapping[str, Any]]
"""Rounds, as `read_metrics` returns them."""
BARS = 100
"""Clients in the chart of their accuracy: of more, those at evenly spaced ranks."""
COLUMNS = {
    "eval/client_accuracy": "accuracy",
    "pseudo/client_coverage": "coverage",
    "pseudo/client_accuracy": "pseudo-labels right",
    "pseudo/client_from_global": "from global",
    "train/client_loss": "training loss",
}
"""List with a number for each client -> what it is."""
CLASS_LISTS = {
    "accuracy": "eval/class_accuracy",
    "coverage_local": "pseudo/class_coverage_local",
    "accuracy_local": "pseudo/class_accuracy_local",
    "coverage_global": "pseudo/class_coverage_global",
    "accuracy_global": "pseudo/class_accuracy_global",
}
"""Name in the report -> list with a number for each class."""


BY_EXPERT = ("accuracy by expert", "coverage by expert", "who labels, and do the experts agree")
"""Charts that compare the local with the global model as giver of pseudo-labels."""


def charts(rows: Rows, own: Sequence[Tag], points: int) -> dict[str, list[dict[str, Any]]]:
    """Returns page -> its charts: title, unit, whether its second and third curve are edges of a band, whether all of
    it is 0 in all rounds, and curves.

    Charts `BY_EXPERT` are left out where only one model ever gives pseudo-labels.

    Args:
        rows: the rounds.
        own: tags that the method declares.
        points: most points of a curve.
    """
    present = {tag for row in rows for tag, value in row.items() if tag != "round" and type(value) in (int, float)}
    found: dict[str, list[dict[str, Any]]] = {}
    nonzero = {tag for tag in present if any(row.get(tag) for row in rows)}
    without = () if {"pseudo/coverage_local", "pseudo/coverage_global"} <= nonzero else BY_EXPERT
    for page, of_page in shown_charts(present, own).items():
        found[page] = []
        for title, names in of_page.items():
            if title in without:
                continue
            tags = [tag for name in names if name in present and (tag := find_tag(name, own)) is not None]
            unit, scale = _UNITS.get(tags[0].unit, (tags[0].unit, 1.0))
            found[page].append(
                {
                    "title": title.removesuffix(f" ({tags[0].unit})"),
                    "unit": unit,
                    "band": isinstance(names, Margin),
                    "zero": not any(tag.name in nonzero for tag in tags),
                    "curves": [{"name": tag.title, "points": _curve(rows, tag.name, scale, points)} for tag in tags],
                }
            )
    return {page: of_page for page, of_page in found.items() if of_page}


_UNITS = {"share": ("%", 100.0), "bytes": ("MB", 1e-6), "index": ("", 1.0)}
"""Unit of a metric -> that of a chart's axis, and what values are multiplied by."""


def _curve(rows: Rows, name: str, scale: float, points: int) -> list[tuple[int, float]]:
    found = [(row["round"], scale * row[name]) for row in rows if row.get(name) is not None]
    return [(found[place][0], _five_digits(found[place][1])) for place in evenly(len(found), points)]


def clients(rows: Rows, num_clients: int) -> dict[str, Any] | None:
    """Returns the clients by accuracy, the worst first, with what else is recorded of each; None without evaluation.

    Each number is the last one that there was.
    """
    accuracy = latest(rows, "eval/client_accuracy")
    numbers = shown_clients(num_clients).tolist()
    if len(accuracy) != len(numbers) or not any(value is not None for value in accuracy):
        return None
    # Of more clients than are listed, those in lists of training differ from round to round.
    names = COLUMNS if num_clients <= SHOWN_CLIENTS else {"eval/client_accuracy": "accuracy"}
    lists = {name: latest(rows, tag) for tag, name in names.items()}
    lists = {name: values for name, values in lists.items() if len(values) == len(numbers)}
    order = sorted((value, place) for place, value in enumerate(accuracy) if value is not None)
    places = [order[rank][1] for rank in evenly(len(order), BARS)]
    return {
        "columns": list(lists),
        "clients": [numbers[place] for place in places],
        "values": [[_short(values[place]) for values in lists.values()] for place in places],
        "of": num_clients,
        "mean": _short(statistics.fmean(value for value, _ in order)),
    }


def classes(rows: Rows, audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what is recorded of each class, see `CLASS_LISTS`: the last number that there was; None without any."""
    lists = {name: latest(rows, tag) for name, tag in CLASS_LISTS.items()}
    number = max(map(len, lists.values()))
    if number == 0:
        return None
    names = list(map(str, audit.get("classes", ())))
    found: dict[str, Any] = {name: [_short(value) for value in values] for name, values in lists.items() if values}
    return {"names": names if len(names) == number else list(map(str, range(number))), **found}


def latest(rows: Rows, tag: str) -> list[float | None]:
    """Returns the last number that there was at each place of a list in metrics.jsonl; empty without it."""
    found: list[float | None] = []
    for row in rows:
        new = row.get(tag)
        if type(new) is list:
            old = found if len(found) == len(new) else new
            found = [was if value is None else value for value, was in zip(new, old, strict=True)]
    return found


def costs(rows: Rows) -> Facts:
    """Returns the time and the bytes of all rounds."""
    if not rows:
        return []
    sums = {tag: math.fsum(row.get(tag) or 0.0 for row in rows) for tag in _SUMS}
    seconds = sums["system/round_seconds"]
    facts: Facts = [
        ("time in rounds", f"{seconds:,.1f} s, {seconds / len(rows):.3g} s a round"),
        ("bytes up, all clients", f"{sums['comm/bytes_up'] / 1e6:,.2f} MB"),
        ("bytes down, all clients", f"{sums['comm/bytes_down'] / 1e6:,.2f} MB"),
    ]
    names = {
        "train/forward_samples": "samples sent through a model",
        "train/backward_samples": "samples propagated back",
        "system/failed_clients": "failed clients",
        "system/late_clients": "clients that were too late",
        "system/dropped_clients": "clients that dropped out",
    }
    facts += [(name, f"{sums[tag]:,.0f}") for tag, name in names.items() if any(tag in row for row in rows)]
    simulated = [row[SECONDS] for row in rows if row.get(SECONDS) is not None]
    return [*facts, *([("simulated time", f"{max(simulated):,.0f} s")] if simulated else [])]


_SUMS = (
    *("system/round_seconds", "comm/bytes_up", "comm/bytes_down", "train/forward_samples", "train/backward_samples"),
    *("system/failed_clients", "system/late_clients", "system/dropped_clients"),
)


def _short(value: float | None) -> float | None:
    return None if value is None else _five_digits(value)


def _five_digits(value: float) -> float:
    """Returns a number that is shorter as text."""
    return float(f"{value:.5g}")
