"""Warnings about a run, from its metrics: each a function of the rounds that returns a `Finding`, or None."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedlabel.data.federation import SHOWN_CLIENTS
from fedlabel.names import counted
from fedlabel.record.results import last_tenth
from fedlabel.shown import shown

Rounds = Sequence[Mapping[str, Any]]
"""As `read_metrics` returns them."""

LEAST_ROUNDS = 8
"""Fewer say nothing about a trend."""
LOSS_FALLS, ACCURACY_FALLS = 0.05, 0.01
"""Drift: so much the training loss falls, as a share of it, and accuracy, from the third to the fourth quarter."""
BELOW_BEST = 0.10
"""An accuracy so far below the best one has fallen."""
DIAGONAL = 0.5
"""A class of which a smaller share keeps its label is taken for others more often than for itself."""
TOO_SURE = 0.10
"""Mean confidence of an expert minus its accuracy."""
LEFT_BEHIND = 0.20
"""Mean accuracy of the clients minus that of their worst tenth."""
UNUSED = 0.05
"""A smaller coverage of pseudo-labels means that hardly any is used."""
NAMED = 10
"""Clients that are named one by one."""


class Finding(NamedTuple):
    """A warning."""

    title: str
    text: str
    """What was found, from which threshold on it is said, and what may help."""


def find_all(rounds: Rounds, num_clients: int) -> list[Finding]:
    """Returns all warnings about a run.

    Args:
        rounds: of its last stage, whose numbers can be compared with each other, or all if there is only one.
        num_clients: of the federation.
    """
    checks: Sequence[Callable[[], Finding | None]] = (
        lambda: drift(rounds),
        lambda: fallen(rounds, "eval/accuracy", "accuracy"),
        lambda: fallen(rounds, "pseudo/accuracy", "accuracy of pseudo-labels"),
        lambda: left_behind(rounds),
        lambda: off_diagonal(rounds),
        lambda: over_confident(rounds, "local"),
        lambda: over_confident(rounds, "global"),
        lambda: unused(rounds),
    )
    return [finding for check in checks if (finding := check()) is not None]


def drift(rounds: Rounds) -> Finding | None:
    """Clients fit their own data while the common model gets worse: their updates point apart."""
    both = [row for row in rounds if row.get("train/loss") is not None and row.get("eval/accuracy") is not None]
    quarter = len(both) // 4
    if len(both) < LEAST_ROUNDS:
        return None
    before, after = both[2 * quarter : 3 * quarter], both[-quarter:]
    loss, loss_after = _mean(before, "train/loss"), _mean(after, "train/loss")
    accuracy, accuracy_after = _mean(before, "eval/accuracy"), _mean(after, "eval/accuracy")
    if loss_after > (1 - LOSS_FALLS) * loss or accuracy_after > accuracy - ACCURACY_FALLS:
        return None
    return Finding(
        "Drift",
        f"From the third to the last quarter of the rounds the training loss fell from {loss:.3g} to {loss_after:.3g} "
        f"while accuracy fell from {_percent(accuracy)} to {_percent(accuracy_after)} (said when the loss falls by "
        f"{_percent(LOSS_FALLS)} of it and accuracy by {_points(ACCURACY_FALLS)}): clients fit their own labels and "
        "their models do not add up. Fewer local steps, a smaller learning rate or training.prox_mu may help.",
    )


def fallen(rounds: Rounds, tag: str, name: str) -> Finding | None:
    """An accuracy is well below its best."""
    values = [row[tag] for row in rounds if row.get(tag) is not None]
    last = _recent(rounds, tag)
    if len(values) < LEAST_ROUNDS or math.isnan(last) or last > max(values) - BELOW_BEST:
        return None
    return Finding(
        f"The {name} fell",
        f"It was {_percent(max(values))} at best and {_percent(last)} over the last rounds (said from "
        f"{_points(BELOW_BEST)} on). Where pseudo-labels fall too, a model learns its own errors: a higher confidence "
        "threshold, or more labels, may help.",
    )


def never_trained(rounds: Rounds, num_clients: int) -> Finding | None:
    """Some clients have not taken part in any round. Of all stages' rounds."""
    lists = [row["train/client_loss"] for row in rounds if row.get("train/client_loss")]
    # Of more clients than are listed, a list is of those that trained.
    if not lists or num_clients > SHOWN_CLIENTS or any(len(each) != num_clients for each in lists):
        return None
    absent = [client for client, losses in enumerate(zip(*lists, strict=True)) if all(x is None for x in losses)]
    if not absent:
        return None
    names = ", ".join(map(str, absent[:NAMED])) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
    return Finding(
        "Clients that never took part",
        f"{len(absent)} of {counted(num_clients, 'client')} gave no result in any of {counted(len(rounds), 'round')} "
        f"(said from one on): {names}. The model knows nothing of their data: more rounds, or a larger "
        "fraction_train, reach them; see also the failures.",
    )


