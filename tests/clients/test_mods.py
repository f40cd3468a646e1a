"""What a node keeps on its disk, and what it logs of the server's refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from clients.mods import Memory, remembering, told
from server.flower import set_identity

set_identity()

KEY = "0123456789abcdef" * 2


def state(text: str) -> RecordDict:
    return RecordDict({"kept": ConfigRecord({"text": text})})


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_begins_with_the_memory_of_the_last_one_before(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "run", "client0")
    assert list(memory.before(1)) == []
    for number in (1, 2, 4):
        memory.save(number, state(f"after {number}"), saved=0)
    for number, begins in ((2, "after 1"), (3, "after 2"), (4, "after 2"), (5, "after 4"), (9, "after 4")):
        assert memory.before(number)["kept"]["text"] == begins
    assert list(memory.before(1)) == []
    assert list(Memory(tmp_path / "run", "client1").before(9)) == []


def test_only_memories_that_can_be_needed_stay(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "client0")
    Memory(tmp_path, "client00").save(1, state("another's"), saved=0)
    for number in range(1, 7):
        memory.save(number, state(str(number)), saved=max(0, number - 3))
    assert rounds(tmp_path) == [f"client0-00000{n}.memory" for n in (3, 4, 5, 6)] + ["client00-000001.memory"]
    assert memory.before(4)["kept"]["text"] == "3"
    memory.save(4, state("once more"), saved=3)  # the run went on from round 3: what came after does not count
    assert rounds(tmp_path) == [f"client0-00000{n}.memory" for n in (3, 4)] + ["client00-000001.memory"]
    assert memory.before(9)["kept"]["text"] == "once more"


def test_a_damaged_memory_is_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(tmp_path, "client0")
    memory.save(1, state("one"), saved=0)
    (path,) = tmp_path.iterdir()
    for content in (path.read_bytes()[:-1], b"", path.read_bytes().replace(b"one", b"two")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="memory of the run is damaged; its log says which file"):
            memory.before(2)
        assert str(path) in caplog.text
        memory.save(1, state("one"), saved=0)


def asked(folder: Path | None, **record: Any) -> tuple[Message, Context]:
    message = Message(RecordDict({"config": ConfigRecord(record)}), 7, "train")
    message.metadata.__dict__["_message_id"] = "an id"
    node: dict[str, Any] = {"partition-id": 3} | ({} if folder is None else {"memory": str(folder)})
    return message, Context(run_id=1, node_id=7, node_config=node, state=state("Flower's"), run_config={})


def test_the_memory_in_the_folder_replaces_flowers(tmp_path: Path) -> None:
    seen: list[str] = []

    def train(message: Message, context: Context) -> Message:
        seen.append(context.state["kept"]["text"] if "kept" in context.state else "nothing")
        context.state = state(f"{seen[-1]}, {message.content['config']['server-round']}")
        return Message(RecordDict({}), reply_to=message)

    def fail(message: Message, context: Context) -> Message:
        train(message, context)
        return Message(Error(2, "no"), reply_to=message)

    order = {"run": KEY, "saved-round": 0}
    for number, handler in ((1, train), (2, train), (2, train), (3, fail), (3, train), (2, train)):
        remembering(*asked(tmp_path, **{**order, "server-round": number}), handler)
        saved = (tmp_path / KEY / f"client3-{number:06d}.memory").exists()
        assert saved == (handler is train)
    assert seen == ["nothing", "nothing, 1", "nothing, 1", "nothing, 1, 2", "nothing, 1, 2", "nothing, 1"]
    assert rounds(tmp_path / KEY) == ["client3-000001.memory", "client3-000002.memory"]
    for message, context in (asked(None, **{**order, "server-round": 2}), asked(tmp_path, **{"server-round": 2})):
        remembering(message, context, train)  # no folder, or a server that does not say which run
        assert seen[-1] == "Flower's"


@pytest.mark.parametrize("key", ["../" + KEY[3:], KEY[1:], KEY.upper(), 5])
def test_the_server_names_no_folder(key: Any, tmp_path: Path) -> None:
    message, context = asked(tmp_path, **{"run": key, "server-round": 1, "saved-round": 0})
    with pytest.raises(ValueError, match="The server says neither which run nor which round"):
        remembering(message, context, lambda message, context: pytest.fail("it was handled"))
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    message = Message(RecordDict({"ask": ConfigRecord({"refused": "other\x1b[2J code"})}), 7, "query")
    message.metadata.__dict__["_message_id"] = "an id"
    context = asked(None)[1]
    told(message, context, lambda message, context: pytest.fail("it was handled"))
    assert "The server refuses this node: other" in caplog.text
    assert "\x1b" not in caplog.text
    other = Message(RecordDict({"ask": ConfigRecord({"source-hash": "1"})}), 7, "query")
    assert told(other, context, lambda message, context: message) is other
