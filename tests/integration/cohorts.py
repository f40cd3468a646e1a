"""Ways to train a cohort in which clients misbehave or remember; workers import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State
from fedlabel.methods.uploads import ModelPart
from server.grids.base import TrainCohort

TrainClient = Callable[[Experiment, Invitation, int, State], ClientResult]


def by_client(own: Mapping[int, TrainClient], default: TrainClient | None = None) -> TrainCohort:
    """Returns a way to train a cohort, one by one, in which some clients have a way of their own."""

    def train(
        experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
    ) -> list[ClientResult | Exception]:
        found: list[ClientResult | Exception] = []
        for client, memory in zip(clients, memories, strict=True):
            try:
                found.append(own.get(client, default or _train)(experiment, invitation, client, memory))
            except Exception as error:
                found.append(error)
        return found

    return train


def _train(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    (result,) = train_cohort(experiment, invitation, [client], [memory])
    if isinstance(result, Exception):
        raise result
    return result


def _always_raise(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    raise RuntimeError("this client always raises")


def _raise_from_round_2(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    act = _train if invitation.round_number == 1 else _always_raise
    return act(experiment, invitation, client, memory)


def _raise_in_round_1(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    """Fails as long as `_die_in_round_1` does."""
    act = _train if invitation.round_number > 1 else _always_raise
    return act(experiment, invitation, client, memory)


def _nan(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    result = _train(experiment, invitation, client, memory)
    (part, (state, weight)), *others = result.parts.items()
    name, values = next(iter(state.items()))
    spoiled = values.clone()
    spoiled.view(-1)[-1] = torch.nan
    return result._replace(parts={part: ModelPart({**state, name: spoiled}, weight), **dict(others)})


def _die_in_round_1(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    if invitation.round_number > 1:
        return _train(experiment, invitation, client, memory)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _count(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    """Trains, and reports how often this client has trained as its `train/loss`: other metrics would be refused."""
    result = _train(experiment, invitation, client, {n: v for n, v in memory.items() if n != "calls"})
    calls = int(memory.get("calls", torch.tensor(0))) + 1
    sums = {**result.sums, "train/loss": [float(calls), 1.0]}
    return result._replace(sums=sums, kept={**result.kept, "calls": torch.tensor(calls)})


def _statistics_of_many(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    """Permutes its counts and multiplies them by a million."""
    result = _train(experiment, invitation, client, memory)
    changed = {name: 1e6 * value.flatten().flip(0).view_as(value) for name, value in result.statistics.items()}
    return result._replace(statistics=changed)


def _mark(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    """Leaves a file named by the machine of the Ray cluster, waits for that of another, which may start later, and
    trains.
    """
    import ray

    marks, deadline = Path(os.environ["FEDLABEL_TEST_MARKS"]), time.monotonic() + 120
    (marks / ray.get_runtime_context().get_node_id()).touch()
    while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return _train(experiment, invitation, client, memory)


healthy = by_client({})
poisoned = by_client({3: _statistics_of_many})
only_raises = by_client({3: _always_raise})
two_fail = by_client({1: _always_raise, 3: _nan})
three_fail = by_client({1: _always_raise, 2: _die_in_round_1, 3: _nan})
three_fail_alive = by_client({1: _always_raise, 2: _raise_in_round_1, 3: _nan})
all_fail_from_round_2 = by_client({}, default=_raise_from_round_2)
counting = by_client({}, default=_count)
marking = by_client({}, default=_mark)
