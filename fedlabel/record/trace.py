"""A trace of a run, in Chrome's trace-event format: https://ui.perfetto.dev opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlabel.errors import naming
from fedlabel.spans import Event, Recorded

LIMIT = 200_000
"""Events in a file: some 30 MB. Those of later rounds are left out, and counted at the file's end."""
SERVER = 1
"""The server's process id in the file; workers are 2, 3, ... (Perfetto takes 0 for an idle processor)."""


class TraceFile:
    """A trace that grows round by round, and is valid JSON after each; an earlier file is replaced.

    Args:
        path: the file.
        limit: how many events it takes.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._path, self._limit = path, limit
        self._events = self._left_out = 0
        self._tracks = {SERVER}
        head = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(map(_line, _named(SERVER, "server")))
        self._end = len(head)
        """Where the next event goes, in place of the file's end."""
        with naming(path):
            path.write_text(head + self._tail(), encoding="ascii")

    def add(self, round_number: int, recorded: Recorded) -> None:
        """Adds what was recorded until the metrics of a round were complete."""
        whole = Event(f"round {round_number}", recorded.begin, recorded.end, {"round": round_number})
        events = [whole, *recorded.events]
        taken = events[: self._limit - self._events]
        self._events += len(taken)
        self._left_out += len(events) - len(taken) + recorded.left_out
        text = "".join(f",\n{_line(entry)}" for event in taken for entry in self._entries(event))
        with naming(self._path), open(self._path, "r+b") as file:
            file.seek(self._end)
            file.write((text + self._tail()).encode("ascii"))
        self._end += len(text)

    def _entries(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yields an event as the format has it, in whole microseconds; before a worker's first one its name."""
        track = SERVER if event.worker is None else SERVER + 1 + event.worker
        if track not in self._tracks:
            self._tracks.add(track)
            yield from _named(track, f"worker {event.worker}")
        begin, end = event.begin // 1000, event.end // 1000  # both rounded down: what lies inside stays inside
        place = {"pid": track, "tid": track}
        yield {"name": event.name, "ph": "X", "ts": begin, "dur": end - begin, **place, "args": event.args}

    def _tail(self) -> str:
        counts = {"events": self._events, "largest_number_of_events": self._limit, "events_left_out": self._left_out}
        return f'\n], "otherData": {json.dumps(counts)}}}\n'


def _named(track: int, name: str) -> list[dict[str, Any]]:
    place = {"ph": "M", "pid": track, "tid": track, "args": {"name": name}}
    return [{"name": "process_name", **place}, {"name": "thread_name", **place}]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":"))
