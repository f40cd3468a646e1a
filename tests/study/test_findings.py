"""Each warning at its threshold, and silence below it and where its metrics are not recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlabel.study.findings import (
    drift,
    failed,
    fallen,
    find_all,
    left_behind,
    never_trained,
    off_diagonal,
    over_confident,
    unused,
)


def rounds(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    """A round for each value of the metrics, whose names have "__" for "/"."""
    number = max(map(len, columns.values()))
    return [
        {"round": place + 1, **{name.replace("__", "/"): values[place] for name, values in columns.items()}}
        for place in range(number)
    ]


def test_nothing_is_said_of_nothing() -> None:
    assert find_all([], 5) == []
    assert find_all(rounds(eval__accuracy=[0.5] * 20), 5) == []
    assert never_trained([], 5) is None
    assert failed([], []) is None


def test_drift_is_a_loss_that_falls_with_accuracy() -> None:
    """Eight rounds: the third quarter is rounds 5 and 6, the last one 7 and 8."""
    losses = [2, 2, 2, 2, 1.0, 1.0, 0.9, 0.9]
    falling = [0.5, 0.5, 0.5, 0.5, 0.7, 0.7, 0.6, 0.6]
    found = drift(rounds(train__loss=losses, eval__accuracy=falling))
    assert found is not None
    assert "fell from 1 to 0.9 while accuracy fell from 70.0 % to 60.0 %" in found.text
    assert "5.0 % of it and accuracy by 1 points" in found.text
    assert drift(rounds(train__loss=losses, eval__accuracy=[0.5] * 8)) is None
    assert drift(rounds(train__loss=[1.0] * 8, eval__accuracy=falling)) is None
    assert drift(rounds(train__loss=losses[1:], eval__accuracy=falling[1:])) is None, "seven rounds show no trend"
    assert found in find_all(rounds(train__loss=losses, eval__accuracy=falling), 5)


def test_an_accuracy_that_fell_below_its_best() -> None:
    """The last five rounds count."""
    found = fallen(rounds(eval__accuracy=[0.2, 0.8, 0.3, *[0.6] * 5]), "eval/accuracy", "accuracy")
    assert found is not None
    assert found.title == "The accuracy fell"
    assert "80.0 % at best and 60.0 % over the last rounds (said from 10 points on)" in found.text
    assert fallen(rounds(eval__accuracy=[0.2, 0.8, 0.3, *[0.75] * 5]), "eval/accuracy", "accuracy") is None


def test_clients_that_never_took_part() -> None:
    losses = [[1.0, None, None, 0.5], [None, 2.0, None, 0.5]]
    found = never_trained(rounds(train__client_loss=losses), 4)
    assert found is not None
    assert "1 of 4 clients gave no result in any of 2 rounds (said from one on): 2." in found.text
    assert never_trained(rounds(train__client_loss=[*losses, [None, None, 1.0, None]]), 4) is None
    many = never_trained(rounds(train__client_loss=[[None] * 29 + [1.0]]), 30)
    assert many is not None
    assert "7, 8, 9 and 19 more" in many.text
    assert never_trained(rounds(train__client_loss=[[1.0, None]]), 2_000) is None, "these are any two that trained"


def test_clients_left_behind() -> None:
    def found(worst: float):
        return left_behind(rounds(eval__mean_client_accuracy=[0.9] * 5, eval__worst_10pct_client_accuracy=[worst] * 5))

    assert found(0.75) is None
    assert "accuracy of 60.0 %, all of them 90.0 % in the mean (said from 20 points on)" in found(0.6).text


def test_a_noise_matrix_off_its_diagonal() -> None:
    """The last one counts; a round may have none."""
    found = off_diagonal(rounds(transition__smallest_diagonal=[0.9, 0.4, None]))
    assert found is not None
    assert "is 40.0 % (said below 50.0 %)" in found.text
    assert off_diagonal(rounds(transition__smallest_diagonal=[0.4, 0.5])) is None


def test_an_over_confident_expert() -> None:
    def found(accuracy: float, expert: str = "global"):
        columns = {"pseudo__confidence_global": [0.9] * 5, "pseudo__accuracy_global": [accuracy] * 5}
        return over_confident(rounds(**columns), expert)

    assert found(0.81) is None
    assert found(0.7, "local") is None, "nothing is recorded of that one"
    assert found(0.7).title == "The global model is over-confident"
    assert "confidence of 90.0 % and 70.0 % of them are right" in found(0.7).text


def test_hardly_any_pseudo_label_is_used() -> None:
    assert unused(rounds(pseudo__coverage=[0.05] * 5)) is None
    assert "0.5 % of the unlabelled samples" in unused(rounds(pseudo__coverage=[0.005] * 5)).text


def test_failed_clients() -> None:
    found = failed(rounds(system__failed_clients=[1.0, 2.0]), ["Round 2, client 1: ValueError: bad"])
    assert found is not None
    assert found.text.startswith("3 failures (said from one on; failures.log has all). The last: Round 2, client 1: Va")
