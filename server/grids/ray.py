"""Clients spread over Ray actors, on this machine or a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlabel.config import to_yaml
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment
from fedlabel.importing import import_path
from fedlabel.methods.recipe import Memory
from fedlabel.models import passed
from server.blocks import Block, BlockResult, Failure
from server.flower import dump_memory, parse_memory
from server.grids.base import ClientGrid, MemoryOf, Order, describe, folded
from server.grids.costs import CostModel
from server.grids.ray_start import start_ray
from server.grids.ray_worker import Worker, pack_order, unpack_block, unpack_own
from server.schema import ResultSchema

logger = logging.getLogger("fedlabel")

RETRIES = 2
"""How often a task goes to another worker after its worker died. A client's result depends on the round and its memory
alone, so it is the one that the dead worker would have given."""
STARTS = 10
"""Workers that die in a row while they start before the run stops."""


class RayGrid(ClientGrid):
    """Spreads tasks over Ray actors; a context manager that stops the actors, and Ray if it started it.

    A round's order (the global model) is put into the object store once, and what clients keep stays there: the driver
    holds references, and Ray moves to disk what does not fit. Tasks that are predicted to take longest start first;
    whoever is free takes the next. Results wait in the object store until it is their turn.

    Args:
        num_workers: how many actors.
        use_gpu: whether they share a GPU.
        train: "module:name" of a `TrainCohort`, which workers import.
    """

    def __init__(self, num_workers: int, use_gpu: bool, train: str = "fedlabel.cohort:train_cohort") -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        self._started_ray = not ray.is_initialized()
        # The workers import what this process imports (a method of the user's own, too).
        environment = {
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(import_path()),
                # Results up to this size skip the object store: 2 instead of 4 ms for one of 300 kB (Ray's: 100 kB).
                "RAY_max_direct_call_object_size": str(2**20),
            }
        }
        if self._started_ray:
            start_ray(num_workers)
        gpus = 1.0 / num_workers if use_gpu else 0.0
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env=environment)(Worker)
        self._num_workers, self._threads = num_workers, 1
        self._new_actor = lambda: remote.remote(train, self._threads)
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        """Reference that is ready when the worker is -> worker."""
        self._idle: list[int] = []
        self._memories: dict[int, Any] = {}
        """Client -> reference to what it keeps."""
        self._failed_starts = 0
        """Workers in a row that died before they were up."""

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def connect(self, experiment: Experiment) -> None:
        """See `ClientGrid`."""
        config, schema = experiment.config, ResultSchema.of(experiment)
        self._spans = experiment.spans
        self._text, self._timeout, self._threads = to_yaml(config), config.grid.timeout, config.grid.threads_per_worker
        self._models = passed(config.model.name)
        self._keeps = experiment.recipe.memory.keep is not Memory.keep or config.compression.error_feedback
        self._costs = CostModel(lambda client, number: schema.limits(client, number).draws)
        for actor in range(len(self._actors), self._num_workers):
            self._start(actor)
        self._await_start()

    def _await_start(self) -> None:
        """Waits for the workers, so that their start is no part of the first round. From when one of them is up, for as
        long again at most: a cluster may have no room for more.
        """
        begun, limit = time.monotonic(), math.inf
        while self._starting and time.monotonic() - begun < limit:
            rest = None if limit == math.inf else max(0.0, limit - (time.monotonic() - begun))
            ready, _ = self._ray.wait(list(self._starting), num_returns=1, timeout=rest)
            for reference in ready:
                self._started(reference)
            if self._idle and limit == math.inf:
                limit = 2 * (time.monotonic() - begun)

    def train(self, order: Order, tasks: Sequence[Sequence[Block]]) -> Iterator[BlockResult]:
        """See `ClientGrid`. A task that takes longer than `grid.timeout` seconds per client is stopped with its worker,
        as is one whose worker dies `RETRIES` times more: then its clients are tried one by one, and only those fail
        that still take too long or kill their workers.

        Raises:
            RunError: workers do not start.
        """
        number = order.invitation.round_number
        with self._spans.part("transfer", "put"):
            packed = self._ray.put(pack_order(order))
        whole = [_Piece(place, task, order.fold) for place, task in enumerate(tasks)]
        cost = [self._costs.predict(piece.clients, number) for piece in whole]
        queue = deque(sorted(whole, key=lambda piece: -cost[piece.place]))
        running: dict[Any, _Running] = {}
        finished: dict[int, _Finished] = {piece.place: _Finished(piece) for piece in whole}
        for due, task in enumerate(tasks):
            while not finished[due].is_whole:
                while self._idle and queue:
                    started = self._send(queue.popleft(), packed)
                    running[started.about] = started
                self._wait(number, queue, running, finished)
            while self._idle and queue:  # the workers have something to do while the server adds up
                started = self._send(queue.popleft(), packed)
                running[started.about] = started
            yield from self._blocks(finished.pop(due), task, order.fold)

    def _wait(
        self, number: int, queue: deque[_Piece], running: dict[Any, _Running], finished: dict[int, _Finished]
    ) -> None:
        """Waits until something happens, and deals with it."""
        soonest = min((task.deadline for task in running.values()), default=math.inf)
        wait = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        with self._spans.part("wait"):
            ready, _ = self._ray.wait([*running, *self._starting], num_returns=1, timeout=wait)
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
            else:
                self._take(running.pop(reference), number, queue, finished)
        for task in [task for task in running.values() if not ready and task.deadline <= time.monotonic()]:
            del running[task.about]
            self._replace(task.actor)
            late = f"TimeoutError: no answer within {self._timeout:g} s"
            self._fail(task.piece, late, queue, finished)

    def _send(self, piece: _Piece, packed: Any) -> _Running:
        """Gives a task to an idle worker."""
        actor, clients = self._idle.pop(), piece.clients
        kept = [self._memories.get(client) for client in clients]
        run = self._actors[actor].run.options(num_returns=2 + len(clients) * self._keeps)
        with self._spans.part("transfer", "send", worker=actor, clients=clients):
            about, result, *keeps = run.remote(packed.hex(), [packed], piece.task, piece.fold, self._keeps, *kept)
        return _Running(about, result, keeps, piece, actor, time.monotonic() + self._timeout * len(clients))

    def _take(self, task: _Running, number: int, queue: deque[_Piece], finished: dict[int, _Finished]) -> None:
        """Deals with a worker that is ready with a task, or dead."""
        piece = task.piece
        try:
            with self._spans.part("transfer", "fetch", worker=task.actor):
                about = self._ray.get(task.about)
        except self._ray.exceptions.RayTaskError as error:
            if self._would_fit_with_fewer(error):  # outside a client's training: the model's way to the GPU, sums, ...
                self._retire(task.actor)
                queue.appendleft(piece)
                return
            self._idle.append(task.actor)
            finished[piece.place].results[piece] = describe(error)
            return
        except self._ray.exceptions.RayError:
            self._replace(task.actor)
            piece.deaths += 1
            if piece.deaths <= RETRIES:
                queue.appendleft(piece)
            else:
                died = f"WorkerDied: {piece.deaths} workers died on it; out of memory?"
                self._fail(piece, died, queue, finished)
            return
        self._spans.add(task.actor, about.recorded)
        if about.out_of_memory and len(self._actors) > 1:
            self._retire(task.actor)
            queue.appendleft(piece)
            return
        self._idle.append(task.actor)
        self._costs.measured(piece.clients, number, about.seconds)
        finished[piece.place].results[piece] = task.result
        self._memories |= {client: task.keeps[piece.clients.index(client)] for client in about.kept}

    def _fail(self, piece: _Piece, reason: str, queue: deque[_Piece], finished: dict[int, _Finished]) -> None:
        """Tries the clients of a task one by one; a single client has failed."""
        done = finished[piece.place]
        if len(piece.clients) == 1:
            done.results[piece] = reason
            return
        logger.warning(
            "Clients %s of a task are tried one by one: %s. If they train as a stack otherwise, the last digits of "
            "their results may differ from those of another run.",
            ", ".join(map(str, piece.clients)),
            reason,
        )
        done.pieces = [_Piece(piece.place, [[client]], fold=False) for client in piece.clients]
        queue.extendleft(reversed(done.pieces))

    def _blocks(self, done: _Finished, task: Sequence[Block], fold: bool) -> Iterator[BlockResult]:
        """Yields the results of a task's blocks from those of its pieces."""
        if len(done.pieces) == 1:
            yield from self._fetch(done.pieces[0], done)
            return
        singles = iter(done.pieces)
        for block in task:
            found = [each for _ in block for each in self._fetch(next(singles), done)]
            results = [result for each in found for result in each.results]
            together = BlockResult(results, [failure for each in found for failure in each.failures], None)
            yield folded(together) if fold else together

    def _fetch(self, piece: _Piece, done: _Finished) -> list[BlockResult]:
        result = done.results[piece]
        if not isinstance(result, str):
            try:
                with self._spans.part("transfer", "fetch"):
                    return [unpack_block(packed) for packed in self._ray.get(result)]
            except self._ray.exceptions.RayError as error:  # the object store lost it
                result = f"AnswerLost: {type(error).__name__}"
        lost = [BlockResult([], [Failure(f"client {c}", result) for c in block], None) for block in piece.task]
        return [folded(block) for block in lost] if piece.fold else lost

    def memory_of(self, cohort: Sequence[int]) -> MemoryOf:
        """See `ClientGrid`."""
        found = {client: self._memories[client] for client in cohort if client in self._memories}
        return lambda client: unpack_own(self._ray.get(found[client])) if client in found else {}

    def dump_memories(self) -> dict[int, bytes]:
        """See `ClientGrid`. One after the other: together they may be more than this process can hold."""
        return {
            client: dump_memory(unpack_own(self._ray.get(reference)))
            for client, reference in sorted(self._memories.items())
        }

    def load_memories(self, saved: Mapping[int, bytes]) -> None:
        """See `ClientGrid`."""
        self._memories = {client: self._ray.put(dict(parse_memory(data) or {})) for client, data in saved.items()}

    def _started(self, reference: Any) -> None:
        """Deals with the start of a worker, or starts another one if it died."""
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if self._would_fit_with_fewer(error):
                self._retire(actor)
                return
            self._failed_starts += 1
            raised = isinstance(error, self._ray.exceptions.RayTaskError)
            fault = raised or getattr(error, "actor_init_failed", False)  # it raised an error, and would again
            if fault or self._failed_starts >= STARTS:
                why = str(error).strip().splitlines()[-1].strip() if fault else "each was killed, or out of memory"
                count = "A worker" if fault else f"{self._failed_starts} workers in a row"
                raise RunError(
                    f"{count} of the simulation died while starting: {why}. What was saved stays; go on from the last "
                    "checkpoint with --resume, with fewer workers (grid.num_workers) or with grid.kind=in_process."
                ) from error
            self._replace(actor)
        else:
            self._failed_starts = 0
            self._idle.append(actor)

    def _start(self, actor: int) -> None:
        self._actors[actor] = self._new_actor()
        self._starting[self._actors[actor].open.remote(self._text, self._models)] = actor

    def _replace(self, actor: int) -> None:
        self._ray.kill(self._actors[actor])
        self._start(actor)

    def _would_fit_with_fewer(self, error: Exception) -> bool:
        """Returns whether a GPU had no room for a worker, and fewer workers would leave it more."""
        return isinstance(error, torch.OutOfMemoryError) and len(self._actors) > 1

    def _retire(self, actor: int) -> None:
        """Stops a worker for which, or for whose clients, the GPU had no room beside the others."""
        self._ray.kill(self._actors.pop(actor))
        logger.warning("The GPU's memory was too small for its workers: the run goes on with %d.", len(self._actors))


@dataclass(eq=False)
class _Piece:
    """Blocks that go to a worker: a task, or one client of it."""

    place: int
    """Of the task."""
    task: Sequence[Block]
    fold: bool
    deaths: int = 0
    """Workers that died on it."""

    @property
    def clients(self) -> list[int]:
        return [client for block in self.task for client in block]


@dataclass(eq=False)
class _Running:
    """A piece that a worker is working on."""

    about: Any
    """Reference to how it went."""
    result: Any
    """Reference to the packed results."""
    keeps: list[Any]
    """References to what each client keeps; none if clients keep nothing."""
    piece: _Piece
    actor: int
    deadline: float


class _Finished:
    """What there is of a task: it is whole when there is a result for each of its pieces."""

    def __init__(self, piece: _Piece) -> None:
        self.pieces = [piece]
        self.results: dict[_Piece, Any] = {}
        """Piece -> reference to its packed results, or why there are none."""

    @property
    def is_whole(self) -> bool:
        return len(self.results) == len(self.pieces)
