"""Grids carry the rounds of a cohort to its clients; common parts of the simulated ones."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.compression import RESIDUAL, residuals, without_residuals
from fedlabel.config import ConfigError, ExperimentConfig
from fedlabel.data.nodes.federation import Holding
from fedlabel.experiment import Experiment
from fedlabel.learning.evaluation import Evaluation
from fedlabel.methods.batch import State
from server.blocks import Block, BlockResult, Failure, WeightedSum
from server.schema import Refused, ResultSchema, RoundSchema
from server.state import ServerState

TrainCohort = Callable[[Experiment, Invitation, Sequence[int], Sequence[State]], Sequence[ClientResult | Exception]]
"""Runs the round of some clients, as `fedlabel.cohort.train_cohort` does."""
MemoryOf = Callable[[int], State]
"""Client -> what it kept; empty for a client that never trained."""


class Order(NamedTuple):
    """A round for a cohort."""

    invitation: Invitation
    shared: State
    """The shared state as the server has it."""
    fold: bool
    """Whether the server needs the weighted sums of blocks only, not the single models."""
    memory: Mapping[str, str | int] = MappingProxyType({})
    """Which memory real clients take up, see `clients/mods.py`: `run`, 32 hexadecimal digits that stay the same when a
    run is resumed, and `saved-round`, the earliest round from which it can be."""


class ClientGrid(ABC):
    """Carries rounds to clients."""

    simulated = True
    """Whether all clients are simulated: then their pseudo-labels may be compared with hidden labels."""

    @abstractmethod
    def connect(self, experiment: Experiment) -> None:
        """Makes the grid ready for the rounds of an experiment.

        Raises:
            RunError: its clients are not there, or not the ones of this experiment.
        """

    @abstractmethod
    def train(self, order: Order, tasks: Sequence[Sequence[Block]]) -> Iterator[BlockResult]:
        """Yields what becomes of each block, in order.

        Args:
            order: the round.
            tasks: runs of blocks; a task's clients may be trained together.

        Raises:
            RunError: no client can be reached any more.
        """

    def holdings(self, config: ExperimentConfig, known: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """Finds the nodes of a run with data.name=nodes, before its experiment is opened.

        Args:
            config: the run's.
            known: what each client held when the run began; empty: it begins.

        Returns:
            What each client holds.

        Raises:
            ConfigError: the clients of this grid are simulated.
            RunError: too few nodes.
        """
        raise ConfigError(
            "`data.name` (=nodes) is for real nodes: start the run by `flwr run` (see docs/data.md). `fedlabel run` "
            "simulates clients, and takes their samples from a data set of this machine."
        )

    def evaluate(self, state: ServerState) -> Evaluation | None:
        """Returns the evaluation of the global model on the samples that nodes hold out; None if nobody could.

        Args:
            state: after a round.
        """
        raise AssertionError("evaluation.at=nodes is for data.name=nodes, which has real nodes")

    def memory_of(self, cohort: Sequence[int]) -> MemoryOf | None:
        """Returns what the clients keep at this moment, to be looked up later; None: only they know."""
        return None

    def dump_memories(self) -> dict[int, bytes]:
        """Returns what the clients keep, for a checkpoint; only what is not empty, and only if it is here."""
        return {}

    def load_memories(self, saved: Mapping[int, bytes]) -> None:
        """Restores the result of `dump_memories`."""
        assert not saved, "real nodes remember by themselves"


class TaskResult(NamedTuple):
    """What became of the clients of a task."""

    blocks: list[BlockResult]
    kept: dict[int, State]
    """Client -> what it keeps until it trains again, on the CPU; of those whose training did not fail."""
    out_of_memory: bool
    """Whether a device was too small for a client."""


def run_task(
    train: TrainCohort,
    experiment: Experiment,
    schema: ResultSchema,
    order: Order,
    task: Sequence[Block],
    memories: Sequence[State],
) -> TaskResult:
    """Trains the clients of a task, checks their results, and adds up the models of each block.

    Args:
        train: runs the round of some clients.
        experiment: the run's, in this process.
        schema: of its results.
        order: the round; its tensors are on the experiment's device.
        task: the blocks.
        memories: what each client kept.
    """
    clients = [client for block in task for client in block]
    spans = experiment.spans
    try:
        found = list(train(experiment, order.invitation, clients, memories))
    except Exception as error:
        found = [error] * len(clients)
    limits = schema.of_round(order.invitation, order.shared)
    with spans.part("transfer", "keep"):
        kept = {
            result.client: {name: own(value) for name, value in result.kept.items()}
            for result in found
            if isinstance(result, ClientResult)
        }
    results = iter(zip(clients, found, strict=True))
    with spans.part("reduce"):
        blocks = [check_block([next(results) for _ in block], limits, order.fold) for block in task]
    used = {result.client for block in blocks for result in block.results}
    for client, memory in zip(clients, memories, strict=True):
        if client in kept and client not in used:  # nothing of its update arrived
            before = {RESIDUAL + part: value for part, value in residuals(memory).items()}
            kept[client] = {**without_residuals(kept[client]), **before}
    return TaskResult(blocks, kept, any(isinstance(result, torch.OutOfMemoryError) for result in found))


def check_block(found: Sequence[tuple[int, ClientResult | Exception]], limits: RoundSchema, fold: bool) -> BlockResult:
    """Returns the result of a block from those of its clients.

    A client that fails stays a client: an exception becomes a text that the run's folder reports.
    """
    results, failures = [], []
    for client, result in found:
        try:
            if isinstance(result, Exception):
                failures.append(Failure(f"client {client}", describe(result)))
            else:
                results.append(limits.check(result)._replace(kept={}, encoded={}))
        except Refused as refusal:
            failures.append(Failure(f"client {client}", str(refusal), refused=True))
    return folded(BlockResult(results, failures, None)) if fold else BlockResult(results, failures, None)


def folded(block: BlockResult) -> BlockResult:
    """Returns a block's result with the sum of the models instead of the models."""
    return BlockResult(
        [result._replace(parts={}) for result in block.results], block.failures, WeightedSum.of(block.results)
    )


def describe(error: Exception) -> str:
    """Returns one line that describes an exception, then its traceback."""
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"


def own(value: Tensor) -> Tensor:
    """Returns a tensor on the CPU that holds no memory but its own: a client's may be part of a whole stack."""
    value = value.detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
