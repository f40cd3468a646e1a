"""Nodes with data of their own: who is which client, and what of their answers is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlabel.config import load_config
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.data.nodes.federation import Holding, as_json
from fedlabel.errors import RunError
from fedlabel.hardware import source_hash
from fedlabel.learning.evaluation import add_evaluations
from fedlabel.learning.metrics import CALIBRATION_BINS
from server.flower import set_identity
from server.own_data import Answer, OwnNodes, number_clients, on_the_way, read_answer, read_evaluation, read_evaluations
from server.schema import Refused
from tests.data.nodes.folders import TABLE
from tests.integration.local_nodes import LocalNodes

HOLDING = Holding(LabelCard(5, 2, 0, 0, 0, 0, 0, 0, 0, ()), (3, 2, 0, 0, 0, 0, 0, 0, 0), 4, 0, 0, 2)
ANSWER = {"source-hash": source_hash(), "holding": as_json(HOLDING), "share-evaluation": False}


def test_nodes_get_their_number_and_the_others_what_is_left() -> None:
    refusals: list[str] = []
    assert number_clients({50: None, 7: 2, 30: None, 90: 0}, 4, refusals) == {0: 90, 1: 30, 2: 7, 3: 50}
    assert refusals == []
    assert number_clients({50: None, 7: None, 30: 4}, 1, refusals) == {0: 7}
    assert refusals == [
        "Node 30 was started with client=4, and `num_clients` is 1.",
        "Node 50 is not needed: `num_clients` is 1.",
    ]


def test_two_nodes_with_one_number_and_too_few_are_refused() -> None:
    with pytest.raises(RunError, match="Nodes 3 and 8 were both started with client=1"):
        number_clients({8: 1, 3: 1}, 2, [])
    with pytest.raises(RunError, match=r"Only 1 of `num_clients` \(=2\) nodes can take part. Node 9 is late."):
        number_clients({8: 1}, 2, ["Node 9 is late."])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source-hash": 3}, "lacks `source-hash`"),
        ({"client": -1}, r"its client \(=-1\) is no number of at least 0"),
        ({"client": 1.5}, r"its client \(=1.5\)"),
        ({"holding": 3}, "lacks `holding`"),
        ({"share-evaluation": 1}, "lacks `holding`"),
        ({"holding": "{}"}, "does not say what it holds: it is no JSON of counts"),
    ],
)
def test_an_odd_answer_is_refused(change: dict[str, Any], message: str) -> None:
    found = read_answer(RecordDict({"identity": ConfigRecord({**ANSWER, "client": 3})}), TABLE)  # type: ignore[dict-item]
    assert found == Answer(HOLDING, 3, False)
    with pytest.raises(Refused, match=message):
        read_answer(RecordDict({"identity": ConfigRecord({**ANSWER, **change})}), TABLE)
    with pytest.raises(Refused, match="lacks the record `identity`"):
        read_answer(RecordDict({}), TABLE)


def test_a_node_with_other_code_need_not_say_what_it_holds() -> None:
    assert read_answer(RecordDict({"identity": ConfigRecord({"source-hash": "other"})}), TABLE) == "other"


def test_nodes_get_no_path_of_the_server() -> None:
    config = load_config([], ["data.name=nodes", "data.schema=/a", "data.test=/b"])
    assert on_the_way(config).data == load_config([], ["data.name=nodes"]).data


def evaluation(**changes: Any) -> RecordDict:
    """Of 4 samples of 3 classes, of which 3 are right."""
    bins = np.zeros((3, CALIBRATION_BINS))
    bins[:, 10] = [4, 2.8, 3]
    sums = {"confusion": [1, 1, 0, 0, 2, 0, 0, 0, 0], "loss": 2.5, "calibration": bins.ravel().tolist()}
    return RecordDict({"evaluation": ConfigRecord({**sums, **changes})})


def bins_of(count: float, confidence: float, correct: float) -> list[float]:
    bins = np.zeros((3, CALIBRATION_BINS))
    bins[:, 3] = [count, confidence, correct]
    return list(map(float, bins.ravel()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusion": [1, 1, 0, 0, 2]}, "not 9 whole numbers"),
        ({"confusion": [1.0] * 9}, "not 9 whole numbers"),
        ({"confusion": [1, 1, 0, 0, 3, 0, 0, 0, 0]}, "not of the 4 samples"),
        ({"confusion": [-1, 1, 0, 0, 4, 0, 0, 0, 0]}, "not of the 4 samples"),
        ({"loss": -1.0}, "sum of losses"),
        ({"loss": float("nan")}, "NotFinite: its sum of losses"),
        ({"loss": 3}, "sum of losses"),
        ({"calibration": [0.0]}, f"not {3 * CALIBRATION_BINS} numbers"),
        ({"calibration": bins_of(4, 4.5, 3)}, "do not fit"),
        ({"calibration": bins_of(4, 2, 4)}, "do not fit"),
        ({"calibration": bins_of(3, 2, 3)}, "do not fit"),
        ({"calibration": bins_of(4, float("nan"), 3)}, "do not fit"),
        ({"more": 1}, "must have confusion, loss and calibration"),
    ],
)
def test_odd_sums_are_refused(change: dict[str, Any], message: str) -> None:
    found = read_evaluation(evaluation(), 3, 4)
    assert (found.samples, found.loss, int(np.trace(found.confusion))) == (4, 2.5, 3)
    with pytest.raises(Refused, match=message):
        read_evaluation(evaluation(**change), 3, 4)
    with pytest.raises(Refused, match="the record `evaluation`, and nothing else"):
        read_evaluation(RecordDict({**evaluation(), "more": ConfigRecord({})}), 3, 4)


def test_who_does_not_evaluate_is_left_out_and_named() -> None:
    set_identity()
    messages = {client: Message(RecordDict({}), client + 10, "evaluate") for client in range(5)}
    for client, message in messages.items():
        message.metadata.__dict__["_message_id"] = f"message {client}"
    replies = [
        Message(evaluation(), reply_to=messages[0]),
        Message(evaluation(loss=1.5), reply_to=messages[2]),
        Message(evaluation(loss=-1.0), reply_to=messages[1]),
        Message(Error(2, "ValueError: no\nTraceback"), reply_to=messages[3]),
        Message(evaluation(), reply_to=messages[0]),
    ]
    found, failures = read_evaluations(messages, replies, 3, dict.fromkeys(range(5), 4))
    assert set(found) == {0, 2}
    assert [failure.partition(":")[0] for failure in failures[:2]] == ["client 1", "client 3"]
    assert "Traceback" not in failures[1]
    assert failures[2:] == [
        "node 10 sent a reply that nobody waits for",
        "client 4: it did not answer in time, or is not connected",
    ]
    total = add_evaluations(found, [2, 4], 5)
    assert total is not None
    assert total.loss == 0.5
    assert total.metrics()["eval/accuracy"] == 0.75
    np.testing.assert_array_equal(total.client_accuracy, [np.nan, np.nan, 0.75, np.nan, np.nan])
    assert add_evaluations({}, [], 5) is None


class Folders(LocalNodes):
    """Nodes of which each answers with what it holds."""

    def __init__(self, *held: int, **clients: int) -> None:
        super().__init__(ClientApp(), len(held))
        self.held, self.asked = dict(enumerate(held, 1)), clients

    def get_node_ids(self) -> Iterable[int]:
        return list(self.held)

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if "refused" in message.content["ask"]:
            return Message(RecordDict({}), reply_to=message)
        number = {"client": self.asked[f"node{node}"]} if f"node{node}" in self.asked else {}
        answer = {**ANSWER, "holding": as_json(HOLDING._replace(held_out=self.held[node])), **number}
        return Message(RecordDict({"identity": ConfigRecord(answer)}), reply_to=message)  # type: ignore[arg-type]


def met(grid: Folders, *overrides: str, held: Sequence[int] = ()) -> OwnNodes:
    """Nodes that are connected; held: samples that each client held out when the run began, if it is resumed."""
    options = ["data.name=nodes", "num_clients=3", "grid.connect_timeout=0.5", "grid.timeout=0.5", *overrides]
    known = tuple(HOLDING._replace(held_out=count) for count in held)
    nodes = OwnNodes(grid, load_config([], options), TABLE, known)
    nodes.connect()
    return nodes


def seen(nodes: OwnNodes) -> dict[int, int]:
    """Client -> node, after two looks: one asks, one reads."""
    nodes.refresh()
    nodes.refresh()
    return dict(sorted(nodes.of.items()))


def test_nodes_come_back_as_the_client_they_were() -> None:
    grid = Folders(5, 6, 7, node2=0)
    nodes = met(grid)
    assert seen(nodes) == {0: 2, 1: 1, 2: 3}
    assert [holding.held_out for holding in nodes.holdings] == [6, 5, 7]
    del grid.held[3]
    assert seen(nodes) == {0: 2, 1: 1}
    grid.held[3] = 7
    assert seen(nodes) == {0: 2, 1: 1, 2: 3}
    del grid.held[3]
    seen(nodes)
    grid.held[9] = 7  # without a key of its own it has another id, and holds as much as it did
    assert seen(nodes) == {0: 2, 1: 1, 2: 9}


def test_a_node_with_other_data_takes_no_place(caplog: pytest.LogCaptureFixture) -> None:
    grid = Folders(5, 6, 7)
    nodes = met(grid)
    del grid.held[3]
    seen(nodes)
    grid.held |= {3: 8, 4: 8}
    assert seen(nodes) == {0: 1, 1: 2}
    assert "Node 3 (client 2) holds other data than when the run began" in caplog.text
    assert "Node 4 is not needed, or holds other data than any client that is missing" in caplog.text
    grid.held[5], grid.asked["node5"] = 5, 0
    assert seen(nodes) == {0: 1, 1: 2}
    assert "Nodes 1 and 5 are both client 0" in caplog.text


def test_a_run_is_resumed_with_those_that_suffice() -> None:
    """Each is the client that it was, by its number or by what it holds; the others join later."""
    grid = Folders(7, 6, node1=2)
    nodes = met(grid, "grid.min_nodes=2", held=[5, 6, 7])
    assert nodes.of == {2: 1, 1: 2}
    assert [holding.held_out for holding in nodes.holdings] == [5, 6, 7]
    grid.held[3] = 5
    assert seen(nodes) == {0: 3, 1: 2, 2: 1}


def test_who_holds_other_data_does_not_go_on_with_a_run() -> None:
    """Node 3 is none of the three clients; two are enough only where `grid.min_nodes` says so."""
    assert met(Folders(5, 6, 9), "grid.min_nodes=2", held=[5, 6, 7]).of == {0: 1, 1: 2}
    message = r"Only 2 of `num_clients` \(=3\) nodes can go on .* Node 3 is not needed, or holds other data"
    with pytest.raises(RunError, match=message):
        met(Folders(5, 6, 9), held=[5, 6, 7])


def test_too_few_and_too_many_nodes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError, match=r"Only 2 of `num_clients` \(=3\) nodes can take part"):
        met(Folders(5, 6))
    assert met(Folders(5, 6, 7, 8)).of == {0: 1, 1: 2, 2: 3}
    assert "Node 4 is not needed: `num_clients` is 3" in caplog.text