def left_behind(rounds: Rounds) -> Finding | None:
    """The worst tenth of the clients is far below the mean."""
    mean, worst = _recent(rounds, "eval/mean_client_accuracy"), _recent(rounds, "eval/worst_10pct_client_accuracy")
    if math.isnan(mean) or math.isnan(worst) or mean - worst < LEFT_BEHIND:
        return None
    return Finding(
        "Clients left behind",
        f"The worst tenth of the clients has an accuracy of {_percent(worst)}, all of them {_percent(mean)} in the "
        f"mean (said from {_points(LEFT_BEHIND)} on). Compare what they hold with what the others do.",
    )


def off_diagonal(rounds: Rounds) -> Finding | None:
    """A class of the noise matrix T is mostly given other labels."""
    tag = "transition/smallest_diagonal"
    last = next((row[tag] for row in reversed(rounds) if row.get(tag) is not None), math.nan)
    if math.isnan(last) or last >= DIAGONAL:
        return None
    return Finding(
        "Noise matrix off its diagonal",
        f"The smallest diagonal entry of the learnt T is {_percent(last)} (said below {_percent(DIAGONAL)}). T is "
        "learnt up to a permutation of the classes, so two may have been exchanged: a longer warm-up, or some true "
        "labels, help.",
    )


def over_confident(rounds: Rounds, expert: str) -> Finding | None:
    """The pseudo-labels of a model are surer than they are right.

    Args:
        rounds: the rounds.
        expert: "local" or "global".
    """
    confidence, accuracy = _recent(rounds, f"pseudo/confidence_{expert}"), _recent(rounds, f"pseudo/accuracy_{expert}")
    if math.isnan(confidence) or math.isnan(accuracy) or confidence - accuracy < TOO_SURE:
        return None
    return Finding(
        f"The {expert} model is over-confident",
        f"Where it is the expert, its pseudo-labels have a confidence of {_percent(confidence)} and "
        f"{_percent(accuracy)} of them are right, over the last rounds (said from {_points(TOO_SURE)} on). A higher "
        "confidence threshold keeps fewer wrong ones; see precision against coverage.",
    )


def unused(rounds: Rounds) -> Finding | None:
    """Hardly any pseudo-label is used."""
    coverage = _recent(rounds, "pseudo/coverage")
    if math.isnan(coverage) or coverage >= UNUSED:
        return None
    return Finding(
        "Hardly any pseudo-label is used",
        f"{_percent(coverage)} of the unlabelled samples drawn in the last rounds (said below {_percent(UNUSED)}): the "
        "run learns from the labels alone. A lower confidence threshold uses more.",
    )


def failed(rounds: Rounds, first_lines: Sequence[str]) -> Finding | None:
    """Clients failed.

    Args:
        rounds: all.
        first_lines: of each failure in failures.log.
    """
    number = max(len(first_lines), int(sum(row.get("system/failed_clients") or 0 for row in rounds)))
    if number == 0:
        return None
    last = f" The last: {shown(first_lines[-1], 300)}" if first_lines else ""
    return Finding("Failed clients", f"{counted(number, 'failure')} (said from one on; failures.log has all).{last}")


def _mean(rounds: Rounds, tag: str) -> float:
    values = [row[tag] for row in rounds if row.get(tag) is not None]
    return math.fsum(values) / len(values) if values else math.nan


def _recent(rounds: Rounds, tag: str) -> float:
    """Returns the mean of a metric over the last tenth of the run, see `last_tenth`; NaN without one."""
    window = last_tenth(rounds[-1]["round"] if rounds else 0)
    return _mean([row for row in rounds if row["round"] in window], tag)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:g} points"
