"""Delivers a round's messages: to clients that are connected, and again where a node was lost before it answered.

A client's round depends on what it is sent and on what it kept of rounds before (see `clients/mods.py`), so a client
that is asked again for a round gives the same reply. Only the reply to the last message to a client is ever read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlabel.config import GridConfig
from server.exchange import Exchange
from server.nodes import Nodes

logger = logging.getLogger("fedlabel")

TRIES = 3
"""How often a client is sent the message of a round, at most."""
LOOK = 2.0
"""Seconds between two looks at who is connected."""
_LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Codes of the SuperLink's errors in place of a reply that a lost node never sent, or of which it sent a part."""

MakeMessages = Callable[[Sequence[int]], Sequence[Message]]
"""Returns a round's messages to some clients that are connected, in their order."""


class Delivered(NamedTuple):
    """What was sent and what came back."""

    messages: dict[int, Message]
    """Client -> the last message to it; clients that were never connected are missing."""
    replies: list[Message]
    """In order of arrival."""


class Delivery:
    """The messages of one round.

    Args:
        grid: carries them.
        nodes: who is connected.
        config: for how long to wait.
        cohort: the round's clients.
        make: makes messages.
    """

    def __init__(self, grid: Grid, nodes: Nodes, config: GridConfig, cohort: Sequence[int], make: MakeMessages) -> None:
        self._nodes, self._config, self._make, self._exchange = nodes, config, make, Exchange(grid)
        self._messages: dict[int, Message] = {}
        self._client_of: dict[str, int] = {}
        """Id of a message -> its client."""
        self._activated: dict[int, str] = {}
        """Client -> when its node was activated, as of its last message."""
        self._tries = dict.fromkeys(cohort, 0)
        self._missing = dict.fromkeys(cohort, time.monotonic())
        """Client without a message under way -> since when."""
        self._errors: dict[int, Message] = {}
        """Client -> the error that its last message ended with."""

    def run(self) -> Delivered:
        """Sends the messages and returns the replies, at the latest after `grid.timeout`.

        Raises:
            RunError: the SuperLink cannot be reached.
        """
        deadline = time.monotonic() + self._config.timeout
        self._nodes.refresh()
        replies: list[Message] = []
        looked = time.monotonic()
        while True:
            self._send()
            replies += self._pull()
            if self._missing or time.monotonic() - looked > LOOK:
                self._nodes.refresh()
                self._look()
                looked = time.monotonic()
            left = deadline - time.monotonic()
            if left <= 0 or not (self._exchange.waiting or self._worth_waiting()):
                break
            self._exchange.sleep(left)
        self._nodes.given_up |= self._missing.keys()
        replies += [self._errors[client] for client in self._missing if client in self._errors]
        return Delivered(self._messages, replies + self._exchange.unread())

    def _send(self) -> None:
        """Sends messages to clients that have none under way and are connected."""
        clients = [client for client in self._missing if client in self._nodes.of and self._tries[client] < TRIES]
        if not clients:
            return
        messages = dict(zip(clients, self._make(clients), strict=True))
        self._exchange.send(list(messages.values()))
        self._messages |= messages
        for client, message in messages.items():
            del self._missing[client]
            self._tries[client] += 1
            self._client_of[message.metadata.message_id] = client
            self._activated[client] = self._nodes.activated.get(self._nodes.of[client], "")
            if self._tries[client] > 1:
                logger.warning("Client %d is asked again: its node was lost before it answered.", client)

    def _pull(self) -> list[Message]:
        """Returns the replies that have arrived, but those that a client was lost."""
        replies = []
        for reply in self._exchange.pull():
            client = self._client_of.get(reply.metadata.reply_to_message_id)
            if client is not None and reply.has_error() and reply.error.code in _LOST:
                self._errors[client] = reply
                self._missing[client] = time.monotonic()
            else:
                replies.append(reply)
        return replies

    def _look(self) -> None:
        """Waits no more for clients whose node has gone or was started again since their message."""
        for message in list(self._exchange.waiting.values()):
            client = self._client_of[message.metadata.message_id]
            now = self._nodes.activated.get(message.metadata.dst_node_id)
            if now != self._activated[client] and not (now is None and self._nodes.of.get(client) is None):
                self._exchange.drop(message)
                self._missing[client] = time.monotonic()

    def _worth_waiting(self) -> bool:
        """Returns whether the round goes on for a client without a message under way."""
        if any(client in self._nodes.of and self._tries[client] < TRIES for client in self._missing):
            return True
        if len(self._nodes.of) >= self._nodes.enough:
            return False
        patience = time.monotonic() - self._config.connect_timeout
        return any(
            since > patience and self._tries[client] < TRIES and client not in self._nodes.given_up
            for client, since in self._missing.items()
        )
