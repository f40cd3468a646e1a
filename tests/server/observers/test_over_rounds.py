"""What of metrics.jsonl is drawn over the rounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedlabel.record import figures_rounds
from server.observers.over_rounds import figures_over_rounds

ROWS = [
    {"round": 1, "train/client_loss": [1.0, None], "eval/accuracy": 0.5},
    {"round": 2, "train/client_loss": np.array([np.nan, 2.0]), "eval/client_accuracy": [0.25, None]}
    | {"eval/class_accuracy": [0.5, 1.0, None]},
]


@pytest.mark.parametrize("num_clients", [2, 2_000])
def test_lists_become_rounds_by_clients_and_by_classes(num_clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more clients than are listed, the lists of training are of other clients in each round: left out."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures_rounds, "clients_over_rounds_figure", lambda *given: drawn.update(clients=given))
    monkeypatch.setattr(figures_rounds, "classes_over_rounds_figure", lambda *given: drawn.update(classes=given))
    rows = ROWS
    if num_clients > 2:
        rows = [{"round": 1, "eval/client_accuracy": [0.5] * 1000, "train/client_loss": [1.0]}]
    config: Any = SimpleNamespace(num_clients=num_clients)
    assert list(figures_over_rounds(config, "abc", rows)) == ["eval/clients_over_rounds", "eval/classes"]
    rounds, values, numbers, total = drawn["clients"]
    assert total == num_clients
    if num_clients > 2:
        assert list(values) == ["accuracy"]
        assert (numbers[1], values["accuracy"].shape) == (2, (1, 1000))
        return
    assert list(values) == ["accuracy", "loss"]
    np.testing.assert_array_equal(rounds, [1, 2])
    np.testing.assert_array_equal(values["accuracy"], [[np.nan, np.nan], [0.25, np.nan]])
    np.testing.assert_array_equal(values["loss"], [[1, np.nan], [np.nan, 2]])
    np.testing.assert_array_equal(drawn["classes"][1]["Accuracy"], [[np.nan] * 3, [0.5, 1, np.nan]])


def test_before_the_first_evaluation_nothing_is_drawn() -> None:
    config: Any = SimpleNamespace(num_clients=2)
    assert figures_over_rounds(config, "abc", ROWS[:1]) == {}
