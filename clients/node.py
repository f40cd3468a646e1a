"""A node as one command: Flower's SuperNode beside one process that keeps model and data between messages.

Usage: fedlabel-node OPTIONS (or python -m clients.node OPTIONS), with the options of `flower-supernode`.

`flower-supernode` by itself starts a process for every message, which imports torch, reads the data, builds the model,
and runs the code that `flwr run` sent. Here a worker (see `worker.py`) does this once, and with the code that is
installed at the node: what `flwr run` sent is neither unpacked nor run (the SuperNode reads its pyproject.toml). Two
more things differ. A SuperNode asks for messages every 3 s, this one sooner where the last one is not long ago. And
what clients remember may be put into a folder (`--node-config 'memory="FOLDER"'`, see `mods.py`), which one node at a
time can use.

All that is known here of Flower beyond its documentation was checked with flwr 1.41.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext  # pylint: disable=no-name-in-module
from flwr.proto.message_pb2 import Message as ProtoMessage  # pylint: disable=no-name-in-module
from flwr.proto.runtime_pb2 import (  # pylint: disable=no-name-in-module
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlabel.record.files import FolderLock

logger = logging.getLogger("fedlabel")

SHORTEST, LONGEST = 0.05, 3.0
"""Seconds between two looks for a message; Flower's own SuperNode always takes the second."""
IDLE = 3600.0
"""Seconds without a message after which the worker ends; the next message starts another."""
CRASHED = "Crashed: the node's worker process ended while it handled the message (see the node's log)"


