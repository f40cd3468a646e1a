"""Nodes with data of their own: which client each of them is, what it holds, and evaluation on what it holds out.

A node answers the first query with counts of its labels, and nothing else of its data. The server numbers the clients:
by the number that a node was started with (`client`), all others in the order of their node ids.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlabel.config import ExperimentConfig
from fedlabel.data.nodes.federation import Holding, parse_holding
from fedlabel.data.nodes.schema import Schema
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from fedlabel.learning.evaluation import EvaluationSums
from fedlabel.learning.metrics import CALIBRATION_BINS
from fedlabel.methods.batch import State
from fedlabel.methods.shared import state_to_lists
from server.exchange import Asked
from server.flower import as_record
from server.nodes import Nodes, logger
from server.schema import Refused, harmless, listed
from server.state import ServerState

LARGEST_LOSS = 1e30
"""Of a sum of losses."""
_ROUNDING = 1e-6
"""Relative error of sums over samples."""


class Answer(NamedTuple):
    """The answer of a node with the server's code to the query."""

    holding: Holding
    client: int | None
    """The number that it was started with; None: any."""
    shares: bool
    """Whether the accuracy on its own held-out samples may be shown."""


def on_the_way(config: ExperimentConfig) -> ExperimentConfig:
    """Returns a configuration as nodes get it: without the server's paths."""
    data, model = replace(config.data, schema=None, test=None), replace(config.model, weights=None)
    return replace(config, data=data, model=model)


