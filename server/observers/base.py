"""The interface of observers: their input and their report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlabel.data.federation import SHOWN_CLIENTS
from fedlabel.experiment import Experiment
from fedlabel.learning.evaluation import Evaluation
from fedlabel.learning.metrics import Counts, add_counts
from fedlabel.methods.batch import State
from server.state import ServerState
from server.tally import RoundTally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedlabel.config import ExperimentConfig


@dataclass(frozen=True, eq=False)
class Round:
    """A completed round."""

    number: int
    """1-based."""
    tally: RoundTally
    memory_of: Callable[[int], State] | None
    """Client -> what it kept when the round began; None if nobody asked for it, see `Observer.needs_memory`, or if only
    the client knows."""
    started: float
    """`time.perf_counter()` at its start."""
    is_evaluated: bool
    may_draw: bool = True
    """Whether there is time for figures, see `DrawingBudget`."""
    evaluate: Callable[[], Evaluation | None] | None = None
    """Has the model evaluated where the samples are; None: they are here."""

    @cached_property
    def counts(self) -> Counts:
        """Sums of the clients' counts."""
        return add_counts(self.tally.client_counts.values())


@dataclass(frozen=True)
class Report:
    """The output of an observer for a round."""

    metrics: dict[str, float] = field(default_factory=dict)
    lists: dict[str, np.ndarray] = field(default_factory=dict)
    """Tag -> (n,) numbers, one per client or class."""
    bins: dict[str, np.ndarray] = field(default_factory=dict)
    """Tag -> (n,) numbers of values in each of n equal parts of [0, 1]."""
    figures: dict[str, Figure] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Tag -> Markdown."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    """Name of a file in the run's folder -> its whole content."""

    def add(self, other: Report) -> Report:
        """Returns the union of both."""
        return Report(*({**getattr(self, each.name), **getattr(other, each.name)} for each in fields(Report)))


class Observer:
    """Reports on each round; most are stateless."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """Returns the report of a round; state: after it."""
        raise NotImplementedError

    def needs_memory(self, number: int) -> bool:
        """Returns whether the observer looks up in a round what a client kept."""
        return False

    def dump(self) -> Any:
        """Returns the observer's state, for a checkpoint: numbers and lists in dictionaries; empty if it has none."""
        return {}

    def load(self, remembered: Any) -> None:
        """Restores the result of `dump`."""

    def of_trained(self, per_client: Mapping[int, float]) -> np.ndarray:
        """Returns a list for metrics.jsonl, NaN for clients that have no number this round.

        Up to `SHOWN_CLIENTS` clients it has a number for each. Of more a fixed choice would hardly ever have trained:
        then those are shown that have, in their order.
        """
        number = self.experiment.config.num_clients
        shown = range(number) if number <= SHOWN_CLIENTS else sorted(per_client)[:SHOWN_CLIENTS]
        return np.array([per_client.get(client, np.nan) for client in shown])

    def is_last(self, number: int) -> bool:
        """Returns whether a round is the run's last."""
        return number == self.experiment.config.num_rounds

    @property
    def is_full(self) -> bool:
        """Whether all is recorded that there is."""
        return self.experiment.config.tracking.level == "full"

    def has_figures(self, number: int) -> bool:
        """Returns whether an evaluated round is one of those with figures of the evaluation."""
        return has_figures(self.experiment.config, number)


FIGURES_EVERY = 10
"""Times `evaluation.every` rounds between two sets of figures."""


def has_figures(config: ExperimentConfig, number: int) -> bool:
    """Returns whether an evaluated round is one of those with figures of the evaluation."""
    return config.draws_figures and (
        number == config.num_rounds or number % (config.evaluation.every * FIGURES_EVERY) == 0
    )
