"""Which node is which client, and whether all of them are simulated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlabel.config import ExperimentConfig, load_config
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from server.nodes import Nodes as Connected
from tests.integration.local_nodes import LocalNodes


class Nodes(LocalNodes):
    """Nodes of which each answers with a partition-id and a source hash."""

    def __init__(self, partition_ids: Sequence[int], node_ids: Sequence[int] = (), source: str = "") -> None:
        super().__init__(ClientApp(), len(partition_ids))
        self.node_ids = list(node_ids or range(1, len(partition_ids) + 1))
        self.partition_of = dict(zip(self.node_ids, partition_ids, strict=True))
        self.source = source or source_hash()
        self.samples = 60
        self.told: dict[int, str] = {}
        self.absent_at_first = 0

    def get_node_ids(self) -> Iterable[int]:
        self.absent_at_first -= 1
        return [] if self.absent_at_first >= 0 else self.node_ids

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if "refused" in message.content["ask"]:
            self.told[node] = str(message.content["ask"]["refused"])
            return Message(RecordDict({}), reply_to=message)
        assert message.content["ask"]["source-hash"] == source_hash()
        answer = {"partition-id": self.partition_of[node], "source-hash": self.source, "num-samples": self.samples}
        reply = Message(RecordDict({"identity": ConfigRecord(answer)}), reply_to=message)
        self.spoil(node, reply)
        return reply

    def spoil(self, node: int, reply: Message) -> None:
        """Changes the answer of a node."""


SIZES = [60, 60, 60]


def connect(grid: Nodes, config: ExperimentConfig, sizes: Sequence[int]) -> dict[int, int]:
    connected = Connected(grid, config, sizes)
    connected.connect()
    return connected.of


CONFIG = load_config([], ["num_clients=3", "grid.connect_timeout=0.7", "grid.timeout=0.5"])


def test_clients_are_found_by_what_nodes_say() -> None:
    grid = Nodes([2, 0, 1], node_ids=[501, 77, 9000])
    grid.absent_at_first = 1  # it waits for them
    assert connect(grid, CONFIG, SIZES) == {2: 501, 0: 77, 1: 9000}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Nodes([0, 1]), r"Only 2 of `num_clients` \(=3\) nodes connected within `grid.connect_timeout` \(=0.7 s\)"),
        (Nodes([0, 1, 1]), "Nodes 2 and 3 both have partition-id 1; give each its own"),
        (Nodes([0, 1, 5]), r"No node has partition-id 2 \(1 of 3 are missing\)"),
        (Nodes([0, 1, 2], source="0123"), rf"Node 1 runs other code \(hash 0123, here {source_hash()}\)"),
    ],
)
def test_what_is_wrong_with_the_nodes_is_said(grid: Nodes, message: str) -> None:
    with pytest.raises(RunError, match=message):
        connect(grid, CONFIG, SIZES)


class Odd(Nodes):
    """Node 4 answers oddly."""

    def __init__(self, partition_ids: Sequence[int], oddity: Callable[[Message], None]) -> None:
        super().__init__(partition_ids)
        self.oddity = oddity

    def spoil(self, node: int, reply: Message) -> None:
        if node == 4:
            self.oddity(reply)


def nothing(reply: Message) -> None:
    reply.content = RecordDict({})


def fail(reply: Message) -> None:
    reply.__dict__["_content"] = None
    reply.error = Error(2, "ValueError: \x1b[2Jno partition-id\nTraceback")


def stray(reply: Message) -> None:
    reply.metadata.__dict__["_reply_to_message_id"] = "another"


@pytest.mark.parametrize(
    ("oddity", "said"),
    [
        (nothing, "Node 4 does not say who it is: its answer lacks the record `identity`."),
        (fail, r"Node 4 does not answer: ValueError: \x1b[2Jno partition-id"),
        (stray, "Node 4 sent an unrequested reply."),
    ],
)
def test_an_odd_node_is_left_out_where_it_is_not_needed(
    oddity: Callable[[Message], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "fedlabel"):
        assert connect(Odd([2, 0, 1, 5], oddity), CONFIG, SIZES) == {2: 1, 0: 2, 1: 3}
    assert said in caplog.text
    with pytest.raises(RunError, match=r"No node has partition-id 1 .*" + re.escape(said)):
        connect(Odd([2, 0, 5, 1], oddity), CONFIG, SIZES)


def test_a_further_node_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "fedlabel"):
        assert connect(Nodes([3, 2, 0, 1]), CONFIG, SIZES) == {2: 2, 0: 3, 1: 4}
    assert "Node 1 has partition-id 3, and `num_clients` is 3" in caplog.text


def test_a_node_with_other_data_is_named() -> None:
    grid = Nodes([0, 1, 2])
    grid.samples = 59
    with pytest.raises(RunError, match=r"Node 1 \(partition-id 0\) holds 59 samples, and by the configuration 60"):
        connect(grid, CONFIG, SIZES)
