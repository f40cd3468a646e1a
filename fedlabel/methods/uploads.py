"""Uploads of a client after a round: one model, or several parts that are averaged separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedlabel.methods.batch import StateDict


class PhaseResult(NamedTuple):
    """The final state of a phase."""

    name: str
    state: StateDict
    examples: float
    """Samples used over all steps (see `Step.examples`)."""
    start: str = "global"
    """See `Phase.start`."""


class ModelPart(NamedTuple):
    """One model that a client uploads, with its weight in the server's mean of that part."""

    state: StateDict
    weight: float


Send = Callable[[StateDict, Sequence[PhaseResult], frozenset[str], float], dict[str, ModelPart]]


@dataclass(frozen=True)
class Upload:
    """What a client uploads from the phases that ran, and the paper's count of its bytes."""

    send: Send
    """(global state, results of the phases in order, names in the state that are trained, the client's weight in the
    server's mean as `training.weight_by` says) -> part name -> model and weight. The server averages each part over the
    clients by its weights and then takes the plain mean of the parts."""
    claimed_bytes: Callable[[StateDict, StateDict, int], tuple[float, float]] | None = None
    """(global state, uploaded state, number of received helpers) -> bytes (up, down) by the paper's own count of its
    traffic; None: the paper has none."""


def send_sum(
    global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
) -> dict[str, ModelPart]:
    """Sends one model, the start plus the sum of the phases' updates; arguments and result: see `Upload.send`.

    Where a phase started from another's end, its update contains the other's.
    """
    continued = {result.start for result in results}
    named = {result.name for result in results}
    assert len([r for r in results if r.start in named]) == len(continued & named), "two phases go on from one"
    ends = [result.state for result in results if result.name not in continued]
    return {"model": ModelPart(sum_updates(global_state, ends, parameters), weight)}


def send_unweighted(
    global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
) -> dict[str, ModelPart]:
    """As `send_sum`; the mean is uniform over the clients that trained, whatever `training.weight_by`."""
    model = send_sum(global_state, results, parameters, weight)["model"]
    return {"model": ModelPart(model.state, float(weight > 0))}


sum_of_updates = Upload(send_sum)
unweighted_sum_of_updates = Upload(send_unweighted)


def sum_updates(start: StateDict, states: Sequence[StateDict], parameters: frozenset[str]) -> StateDict:
    """Returns start + sum of (state - start); exactly the changed state if only one changed.

    Buffers (BatchNorm's running statistics) are averaged instead: a sum of two changes of a variance can be negative.
    Integer buffers (BatchNorm's batch counter) are taken from the last state.
    """
    if not states:
        return dict(start)
    if len(states) == 1:
        return dict(states[0])
    merged: StateDict = {}
    for key, first in states[0].items():
        if key in parameters:
            merged[key] = first + sum(state[key] - start[key] for state in states[1:])
        elif first.is_floating_point():
            merged[key] = torch.stack([state[key] for state in states]).mean(0)
        else:
            merged[key] = states[-1][key]
    return merged
