"""A grid of simulated clients: common parts of the in-process and the Ray grid.

Knowledge of Flower that is not in its public documentation is kept in this file and in `exchange.py` (checked with
flwr 1.41).
"""

from __future__ import annotations

import copy
import traceback
from abc import abstractmethod
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
        """Restores the result of `dump_states`."""
        self.states = {client: state for client, data in states.items() if (state := parse_state(data)) is not None}

    def _number(self, message: Message) -> Message:
        # Flower's SuperLink does this on arrival; a message without an id cannot be replied to.
        self._sent += 1
        message.metadata.__dict__["_message_id"] = str(self._sent)
        return message


def parse_state(data: bytes) -> RecordDict | None:
    """Returns a client's state from its bytes by `dump_states`; None if they are invalid."""
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(data))
    except Exception:  # Flower's readers have many ways to fail
        return None


def make_context(client: int, num_clients: int, state: RecordDict) -> Context:
    """Returns the context of a simulated client, with its own copy of the state."""
    node_config: Any = {"partition-id": client, "num-partitions": num_clients}
    return Context(run_id=1, node_id=client + 1, node_config=node_config, state=copy.deepcopy(state), run_config={})


def answer(client_app: ClientApp, message: Message, context: Context) -> tuple[Answer, RecordDict | None]:
    """Runs the client app on a message; returns its reply and its new state, None if it failed (the old one stays).

    An exception becomes an error, as on a SuperNode: it is reported, not hidden.
    """
    try:
        return client_app(message, context).content, context.state
    except Exception as error:
        return raised(error), None


def raised(error: Exception) -> Error:
    """Returns a raised exception as Flower's error: one line of description, then the traceback."""
    text = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=text)


def reply_to(message: Message, result: Answer) -> Message:
    """Returns `result` as the reply to `message`."""
    return Message(result, reply_to=message)


def client_of(message: Message) -> int:
    """Returns the simulated client that receives a message."""
    return message.metadata.dst_node_id - 1
