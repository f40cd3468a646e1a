"""The process of a node that handles its messages, one after the other, and keeps model and data between them.

Usage (by `node.py` only): python -m clients.worker PID DESCRIPTOR

PID: of the node, with which the worker ends. DESCRIPTOR: the worker's end of a connection that nobody else has: a
socket pair, inherited, without a name in the file system. What travels: a message and a context, each as Flower
serialises them, behind its length; back come the reply and the context after it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext  # pylint: disable=no-name-in-module
from flwr.proto.message_pb2 import Message as ProtoMessage  # pylint: disable=no-name-in-module
from flwr.supercore.task_identity import TaskIdentity

logger = logging.getLogger("fedlabel")


def serve(connection: Connection, app: ClientApp) -> None:
    """Answers messages until the other end of the connection is closed."""
    while True:
        try:
            message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
            context = context_from_proto(ProtoContext.FromString(connection.recv_bytes()))
        except EOFError:
            return
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, context.run_id, context.node_id
        before = context_to_proto(context)
        try:
            reply = app(message, context)
            after = context_to_proto(context)
        except Exception as error:  # of Flower: our app makes a reply of its own errors
            from clients.trust import error_reply  # here: it imports torch

            reply = error_reply(message, error)
            after = before
        connection.send_bytes(message_to_proto(reply).SerializeToString())
        connection.send_bytes(after.SerializeToString())


def _end_with(parent: int) -> None:
    """Ends this process as soon as its parent has ended, in the middle of whatever it does."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """Serves the node that started this process."""
    parent, descriptor = int(sys.argv[1]), int(sys.argv[2])
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the node, and the worker ends with it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from clients.client_app import app  # here: it takes seconds, in which the parent may end

    with Connection(descriptor) as connection:
        serve(connection, app)


if __name__ == "__main__":
    main()