class Patience:
    """How long to wait before something is looked for again: a tenth of the time since it last was there."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def found(self) -> None:
        """It was there."""
        self._last = time.monotonic()

    def seconds(self) -> float:
        """Returns the time to wait."""
        return min(LONGEST, max(SHORTEST, (time.monotonic() - self._last) / 10))


class Worker:
    """The process that handles messages; it is started when needed.

    Args:
        command: starts it; the number of the descriptor of its end of the connection is appended.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command, self._used = command, time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Starts the process if there is none."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._connection, theirs = multiprocessing.Pipe()
        with closing(theirs):
            number = theirs.fileno()
            self._process = subprocess.Popen([*self._command, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def stop_if_idle(self) -> None:
        """Ends the process if it had no message for long."""
        if self._process is not None and time.monotonic() - self._used > IDLE:
            self.stop()

    def handle(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Returns the reply to a message, and the client's context after it.

        A worker that crashes becomes an error reply; the context is then the one before.
        """
        self.start()
        assert self._connection is not None
        started = time.monotonic()
        try:
            self._connection.send_bytes(message_to_proto(message).SerializeToString())
            self._connection.send_bytes(context_to_proto(context).SerializeToString())
            reply = message_from_proto(ProtoMessage.FromString(self._connection.recv_bytes()))
            context = context_from_proto(ProtoContext.FromString(self._connection.recv_bytes()))
        except (EOFError, OSError):
            logger.error("The worker ended while it handled a message; the next message starts another.")
            self.stop()
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, CRASHED), reply_to=message), context
        finally:
            self._used = time.monotonic()
        logger.info("Handled a %s message in %.2f s", message.metadata.message_type, self._used - started)
        return reply, context


class Executor:
    """Takes messages from the SuperNode, has them handled by the worker, and hands back the replies.

    It stands in for Flower's SuperExec and the ClientApp processes that this starts.

    Args:
        connect: makes a client of the SuperNode's Runtime API with an interceptor.
        come: set when a message has come: the SuperNode waits for its reply.
        secret: that the API asks for when a task is taken.
        worker: handles the messages.
    """

    def __init__(
        self,
        connect: Callable[[ProtobufClientInterceptor], RuntimeHttpClient],
        come: threading.Event,
        secret: bytes,
        worker: Worker,
    ) -> None:
        self._connect, self._come, self._worker, self._patience = connect, come, worker, Patience()
        signs = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._client = connect(signs)

    def run(self) -> None:
        """Handles one message after the other, until this process ends."""
        self._worker.start()  # its imports take longer than the first message needs to arrive
        while True:
            self._come.clear()
            token = self._take()
            if token is None:
                self._worker.stop_if_idle()
                self._come.wait(self._patience.seconds())
                continue
            try:
                self._handle(token)
            except httpx.HTTPError as error:  # e.g. the run was stopped meanwhile
                logger.error("The SuperNode did not take a reply: %s", error)
            self._patience.found()

    def _take(self) -> str | None:
        """Returns the token of a message that waits; None if there is none."""
        try:
            response = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.TransportError:  # not up yet
            return None
        return response.token or None

    def _handle(self, token: str) -> None:
        client = self._connect(RuntimeTokenHttpInterceptor(token))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        try:
            heartbeat.start()
            try:
                message, context, _run, _code = pull_task_input(_waiting(client))
            except (ObjectPullError, RuntimeError) as error:  # the second if there is no message
                logger.warning("A message was taken back before it was there as a whole: %s", error)
                return
            reply, context = self._worker.handle(message, context)
            push_message(client, reply, context)
            if heartbeat.is_running:  # one after the end of the task would fail
                heartbeat.stop()
            status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
            push_task_output(client, context, status, str(reply.error.reason) if reply.has_error() else "")
        finally:
            if heartbeat.is_running:
                heartbeat.stop()
            client.close()


def _waiting(client: RuntimeHttpClient) -> RuntimeHttpClient:
    """Makes a client wait for its message: Flower's SuperNode hands out the task a moment before it has the message."""
    pull, deadline = client.PullMessages, time.monotonic() + LONGEST

    def pull_messages(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        while not (found := pull(request)).messages_list and time.monotonic() < deadline:
            time.sleep(SHORTEST)
        return found

    client.PullMessages = pull_messages  # type: ignore[method-assign]
    return client


def _poll_sooner(come: threading.Event) -> None:
    """Makes Flower's SuperNode wait as `Patience` says, where it says 3 s (no message) or 0.5 s (no reply); the second
    sets `come`.
    """
    patience = Patience()

    def sleep(seconds: float) -> None:
        if seconds < LONGEST:  # a message is being handled
            patience.found()
            come.set()
        time.sleep(min(seconds, patience.seconds()))

    # Whoever pulls a message while it is still being sent waits: Flower first 1 s, then 2 s, ...
    sooner = partial(start_client_internal.pull_objects, initial_backoff=SHORTEST)
    start_client_internal.pull_objects = _failing_with_the_run(sooner)
    run_clientapp.pull_and_inflate_object_from_tree = partial(
        run_clientapp.pull_and_inflate_object_from_tree, initial_backoff=SHORTEST
    )
    start_client_internal.time = SimpleNamespace(sleep=sleep)  # type: ignore[assignment]


def _failing_with_the_run(pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Makes a pull of a message fail as others do if its run ends meanwhile.

    Flower's SuperNode makes the task before it has the whole message. Where the run ends it forgets the message and
    leaves the task, whose executor then looks for the rest of it for more than an hour, and handles nothing else. Of
    a pull that fails otherwise it deletes both.
    """

    def pulled(object_ids: list[str], **settings: Any) -> dict[str, bytes]:
        try:
            return pull(object_ids, **settings)
        except RunNotRunningException as error:
            raise ObjectPullError(object_ids[0], "its run has ended") from error

    return pulled


def _memory_folder(node_config: str) -> Path | None:
    """Returns `memory` of a node's configuration; None without it."""
    from flwr.common.config import parse_config_args

    found = parse_config_args([node_config] if node_config else None).get("memory")
    return None if found is None else Path(str(found))


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as each:
        each.bind((host, 0))
        return int(each.getsockname()[1])


def _in_memory(content: bytes) -> str:
    """Returns a path from which this process can read some bytes, once: they are in no file."""
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(content)  # few: a pipe holds 64 kB
    return f"/dev/fd/{reader}"


def _run_until_it_fails(executor: Executor) -> None:
    """Runs an executor; a node without one would be connected and deaf, so it ends with it."""
    try:
        executor.run()
    except BaseException:
        logger.exception("The node ends: messages can be handled no more.")
        os._exit(1)


def main() -> None:
    """Runs a node until it is stopped."""
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    parser = argparse.ArgumentParser(
        prog="fedlabel-node",
        description="Starts a node that keeps model and data between messages. All other options are handed on to "
        "flower-supernode (see flower-supernode --help); --isolation and --superexec-auth-secret-file are set here.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the API inside the node (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="of the same (default: a free one)")
    parser.add_argument("--node-config", default="", help="the node's configuration, as flower-supernode takes it")
    asked, others = parser.parse_known_args()
    for name in ("--isolation", "--superexec-auth-secret-file", "--ssl-certfile"):
        if any(other.partition("=")[0] == name for other in others):
            parser.error(f"leave out {name}: it is about the API inside the node, which is set up here")
    folder = _memory_folder(asked.node_config)
    if folder is None:
        logger.warning(
            "What this node's client remembers is lost when the node stops: give it a folder with "
            "--node-config 'memory=\"FOLDER\"'."
        )
    else:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FolderLock(folder)
        except (OSError, ValueError) as error:
            parser.error(f"`memory` of the node's configuration cannot be used. {error}")
    port, secret = asked.port or _free_port(asked.host), secrets.token_bytes(32)
    address = f"[{asked.host}]:{port}" if ":" in asked.host else f"{asked.host}:{port}"

    def connect(interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        named = RuntimeVersionHttpInterceptor(component_name="fedlabel node")
        return RuntimeHttpClient.from_server_address(address, True, None, interceptors=[named, interceptor])

    worker = Worker([sys.executable, "-m", "clients.worker", str(os.getpid())])
    come = threading.Event()
    executor = Executor(connect, come, secret, worker)
    threading.Thread(target=_run_until_it_fails, args=(executor,), daemon=True, name="executor").start()
    _poll_sooner(come)
    own = ["--isolation", "process", "--superexec-auth-secret-file", _in_memory(secret)]
    own += ["--host", asked.host, "--port", str(port)]
    sys.argv = ["flower-supernode", *others, *own, *(["--node-config", asked.node_config] * bool(asked.node_config))]
    flower_supernode()
    if folder is not None:
        lock.close()  # else Python would close it, and with it unlock the folder, when nothing refers to it


if __name__ == "__main__":
    main()
