"""The state that a server shares with its clients: closed-form updates from summed statistics, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.methods.batch import State


class Limits(NamedTuple):
    """Upper limits of a client's work in a round, from its data and the configuration.

    It may be far more than what it did work with: only a client that does not follow the method exceeds it.
    """

    samples: int
    """Number of samples it holds."""
    annotators: int
    """Largest number of annotators' labels of a sample."""
    steps: int
    """Optimiser steps over all phases."""
    examples: int
    """Largest number of samples used by its losses, over all steps (see `Step.examples`)."""


class Shared:
    """Shared state with a closed-form update: clients send statistics, their sum updates the state that all clients
    get. By default empty.
    """

    def start(self) -> State:
        """Returns the state of round 1."""
        return {}

    def statistics(self, memory: State) -> State:
        """Returns tensors whose sums over the cohort go into `update`; memory: a client's, with the shared state."""
        return {}

    def update(self, shared: State, total: State) -> State:
        """Returns the next state from the current one and the summed statistics of a round; {} if no client sent
        any.
        """
        return shared

    def broadcast(self, shared: State) -> State:
        """Returns the part of the state that clients receive. Default: all of it."""
        return shared

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        """Checks the statistics of one client before they are summed: no robust strategy covers them, so their effect
        on the state has to be bounded by the client's data. Default: no check.

        Args:
            statistics: float64, of the right names and shapes, all finite.
            shared: the state that the client got, as the server has it.
            limits: what the client can have worked with.

        Raises:
            ValueError: no client that follows the method can have sent this.
        """

    def check(self, shared: State) -> None:
        """Checks the state before it is saved and sent; it is already known to be finite. Default: no check.

        Raises:
            ValueError: it is none that the method can go on from.
        """


nothing_shared = Shared()


class _Together(Shared):
    """Several closed forms whose names do not overlap; each sees all names and returns its own.

    Raises:
        ValueError: a name is in the states, or in the statistics, of two.
    """

    def __init__(self, parts: Sequence[Shared]) -> None:
        self._parts = parts
        _disjoint("state", [part.start() for part in parts])

    def start(self) -> State:
        return {name: value for part in self._parts for name, value in part.start().items()}

    def statistics(self, memory: State) -> State:
        return _disjoint("statistic", [part.statistics(memory) for part in self._parts])

    def update(self, shared: State, total: State) -> State:
        updated = dict(shared)
        for part in self._parts:
            own = part.start().keys()
            updated |= {name: value for name, value in part.update(shared, total).items() if name in own}
        return updated

    def broadcast(self, shared: State) -> State:
        sent: State = {}
        for part in self._parts:
            own = part.start().keys()
            sent |= {name: value for name, value in part.broadcast(shared).items() if name in own}
        return sent

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        for part in self._parts:
            part.check_statistics(statistics, shared, limits)

    def check(self, shared: State) -> None:
        for part in self._parts:
            part.check(shared)


def _disjoint(what: str, states: Sequence[State]) -> State:
    """Returns states as one; no name may be in two."""
    names = [name for state in states for name in state]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two closed forms have a {what} called {', '.join(twice)}: give each its own name.")
    return {name: value for state in states for name, value in state.items()}


def together(*parts: Shared) -> Shared:
    """Returns closed forms as one.

    Raises:
        ValueError: a name is in the states of two.
    """
    return parts[0] if len(parts) == 1 else _Together(parts)


def state_to_lists(state: State) -> dict[str, list[float]]:
    """Returns a small state as name -> [dimensions, sizes..., values...], to travel in a message's configuration."""
    return {
        name: [float(value.dim()), *map(float, value.shape), *value.detach().double().flatten().tolist()]
        for name, value in state.items()
    }


def state_from_lists(lists: Mapping[str, Sequence[float]], device: torch.device) -> State:
    """Returns the input of `state_to_lists`, as float tensors on `device`."""
    state: State = {}
    for name, values in lists.items():
        dimensions = int(values[0])
        shape = [int(size) for size in values[1 : 1 + dimensions]]
        state[name] = torch.tensor(values[1 + dimensions :], dtype=torch.float32, device=device).reshape(shape)
    return state


# ------------------------------------------------------------------------------------------- bounds of statistics

SLACK = 1e-3
"""Relative error that sums of float32 may have."""


def check_counts(name: str, values: Tensor, most: float) -> None:
    """Checks counts of samples, whole or expected.

    Args:
        name: of the statistic.
        values: any shape.
        most: what they may add up to.

    Raises:
        ValueError: one is below 0, or the sum is above `most`.
    """
    if (values < 0).any():
        raise ValueError(f"its statistic {name} has a count below 0 (={float(values.min()):g})")
    if values.sum() > most * (1 + SLACK):
        raise ValueError(f"its statistic {name} counts {float(values.sum()):g} samples, and it can have {most:g}")


def check_flags(name: str, values: Tensor) -> None:
    """Raises ValueError unless each value is 0 or 1."""
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"its statistic {name} must hold only 0 and 1")


def check_shares(name: str, values: Tensor, total: Tensor) -> None:
    """Checks probabilities.

    Args:
        name: of the statistic, or of the shared state.
        values: (..., classes).
        total: (...), what each row has to add up to: 1, or 0 for one that says nothing.

    Raises:
        ValueError: one is below 0, or a row adds up to something else.
    """
    if (values < 0).any() or ((values.sum(-1) - total).abs() > SLACK).any():
        raise ValueError(f"{name} must be probabilities: at least 0, each row with the sum 1")
