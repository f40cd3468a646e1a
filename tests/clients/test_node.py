"""The node's worker: what goes to it, what comes back, and what a crash becomes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, Status
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import InMemoryNodeState

from clients.node import LONGEST, SHORTEST, Executor, Patience, Worker, _failing_with_the_run, _in_memory
from clients.worker import serve
from server.flower import set_identity

set_identity()

ECHO = """
import os, sys
from multiprocessing.connection import Connection
with Connection(int(sys.argv[1])) as connection:
    while True:
        message, context = connection.recv_bytes(), connection.recv_bytes()
        if b"crash" in message:
            os._exit(3)
        connection.send_bytes(message)
        connection.send_bytes(context)
"""
"""A worker that hands back what it gets, and ends where it reads "crash"."""


def message(text: str) -> Message:
    made = Message(RecordDict({"say": ConfigRecord({"text": text})}), 7, "train")
    made.metadata.__dict__["_message_id"] = "an id"
    return made


def context() -> Context:
    return Context(run_id=5, node_id=7, node_config={"partition-id": 1}, state=RecordDict(), run_config={})


def test_a_worker_is_kept_and_a_crash_is_an_error_reply() -> None:
    worker = Worker([sys.executable, "-c", ECHO])
    try:
        for text in ("first", "second"):
            reply, after = worker.handle(message(text), context())
            assert (reply.content["say"]["text"], after.node_config["partition-id"]) == (text, 1)
        assert worker._process is not None
        first = worker._process.pid
        reply, after = worker.handle(message("crash"), context())
        assert (reply.error.code, reply.metadata.reply_to_message_id) == (ErrorCode.CLIENT_APP_CRASHED, "an id")
        assert after.node_config["partition-id"] == 1
        assert worker._process is None
        reply, _ = worker.handle(message("third"), context())
        assert reply.content["say"]["text"] == "third"
        assert worker._process is not None
        assert worker._process.pid != first
    finally:
        worker.stop()


def test_a_worker_ends_after_a_while_without_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker([sys.executable, "-c", ECHO])
    worker.handle(message("first"), context())
    process = worker._process
    assert process is not None
    worker.stop_if_idle()
    assert process.poll() is None
    monkeypatch.setattr("clients.node.IDLE", 0.0)
    worker.stop_if_idle()
    assert process.poll() is not None
    assert worker.handle(message("second"), context())[0].content["say"]["text"] == "second"
    worker.stop()


def test_the_worker_hands_messages_to_the_app() -> None:
    """What the app keeps comes back; of a message that it could not handle nothing is kept."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["kept"] = ConfigRecord({"text": message.content["say"]["text"]})
        if message.content["say"]["text"] == "bad":
            raise ValueError("no\nsecond line")
        return Message(RecordDict({}), reply_to=message)

    ours, theirs = Pipe()
    thread = threading.Thread(target=serve, args=(theirs, app), daemon=True)
    thread.start()
    kept = context()
    for text, error in (("good", ""), ("bad", "ValueError: the client failed; the node's own log says why")):
        ours.send_bytes(message_to_proto(message(text)).SerializeToString())
        ours.send_bytes(context_to_proto(kept).SerializeToString())
        reply = message_from_proto(ProtoMessage.FromString(ours.recv_bytes()))
        kept = context_from_proto(ProtoContext.FromString(ours.recv_bytes()))
        assert (str(reply.error.reason) if reply.has_error() else "") == error
        assert kept.state["kept"]["text"] == "good"
    ours.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def tasks_left(monkeypatch: pytest.MonkeyPatch, pull: Callable[..., dict[str, bytes]]) -> int:
    """Returns how many tasks Flower's SuperNode leaves of a message whose run ends while it is being pulled."""
    store = ObjectStoreFactory().store()
    state = InMemoryNodeState(store)
    state.set_node_id(7)
    state.store_run(Run.create_empty(5))
    sent = message("never here as a whole")
    sent.metadata.__dict__["_run_id"] = 5

    def ended(*_: object) -> bytes:
        raise RunNotRunningException

    monkeypatch.setattr(start_client_internal, "pull_objects", pull)
    nothing: Any = None  # is not asked for
    received = (sent, get_object_tree(sent))
    pulled = start_client_internal._pull_and_store_message
    assert pulled(state, store, {}, lambda: received, nothing, nothing, ended, nothing, None) is None
    return len(state.get_tasks(statuses=[Status.PENDING]))


def test_a_message_whose_run_ends_while_it_comes_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would with Flower's own pull: the worker then waited for the rest, and for nothing else."""
    assert tasks_left(monkeypatch, pull_objects) == 1
    assert tasks_left(monkeypatch, _failing_with_the_run(pull_objects)) == 0


@pytest.mark.parametrize("error", [ObjectPullError("id", "gone"), RuntimeError("No messages received")])
def test_a_message_that_was_taken_back_is_passed_over(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pull(_: object) -> None:
        raise error

    monkeypatch.setattr("clients.node.pull_task_input", pull)
    monkeypatch.setattr("clients.node.make_task_heartbeat_fn_http", lambda client: lambda: True)
    client: Any = SimpleNamespace(PullMessages=None, close=lambda: None)
    executor = Executor(lambda _: client, threading.Event(), b"secret", Worker([]))
    executor._handle("token")
    assert "A message was taken back" in caplog.text


def test_who_waits_long_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    patience = Patience()
    waits = []
    for now in (100.0, 101.0, 110.0, 1000.0):  # noqa: B007
        waits.append(patience.seconds())
    assert waits == [SHORTEST, pytest.approx(0.1), pytest.approx(1.0), LONGEST]
    patience.found()
    assert patience.seconds() == SHORTEST


def test_a_secret_is_read_without_a_file() -> None:
    path = _in_memory(b"secret")
    with open(path, "rb") as file:
        assert file.read() == b"secret"
    os.close(int(path.rpartition("/")[2]))
