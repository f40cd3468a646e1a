"""Results of a run: which rounds are averaged, and what is best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fedlabel.record.results import averaged_rounds, is_evaluated, last_tenth, name_mean, summarize


@pytest.mark.parametrize(
    ("num_rounds", "first"),
    [(0, 1), (1, 1), (2, 1), (5, 1), (6, 2), (20, 16), (50, 46), (51, 46), (60, 55), (1000, 901)],
)
def test_the_last_tenth_has_five_rounds_at_least(num_rounds: int, first: int) -> None:
    """51 rounds: a tenth is 5.1, so six of them."""
    assert last_tenth(num_rounds) == range(first, num_rounds + 1)


@pytest.mark.parametrize(
    ("num_rounds", "every", "rounds"),
    [
        (60, 4, [*range(4, 53, 4), *range(55, 61)]),
        (20, 1, range(1, 21)),
        (7, 50, range(3, 8)),
        (3, 2, [1, 2, 3]),
        (40, 39, [*range(36, 41)]),
    ],
)
def test_each_round_of_the_last_tenth_is_evaluated(num_rounds: int, every: int, rounds: Sequence[int]) -> None:
    assert [n for n in range(1, num_rounds + 1) if is_evaluated(n, num_rounds, every)] == [*rounds]


def test_summarize() -> None:
    """13 rounds of 0.1 .. 1.2 and 0.5: the last five are 0.9 .. 1.2 and 0.5; (4.2 + 0.5) / 5 = 0.94."""
    rows = [{"round": i, "eval/accuracy": i / 10} for i in range(1, 13)] + [{"round": 13, "eval/accuracy": 0.5}]
    assert summarize(rows) == {"last": 0.5, "best": 1.2, "mean_last_tenth": pytest.approx(0.94)}


def test_summarize_counts_only_rows_with_a_value() -> None:
    """Of the last five of seven rounds, of which the third was not evaluated, two others have x: (3 + 5) / 2; none has
    y."""
    found = {1: {"y": 8.0}, 2: {"x": 1.0}, 3: {"x": 9.0}, 4: {"x": 3.0}, 5: {"x": None}, 6: {"x": 5.0}}
    rows = [{"round": number, **found.get(number, {})} for number in range(1, 8)]
    for row in rows[3:]:
        row["eval/accuracy"] = 0.5
    assert summarize(rows, "x") == {"last": 5.0, "best": 9.0, "mean_last_tenth": 4.0}
    early = summarize(rows, "y")
    assert (early["last"], early["best"]) == (8.0, 8.0)
    assert math.isnan(early["mean_last_tenth"])
    assert all(math.isnan(value) for value in summarize(rows, "absent").values())
    assert all(math.isnan(value) for value in summarize([]).values())


@pytest.mark.parametrize(
    ("num_rounds", "evaluated", "counted", "name"),
    [
        (60, range(4, 61), {"first": 55, "last": 60, "count": 6}, "mean of rounds 55–60"),
        (2, [1, 2], {"first": 1, "last": 2, "count": 2}, "mean of rounds 1–2"),
        (1, [1], {"first": 1, "last": 1, "count": 1}, "mean of round 1"),
        (15, [10, 13, 14, 15], {"first": 11, "last": 15, "count": 3}, "mean of 3 of rounds 11–15"),
        (15, [], {"first": 11, "last": 15, "count": 0}, "mean of 0 of rounds 11–15"),
    ],
)
def test_a_mean_says_of_which_rounds(
    num_rounds: int, evaluated: Sequence[int], counted: dict[str, int], name: str
) -> None:
    """The fourth was to have 20 rounds, evaluated every 10th, was stopped after 12 and resumed for 15."""
    rows = [{"round": n, **({"eval/accuracy": 0.5} if n in evaluated else {})} for n in range(1, num_rounds + 1)]
    assert averaged_rounds(rows) == counted
    assert name_mean(counted) == name


@pytest.mark.parametrize(
    ("key", "best"),
    [
        ("train/loss", 1.0),
        ("train/loss_supervised", 1.0),
        ("pseudo/ece_kept", 1.0),
        ("eval/client_accuracy_sd", 1.0),
        ("eval/accuracy", 2.0),
    ],
)
def test_the_best_loss_or_error_is_the_lowest(key, best):
    assert summarize([{"round": 1, key: 1.0}, {"round": 2, key: 2.0}], key)["best"] == best
