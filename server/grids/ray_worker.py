"""A worker process of the Ray grid, and the form in which a round travels to it and back."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.experiment import open_experiment
from fedlabel.methods.batch import State
from fedlabel.methods.uploads import ModelPart
from fedlabel.models import receive
from fedlabel.spans import Recorded
from server.blocks import Block, BlockResult, WeightedSum
from server.grids.base import Order, TrainCohort, run_task
from server.schema import ResultSchema

PackedState = Mapping[str, np.ndarray]
"""Tensors as numpy arrays: Ray stores these without a copy, and workers of one machine share them."""


class About(NamedTuple):
    """How a task went, beside its results."""

    seconds: float
    out_of_memory: bool
    """Whether a device was too small for a client."""
    kept: list[int]
    """Clients that keep something, other than before."""
    recorded: Recorded | None = None
    """Where the time went, if that is measured."""


class Worker:
    """A long-lived process; Ray makes the remote class from it. Data and model stay in it between rounds.

    Args:
        train: "module:name" of a `TrainCohort`.
        threads: of torch.
    """

    def __init__(self, train: str, threads: int) -> None:
        module, _, name = train.partition(":")
        self._train: TrainCohort = getattr(importlib.import_module(module), name)
        self._round: tuple[str, Order] | None = None
        torch.set_num_threads(threads)

    def open(self, text: str, models: Mapping[str, Any]) -> None:
        """Makes ready for the rounds of an experiment.

        Args:
            text: its configuration as YAML.
            models: what was passed from Python, by `model.name`.
        """
        receive(models)
        self._experiment = open_experiment(text)
        self._schema = ResultSchema.of(self._experiment)
        self._spans = self._experiment.spans

    def run(self, key: str, packed: list[Any], task: Sequence[Block], fold: bool, keeps: bool, *kept: Any) -> Any:
        """Trains the clients of a task.

        Args:
            key: of the round.
            packed: the reference to its order.
            task: the blocks.
            fold: see `Order`.
            keeps: whether clients keep something.
            kept: what each has kept; None for a client that never trained.

        Returns:
            How it went, the packed results of the blocks and, if `keeps`, what each client keeps now: None if nothing,
            or if it failed.
        """
        import ray

        started = time.perf_counter()
        self._spans.take()  # the time between two tasks is not the worker's
        with self._spans.part("transfer", "receive"):
            if self._round is None or self._round[0] != key:  # one copy of the global model per worker and round
                self._round = (key, unpack_order(ray.get(packed[0]), self._experiment.device))
            memories = [{} if memory is None else unpack_own(memory) for memory in kept]
        order = self._round[1]._replace(fold=fold)
        done = run_task(self._train, self._experiment, self._schema, order, task, memories)
        with self._spans.part("transfer", "send"):
            kept_now = {client: pack(memory) for client, memory in done.kept.items() if memory}
            blocks = [pack_block(block) for block in done.blocks]
        seconds = time.perf_counter() - started
        about = About(seconds, done.out_of_memory, list(kept_now), self._spans.take())
        if not keeps:
            return about, blocks
        clients = [client for block in task for client in block]
        return about, blocks, *(kept_now.get(client) for client in clients)


def pack(state: Mapping[str, Tensor], seen: dict[int, np.ndarray] | None = None) -> PackedState:
    """Returns tensors as arrays; seen: of tensors that travel along, by id, so that none travels twice."""
    seen = {} if seen is None else seen
    for value in state.values():
        if id(value) not in seen:
            seen[id(value)] = value.detach().cpu().numpy()
    return {name: seen[id(value)] for name, value in state.items()}


def unpack(packed: PackedState, device: torch.device | str = "cpu") -> State:
    """Returns arrays as tensors, which nobody may write to: other processes may share them."""
    with warnings.catch_warnings(action="ignore"):  # torch's, that the arrays are read only
        return {name: torch.from_numpy(array).to(device) for name, array in packed.items()}


def unpack_own(packed: PackedState) -> State:
    """Returns arrays as tensors of their own."""
    return {name: torch.from_numpy(array.copy()) for name, array in packed.items()}


def pack_order(order: Order) -> Order:
    """Returns an order whose tensors are arrays."""
    seen: dict[int, np.ndarray] = {}
    sent = order.invitation
    helpers = {
        client: {name: pack(model, seen) for name, model in models.items()} for client, models in sent.helpers.items()
    }
    packed = sent._replace(
        model=pack(sent.model, seen),  # type: ignore[arg-type]
        shared=pack(sent.shared, seen),  # type: ignore[arg-type]
        previous=pack(sent.previous, seen),  # type: ignore[arg-type]
        helpers=helpers,  # type: ignore[arg-type]
        work=dict(sent.work),
        encoded=None,
    )
    return Order(packed, pack(order.shared, seen), order.fold)  # type: ignore[arg-type]


def unpack_order(packed: Order, device: torch.device) -> Order:
    """Returns the order of `pack_order`, on a device."""
    sent: Any = packed.invitation
    helpers = {
        client: {name: unpack(model, device) for name, model in models.items()}
        for client, models in sent.helpers.items()
    }
    received = sent._replace(
        model=unpack(sent.model, device),
        shared=unpack(sent.shared, device),
        previous=unpack(sent.previous, device),
        helpers=helpers,
    )
    return Order(received, unpack(packed.shared), packed.fold)  # type: ignore[arg-type]


def pack_block(block: BlockResult) -> Any:
    """Returns a block's result as numbers, texts and arrays."""
    results = [
        result._replace(
            parts={part: ModelPart(pack(state), weight) for part, (state, weight) in result.parts.items()},  # type: ignore[arg-type]
            statistics=pack(result.statistics),  # type: ignore[arg-type]
        )
        for result in block.results
    ]
    total = None if block.total is None else (pack(block.total.totals), block.total.weights)
    return results, block.failures, total


def unpack_block(packed: Any) -> BlockResult:
    """Returns the result of `pack_block`."""
    results, failures, folded = packed
    whole = [
        result._replace(
            parts={part: ModelPart(unpack(state), weight) for part, (state, weight) in result.parts.items()},
            statistics=unpack(result.statistics),
        )
        for result in results
    ]
    total = None
    if folded is not None:
        total = WeightedSum()
        total.totals, total.weights = unpack(folded[0]), folded[1]
    return BlockResult(whole, failures, total)
