"""Clients spread over Ray actors, on this machine or a Ray cluster."""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlabel.errors import RunError
from fedlabel.importing import import_path
from server.grids.base import Answer, SimulationGrid, answer, client_of, make_context, raised, reply_to

RETRIES = 2
"""How often a client's message goes to another worker after its worker died. What a client answers depends on the
message and its state alone, so the answer is the one that the dead worker would have given."""
STARTS = 10
"""Workers that die in a row while they start before the run stops."""
SOCKET_PATH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
"""Bytes that Ray's folder for temporary files may have in its path: the system takes 107 for a socket's."""


class ClientActor:
    """A long-lived worker process; Ray makes the remote class from it. Data and model stay in it between rounds."""

    def __init__(self, client_app: str, num_clients: int) -> None:
        module, _, attribute = client_app.partition(":")
        self._client_app: ClientApp = getattr(importlib.import_module(module), attribute)
        self._num_clients = num_clients
        self._content: tuple[str, RecordDict] | None = None

    def ping(self) -> None:
        """Returns when the worker is up."""

    def handle(self, key: str, content: list[Any], metadata: Any, state: RecordDict) -> tuple[Any, Answer]:
        """Handles one message; returns (seconds, client state or None) and the answer, as two objects."""
        import ray

        started = time.perf_counter()
        if self._content is None or self._content[0] != key:  # one copy of the global model per worker and round
            self._content = (key, ray.get(content[0]))
        # `metadata=` is Flower's own way to rebuild a message that has travelled.
        message = Message(metadata=metadata, content=self._content[1])  # type: ignore[call-overload]
        context = make_context(metadata.dst_node_id - 1, self._num_clients, state)
        result, new_state = answer(self._client_app, message, context)
        return (time.perf_counter() - started, new_state), result


class RayGrid(SimulationGrid):
    """Spreads clients over Ray actors; a context manager that stops the actors, and Ray if it started it.

    The content of a round's messages (the global model) is put into the object store once. Clients that took longest
    so far start first; whoever is free takes the next. Replies wait in the object store until it is their turn.
    """

    def __init__(self, client_app: str, num_clients: int, num_workers: int, use_gpu: bool) -> None:
        super().__init__(num_clients)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        self._started_ray = not ray.is_initialized()
        # The workers import what this process imports (a method of the user's own, too).
        environment = {
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(import_path()),
                # Replies up to this size skip the object store: 2 instead of 4 ms for one of 300 kB (Ray's: 100 kB).
                "RAY_max_direct_call_object_size": str(2**20),
            }
        }
        if self._started_ray:
            _start_ray(num_workers)
        gpus = 1.0 / num_workers if use_gpu else 0.0
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env=environment)(ClientActor)
        self._new_actor = lambda: remote.remote(client_app, num_clients)
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        """Reference that is ready when the worker is -> worker."""
        self._idle: list[int] = []
        self._seconds: dict[int, float] = {}
        """Client -> how long its last training took."""
        self._failed_starts = 0
        """Workers in a row that died before they were up."""
        for actor in range(min(num_workers, num_clients)):
            self._start(actor)

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """See `SimulationGrid`. A client that has not answered `timeout` seconds after its worker got the message has
        failed; the worker is stopped and replaced, and the others continue. A client whose worker dies is given to
        another one, `RETRIES` times.

        Raises:
            RunError: workers do not start.
        """
        sent = [self._number(message) for message in messages]
        contents = {id(message.content): message.content for message in sent}
        shared = {key: self._ray.put(content) for key, content in contents.items()}
        # Longest first; clients never seen count as long.
        queue = deque(sorted(range(len(sent)), key=lambda i: -self._seconds.get(client_of(sent[i]), float("inf"))))
        running: dict[Any, _Task] = {}
        finished: dict[int, Any] = {}
        deaths = [0] * len(sent)
        due = 0
        while due < len(sent):
            while self._idle and queue:
                task = self._send(queue.popleft(), sent, shared, timeout)
                running[task.about] = task
            while due in finished:  # after the idle have got work: the server adds this up meanwhile
                yield reply_to(sent[due], self._fetch(finished.pop(due)))
                due += 1
            if due == len(sent):
                break
            soonest = min((task.deadline for task in running.values()), default=math.inf)
            wait = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
            ready, _ = self._ray.wait([*running, *self._starting], num_returns=1, timeout=wait)
            for reference in ready:
                if reference in self._starting:
                    self._started(reference)
                    continue
                task = running.pop(reference)
                result = self._take(task, sent[task.position])
                deaths[task.position] += result is None
                if result is not None:
                    finished[task.position] = result
                elif deaths[task.position] <= RETRIES:
                    queue.appendleft(task.position)
                else:
                    died = f"WorkerDied: {deaths[task.position]} workers died on it; out of memory?"
                    finished[task.position] = Error(ErrorCode.CLIENT_APP_CRASHED, died)
            for task in [task for task in running.values() if not ready and task.deadline <= time.monotonic()]:
                del running[task.about]
                self._replace(task.actor)
                late = f"TimeoutError: no answer within {timeout:g} s"
                finished[task.position] = Error(ErrorCode.NODE_UNAVAILABLE, late)

    def _send(self, position: int, sent: list[Message], shared: dict[int, Any], timeout: float | None) -> _Task:
        """Gives message number `position` to an idle worker."""
        actor, message = self._idle.pop(), sent[position]
        reference = shared[id(message.content)]
        state = self.states.get(client_of(message), RecordDict())
        handle = self._actors[actor].handle.options(num_returns=2)
        about, result = handle.remote(reference.hex(), [reference], message.metadata, state)
        return _Task(about, result, position, actor, math.inf if timeout is None else time.monotonic() + timeout)

    def _take(self, task: _Task, message: Message) -> Any:
        """Processes a worker's result: a reference to the answer, or an error; None if the worker died."""
        try:
            seconds, state = self._ray.get(task.about)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(task.actor)
            return raised(error)
        except self._ray.exceptions.RayError:
            self._replace(task.actor)
            return None
        self._idle.append(task.actor)
        if message.metadata.message_type == "train":
            self._seconds[client_of(message)] = seconds
        if state is not None:
            self.states[client_of(message)] = state
        return task.result

    def _fetch(self, result: Any) -> Answer:
        try:
            return result if isinstance(result, Error) else self._ray.get(result)
        except self._ray.exceptions.RayError as error:  # the object store lost it
            return Error(ErrorCode.CLIENT_APP_CRASHED, f"AnswerLost: {type(error).__name__}")

    def _started(self, reference: Any) -> None:
        """Processes the start of a worker, or starts another one if it died."""
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            fault = getattr(error, "actor_init_failed", False)  # it raised an error, and would again
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
        self._starting[self._actors[actor].ping.remote()] = actor

    def _replace(self, actor: int) -> None:
        self._ray.kill(self._actors[actor])
        self._start(actor)


