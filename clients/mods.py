"""What happens around every message to a client: what it remembers is put in place, what it is told is logged.

A client's memory (`context.state`) is kept by Flower's SuperNode, in this process alone and for one `flwr run`. A node
with `memory` in its configuration keeps it in this folder, where it outlives the node and the run:

    FOLDER/RUN/client0-000012.memory    after the client's round 12 of the run with this key

The server may ask for a round again: it was killed and has resumed from a checkpoint, or the reply got lost. So the
memory that a round begins with is the newest one of a round before it, and older ones stay as long as the server can
go back to them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # pylint: disable=no-name-in-module

from fedlabel.record.files import TEMPORARY, write_atomic
from fedlabel.shown import shown

logger = logging.getLogger("fedlabel")

Next = Callable[[Message, Context], Message]
MAGIC = b"fedlabel-memory-1\n"
_KEY = re.compile(r"[0-9a-f]{32}")


def told(message: Message, context: Context, call_next: Next) -> Message:
    """Logs why the server refuses this node, if it says so."""
    asked = message.content.get("ask") if message.has_content() else None
    if not isinstance(asked, ConfigRecord) or "refused" not in asked:
        return call_next(message, context)
    logger.warning("The server refuses this node: %s", shown(str(asked["refused"]), 500))
    return Message(RecordDict({}), reply_to=message)


def remembering(message: Message, context: Context, call_next: Next) -> Message:
    """Begins a client's round with its memory of the rounds before, and saves the one after; see above.

    Raises:
        ValueError: the memory is damaged, or the server does not say which one it means.
    """
    folder, record = context.node_config.get("memory"), message.content.get("config") if message.has_content() else None
    if folder is None or not isinstance(record, ConfigRecord) or "run" not in record:
        return call_next(message, context)
    key, number, saved = (record.get(name) for name in ("run", "server-round", "saved-round"))
    if type(key) is not str or not _KEY.fullmatch(key) or type(number) is not int or type(saved) is not int:
        raise ValueError("The server says neither which run nor which round it asks for; nothing was done.")
    memory = Memory(Path(str(folder)) / key, f"client{context.node_config.get('partition-id', '')}")
    context.state = memory.before(number)
    reply = call_next(message, context)
    if not reply.has_error():
        memory.save(number, context.state, saved)
    return reply


class Memory:
    """The memories of one client in one run, each the one after a round.

    Args:
        folder: the run's; made when something is saved.
        client: the beginning of the files' names.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self._folder, self._client = folder, client

    def before(self, number: int) -> RecordDict:
        """Returns the memory that a round begins with; empty if the client never trained.

        Raises:
            ValueError: it is damaged.
        """
        rounds = [each for each in self._rounds() if each < number]
        if not rounds:
            if number > 1:
                logger.info("This node remembers nothing of the run before round %d, and begins as new.", number)
            return RecordDict()
        path = self._path(max(rounds))
        content = path.read_bytes()
        digest, payload = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
        if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
            logger.error("%s is damaged: delete it to go on from an older memory, if there is one.", path)
            raise ValueError("The node's memory of the run is damaged; its log says which file.")
        return recorddict_from_proto(ProtoRecordDict.FromString(payload))

    def save(self, number: int, state: RecordDict, saved: int) -> None:
        """Saves the memory after a round, and deletes those that no round can begin with any more.

        Args:
            number: the round.
            state: what the client remembers.
            saved: the earliest round from which the server can resume.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        payload = recorddict_to_proto(state).SerializeToString()
        later = [each for each in self._rounds() if each > number]  # of rounds that did not count
        write_atomic(self._path(number), MAGIC + hashlib.sha256(payload).digest(), payload)
        needed = max((each for each in self._rounds() if each <= saved), default=0)
        for each in [*later, *(each for each in self._rounds() if each < needed)]:
            self._path(each).unlink(missing_ok=True)
        for leftover in self._folder.glob(f".{self._client}-*{TEMPORARY}"):  # of a write that was killed
            leftover.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._client}-{number:06d}.memory"

    def _rounds(self) -> list[int]:
        name = re.compile(rf"{re.escape(self._client)}-(\d{{6,18}})\.memory")
        return [int(found[1]) for path in self._folder.glob("*.memory") if (found := name.fullmatch(path.name))]
