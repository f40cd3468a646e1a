"""Flower's grids: an undecodable reply costs its client alone; an unreachable SuperLink ends the run in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError

from fedlabel.config import load_config
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment
from fedlabel.record.json_files import read_metrics
from server.exchange import TRIES, replies_to
from server.grids.flower import FlowerGrid
from server.nodes import Nodes
from server.server_app import run_federation
from server.tally import RoundTally
from tests.integration.client_apps import always_raise, by_client
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import TINY, assert_same_run
from tests.server.rounds import NODES, content, order, tally_of

Step = Exception | None
"""What a pull gives in place of the reply: None is nothing yet."""


class Wire(Grid):
    """A grid that is no simulation's; `steps` of a node come before its reply.

    As on a SuperLink, a reply is gone when it was pulled, and whoever asks again is answered with an error.
    """

    pull_interval = 0.01

    def __init__(self, answer: Callable[[Message], Message], steps: Mapping[int, Sequence[Step]], kind: str = "train"):
        self.answer, self.steps, self.kind = answer, steps, kind
        self.waiting: dict[str, tuple[Message, list[Step]]] = {}
        self.gone: dict[str, Message] = {}
        self.refused: tuple[int, ...] = ()
        self.push_error: Exception | None = None
        self.nodes: Sequence[int] = ()

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    run: Any = None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if self.push_error:
            raise self.push_error
        ids: list[Any] = []
        for message in messages:
            node, key = message.metadata.dst_node_id, f"{len(self.waiting) + len(self.gone)} to {id(message)}"
            message.metadata.__dict__["_message_id"] = key
            ids.append(None if node in self.refused else key)
            if node not in self.refused:
                own = message.metadata.message_type == self.kind
                self.waiting[key] = (message, list(self.steps.get(node, ())) if own else [])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (key,) = message_ids  # more than one, and one bad reply would take others with it
        if key in self.gone:
            lost = Error(ErrorCode.MESSAGE_UNAVAILABLE, "Message Unavailable")
            return [Message(lost, reply_to=self.gone[key])]
        message, steps = self.waiting[key]
        step = steps.pop(0) if steps else self.answer(message)
        if isinstance(step, (DecodeError, AttributeError, KeyError, Message)):
            del self.waiting[key]
            self.gone[key] = message
        if isinstance(step, Exception):
            raise step
        return [] if step is None else [step]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("it decodes all replies at once")


def clients(app: ClientApp, count: int) -> Callable[[Message], Message]:
    """Returns what hands a message to its client in this process."""
    return LocalNodes(app, count).answer


ERRORS = [DecodeError("Error parsing\nmessage"), AttributeError("no `metadata`"), KeyError("ab" * 32)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_undecodable_reply_leaves_the_round_of_the_others(error: Exception, tmp_path: Path) -> None:
    """The run in which a client's replies cannot be decoded is the one in which it fails."""
    config = load_config([], [*TINY, "num_clients=3", "num_rounds=1", "fraction_train=1.0"])
    failing = Wire(clients(by_client({1: always_raise}), 3), {})
    broken = Wire(clients(by_client({}), 3), {2: [error]})
    failing.nodes = broken.nodes = (1, 2, 3)
    run_federation(config, FlowerGrid(failing), tmp_path / "failing")
    run_federation(config, FlowerGrid(broken), tmp_path / "broken")
    assert_same_run(tmp_path / "failing", tmp_path / "broken")
    (row,) = read_metrics(tmp_path / "broken")
    assert (row["system/failed_clients"], row["system/refused_replies"]) == (1, 1)
    said = (tmp_path / "broken" / "failures.log").read_text().strip()
    first = str(error).partition("\n")[0]
    assert said == f"Round 1, client 1: BadReply: it cannot be decoded ({type(error).__name__}: {first})"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_undecodable_identity_leaves_its_node_out(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config([], [*TINY, "num_clients=2"])
    sizes = [len(rows) for rows in Experiment(config).federation.parts]
    grid = Wire(clients(by_client({}), 3), {3: [error]}, kind="query")
    grid.nodes = (1, 2, 3)
    with caplog.at_level("WARNING", "fedlabel"):
        nodes = Nodes(grid, config, sizes)
        nodes.connect()
        nodes.refresh()  # nobody waits for one that is not needed
        assert nodes.of == {0: 1, 1: 2}
    said = f"Node 3 does not answer: BadReply: it cannot be decoded ({type(error).__name__}: "
    assert said in caplog.text
    grid = Wire(clients(by_client({}), 3), {2: [error]}, kind="query")
    grid.nodes = (1, 2)
    with pytest.raises(RunError, match=r"No node has partition-id 1 .* BadReply: it cannot be decoded"):
        Nodes(grid, config, sizes).connect()


# ------------------------------------------------------------------------------------------------------ one round


def round_over(grid: Grid, timeout: float = 5.0) -> tuple[RoundTally, list[int]]:
    """Returns the finished tally of a round over a grid and the nodes whose replies it handed on."""
    messages = [order(node) for node in NODES]
    return tally_of(replies_to(grid, messages, timeout), sent=messages)


def wire(steps: Mapping[int, Sequence[Step]]) -> Wire:
    return Wire(lambda message: Message(content(), reply_to=message), steps)


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink/v1/runtime/pull-messages")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(code, request=request))


def test_an_error_that_passes_costs_nothing() -> None:
    """The SuperLink's own, or that of another message which it handed out beside the reply."""
    tally, used = round_over(wire({12: [None, *[status(500)] * (TRIES - 1)], 13: [ValueError("of another"), None]}))
    assert used == [11, 12, 13]
    assert (tally.failures, tally.refused) == ([], 0)


def test_an_error_that_stays_refuses_the_reply() -> None:
    tally, used = round_over(wire({12: [status(500)] * 100, 13: [ValueError("\x1b[2J")] * 100}))
    assert used == [11]
    assert tally.failures == [
        "Round 4, client 1: BadReply: the SuperLink answers with HTTP status 500 when asked for it",
        r"Round 4, client 2: BadReply: it cannot be decoded (ValueError: \x1b[2J)",
    ]
    assert (tally.num_failed, tally.refused) == (2, 2)


def test_an_unreachable_superlink_ends_the_run_in_one_sentence() -> None:
    lost = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")
    said = r"^Flower's SuperLink cannot be reached \(ConnectError: \[SSL: CERTIFICATE_VERIFY_FAILED\]\)"
    with pytest.raises(RunError, match=said):
        round_over(wire({12: [lost]}))
    grid = wire({})
    grid.push_error = lost
    with pytest.raises(RunError, match=said):
        round_over(grid)
    grid.push_error = status(500)
    with pytest.raises(RunError, match=r"^Flower's SuperLink refuses the messages \(HTTP status 500\)"):
        round_over(grid)


def test_who_does_not_answer_in_time_is_missing() -> None:
    started = time.monotonic()
    tally, used = round_over(wire({12: [None] * 10_000, 13: [None, DecodeError("late"), *[None] * 10_000]}), 0.3)
    assert 0.3 <= time.monotonic() - started < 2
    assert used == [11]
    assert tally.failures == [
        "Round 4, client 1: NoAnswer: the client did not answer in time",
        "Round 4, client 2: BadReply: it cannot be decoded (DecodeError: late)",
    ]


def test_a_fault_just_before_the_deadline_is_told() -> None:
    """The SuperLink was not asked again: time was over."""
    tally, used = round_over(wire({12: [DecodeError("late")]}), 0.0)
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: BadReply: it cannot be decoded (DecodeError: late)"]


def test_an_upload_that_stops_half_way_does_not_cost_the_others_their_place() -> None:
    """Flower's grid waits for the rest of it, here beyond the deadline; the replies after it are there."""

    class Slow(Wire):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            time.sleep(0.2 * (found[0].metadata.src_node_id == 11))
            return found

    _, used = round_over(Slow(wire({}).answer, {}), 0.1)
    assert used == [11, 12, 13]


def test_messages_that_the_superlink_does_not_take_fail_their_clients() -> None:
    grid = wire({})
    grid.refused = (12,)
    tally, used = round_over(grid)
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: NotSent: the SuperLink did not take the message to this client"]
    assert (tally.num_failed, tally.refused) == (1, 0)


# -------------------------------------------------------------------------------------------- Flower's own decoding


class Link:
    """Stands for the client of a SuperLink: every node has answered; `spoil` changes what node 12 has uploaded."""

    def __init__(self, spoil: Callable[[dict[str, bytes], ObjectTree], None]) -> None:
        self.spoil = spoil
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, tuple[Any, ObjectTree]] = {}

    def add(self, message: Message) -> None:
        body = content()
        if message.metadata.dst_node_id == 12:  # equal objects have equal ids, and there is only one of each
            body["sums"] = ConfigRecord({"train/loss": [2.0, 4.0]})
        reply = Message(body, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}
        tree = get_object_tree(reply)
        if message.metadata.dst_node_id == 12:
            self.spoil(objects, tree)
        self.objects |= objects
        proto = message_to_proto(remove_content_from_message(reply))
        self.replies[message.metadata.message_id] = (proto, tree)

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        return PushAppMessagesResponse(message_ids=[m.metadata.message_id for m in request.messages_list])

    def PushObject(self, request: Any) -> PushObjectResponse:
        return PushObjectResponse(stored=True)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        found = [self.replies.pop(key) for key in request.message_ids if key in self.replies]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        body = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=body)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()


