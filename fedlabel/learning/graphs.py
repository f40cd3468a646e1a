"""Runs the steps of a phase as a CUDA graph: captured once, replayed for all later steps with the same shapes. Without
it a step of a small network takes as long as its hundreds of launches, not as its arithmetic.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedlabel.learning.step import Taken, copy_into, tensors_in
from fedlabel.methods.batch import Batch, StateDict
from fedlabel.methods.recipe import Phase

WARM_UP = 3
"""Steps before a capture, in which libraries choose their kernels and optimisers make their state."""
KEPT = 16
"""Graphs in memory; each holds the weights of its students and teachers."""

logger = logging.getLogger("fedlabel")


class Students(Protocol):
    """Those of one client or of a stack, with their teachers and optimisers, in fixed memory."""

    def take(self, batch: Batch) -> list[Taken]:
        """Takes all optimiser steps on a batch."""

    def restart(
        self, received: StateDict, starts: Sequence[StateDict], teachers: Mapping[str, Sequence[StateDict]]
    ) -> None:
        """Puts the weights of other clients in place of these, in the same memory."""

    def results(self) -> list[StateDict]:
        """Returns the weights of each client."""


Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""A step -> a function that repeats it and returns its results, in memory that the next call writes to."""


class Graph:
    """The steps of some students as a graph.

    Args:
        students: whose weights are moved.
        batch: one of the shapes to come.
        capture: makes the graph.
    """

    def __init__(self, students: Students, batch: Batch, capture: Capture) -> None:
        self.students = students
        self._batch: Batch = tree_map(torch.clone, batch)
        self._replay = capture(lambda: students.take(self._batch))

    def take(self, batch: Batch) -> list[Taken]:
        """Takes all optimiser steps on a batch."""
        copy_into(self._batch, batch)
        taken: list[Taken] = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self._replay())
        return taken


class _Seen(NamedTuple):
    """A phase that was run with some shapes."""

    phase: Phase
    """Kept, so that no other phase gets its id."""
    graph: Graph | None = None
    refused: bool = False
    """Whether its steps cannot be captured."""


class Graphs:
    """Graphs by phase and shapes. A phase is captured when it comes a second time: where a recipe makes new phases in
    every round (say, with a weight that grows) there would be nothing to replay.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()

    def find(
        self,
        phase: Phase,
        key: Hashable,
        batch: Batch,
        build: Callable[[], Students],
        restart: Callable[[Students], None],
    ) -> Graph | None:
        """Returns a graph with students in place; None if the phase is to be run without one.

        Args:
            phase: the phase.
            key: what students and teachers must have in common besides the batch's shapes.
            batch: the first.
            build: returns new students, whose received weights and teachers are in memory of their own.
            restart: puts this client's weights in place.
        """
        place = (id(phase), key, tuple(sorted(batch.memory)), tuple((v.shape, v.dtype) for v in tensors_in(batch)))
        if place not in self._seen:
            self._seen[place] = _Seen(phase)
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
            return None
        self._seen.move_to_end(place)
        _, graph, refused = self._seen[place]
        if refused:
            return None
        if graph is None:
            try:
                graph = Graph(build(), batch, self._capture)
            except RuntimeError as error:  # a loss that waits for the device, say
                self._seen[place] = _Seen(phase, refused=True)
                reason = str(error).partition("\n")[0]
                logger.warning("The steps of phase %s cannot be captured as a CUDA graph: %s", phase.name, reason)
                return None
            self._seen[place] = _Seen(phase, graph)
        restart(graph.students)
        return graph


def capture_on_cuda(step: Callable[[], Any]) -> Callable[[], Any]:
    """Captures a step as a CUDA graph, see `Capture`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Any:
        graph.replay()
        return results

    return replay
