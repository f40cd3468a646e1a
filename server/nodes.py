"""Maps nodes to clients: a query to each node when it is first seen, over any grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlabel.config import ExperimentConfig, to_yaml
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from server.exchange import Asked, Exchange, unreachable
from server.replies import Refused, harmless, read_identity

logger = logging.getLogger("fedlabel")

TOLD = 5.0
"""Seconds that a run which ends waits until refused nodes have read why: its messages end with it."""


def is_simulation(grid: Grid) -> bool:
    """Returns whether all clients are simulated, on one machine or cluster: then their pseudo-labels may be compared
    with hidden labels. Nodes behind a SuperLink are real.
    """
    from flwr.superlink.grid.http_grid import HttpGrid  # here: with its servers it takes as long to import as torch

    return not isinstance(grid, HttpGrid)


class Nodes:
    """Which node is which client, now: nodes come and go during a run.

    Args:
        grid: carries the messages.
        config: the run's.
        sizes: how many samples each client holds.
    """

    def __init__(self, grid: Grid, config: ExperimentConfig, sizes: Sequence[int]) -> None:
        self._grid, self._config, self._sizes = grid, config, sizes
        self.of: dict[int, int] = {}
        """Client -> its node, of those that are connected."""
        self.activated: dict[int, str] = {}
        """Node -> when it was last activated, of those that are connected; "" where the grid does not say. It changes
        when a node with a key of its own is started again: what was under way to it is lost then."""
        self.given_up: set[int] = set()
        """Clients that a round has waited for in vain; no other round waits, until they are back."""
        self._refusals: dict[int, str] = {}
        """Node -> why it is no client's."""
        self._rivals: dict[int, int] = {}
        """Node that is refused -> the node that is its client."""
        self._strays: list[str] = []
        """What was said of replies to no query."""
        self._exchange = Exchange(grid)
        self._queries: dict[int, Message] = {}
        """Node -> the query it has not answered."""

    @property
    def enough(self) -> int:
        """The clients without which no round goes on, see `GridConfig.min_nodes`."""
        return min(self._config.grid.min_nodes or self._config.num_clients, self._config.num_clients)

    def connect(self) -> None:
        """Waits until all clients are connected, or, when the time is up, `grid.min_nodes` of them.

        Raises:
            RunError: there are fewer in `grid.connect_timeout`, or the SuperLink cannot be reached.
        """
        self._wait_for(lambda: len(self.of))
        if len(self.of) < self.enough:
            self._finish_telling()
            raise RunError(self._too_few())

    def _wait_for(self, identified: Callable[[], int]) -> None:
        """Lists nodes until as many as there are clients have said who they are, or as many have answered and no more
        is to be expected, or `grid.connect_timeout` is over; identified: () -> how many have.
        """
        deadline, connected, clients = (
            time.monotonic() + self._config.grid.connect_timeout,
            -1,
            self._config.num_clients,
        )
        while True:
            self.refresh()
            if identified() >= clients or (len(self.activated) >= clients and not self._queries):
                break
            if len(self.activated) != connected:
                connected = len(self.activated)
                logger.info("Waiting for nodes: %d of num_clients=%d are connected", connected, clients)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._exchange.sleep(left)

    def _too_few(self) -> str:
        """Returns the message that too few clients are connected."""
        clients, listed, timeout = self._config.num_clients, len(self.activated), self._config.grid.connect_timeout
        what, key = f"`num_clients` (={clients}) nodes", "num_clients"
        if self.enough < clients:
            what, key = f"`grid.min_nodes` (={self.enough}) nodes", "grid.min_nodes"
        if listed < self.enough:
            return (
                f"Only {listed} of {what} connected within `grid.connect_timeout` (={timeout:g} s); start more "
                f"SuperNodes or lower {key}."
            )
        missing = sorted(set(range(clients)) - set(self.of))
        silent = [f"Node {node} does not answer." for node in self._queries]
        return f"No node has partition-id {missing[0]} ({len(missing)} of {clients} are missing). " + " ".join(
            [*self._refusals.values(), *self._strays, *silent][:3]
        )

    def refresh(self) -> None:
        """Lists the nodes anew: forgets who has gone, asks newcomers who they are, and reads their answers, without
        waiting for them.

        Raises:
            RunError: the SuperLink cannot be reached.
        """
        before, self.activated = self.activated, self._list()
        there = {node for node, since in self.activated.items() if before.get(node, since) == since}
        self.of = {client: node for client, node in self.of.items() if node in there}
        for node in self._queries.keys() - there:
            self._exchange.drop(self._queries.pop(node))
        for node in self._refusals.keys() - there:
            del self._refusals[node]
        used = set(self.of.values())
        for node in [node for node, rival in self._rivals.items() if node not in there or rival not in used]:
            del self._rivals[node]  # its turn
            self._refusals.pop(node, None)
        known = used | self._queries.keys() | self._refusals.keys() | self._waiting(there)
        self._ask([node for node in self.activated if node not in known])
        self._read()

    def _list(self) -> dict[int, str]:
        """Returns the connected nodes, see `activated`."""
        if is_simulation(self._grid):
            return dict.fromkeys(self._grid.get_node_ids(), "")
        try:
            return {info.node_id: info.last_activated_at for info in self._grid.get_nodes()}
        except httpx.RequestError as error:
            raise RunError(unreachable(error)) from error

    def _question(self) -> ConfigRecord:
        """Returns what a node is asked."""
        return ConfigRecord({"experiment": to_yaml(self._config), "source-hash": source_hash()})

    def _waiting(self, there: Collection[int]) -> set[int]:
        """Returns nodes that have answered, and are no client's yet; there: the nodes that are connected."""
        return set()

    def _ask(self, ids: Sequence[int]) -> None:
        """Sends a query to nodes."""
        if ids:
            queries = {node: Message(RecordDict({"ask": self._question()}), node, "query") for node in ids}
            self._exchange.send(list(queries.values()))
            self._queries |= queries

    def _read(self) -> None:
        """Reads the answers that have arrived."""
        if not self._exchange.waiting:
            return
        asked, reasons = Asked(list(self._queries.values())), {}
        notes = {message.metadata.message_id for message in self._exchange.waiting.values()} - {
            message.metadata.message_id for message in self._queries.values()
        }
        for reply in self._exchange.pull():
            query = asked.of(reply)
            if query is None:
                if reply.metadata.reply_to_message_id not in notes:
                    self._strays.append(f"Node {reply.metadata.src_node_id} sent an unrequested reply.")
                    logger.warning("Left out: %s", self._strays[-1])
                continue
            node = query.metadata.dst_node_id
            self._queries.pop(node, None)
            if reason := self._refusal(node, reply):
                self._refusals[node] = reason
                logger.warning("Left out: %s", reason)
                if not reply.has_error():
                    reasons[node] = reason
        if reasons:
            tell = {node: RecordDict({"ask": ConfigRecord({"refused": why})}) for node, why in reasons.items()}
            self._exchange.send([Message(content, node, "query") for node, content in tell.items()])

    def _refusal(self, node: int, reply: Message) -> str | None:
        """Takes a node's answer; returns why it is no client's, None if it now is one's."""
        if reply.has_error():
            reason = str(reply.error.reason).partition("\n")[0]
            return f"Node {node} does not answer: {harmless(reason)}"
        try:
            return self._take(node, reply.content if reply.has_content() else RecordDict())
        except Refused as refusal:
            return f"Node {node} does not say who it is: {refusal}."

    def _take(self, node: int, content: RecordDict) -> str | None:
        """Takes the content of a node's answer, see `_refusal`.

        Raises:
            Refused: it makes no sense.
        """
        found = read_identity(content)
        if found.source_hash != source_hash():
            return (
                f"Node {node} runs other code (hash {found.source_hash}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        if found.client in self.of:
            self._rivals[node] = rival = self.of[found.client]
            return f"Nodes {rival} and {node} both have partition-id {found.client}; give each its own."
        if found.client >= len(self._sizes):
            return f"Node {node} has partition-id {found.client}, and `num_clients` is {len(self._sizes)}."
        # Under `privacy` clients do not say how many samples they hold.
        if found.samples != (None if self._config.privacy.is_on else self._sizes[found.client]):
            return (
                f"Node {node} (partition-id {found.client}) holds {found.samples} samples, and by the configuration "
                f"{self._sizes[found.client]}: its data are not those of the server."
            )
        self.of[found.client] = node
        self.given_up.discard(found.client)
        return None

    def _finish_telling(self) -> None:
        """Waits until refused nodes have read why."""
        deadline = time.monotonic() + min(TOLD, self._config.grid.timeout)
        for query in self._queries.values():
            self._exchange.drop(query)
        while self._exchange.waiting and (left := deadline - time.monotonic()) > 0:
            self._exchange.sleep(left)
            self._exchange.pull()
