"""Where the time goes: spans of a process, each of one part of a round. A span that begins inside another one stops the
other's clock, so that the seconds of the parts add up to the time that passed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

PARTS: Mapping[str, str] = {
    "wait": "waiting for clients",
    "transfer": "sending and receiving",
    "plan": "drawing steps",
    "e_step": "E step",
    "views": "batches and views",
    "steps": "forward and backward",
    "audit": "audit of pseudo-labels",
    "reduce": "sums and strategy",
    "evaluate": "evaluation",
    "write": "files",
    "other": "other",
}
"""Part of a round -> its title. `other` is all that no span is about."""
EVENTS = 50_000
"""Events that a recorder holds at most; the seconds of those beyond are counted all the same."""


SHORTEST = 1_000_000
"""Nanoseconds that a span lasts at least to be an event, as an event costs a hundredth of that until it is in a file;
the seconds of shorter ones are counted all the same."""


class Event(NamedTuple):
    """A span that has ended, and was not too short."""

    name: str
    begin: int
    """Nanoseconds since 1970, of a clock that is never set back while a process lives."""
    end: int
    args: Mapping[str, Any]
    """What to know of it: numbers, texts, lists."""
    worker: int | None = None
    """Number of the worker process; None: the server's."""


class Recorded(NamedTuple):
    """What a recorder holds."""

    begin: int
    """See `Event.begin`."""
    end: int
    seconds: dict[str, float]
    """Part -> seconds in this process, without those of spans inside; of the parts that occurred. Their sum is the time
    from `begin` to `end`."""
    worker_seconds: dict[str, float]
    """Likewise in the worker processes, added up over them."""
    events: list[Event]
    left_out: int
    """Events beyond `EVENTS`."""

    def metrics(self) -> dict[str, float]:
        """Returns the seconds by metric tag."""
        server = {f"system/seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return server | {f"system/worker_seconds_{part}": seconds for part, seconds in self.worker_seconds.items()}


class Spans(ABC):
    """Takes note of spans."""

    @abstractmethod
    def part(self, part: str, name: str | None = None, **args: Any) -> AbstractContextManager[None]:
        """Returns the context of a span.

        Args:
            part: one of `PARTS`.
            name: what of it, for its event: "transfer: put"; None: no more than the part.
            args: see `Event.args`.
        """

    @abstractmethod
    def take(self) -> Recorded | None:
        """Returns what was recorded since the last time, and forgets it; None if nothing is recorded."""

    @abstractmethod
    def add(self, worker: int, recorded: Recorded | None) -> None:
        """Adds what a worker process recorded."""


class NoSpans(Spans):
    """Records nothing."""

    def __init__(self) -> None:
        self._nothing = nullcontext()

    def part(self, part: str, name: str | None = None, **args: Any) -> AbstractContextManager[None]:
        """See `Spans`."""
        return self._nothing

    def take(self) -> None:
        """See `Spans`."""

    def add(self, worker: int, recorded: Recorded | None) -> None:
        """See `Spans`."""


class Recorder(Spans):
    """Records the spans of a thread.

    Args:
        synchronize: waits until a device has done what was given to it, at the beginning and the end of each span.
        shortest: nanoseconds below which a span is no event.
        limit: how many events are held.
        clock: nanoseconds that only grow.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        shortest: int = SHORTEST,
        limit: int = EVENTS,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._synchronize, self._shortest, self._limit, self._clock = synchronize, shortest, limit, clock
        self._epoch = time.time_ns() - clock()  # so that the processes of a run have one time
        self._part = "other"
        """Whose time it is."""
        self._begin = self._since = clock()
        self._clear()

    def part(self, part: str, name: str | None = None, **args: Any) -> AbstractContextManager[None]:
        """See `Spans`."""
        return _Span(self, part, name, args)

    def take(self) -> Recorded:
        """See `Spans`."""
        self.switch(self._part)
        begin, self._begin = self._begin, self._since
        seconds = {part: spent / 1e9 for part, spent in self._spent.items() if spent}
        taken = Recorded(
            begin + self._epoch, self._since + self._epoch, seconds, self._worker_seconds, self._events, self._left_out
        )
        self._clear()
        return taken

    def add(self, worker: int, recorded: Recorded | None) -> None:
        """See `Spans`."""
        if recorded is None:
            return
        for part, seconds in recorded.seconds.items():
            self._worker_seconds[part] = self._worker_seconds.get(part, 0.0) + seconds
        for event in recorded.events:
            self._keep(event._replace(worker=worker))
        self._left_out += recorded.left_out

    def switch(self, part: str) -> tuple[str, int]:
        """Ends the time of the current part and begins that of another; returns the former, and when."""
        if self._synchronize is not None:
            self._synchronize()
        now, before = self._clock(), self._part
        self._spent[before] += now - self._since
        self._part, self._since = part, now
        return before, now

    def end(self, span: _Span) -> None:
        """Ends a span."""
        _, now = self.switch(span.outer)
        if now - span.begin >= self._shortest:
            name = span.part if span.name is None else f"{span.part}: {span.name}"
            self._keep(Event(name, span.begin + self._epoch, now + self._epoch, span.args))

    def _keep(self, event: Event) -> None:
        if len(self._events) < self._limit:
            self._events.append(event)
        else:
            self._left_out += 1

    def _clear(self) -> None:
        self._spent = dict.fromkeys(PARTS, 0)
        """Part -> nanoseconds."""
        self._worker_seconds: dict[str, float] = {}
        self._events: list[Event] = []
        self._left_out = 0


class _Span:
    """The context of one span."""

    __slots__ = ("_recorder", "args", "begin", "name", "outer", "part")

    def __init__(self, recorder: Recorder, part: str, name: str | None, args: Mapping[str, Any]) -> None:
        self._recorder, self.part, self.name, self.args = recorder, part, name, args

    def __enter__(self) -> None:
        self.outer, self.begin = self._recorder.switch(self.part)

    def __exit__(self, *_: object) -> None:
        self._recorder.end(self)
