"""Nodes with data of their own: which client each of them is, what it holds, and evaluation on what it holds out.

A node answers the first query with counts of its labels, and nothing else of its data. The server numbers the clients:
by the number that a node was started with (`client`), all others in the order of their node ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlabel.config import ExperimentConfig, to_yaml
from fedlabel.data.nodes.federation import Holding, parse_holding
from fedlabel.data.nodes.schema import Schema
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from fedlabel.learning.evaluation import EvaluationSums
from fedlabel.learning.metrics import CALIBRATION_BINS
from fedlabel.methods.batch import State
from fedlabel.methods.shared import state_to_lists
from server.exchange import Asked, replies_to
from server.flower import as_record
from server.nodes import logger, wait_for_nodes
from server.schema import Refused, harmless, listed
from server.state import ServerState

LARGEST_LOSS = 1e30
"""Of a sum of losses."""
_ROUNDING = 1e-6
"""Relative error of sums over samples."""


class Answer(NamedTuple):
    """A node's answer to the query."""

    source_hash: str
    holding: Holding | None
    """None if its code differs from the server's."""
    client: int | None
    """The number that it was started with; None: any."""
    shares: bool
    """Whether the accuracy on its own held-out samples may be shown."""


class Met(NamedTuple):
    """The nodes of a run."""

    nodes: dict[int, int]
    """Client -> node id."""
    holdings: tuple[Holding, ...]
    """Of each client."""
    shared: frozenset[int]
    """Clients whose own accuracy may be shown."""


def on_the_way(config: ExperimentConfig) -> ExperimentConfig:
    """Returns a configuration as nodes get it: without the server's paths."""
    return replace(config, data=replace(config.data, schema=None, test=None))


def meet(grid: Grid, config: ExperimentConfig, schema: Schema) -> Met:
    """Waits for the nodes and asks each what it holds.

    Raises:
        RunError: too few nodes in `grid.connect_timeout`, a node with other code, two with one number.
    """
    ask = ConfigRecord({"experiment": to_yaml(on_the_way(config)), "source-hash": source_hash(), "schema": schema.text})
    queries = [Message(RecordDict({"ask": ask}), node, "query") for node in wait_for_nodes(grid, config)]
    replies, asked = replies_to(grid, queries, config.grid.timeout), Asked(queries)
    found: dict[int, Answer] = {}
    refusals: list[str] = []
    for reply in replies:
        query = asked.of(reply)
        if query is None:
            refusals.append(f"Node {reply.metadata.src_node_id} sent an unrequested reply.")
            continue
        node = query.metadata.dst_node_id
        if reply.has_error():
            refusals.append(f"Node {node} does not answer: {harmless(str(reply.error.reason).partition(chr(10))[0])}")
            continue
        try:
            answer = read_answer(reply.content if reply.has_content() else RecordDict(), schema)
        except Refused as error:
            refusals.append(f"Node {node} cannot take part: {error}.")
            continue
        if answer.source_hash != source_hash():
            raise RunError(
                f"Node {node} runs other code (hash {answer.source_hash}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        found[node] = answer
    nodes = number_clients({node: answer.client for node, answer in found.items()}, config.num_clients, refusals)
    for refusal in refusals:
        logger.warning("Left out: %s", refusal)
    holdings = []
    for client in range(config.num_clients):
        holding = found[nodes[client]].holding
        assert holding is not None, "its code is the server's"
        holdings.append(holding)
    return Met(nodes, tuple(holdings), frozenset(client for client, node in nodes.items() if found[node].shares))


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


def read_answer(content: RecordDict, schema: Schema) -> Answer:
    """Returns a node's answer to the query, checked.

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
        return Answer(harmless(code, 64), None, None, False)
    if client is not None and (type(client) is not int or client < 0):
        raise Refused(f"its client (={listed([str(client)])}) is no number of at least 0")
    if type(text) is not str or type(shares) is not bool:
        raise Refused("its answer lacks `holding`: was it started with a folder, `data` in --node-config?")
    try:
        return Answer(code, parse_holding(text, schema), client, shares)
    except ValueError as error:
        raise Refused(f"it does not say what it holds: {error}") from error


def evaluation_messages(
    clients: Sequence[int],
    nodes: Mapping[int, int],
    state: ServerState,
    shared: State,
    experiment: str,
    agreement: str,
) -> dict[int, Message]:
    """Returns client -> the message that asks for an evaluation of the global model.

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
    config = {"experiment": experiment, "agreement": agreement, "server-round": state.round_number}
    group = str(state.round_number)
    return {
        client: Message(
            RecordDict({**same, "shared": lists, "config": ConfigRecord({**config, "client": client})}),  # type: ignore[dict-item]
            nodes[client],
            "evaluate",
            group_id=group,
        )
        for client in clients
    }


def read_evaluations(
    messages: Mapping[int, Message], replies: Sequence[Message], num_classes: int, held_out: Mapping[int, int]
) -> tuple[dict[int, EvaluationSums], list[str]]:
    """Returns client -> its sums, and why those of others are missing.

    Args:
        messages: client -> what was sent to it.
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
    silent = [client for client in messages if client not in found and f"client {client}" not in there]
    return found, failures + [f"client {client}: it did not answer in time" for client in silent]


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
