"""All clients in this process, one task after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fedlabel.cohort import train_cohort
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State
from server.blocks import Block, BlockResult
from server.flower import dump_memory, parse_memory
from server.grids.base import ClientGrid, MemoryOf, Order, TrainCohort, run_task
from server.schema import ResultSchema


class InProcessGrid(ClientGrid):
    """Trains clients in this process; they cannot be interrupted: `grid.timeout` is not applied.

    Args:
        train: runs the round of some clients.
    """

    def __init__(self, train: TrainCohort = train_cohort) -> None:
        self._train = train
        self._memories: dict[int, State] = {}

    def connect(self, experiment: Experiment) -> None:
        """See `ClientGrid`."""
        self._experiment, self._schema = experiment, ResultSchema.of(experiment)

    def train(self, order: Order, tasks: Sequence[Sequence[Block]]) -> Iterator[BlockResult]:
        """See `ClientGrid`."""
        for task in tasks:
            memories = [self._memories.get(client, {}) for block in task for client in block]
            done = run_task(self._train, self._experiment, self._schema, order, task, memories)
            self._memories |= {client: kept for client, kept in done.kept.items() if kept}
            yield from done.blocks

    def memory_of(self, cohort: Sequence[int]) -> MemoryOf:
        """See `ClientGrid`."""
        found = {client: self._memories.get(client, {}) for client in cohort}
        return found.__getitem__

    def dump_memories(self) -> dict[int, bytes]:
        """See `ClientGrid`."""
        return {client: dump_memory(memory) for client, memory in sorted(self._memories.items())}

    def load_memories(self, saved: Mapping[int, bytes]) -> None:
        """See `ClientGrid`."""
        for client, data in saved.items():
            arrays = parse_memory(data)
            assert arrays is not None, "the checkpoint was checked"
            self._memories[client] = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
