"""Figures of a whole run so far, from the rows of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlabel.config import ExperimentConfig
from fedlabel.data.federation import SHOWN_CLIENTS, shown_clients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS = {
    "accuracy": "eval/client_accuracy",
    "coverage": "pseudo/client_coverage",
    "from global": "pseudo/client_from_global",
    "loss": "train/client_loss",
}
CLASSES = {
    "Accuracy": "eval/class_accuracy",
    "Pseudo-labels: used": "pseudo/class_coverage",
    "Pseudo-labels: right of the used": "pseudo/class_accuracy",
}
"""Of both: what it is called in the figure -> list in metrics.jsonl."""


def figures_over_rounds(
    config: ExperimentConfig, class_names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Returns the figures; none before the first evaluation.

    Args:
        config: the run's.
        class_names: one per class.
        rows: the rounds so far, as `read_metrics` returns them.
    """
    if not any("eval/client_accuracy" in row for row in rows):
        return {}
    from fedlabel.record.figures_rounds import classes_over_rounds_figure, clients_over_rounds_figure

    # Of more clients than are listed, lists of training are of other clients in each round.
    names = CLIENTS if config.num_clients <= SHOWN_CLIENTS else {"accuracy": CLIENTS["accuracy"]}
    rounds, numbers = np.array([row["round"] for row in rows]), shown_clients(config.num_clients)
    of_clients = _matrices(rows, names, len(numbers))
    of_classes = _matrices(rows, CLASSES, len(class_names))
    return {
        "eval/clients_over_rounds": clients_over_rounds_figure(rounds, of_clients, numbers, config.num_clients),
        "eval/classes": classes_over_rounds_figure(rounds, of_classes, class_names),
    }


def _matrices(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], length: int) -> dict[str, np.ndarray]:
    """Returns name -> (rounds, length), NaN where there is no number, of those lists that occur."""
    nothing = [None] * length
    return {
        name: np.array([row.get(tag, nothing) for row in rows], dtype=np.float64)
        for name, tag in names.items()
        if any(tag in row for row in rows)
    }
