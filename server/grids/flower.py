"""Real nodes, and Flower's own simulation runtime: the only place where Flower's messages are made and read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.config import ExperimentConfig, to_yaml
from fedlabel.data.nodes.federation import Holding, ServerFederation
from fedlabel.data.nodes.schema import load_schema
from fedlabel.experiment import Experiment
from fedlabel.hardware import source_hash
from fedlabel.learning.evaluation import Evaluation, add_evaluations
from fedlabel.methods.shared import state_to_lists
from server.blocks import Block, BlockResult, Failure
from server.delivery import Delivery
from server.exchange import BAD_REPLY, Asked
from server.flower import as_record, pull_sooner
from server.grids.base import ClientGrid, Order, folded
from server.nodes import Nodes, is_simulation
from server.own_data import OwnNodes, evaluation_messages, on_the_way, read_evaluations
from server.replies import ReplyReader
from server.schema import Refused, ResultSchema
from server.state import ServerState

logger = logging.getLogger("fedlabel")


class FlowerGrid(ClientGrid):
    """Sends a message to each client of a cohort and reads the replies.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.simulated = is_simulation(grid)
        if not self.simulated:
            pull_sooner()
        self._agreement = ""
        """See `messages_to`."""
        self._used: dict[int, int] = {}
        """Client that was asked -> the last round in which its reply was used, 0: none."""

    def connect(self, experiment: Experiment) -> None:
        """See `ClientGrid`."""
        self._spans, self._schema = experiment.spans, ResultSchema.of(experiment)
        federation, config = experiment.federation, experiment.config
        grid = replace(config.grid, profile=False)  # nobody would fetch what clients record
        # Nodes get all weights from here.
        self._config = replace(config, grid=grid, model=replace(config.model, weights=None))
        if isinstance(federation, ServerFederation):
            self._config = on_the_way(self._config)
            assert federation.agreement is not None
            self._agreement = federation.agreement.text
        else:
            self._nodes = Nodes(self._grid, self._config, [len(rows) for rows in federation.parts])
            self._nodes.connect()

    def holdings(self, config: ExperimentConfig, known: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """See `ClientGrid`."""
        assert config.data.schema is not None
        nodes = OwnNodes(self._grid, config, load_schema(Path(config.data.schema)), known)
        nodes.connect()
        self._nodes = nodes
        return nodes.holdings

    def evaluate(self, state: ServerState) -> Evaluation | None:
        """See `ClientGrid`. Nodes without an answer are left out, which is warned of."""
        nodes = self._nodes
        assert isinstance(nodes, OwnNodes)
        held_out = {client: holding.held_out for client, holding in enumerate(nodes.holdings) if holding.held_out}
        shared = self._schema.recipe.shared.broadcast(state.shared)

        def make(clients: Sequence[int]) -> list[Message]:
            return evaluation_messages(clients, nodes.of, state, shared, to_yaml(self._config), self._agreement)

        messages, replies = Delivery(self._grid, nodes, self._config.grid, list(held_out), make).run()
        found, failures = read_evaluations(messages, replies, self._schema.num_classes, held_out)
        for failure in failures:
            logger.warning("Round %d, evaluation: %s", state.round_number, failure)
        return add_evaluations(found, nodes.shared, self._config.num_clients)

    def train(self, order: Order, tasks: Sequence[Sequence[Block]]) -> Iterator[BlockResult]:
        """See `ClientGrid`. A client without an answer after `grid.timeout` seconds has failed."""
        blocks = [block for task in tasks for block in task]
        cohort = [client for block in blocks for client in block]
        used, text = self._used if self._config.compression.error_feedback else {}, to_yaml(self._config)

        def make(clients: Sequence[int]) -> list[Message]:
            with self._spans.part("transfer"):
                of = self._nodes.of
                return messages_to(clients, of, order.invitation, text, used, order.memory, self._agreement)

        with self._spans.part("wait"):
            messages, replies = Delivery(self._grid, self._nodes, self._config.grid, cohort, make).run()
        for client in cohort:
            self._used.setdefault(client, 0)
        reader = ReplyReader(self._schema.of_round(order.invitation, order.shared))
        for block in read_blocks(blocks, messages, replies, reader, order.fold):
            self._used |= {result.client: order.invitation.round_number for result in block.results}
            yield block


def messages_to(
    cohort: Sequence[int],
    nodes: Mapping[int, int],
    invitation: Invitation,
    experiment: str,
    used: Mapping[int, int] = MappingProxyType({}),
    memory: Mapping[str, str | int] = MappingProxyType({}),
    agreement: str = "",
) -> list[Message]:
    """Returns the messages of a round, in client order; most have one content.

    Args:
        cohort: clients that train.
        nodes: client -> node id.
        invitation: what is sent to them.
        experiment: the configuration as YAML.
        used: client -> the last round in which its reply was used, 0: none; clients that need not know are missing.
        memory: see `Order.memory`.
        agreement: with nodes that have data of their own, see `Agreement`; "": with others.
    """
    sent = invitation.on_the_way
    config = {"experiment": experiment, "source-hash": source_hash(), "server-round": invitation.round_number, **memory}
    if invitation.audit:  # real nodes are not asked, and would not do it
        config["audit"] = True
    records = {
        "arrays": as_record(sent.model),
        "config": ConfigRecord(config),  # type: ignore[arg-type]
        "shared": ConfigRecord(dict(state_to_lists(sent.shared))),
    }
    if sent.previous:
        records["previous"] = as_record(sent.previous)
    everybody = RecordDict(records)  # type: ignore[arg-type]
    own = {
        client: RecordDict({**everybody, **{name: as_record(model) for name, model in helpers.items()}})
        for client, helpers in sent.helpers.items()
    }
    told: dict[int, dict[str, float | str]] = {c: {"work": float(share)} for c, share in invitation.work.items()}
    if agreement:  # they do not know their number
        for client in cohort:
            told[client] = {**told.get(client, {}), "agreement": agreement, "client": client}
    for client in used.keys() & set(cohort):
        told[client] = {**told.get(client, {}), "used-round": used[client]}
    for client, more in told.items():
        record = ConfigRecord({**config, **more})
        own[client] = RecordDict({**own.get(client, everybody), "config": record})
    group = str(invitation.round_number)
    return [Message(own.get(client, everybody), nodes[client], "train", group_id=group) for client in cohort]


def read_blocks(
    blocks: Sequence[Block],
    messages: Mapping[int, Message],
    replies: Sequence[Message],
    reader: ReplyReader,
    fold: bool,
) -> Iterator[BlockResult]:
    """Yields the results of blocks from replies; a reply that belongs to no client comes last.

    Args:
        blocks: of the cohort.
        messages: client -> what was sent to it; clients that are not connected are missing.
        replies: in any order.
        reader: reads one.
        fold: see `Order`.
    """
    asked, client_of = Asked(list(messages.values())), {id(message): client for client, message in messages.items()}
    found: dict[int, list[Message]] = {}
    strays = []
    for reply in replies:
        message = asked.of(reply)
        if message is None:
            who = f"node {reply.metadata.src_node_id}"
            strays.append(Failure(who, "BadReply: it answers no message of this round", refused=True))
        else:
            found.setdefault(client_of[id(message)], []).append(reply)
    for block in blocks:
        results: list[ClientResult] = []
        failures: list[Failure] = []
        for client in block:
            who = f"client {client}"
            first, *more = found.pop(client, [None])
            try:
                if client not in messages:
                    failures.append(Failure(who, "NotConnected: no node of this client is connected"))
                elif first is None:
                    failures.append(Failure(who, "NoAnswer: the client did not answer in time"))
                elif first.has_error() and first.error.code != BAD_REPLY:
                    failures.append(Failure(who, str(first.error.reason)))
                else:
                    results.append(_read(first, messages[client], reader, client))
            except Refused as refusal:
                failures.append(Failure(who, str(refusal), refused=True))
            second = "BadReply: it answers a second time; the first answer counts"
            failures += [Failure(who, second, refused=True) for _ in more]
        whole = BlockResult(results, failures, None)
        yield folded(whole) if fold else whole
    if strays:
        yield BlockResult([], strays, None)


def _read(reply: Message, message: Message, reader: ReplyReader, client: int) -> ClientResult:
    """Returns the result in a reply.

    Raises:
        Refused: it cannot be used.
    """
    if reply.has_error():
        raise Refused(str(reply.error.reason))
    node = message.metadata.dst_node_id
    if reply.metadata.src_node_id != node:
        raise Refused(f"BadReply: it says that node {reply.metadata.src_node_id} sent it, not node {node}")
    if not reply.has_content():
        raise Refused("BadReply: it is empty")
    return reader.read(reply.content, client)
