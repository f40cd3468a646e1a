"""Spans of time: exclusive seconds that add up, events, and a recorder that records nothing."""

from __future__ import annotations

import pytest

from fedlabel.metric_tags import find_tag
from fedlabel.spans import PARTS, NoSpans, Recorder

MS = 1_000_000


class Clock:
    """Nanoseconds that go on when a test says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def pass_ms(self, milliseconds: float) -> None:
        self.now += int(milliseconds * MS)


def nested() -> tuple[Clock, Recorder]:
    """1 ms of nothing, 2 of reduce, in it 5 of steps with 0.5 of views and 3 of an E step in them, 4 more of reduce."""
    clock = Clock()
    recorder = Recorder(clock=clock)
    clock.pass_ms(1)
    with recorder.part("reduce"):
        clock.pass_ms(2)
        with recorder.part("steps", stack=7):
            clock.pass_ms(5)
            with recorder.part("views"):
                clock.pass_ms(0.5)
            with recorder.part("e_step", "beliefs", client=3):
                clock.pass_ms(3)
        clock.pass_ms(4)
    return clock, recorder


def test_time_inside_another_part_counts_once_and_all_adds_up() -> None:
    _, recorder = nested()
    found = recorder.take()
    seconds = {"other": 0.001, "reduce": 0.006, "steps": 0.005, "views": 0.0005, "e_step": 0.003}
    assert found.seconds == pytest.approx(seconds)
    assert sum(found.seconds.values()) == pytest.approx((found.end - found.begin) / 1e9)


def test_events_lie_inside_each_other_and_short_ones_are_none() -> None:
    _, recorder = nested()
    found = recorder.take()
    events = [(e.name, (e.begin - found.begin) / MS, (e.end - found.begin) / MS, dict(e.args)) for e in found.events]
    assert events == [
        ("e_step: beliefs", 8.5, 11.5, {"client": 3}),
        ("steps", 3.0, 11.5, {"stack": 7}),
        ("reduce", 1.0, 15.5, {}),
    ]


def test_what_was_taken_is_forgotten_and_an_open_part_goes_on() -> None:
    clock, recorder = nested()
    with recorder.part("write"):
        clock.pass_ms(2)
        first = recorder.take()
        clock.pass_ms(3)
    second = recorder.take()
    assert first.seconds["write"] == pytest.approx(0.002)
    assert second.seconds == pytest.approx({"write": 0.003})
    assert second.begin == first.end
    assert [event.name for event in second.events] == ["write"]


def test_an_exception_ends_its_span() -> None:
    clock = Clock()
    recorder = Recorder(clock=clock)
    empty: dict[str, int] = {}
    with pytest.raises(KeyError), recorder.part("evaluate"):
        empty[str(clock.pass_ms(2))]
    clock.pass_ms(3)
    assert recorder.take().seconds == pytest.approx({"evaluate": 0.002, "other": 0.003})


def test_events_beyond_the_limit_are_counted_and_so_is_their_time() -> None:
    clock = Clock()
    recorder = Recorder(limit=2, clock=clock)
    for _ in range(5):
        with recorder.part("plan"):
            clock.pass_ms(1)
    found = recorder.take()
    assert (len(found.events), found.left_out) == (2, 3)
    assert found.seconds == pytest.approx({"plan": 0.005})
    assert recorder.take().left_out == 0


def test_workers_are_added_up_apart_from_the_own_process() -> None:
    clock, worker = nested()
    found, server = worker.take(), Recorder(limit=5, clock=clock)
    server.add(0, found)
    server.add(1, found)
    together = server.take()
    assert together.worker_seconds == pytest.approx({part: 2 * value for part, value in found.seconds.items()})
    assert together.seconds == {}
    assert [event.worker for event in together.events] == [0, 0, 0, 1, 1]
    assert together.left_out == 1
    assert server.take().worker_seconds == {}


def test_the_device_is_waited_for_at_both_ends_of_a_span() -> None:
    """What was launched before a span is not its work, and what it launched is."""
    clock = Clock()
    launched = [0.0]

    def synchronize() -> None:
        clock.pass_ms(launched[0])
        launched[0] = 0.0

    recorder = Recorder(synchronize, clock=clock)
    with recorder.part("steps"):
        launched[0] = 2
        with recorder.part("views"):
            launched[0] = 3
        launched[0] = 4
    assert recorder.take().seconds == pytest.approx({"steps": 0.006, "views": 0.003})


def test_no_spans_record_nothing() -> None:
    spans = NoSpans()
    with spans.part("steps", clients=[1]), spans.part("views"):
        pass
    spans.add(0, nested()[1].take())
    assert spans.take() is None


def test_every_part_is_a_metric() -> None:
    _, worker = nested()
    recorder = Recorder()
    recorder.add(0, worker.take())
    with recorder.part("write"):
        metrics = recorder.take().metrics()
    assert metrics["system/worker_seconds_steps"] == pytest.approx(0.005)
    assert "system/seconds_write" in metrics
    assert all(find_tag(f"system/{whose}seconds_{part}") for part in PARTS for whose in ("", "worker_"))
