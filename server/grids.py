"""Grids that simulate all clients on this machine: in this process, or in Ray actors.

All knowledge of Flower that is not in its public documentation is kept in this file (checked with flwr 1.41).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # pylint: disable=no-name-in-module
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Answer = RecordDict | Error


class SimulationGrid(Grid):
    """A grid whose nodes 1..num_clients are simulated clients 0..num_clients-1; their state lives here."""

    def __init__(self, num_clients: int) -> None:
        # `Message(...)` reads these three on the server's side.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self.num_clients = num_clients
        self.states: dict[int, RecordDict] = {}
        self._run: Run | None = None
        self._sent = 0
        self._outbox: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("This simulation has no run record: no SuperLink is involved. Call `set_run` first.")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages in; they are handled when their replies are pulled."""
        accepted = [self._number(message) for message in messages]
        self._outbox.update({message.metadata.message_id: message for message in accepted})
        return [message.metadata.message_id for message in accepted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.send_and_receive([self._outbox.pop(key) for key in message_ids])

    @abstractmethod
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields the replies one by one in the order of `messages`; a failed client's is an error reply."""

    def dump_states(self) -> dict[int, bytes]:
        """Returns the clients' non-empty states, serialised, for a checkpoint."""
        filled = {client: state for client, state in sorted(self.states.items()) if len(state)}
        return {client: recorddict_to_proto(state).SerializeToString() for client, state in filled.items()}

    def load_states(self, states: dict[int, bytes]) -> None:
        """Puts back what `dump_states` returned."""
        self.states = {
            client: recorddict_from_proto(ProtoRecordDict.FromString(data)) for client, data in states.items()
        }

    def _number(self, message: Message) -> Message:
        # Flower's SuperLink does this on arrival; a message without an id cannot be replied to.
        self._sent += 1
        message.metadata.__dict__["_message_id"] = str(self._sent)
        return message

    def _context(self, client: int) -> Context:
        return make_context(client, self.num_clients, self.states.setdefault(client, RecordDict()))


def make_context(client: int, num_clients: int, state: RecordDict) -> Context:
    """Returns the context that a simulated client sees."""
    node_config: Any = {"partition-id": client, "num-partitions": num_clients}
    return Context(run_id=1, node_id=client + 1, node_config=node_config, state=state, run_config={})


def answer(client_app: ClientApp, message: Message, context: Context) -> Answer:
    """Lets a client handle a message. An exception becomes an error, as on a SuperNode: it is reported, not hidden."""
    try:
        return client_app(message, context).content
    except Exception as error:
        return raised(error)


def raised(error: Exception) -> Error:
    """Returns a raised exception as Flower's error: one line that says what, then the traceback."""
    text = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=text)


def reply_to(message: Message, result: Answer) -> Message:
    """Returns `result` as the reply to `message`."""
    return Message(result, reply_to=message)


class InProcessGrid(SimulationGrid):
    """Calls the client app in this process, one client after the other."""

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        super().__init__(num_clients)
        self._client_app = client_app

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """See `SimulationGrid`. A client in this process cannot be interrupted: `timeout` is not applied."""
        for message in messages:
            self._number(message)
            client = message.metadata.dst_node_id - 1
            yield reply_to(message, answer(self._client_app, message, self._context(client)))


class ClientActor:
    """A long-lived worker process; Ray makes the remote class from it. Data and model stay in it between rounds."""

    def __init__(self, client_app: str, num_clients: int) -> None:
        module, _, attribute = client_app.partition(":")
        self._client_app: ClientApp = getattr(importlib.import_module(module), attribute)
        self._num_clients = num_clients
        self._content: tuple[str, RecordDict] | None = None

    def handle(self, key: str, content: list[Any], metadata: Any, state: RecordDict) -> tuple[Any, Answer]:
        """Handles one message; returns (seconds, client state) and the answer, as two objects."""
        import ray

        started = time.perf_counter()
        if self._content is None or self._content[0] != key:  # one copy of the global model per worker and round
            self._content = (key, ray.get(content[0]))
        # `metadata=` is Flower's own way to rebuild a message that has travelled.
        message = Message(metadata=metadata, content=self._content[1])  # type: ignore[call-overload]
        context = make_context(metadata.dst_node_id - 1, self._num_clients, state)
        result = answer(self._client_app, message, context)
        return (time.perf_counter() - started, context.state), result


