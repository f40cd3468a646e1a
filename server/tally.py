"""Matches replies to messages: each message has one reply, and an invalid reply fails only its client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Message, RecordDict

from fedlabel.learning.metrics import Counts, add_counts
from fedlabel.methods.batch import State
from server.exchange import BAD_REPLY
from server.replies import Refused, RoundSchema, harmless

LONGEST_FAILURE = 10_000
"""Characters of a client's own words (a traceback, say) that are kept."""


class Asked:
    """Matches a reply to its message. The reply's sender is not used: an error that Flower's SuperLink makes in place
    of a lost node names the SuperLink.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        """Takes the messages; a grid gives them their ids when it sends them."""
        self._messages = messages
        self._by_id: dict[str, Message] = {}

    def of(self, reply: Message) -> Message | None:
        """Returns the message of a reply; None if it belongs to none of these."""
        for message in self._messages[len(self._by_id) :]:  # they may be sent one by one, in order
            if not message.metadata.message_id:
                break
            self._by_id[message.metadata.message_id] = message
        return self._by_id.get(reply.metadata.reply_to_message_id)


class RoundTally:
    """Collects the replies of one round: yields the usable ones, sums their counts, records failures."""

    def __init__(self, schema: RoundSchema, client_of: Mapping[int, int], messages: Sequence[Message]) -> None:
        """Takes the schema of replies, node id -> client for the cohort, and the round's messages."""
        self.round_number = schema.round_number
        self.messages = {client_of[message.metadata.dst_node_id]: message for message in messages}
        self.failures: list[str] = []
        """One text per failed client or refused reply: a line that says who and what, then a traceback, indented."""
        self.refused = 0
        """Replies that came and were not used."""
        self.sums: Counts = {}
        self.client_counts: dict[int, Counts] = {}
        """Of each client whose reply is used."""
        self.bytes_down = sum(count_bytes(message.content) for message in messages)
        self.bytes_up = 0
        self._schema = schema
        self._client_of = client_of
        self._asked = Asked(messages)
        self._statistics: dict[str, np.ndarray] = {}
        self._seen: set[int] = set()

    def usable(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yields the valid replies, in client order, with their arrays and metrics only."""
        pairs: Iterable[tuple[int | None, Message]] = ((self._client(reply), reply) for reply in replies)
        if isinstance(replies, list):  # Flower's own grid: order of arrival
            pairs = sorted(pairs, key=lambda pair: (pair[0] is None, pair[0] or 0))
        for client, reply in pairs:
            if client is None:
                self._refuse(f"node {reply.metadata.src_node_id}", "BadReply: it answers no message of this round")
            elif client in self._seen:
                self._refuse(f"client {client}", "BadReply: it answers a second time; the first answer counts")
            else:
                self._seen.add(client)
                if reply.has_error() and reply.error.code == BAD_REPLY:
                    self._refuse(f"client {client}", str(reply.error.reason))
                elif reply.has_error():
                    self._note(f"client {client}", str(reply.error.reason))
                elif self._take(client, reply):
                    yield reply

    def _client(self, reply: Message) -> int | None:
        message = self._asked.of(reply)
        return None if message is None else self._client_of[message.metadata.dst_node_id]

    def _take(self, client: int, reply: Message) -> bool:
        """Adds the content of a reply, besides its model; returns whether it is usable."""
        try:
            node = self.messages[client].metadata.dst_node_id
            if reply.metadata.src_node_id != node:
                raise Refused(f"BadReply: it says that node {reply.metadata.src_node_id} sent it, not node {node}")
            if not reply.has_content():
                raise Refused("BadReply: it is empty")
            found = self._schema.read(reply.content, client)
        except Refused as refusal:
            self._refuse(f"client {client}", str(refusal))
            return False
        self.bytes_up += count_bytes(reply.content)
        self.client_counts[client] = found.counts
        self.sums = add_counts([self.sums, found.sums])
        for name, values in found.statistics.items():
            self._statistics[name] = self._statistics[name] + values if name in self._statistics else values
        reply.content = found.content
        return True

    def statistics(self, device: torch.device) -> State:
        """Returns the sum of the usable replies' statistics, float32; empty without a usable reply."""
        return {n: torch.tensor(v, dtype=torch.float32, device=device) for n, v in self._statistics.items()}

    def finish(self) -> None:
        """Records the clients that never answered."""
        for client in sorted(set(self.messages) - self._seen):
            self._note(f"client {client}", "NoAnswer: the client did not answer in time")

    @property
    def num_usable(self) -> int:
        """Number of clients with a usable reply so far."""
        return len(self.client_counts)

    @property
    def num_failed(self) -> int:
        """Number of clients of the cohort without one."""
        return len(self.messages) - self.num_usable

    def _refuse(self, who: str, reason: str) -> None:
        self.refused += 1
        self._note(who, reason)

    def _note(self, who: str, reason: str) -> None:
        """Records a failure; a client's text can neither control a terminal nor look like another's failure."""
        first, *more = harmless(reason, LONGEST_FAILURE).split("\n")
        lines = [f"Round {self.round_number}, {who}: {harmless(first)}", *(f"    {line}" for line in more if line)]
        self.failures.append("\n".join(lines))


def count_bytes(content: RecordDict) -> int:
    """Returns the size of a message's records, as Flower counts them (array data with their small headers, keys and
    scalars).

    The configuration is left out: its text names the grid, so the same run would count differently on another one.
    """
    return sum(record.count_bytes() for name, record in content.items() if name != "config")
