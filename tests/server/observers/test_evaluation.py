"""What an evaluation of the global model leaves, and when it may select it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedlabel.learning.evaluation import Evaluation
from fedlabel.methods.recipe import LabelKinds, Recipe, Stage
from server.observers import Report, Round
from server.observers.evaluation import EvaluationObserver
from server.state import ServerState

EVALUATION = Evaluation(0.5, np.array([[3, 1], [2, 4]]), np.array([0.5, 1.0]), np.zeros((3, 1)))


def report_of(
    number: int,
    *,
    found: Evaluation | None = EVALUATION,
    score: float | None = 0.25,
    final: bool = True,
    select: str | None = None,
    is_evaluated: bool = True,
) -> Report:
    """Of a run of 10 rounds of which every fourth is evaluated, without figures."""
    experiment: Any = SimpleNamespace(
        config=SimpleNamespace(
            num_rounds=10,
            evaluation=SimpleNamespace(every=4, figures=False, select=select, panel_samples=0),
            draws_figures=False,
            devices=SimpleNamespace(correlation=0.0),
        ),
        recipe=Recipe((Stage((), final=final),), LabelKinds.TRUE),
        evaluate=lambda *arguments: asked.append(arguments) or found,
        selection_score=lambda *arguments: score,
    )
    asked: list[Any] = []
    nobody: Any = None
    state: Any = ServerState(number, {"w": "weights"}, "", shared={"s": "shared"})  # type: ignore[dict-item]
    report = EvaluationObserver(experiment).after_round(Round(number, nobody, None, 0.0, is_evaluated), state)
    assert asked == ([(number, {"model": {"w": "weights"}}, {"s": "shared"})] if is_evaluated else [])
    return report


def test_a_round_is_evaluated_as_the_state_is_after_it() -> None:
    report = report_of(4)
    assert report.metrics == EVALUATION.metrics()
    np.testing.assert_array_equal(report.lists["eval/class_accuracy"], [3 / 4, 4 / 6])
    np.testing.assert_array_equal(report.lists["eval/client_accuracy"], [0.5, 1.0])
    assert report.figures == {}
    assert report_of(5, is_evaluated=False) == Report()
    assert report_of(4, found=None) == Report()  # there is no model to evaluate yet


def test_of_many_clients_evenly_spaced_ones_are_listed_and_all_are_measured() -> None:
    accuracy = np.arange(5_000) / 5_000
    accuracy[1] = 1.0
    found = Evaluation(0.5, np.array([[3, 1], [2, 4]]), accuracy, np.zeros((3, 1)))
    report = report_of(4, found=found)
    np.testing.assert_array_equal(report.lists["eval/client_accuracy"], accuracy[::5])
    assert report.metrics["eval/mean_client_accuracy"] == accuracy.mean()


def test_what_is_no_model_as_the_run_is_for_has_an_interim_accuracy_only() -> None:
    assert report_of(4, final=False, select="instance_accuracy") == Report({"interim/accuracy": 0.7})


@pytest.mark.parametrize(("number", "selects"), [(4, True), (8, True), (9, False), (10, True)])
def test_only_rounds_that_any_longer_run_evaluates_may_be_selected(number: int, selects: bool) -> None:
    """And the last: 9 is evaluated as it is of the last tenth."""
    metrics = report_of(number, select="instance_accuracy").metrics
    assert {name: value for name, value in metrics.items() if name.startswith("select/")} == (
        {"select/accuracy": 0.25} if selects else {}
    )
    assert EVALUATION.metrics().items() <= metrics.items()
    assert "select/accuracy" not in report_of(number).metrics
    assert "select/accuracy" not in report_of(number, select="instance_accuracy", score=None).metrics