def _start_ray(num_workers: int) -> None:
    """Starts a Ray of our own, or joins the cluster that RAY_ADDRESS names.

    Raises:
        ValueError: no folder is short enough for Ray's sockets.
        RunError: it does not start, or there is no such cluster.
    """
    import ray
    from ray.job_config import JobConfig

    class Job(JobConfig):
        """Its workers search modules as PYTHONPATH says: Ray would have them look in the working directory first."""

        _py_driver_sys_path = property(lambda self: [], lambda self, paths: None)

    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    # Not a cluster that someone else started here.
    local: dict[str, Any] = {
        "num_cpus": num_workers,
        "include_dashboard": False,
        "_temp_dir": None if address else _ray_folder(),
    }
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            job_config=Job(),
            **({} if address else local),
        )
    except Exception as error:  # of whatever part of Ray it was
        lines = str(error).strip().splitlines() or [""]
        cure = f"check RAY_ADDRESS (={address}), or unset it" if address else "try again, or take grid.kind=in_process"
        raise RunError(f"Ray does not start: {type(error).__name__}: {lines[0]}; {cure}.") from error


def _check_address(address: str) -> None:
    """Checks that a server answers at "host:port" or "ray://host:port": without one Ray ends this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"No Ray cluster answers at RAY_ADDRESS (={address}): {getattr(error, 'strerror', None) or error}; correct "
            "it, or unset it to use this machine alone."
        ) from error


def _ray_folder() -> str | None:
    """Returns the folder for Ray's sockets; None for Ray's default."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if sys.platform != "linux" or len(os.fsencode(os.path.join(usual, "ray"))) <= SOCKET_PATH:
        return None
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        try:
            with tempfile.TemporaryFile(dir=place):
                return os.path.join(place, "ray")
        except OSError:
            continue
    raise ValueError(
        f"TMPDIR (={usual}) is too long for Ray, whose sockets lie there (at most {SOCKET_PATH - len('/ray')} bytes), "
        "and /tmp cannot be written: set RAY_TMPDIR to a short path, or take grid.kind=in_process."
    )


class _Task(NamedTuple):
    """A message that a worker is processing."""

    about: Any
    """Reference to (seconds, client state)."""
    result: Any
    """Reference to the answer."""
    position: int
    actor: int
    deadline: float
