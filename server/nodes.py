"""Maps nodes to clients: a query before the first round, over any grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlabel.config import ExperimentConfig, to_yaml
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from server.exchange import Asked, replies_to
from server.replies import Refused, harmless, read_identity

logger = logging.getLogger("fedlabel")


def is_simulation(grid: Grid) -> bool:
    """Returns whether all clients are simulated, on one machine or cluster: then their pseudo-labels may be compared
    with hidden labels. Nodes behind a SuperLink are real.
    """
    from flwr.superlink.grid.http_grid import HttpGrid  # here: with its servers it takes as long to import as torch

    return not isinstance(grid, HttpGrid)


def connect(grid: Grid, config: ExperimentConfig, sizes: Sequence[int]) -> dict[int, int]:
    """Waits until all clients are connected; returns client -> node id, as the nodes report it.

    Args:
        grid: carries the messages.
        config: the run's.
        sizes: how many samples each client holds.

    Raises:
        RunError: too few nodes in `grid.connect_timeout`, two nodes with one partition-id, a node with other code or
            data, or a SuperLink that cannot be reached.
    """
    nodes, refusals = _identify(grid, config, wait_for_nodes(grid, config), sizes)
    missing = sorted(set(range(config.num_clients)) - set(nodes))
    if missing:
        raise RunError(
            f"No node has partition-id {missing[0]} ({len(missing)} of {config.num_clients} are missing). "
            + " ".join(refusals[:3])
        )
    for refusal in refusals:
        logger.warning("Left out: %s", refusal)
    return nodes


def wait_for_nodes(grid: Grid, config: ExperimentConfig) -> list[int]:
    """Waits until `num_clients` nodes are connected; returns the ids of all.

    Raises:
        RunError: too few in `grid.connect_timeout`.
    """
    deadline = time.monotonic() + config.grid.connect_timeout
    connected = -1
    while len(ids := list(grid.get_node_ids())) < config.num_clients:
        if len(ids) != connected:
            connected = len(ids)
            logger.info("Waiting for nodes: %d of num_clients=%d are connected", connected, config.num_clients)
        if time.monotonic() > deadline:
            raise RunError(
                f"Only {len(ids)} of `num_clients` (={config.num_clients}) nodes connected within "
                f"`grid.connect_timeout` (={config.grid.connect_timeout:g} s); start more SuperNodes or lower "
                "num_clients."
            )
        time.sleep(0.5)
    return ids


def _identify(
    grid: Grid, config: ExperimentConfig, ids: list[int], sizes: Sequence[int]
) -> tuple[dict[int, int], list[str]]:
    """Queries every node for its client; returns client -> node id, and why other nodes have none.

    Raises:
        RunError: see `connect`.
    """
    ask = ConfigRecord({"experiment": to_yaml(config), "source-hash": source_hash()})
    queries = [Message(RecordDict({"ask": ask}), node, "query") for node in ids]
    replies = replies_to(grid, queries, config.grid.timeout)
    asked = Asked(queries)
    nodes: dict[int, int] = {}
    refusals: list[str] = []
    for reply in replies:
        query = asked.of(reply)
        if query is None:
            refusals.append(f"Node {reply.metadata.src_node_id} sent an unrequested reply.")
            continue
        node = query.metadata.dst_node_id
        if reply.has_error():
            reason = str(reply.error.reason).partition("\n")[0]
            refusals.append(f"Node {node} does not answer: {harmless(reason)}")
            continue
        try:
            found = read_identity(reply.content if reply.has_content() else RecordDict())
        except Refused as refusal:
            refusals.append(f"Node {node} does not say who it is: {refusal}.")
            continue
        if found.source_hash != source_hash():
            raise RunError(
                f"Node {node} runs other code (hash {found.source_hash}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        if found.client in nodes:
            raise RunError(
                f"Nodes {nodes[found.client]} and {node} both have partition-id {found.client}; give each its own."
            )
        if found.client >= len(sizes):
            refusals.append(f"Node {node} has partition-id {found.client}, and `num_clients` is {len(sizes)}.")
            continue
        # Under `privacy` clients do not say how many samples they hold.
        if found.samples != (None if config.privacy.is_on else sizes[found.client]):
            raise RunError(
                f"Node {node} (partition-id {found.client}) holds {found.samples} samples, and by the configuration "
                f"{sizes[found.client]}: its data are not those of the server."
            )
        nodes[found.client] = node
    return nodes, refusals
