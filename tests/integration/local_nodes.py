"""Flower's nodes in this process: a client app behind Flower's `Grid`, for tests of what is sent and read."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from server.flower import set_identity

set_identity()


class LocalNodes(Grid):
    """Nodes 1..count are the clients 0..count-1 of an app; what a client remembers is in `states`.

    Args:
        app: the clients'.
        count: how many there are.
        further: what is in all nodes' `--node-config` besides their number; by default they say that they are
            simulated.
        node_configs: all of what each was started with, instead.
    """

    run: Any = None
    pull_interval = 0.01

    def __init__(
        self,
        app: ClientApp,
        count: int,
        further: Mapping[str, Any] = MappingProxyType({"audit": True}),
        node_configs: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.app, self.count, self.further, self.node_configs = app, count, dict(further), node_configs
        self.states: dict[int, RecordDict] = {}
        self._sent: dict[str, Message] = {}
        self._number = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)

    def get_nodes(self) -> Iterable[Any]:
        """Real nodes with the time since when they are there, as only the grid of a SuperLink has them."""
        return [SimpleNamespace(node_id=node, last_activated_at="") for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            self._number += 1
            keys.append(f"{self._number} to {message.metadata.dst_node_id}")
            message.metadata.__dict__["_message_id"] = keys[-1]
            self._sent[keys[-1]] = message
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = {key: self.answer(self._sent[key]) for key in message_ids if key in self._sent}
        for key in replies:  # as a SuperLink, which gives each once
            del self._sent[key]
        return list(replies.values())

    def answer(self, message: Message) -> Message:
        """Returns a node's reply; a client that fails keeps the state it had."""
        client = message.metadata.dst_node_id - 1
        numbered = {"partition-id": client, "num-partitions": self.count, **self.further}
        node: Any = numbered if self.node_configs is None else self.node_configs[client]
        context = Context(
            run_id=1,
            node_id=client + 1,
            node_config=node,
            state=copy.deepcopy(self.states.get(client, RecordDict())),
            run_config={},
        )
        try:
            reply = self.app(message, context)
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=message)
        if not reply.has_error():
            self.states[client] = context.state
        return reply