class LinkGrid(HttpGrid):
    """Flower's grid on a `Link`."""

    pull_interval = 0.01

    def __init__(self, link: Link) -> None:
        super().__init__(token="none")
        self.link = link
        self._run: Any = SimpleNamespace(run_id=1)

    @property
    def _runtime_client(self) -> Any:
        return self.link

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = super().push_messages(messages)
        for message in messages:
            self.link.add(message)
        return ids


def _bad_body(objects: dict[str, bytes], tree: ObjectTree) -> None:
    (key,) = (key for key, value in objects.items() if value.startswith(b"ConfigRecord") and b"train/loss" in value)
    objects[key] = add_header_to_object_body(b"\xff", ConfigRecord({}))


def _other_root(objects: dict[str, bytes], tree: ObjectTree) -> None:
    objects[tree.object_id] = ConfigRecord({}).deflate()
    tree.ClearField("children")


def _missing_child(objects: dict[str, bytes], tree: ObjectTree) -> None:
    tree.ClearField("children")


def test_what_flowers_decoder_raises_on_one_reply_is_refused_for_its_client() -> None:
    seen = []
    for spoil in (_bad_body, _other_root, _missing_child):
        tally, used = round_over(LinkGrid(Link(spoil)), 0.5)
        assert used == [11, 13], spoil
        assert tally.refused == 1
        (failure,) = tally.failures
        seen.append(failure.partition("(")[2].partition(":")[0])
        assert failure.startswith("Round 4, client 1: BadReply: it cannot be decoded (")
    assert seen == ["DecodeError", "AttributeError", "KeyError"]
    _, used = round_over(LinkGrid(Link(lambda objects, tree: None)), 0.5)
    assert used == [11, 12, 13]


def test_flowers_own_loop_loses_all_replies_of_the_batch() -> None:
    """The reason for `server.exchange`: where this fails, Flower has mended it."""
    with pytest.raises(DecodeError):
        LinkGrid(Link(_bad_body)).send_and_receive([order(node) for node in NODES], timeout=1)