class OwnNodes(Nodes):
    """Nodes with data of their own. A run begins with all clients, as what they hold together decides how a method is
    built, and what a reply may be; its rounds, and a run that is resumed, go on with `grid.min_nodes`.

    Args:
        grid: carries the messages.
        config: the run's.
        schema: of the nodes' data.
        holdings: what each client held when the run began; empty: it begins.
    """

    def __init__(
        self, grid: Grid, config: ExperimentConfig, schema: Schema, holdings: tuple[Holding, ...] = ()
    ) -> None:
        super().__init__(grid, on_the_way(config), [])
        self._schema = schema
        self._answers: dict[int, Answer] = {}
        """Node -> its answer, before clients are numbered."""
        self._numbers: dict[int, int] = {}
        """Node -> its client, of all that ever had one."""
        self.holdings = holdings
        """Of each client; empty before clients are numbered."""
        self.shared: frozenset[int] = frozenset()
        """Clients whose own accuracy may be shown."""

    def connect(self) -> None:
        """Waits until there is a node for each client, and numbers the clients. In a run that is resumed they have
        numbers, and `grid.min_nodes` suffice when the time is up.

        Raises:
            RunError: there are fewer in `grid.connect_timeout`, two have one number, or the SuperLink cannot be
                reached.
        """
        if self.holdings:
            super().connect()
            return
        clients = self._config.num_clients
        self._wait_for(lambda: len(self._answers))
        refusals = list(self._refusals.values()) + [f"Node {node} does not answer." for node in self._queries]
        try:
            self.of = number_clients({node: each.client for node, each in self._answers.items()}, clients, refusals)
        except RunError:
            self._finish_telling()
            raise
        found = [self._answers[node] for _, node in sorted(self.of.items())]
        self.holdings = tuple(answer.holding for answer in found)
        self.shared = frozenset(client for client, answer in enumerate(found) if answer.shares)
        self._numbers = {node: client for client, node in self.of.items()}
        for node in self._answers.keys() - self._numbers.keys():
            self._refusals[node] = f"Node {node} is not needed: `num_clients` is {clients}."
            logger.warning("Left out: %s", self._refusals[node])
        self._answers = {}

    def _question(self) -> ConfigRecord:
        """See `Nodes`."""
        asked = super()._question()
        asked["schema"] = self._schema.text
        return asked

    def _waiting(self, there: Collection[int]) -> set[int]:
        """See `Nodes`."""
        self._answers = {node: answer for node, answer in self._answers.items() if node in there}
        return set(self._answers)

    def _take(self, node: int, content: RecordDict) -> str | None:
        """See `Nodes`."""
        answer = read_answer(content, self._schema)
        if isinstance(answer, str):
            return (
                f"Node {node} runs other code (hash {answer}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        if not self.holdings:
            self._answers[node] = answer
            return None
        client = self._number(node, answer)
        if client is None:
            return f"Node {node} is not needed, or holds other data than any client that is missing."
        if client in self.of:
            self._rivals[node] = rival = self.of[client]
            return f"Nodes {rival} and {node} are both client {client}."
        if answer.holding != self.holdings[client]:
            return f"Node {node} (client {client}) holds other data than when the run began."
        self.of[client] = node
        self._numbers[node] = client
        self.shared |= {client} if answer.shares else set()
        self.given_up.discard(client)
        return None

    def _too_few(self) -> str:
        """See `Nodes`."""
        needed = "num_clients" if self.enough == self._config.num_clients else "grid.min_nodes"
        reasons = [*self._refusals.values(), *(f"Node {node} does not answer." for node in self._queries)]
        return (
            f"Only {len(self.of)} of `{needed}` (={self.enough}) nodes can go on with the run within "
            f"`grid.connect_timeout` (={self._config.grid.connect_timeout:g} s). {' '.join(reasons[:3])}".rstrip()
        )

    def _number(self, node: int, answer: Answer) -> int | None:
        """Returns the client of a node that comes, or comes back, when clients are numbered: its own number, the one
        that it had, or that of the first missing client that held as much of everything; None: there is none.
        """
        if answer.client is not None:
            return answer.client if answer.client < len(self.holdings) else None
        if node in self._numbers:
            return self._numbers[node]
        return next((c for c, held in enumerate(self.holdings) if c not in self.of and held == answer.holding), None)


def number_clients(asked: Mapping[int, int | None], num_clients: int, refusals: list[str]) -> dict[int, int]:
    """Returns client -> node id: nodes that were started with a number get it, the others what is left, by their ids.

    Args:
        asked: node id -> the number that it was started with; None: any.
        num_clients: how many are needed.
        refusals: why nodes are left out; those that are not needed are added.

    Raises:
        RunError: two nodes have one number, or there are too few.
    """
    nodes: dict[int, int] = {}
    for node, client in sorted(asked.items()):
        if client is None:
            continue
        if client >= num_clients:
            refusals.append(f"Node {node} was started with client={client}, and `num_clients` is {num_clients}.")
        elif client in nodes:
            raise RunError(f"Nodes {nodes[client]} and {node} were both started with client={client}.")
        else:
            nodes[client] = node
    free = [client for client in range(num_clients) if client not in nodes]
    others = [node for node, client in sorted(asked.items()) if client is None]
    refusals += [f"Node {node} is not needed: `num_clients` is {num_clients}." for node in others[len(free) :]]
    nodes |= dict(zip(free, others, strict=False))
    if len(nodes) < num_clients:
        raise RunError(
            f"Only {len(nodes)} of `num_clients` (={num_clients}) nodes can take part. {' '.join(refusals[:3])}"
        )
    return dict(sorted(nodes.items()))


def read_answer(content: RecordDict, schema: Schema) -> Answer | str:
    """Returns a node's answer to the query, checked; the hash of its code, if that differs from the server's.

    Raises:
        Refused: it says nothing that makes sense.
    """
    record = content.get("identity")
    if not isinstance(record, ConfigRecord):
        raise Refused("its answer lacks the record `identity`")
    code, text = record.get("source-hash"), record.get("holding")
    client, shares = record.get("client"), record.get("share-evaluation", False)
    if type(code) is not str:
        raise Refused("its answer lacks `source-hash`")
    if code != source_hash():
        return harmless(code, 64)
    if client is not None and (type(client) is not int or client < 0):
        raise Refused(f"its client (={listed([str(client)])}) is no number of at least 0")
    if type(text) is not str or type(shares) is not bool:
        raise Refused("its answer lacks `holding`: was it started with a folder, `data` in --node-config?")
    try:
        return Answer(parse_holding(text, schema), client, shares)
    except ValueError as error:
        raise Refused(f"it does not say what it holds: {error}") from error


def evaluation_messages(
    clients: Sequence[int],
    nodes: Mapping[int, int],
    state: ServerState,
    shared: State,
    experiment: str,
    agreement: str,
) -> list[Message]:
    """Returns the messages that ask for an evaluation of the global model, in client order.

    Args:
        clients: who is asked.
        nodes: client -> node id.
        state: after a round.
        shared: what the server shares.
        experiment: the configuration as YAML.
        agreement: see `Agreement`.
    """
    same = {name: as_record(model) for name, model in state.models.items()}
    lists = ConfigRecord(dict(state_to_lists(shared)))
    config: dict[str, str | int] = {"experiment": experiment, "agreement": agreement, "source-hash": source_hash()}
    config["server-round"] = state.round_number
    group = str(state.round_number)
    return [
        Message(
            RecordDict({**same, "shared": lists, "config": ConfigRecord({**config, "client": client})}),
            nodes[client],
            "evaluate",
            group_id=group,
        )
        for client in clients
    ]


def read_evaluations(
    messages: Mapping[int, Message], replies: Sequence[Message], num_classes: int, held_out: Mapping[int, int]
) -> tuple[dict[int, EvaluationSums], list[str]]:
    """Returns client -> its sums, and why those of others are missing.

    Args:
        messages: client -> what was sent to it; clients that are not connected are missing.
        replies: in any order.
        num_classes: of the labels.
        held_out: client -> the number of samples that it holds out.
    """
    asked, client_of = Asked(list(messages.values())), {id(message): client for client, message in messages.items()}
    found: dict[int, EvaluationSums] = {}
    failures: list[str] = []
    for reply in replies:
        message = asked.of(reply)
        client = None if message is None else client_of[id(message)]
        if client is None or client in found:
            failures.append(f"node {reply.metadata.src_node_id} sent a reply that nobody waits for")
        elif reply.has_error():
            failures.append(f"client {client}: {harmless(str(reply.error.reason).partition(chr(10))[0])}")
        else:
            try:
                content = reply.content if reply.has_content() else RecordDict()
                found[client] = read_evaluation(content, num_classes, held_out[client])
            except Refused as refusal:
                failures.append(f"client {client}: {refusal}")
    there = {failure.partition(":")[0] for failure in failures}
    silent = [client for client in held_out if client not in found and f"client {client}" not in there]
    return found, failures + [f"client {client}: it did not answer in time, or is not connected" for client in silent]


def read_evaluation(content: RecordDict, num_classes: int, held_out: int) -> EvaluationSums:
    """Returns the sums in a node's reply, checked.

    Raises:
        Refused: they are not those of an evaluation on as many samples as it holds out.
    """
    record = content.get("evaluation")
    if not isinstance(record, ConfigRecord) or set(content) != {"evaluation"}:
        raise Refused("BadReply: it must be the record `evaluation`, and nothing else")
    if set(record) != {"confusion", "loss", "calibration"}:
        raise Refused("BadReply: its evaluation must have confusion, loss and calibration")
    confusion, loss, calibration = record["confusion"], record["loss"], record["calibration"]
    if type(confusion) is not list or len(confusion) != num_classes**2 or set(map(type, confusion)) - {int}:
        raise Refused(f"BadReply: its confusion counts are not {num_classes**2} whole numbers")
    if min(confusion) < 0 or sum(confusion) != held_out:  # type: ignore[operator, arg-type]
        raise Refused(f"BadReply: its confusion counts are not of the {held_out} samples that it holds out")
    if type(loss) is not float or not 0 <= loss <= LARGEST_LOSS:
        kind = "NotFinite" if type(loss) is float and not math.isfinite(loss) else "BadReply"
        raise Refused(f"{kind}: its sum of losses is no number from 0 to {LARGEST_LOSS:g}")
    size = 3 * CALIBRATION_BINS
    if type(calibration) is not list or len(calibration) != size or set(map(type, calibration)) - {float}:
        raise Refused(f"BadReply: its calibration bins are not {size} numbers")
    matrix = np.reshape(np.array(confusion, dtype=np.int64), (num_classes, num_classes))
    bins = np.reshape(np.array(calibration), (3, CALIBRATION_BINS))
    count, confidence, correct = bins
    fits = (bins >= 0).all() and (correct <= count).all() and (confidence <= count * (1 + _ROUNDING)).all()
    if not fits or count.sum() != held_out or correct.sum() != np.trace(matrix):
        raise Refused("BadReply: its calibration bins do not fit its confusion counts")
    return EvaluationSums(matrix, loss, bins)
