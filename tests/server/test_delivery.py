"""Nodes that are lost in a round, return, or never come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

import server.nodes
from fedlabel.config import ExperimentConfig, load_config
from fedlabel.hardware import source_hash
from server.delivery import TRIES, Delivered, Delivery
from server.nodes import Nodes
from tests.integration.local_nodes import LocalNodes

LOST = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")


class Link(LocalNodes):
    """A grid that says when its nodes were activated; each answers with its number, or as `steps` say.

    steps: node -> what becomes of its training messages, one after the other: an error, "late" (nothing yet), "gone"
    (the node leaves, and an error comes), "restarts" (it is activated anew, and nothing comes), or "answer".
    """

    def __init__(self, clients: dict[int, int], steps: dict[int, list[Any]] | None = None) -> None:
        super().__init__(ClientApp(), 0)
        self.clients, self.steps = clients, steps or {}
        self.since = dict.fromkeys(clients, "start")
        self.returning: dict[int, int] = {}
        """Node that comes when another one goes -> its client."""
        self.trained: list[int] = []
        self.told: dict[int, str] = {}

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, last_activated_at=since) for node, since in self.since.items()]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (key,) = message_ids
        message = self._sent.get(key)
        if message is None:
            return []
        node, ask = message.metadata.dst_node_id, message.content.get("ask")
        if isinstance(ask, ConfigRecord):
            del self._sent[key]
            if "refused" in ask:
                self.told[node] = str(ask["refused"])
                return [Message(RecordDict({}), reply_to=message)]
            identity = {"partition-id": self.clients[node], "source-hash": source_hash(), "num-samples": 9}
            return [Message(RecordDict({"identity": ConfigRecord(identity)}), reply_to=message)]
        step = self.steps[node].pop(0) if self.steps.get(node) else "answer"
        if isinstance(step, Error):
            del self._sent[key]
            return [Message(step, reply_to=message)]
        if step == "late":
            return []
        if step == "restarts":
            self.since[node] += "+"
            self.steps[node].insert(0, "lost")
            return []
        if step == "lost":  # the message that the node had before it was started again
            self.steps[node].insert(0, "lost")
            return []
        del self._sent[key]
        if step == "gone":
            del self.since[node]
            self.since |= dict.fromkeys(self.returning, "later")
            self.clients |= self.returning
            return [Message(LOST, reply_to=message)]
        self.trained.append(node)
        return [Message(RecordDict({}), reply_to=message)]


@pytest.fixture(autouse=True)
def real_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.nodes, "is_simulation", lambda grid: False)


def config(*overrides: str) -> ExperimentConfig:
    return load_config([], ["num_clients=2", "grid.timeout=20", "grid.connect_timeout=0.4", *overrides])


def round_over(link: Link, *overrides: str, nodes: Nodes | None = None) -> tuple[Delivered, Nodes]:
    """Returns what a round delivers to clients 0 and 1, and who is connected after it."""
    asked = config(*overrides)
    if nodes is None:
        nodes = Nodes(link, asked, [9, 9])
        nodes.connect()

    def make(clients: Iterable[int]) -> list[Message]:
        return [Message(RecordDict({"client": ConfigRecord({"client": c})}), nodes.of[c], "train") for c in clients]

    return Delivery(link, nodes, asked.grid, [0, 1], make).run(), nodes


def errors(delivered: Delivered) -> list[str]:
    return [str(reply.error.reason) for reply in delivered.replies if reply.has_error()]


def test_who_returns_as_another_node_is_asked_again() -> None:
    link = Link({11: 0, 12: 1}, {11: ["gone"]})
    link.returning = {13: 0}
    delivered, nodes = round_over(link, "grid.connect_timeout=10")
    assert sorted(link.trained) == [12, 13]
    assert (len(delivered.replies), errors(delivered), nodes.of) == (2, [], {0: 13, 1: 12})
    assert delivered.messages[0].metadata.dst_node_id == 13


def test_a_node_that_was_started_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a key, so it returns as the same node, and its lost message is never answered."""
    monkeypatch.setattr("server.delivery.LOOK", 0.01)
    link = Link({11: 0, 12: 1}, {11: ["restarts"]})
    heard = link.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if link.since[11] == "start+" and any("client" in message.content for message in sent):
            link.steps[11] = []
        return heard(sent)

    monkeypatch.setattr(link, "push_messages", push)
    delivered, _ = round_over(link)
    assert sorted(link.trained) == [11, 12]
    assert (len(delivered.replies), errors(delivered)) == (2, [])


def test_a_client_whose_node_stays_away_fails_and_is_waited_for_once() -> None:
    link = Link({11: 0, 12: 1}, {11: ["gone"]})
    delivered, nodes = round_over(link)
    assert (link.trained, errors(delivered), nodes.given_up) == ([12], ["Node Unavailable"], {0})
    delivered, _ = round_over(link, "grid.connect_timeout=10000", nodes=nodes)  # or this test would run into a timeout
    assert (link.trained, list(delivered.messages)) == ([12, 12], [1])
    link.since[14], link.clients[14] = "later", 0
    delivered, _ = round_over(link, "grid.connect_timeout=10", nodes=nodes)
    assert (sorted(link.trained[2:]), nodes.given_up) == ([12, 14], set())


def test_enough_nodes_go_on_without_the_others() -> None:
    link = Link({11: 0, 12: 1}, {11: ["gone"]})
    started = time.monotonic()
    delivered, nodes = round_over(link, "grid.min_nodes=1", "grid.connect_timeout=10000")
    assert time.monotonic() - started < 10
    assert (link.trained, errors(delivered), nodes.of) == ([12], ["Node Unavailable"], {1: 12})


def test_a_client_is_not_asked_for_ever() -> None:
    link = Link({11: 0, 12: 1}, {11: [LOST] * 100, 12: ["late"] * 20})
    delivered, _ = round_over(link)
    assert (len(link.steps[11]), errors(delivered)) == (100 - TRIES, ["Node Unavailable"])


def test_another_error_is_the_reply() -> None:
    link = Link({11: 0, 12: 1}, {11: [Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError")]})
    delivered, _ = round_over(link)
    assert (link.trained, errors(delivered), link.steps[11]) == ([12], ["ValueError"], [])


def test_a_run_starts_with_min_nodes_and_others_join() -> None:
    link = Link({11: 0})
    delivered, nodes = round_over(link, "grid.min_nodes=1")
    assert (link.trained, list(delivered.messages)) == ([11], [0])
    link.since[12], link.clients[12] = "later", 1
    nodes.refresh()
    round_over(link, "grid.min_nodes=1", nodes=nodes)
    assert sorted(link.trained[1:]) == [11, 12]


def test_a_double_identity_is_refused_until_the_other_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    link = Link({11: 0, 12: 1})
    _, nodes = round_over(link)
    link.since[13], link.clients[13] = "later", 0
    for _ in range(3):
        nodes.refresh()
    said = "Nodes 11 and 13 both have partition-id 0; give each its own."
    assert (nodes.of, link.told) == ({0: 11, 1: 12}, {13: said})
    assert caplog.text.count(said) == 1
    del link.since[11]
    for _ in range(3):
        nodes.refresh()
    assert nodes.of == {0: 13, 1: 12}


def test_a_node_that_was_started_again_says_anew_who_it_is() -> None:
    link = Link({11: 0, 12: 1})
    _, nodes = round_over(link)
    link.since[11], link.clients[11] = "again", 1
    for _ in range(3):
        nodes.refresh()
    assert (nodes.of, list(link.told)) == ({1: 12}, [11])
