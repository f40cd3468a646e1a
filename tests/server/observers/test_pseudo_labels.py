"""Pseudo-labels against the truth, over all clients, per class and per client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedlabel.learning.metrics import Counts, pseudo_label_metrics
from fedlabel.methods.recipe import LabelKinds, Recipe, Stage
from server.observers import Report
from server.observers.pseudo_labels import PseudoLabelObserver
from server.state import ServerState
from tests.server.rounds import PSEUDO, content, reply, seen, tally_of

STATE = ServerState(4, {}, "")


def observer(final: bool = True, figures: bool = False, num_clients: int = 3) -> PseudoLabelObserver:
    experiment: Any = SimpleNamespace(
        config=SimpleNamespace(
            num_clients=num_clients, num_rounds=4, evaluation=SimpleNamespace(every=1), draws_figures=figures
        ),
        federation=SimpleNamespace(dataset=SimpleNamespace(class_names=("a", "b", "c"))),
        recipe=Recipe((Stage((), final=final),), LabelKinds.TRUE),
    )
    return PseudoLabelObserver(experiment)


def report_of(watching: PseudoLabelObserver, *counts: Counts, **options: Any) -> Report:
    replies = [reply(node, content(**each)) for node, each in zip((11, 12, 13), counts, strict=False)]
    return watching.after_round(seen(tally_of(replies)[0], **options), STATE)


def test_of_many_clients_only_those_that_trained_are_listed() -> None:
    lists = report_of(observer(num_clients=1_000_000), PSEUDO, {}, PSEUDO).lists
    nan = float("nan")
    np.testing.assert_array_equal(lists["pseudo/client_coverage"], [5 / 8, nan, 5 / 8])
    np.testing.assert_array_equal(lists["pseudo/client_accuracy"], [4 / 5, nan, 4 / 5])


def test_rates_by_class_and_by_client() -> None:
    """Clients 0 and 2 drew 4, 2 and 2 of each class, kept 3, 2, 0, of which 3, 1 are right; client 1 is silent."""
    report = report_of(observer(), PSEUDO, {}, PSEUDO)
    both = {name: [2 * value for value in values] for name, values in PSEUDO.items()}
    tenths = dict.fromkeys(("pseudo/lowest_10pct_client_accuracy", "pseudo/highest_10pct_client_accuracy"), 4 / 5)
    assert report.metrics == {**pseudo_label_metrics(both), **tenths}
    assert report.metrics["pseudo/accuracy"] == 4 / 5
    nan = float("nan")
    expected = {
        "pseudo/class_coverage": [3 / 4, 1, 0],
        "pseudo/class_accuracy": [1, 1 / 2, nan],
        "pseudo/class_coverage_local": [3 / 4, 1 / 2, 0],
        "pseudo/class_coverage_global": [0, 1 / 2, 0],
        "pseudo/class_accuracy_local": [1, 0, nan],
        "pseudo/class_accuracy_global": [nan, 1, nan],
        "pseudo/client_coverage": [5 / 8, nan, 5 / 8],
        "pseudo/client_accuracy": [4 / 5, nan, 4 / 5],
    }
    assert report.lists.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(report.lists[name], values)
    assert report.bins.keys() == {"pseudo/confidences"}
    np.testing.assert_array_equal(report.bins["pseudo/confidences"], [16, *[0] * 14])
    assert report.figures == {}


def test_nothing_is_said_where_nothing_was_counted() -> None:
    assert report_of(observer(figures=True), {}, {}, {}, is_evaluated=True) == Report()


@pytest.mark.parametrize(
    ("final", "figures", "evaluated", "shown"),
    [(True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)],
)
def test_the_figure_comes_with_those_of_an_evaluation(final: bool, figures: bool, evaluated: bool, shown: bool) -> None:
    report = report_of(observer(final, figures), PSEUDO, is_evaluated=evaluated)
    assert list(report.figures) == ["pseudo/reliability", "pseudo/precision_coverage", "pseudo/experts"] * shown