class RayGrid(SimulationGrid):
    """Spreads clients over Ray actors; a context manager that stops what it started.

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
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                # Replies up to this size skip the object store: 2 instead of 4 ms for one of 300 kB (Ray's: 100 kB).
                "RAY_max_direct_call_object_size": str(2**20),
            }
        }
        if self._started_ray:
            ray.init(
                num_cpus=None if os.environ.get("RAY_ADDRESS") else num_workers,
                include_dashboard=None if os.environ.get("RAY_ADDRESS") else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        gpus = 1.0 / num_workers if use_gpu else 0.0
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env=environment)(ClientActor)
        self._start_actor = lambda: remote.remote(client_app, num_clients)
        self._actors: list[Any] = [self._start_actor() for _ in range(min(num_workers, num_clients))]
        self._seconds: dict[int, float] = {}

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """See `SimulationGrid`. A client that has not answered `timeout` seconds after the start of the call has
        failed; its worker is stopped and replaced.
        """
        sent = [self._number(message) for message in messages]
        deadline = None if timeout is None else time.monotonic() + timeout
        contents = {id(message.content): message.content for message in sent}
        shared = {key: self._ray.put(content) for key, content in contents.items()}
        # Longest first; clients never seen count as long.
        queue = deque(
            sorted(range(len(sent)), key=lambda i: -self._seconds.get(sent[i].metadata.dst_node_id - 1, float("inf")))
        )
        idle = list(range(len(self._actors)))
        running: dict[Any, tuple[int, int, Any]] = {}
        finished: dict[int, Any] = {}
        due = 0
        while due < len(sent):
            while idle and queue:
                actor, position = idle.pop(), queue.popleft()
                message = sent[position]
                client = message.metadata.dst_node_id - 1
                reference = shared[id(message.content)]
                about, result = (
                    self._actors[actor]
                    .handle.options(num_returns=2)
                    .remote(
                        reference.hex(), [reference], message.metadata, self.states.setdefault(client, RecordDict())
                    )
                )
                running[about] = (position, actor, result)
            while due in finished:  # after the idle have got work: the server adds this up meanwhile
                result = finished.pop(due)
                content = result if isinstance(result, Error) else self._ray.get(result)
                del result
                yield reply_to(sent[due], content)
                due += 1
            if not running:
                continue
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = self._ray.wait(list(running), num_returns=1, timeout=wait)
            if not ready:
                late = Error(ErrorCode.NODE_UNAVAILABLE, f"TimeoutError: no answer within {timeout:g} s")
                for position, actor, _ in running.values():
                    self._replace(actor)
                    idle.append(actor)
                    finished[position] = late
                finished.update(dict.fromkeys(queue, late))
                running.clear()
                queue.clear()
            for about in ready:
                position, actor, result = running.pop(about)
                client = sent[position].metadata.dst_node_id - 1
                try:
                    self._seconds[client], self.states[client] = self._ray.get(about)
                    finished[position] = result
                except self._ray.exceptions.RayActorError as error:
                    finished[position] = Error(ErrorCode.CLIENT_APP_CRASHED, f"WorkerDied: {error}".split("\n")[0])
                    self._replace(actor)
                except self._ray.exceptions.RayTaskError as error:
                    finished[position] = raised(error)
                idle.append(actor)

    def _replace(self, actor: int) -> None:
        self._ray.kill(self._actors[actor])
        self._actors[actor] = self._start_actor()
