"""The trace file: valid JSON after each round, with the fields that Perfetto needs, and no larger than it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlabel.record.trace import TraceFile
from fedlabel.spans import Event, Recorded

US = 1000


def recorded(*events: Event, begin: int = 0, end: int = 100 * US, left_out: int = 0) -> Recorded:
    return Recorded(begin, end, {}, {}, list(events), left_out)


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    content = json.loads(path.read_text())
    return content["traceEvents"], content["otherData"]


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in read(path)[0] if event["ph"] == "X"]


def test_an_event_has_name_times_in_microseconds_track_and_args(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    args = {"clients": [3, 8], "stack": 2}
    trace.add(4, recorded(Event("forward and backward", 10 * US, 30 * US, args), begin=5 * US, end=50 * US))
    place = {"ph": "X", "pid": 1, "tid": 1}
    assert spans(tmp_path / "trace.json") == [
        {"name": "round 4", "ts": 5, "dur": 45, "args": {"round": 4}, **place},
        {"name": "forward and backward", "ts": 10, "dur": 20, "args": args, **place},
    ]


def test_it_is_valid_after_each_round_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    assert spans(path) == []
    for number in range(1, 4):
        trace.add(number, recorded(begin=number * US, end=(number + 1) * US))
        assert [event["name"] for event in spans(path)] == [f"round {each}" for each in range(1, number + 1)]


def test_each_process_has_a_track_that_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    for number in (1, 2):
        trace.add(number, recorded(*(Event("plan", 0, US, {}, worker) for worker in (1, 0, None))))
    names = {e["pid"]: e["args"]["name"] for e in read(path)[0] if e["name"] == "process_name"}
    assert names == {1: "server", 2: "worker 0", 3: "worker 1"}
    assert sum(event["ph"] == "M" for event in read(path)[0]) == 2 * 3
    assert [event["pid"] for event in spans(path) if event["name"] == "plan"] == [3, 2, 1, 3, 2, 1]


@pytest.mark.parametrize(("outer", "inner"), [((1900, 2900), (2000, 2900)), ((1000, 2400), (1600, 2300))])
def test_an_event_inside_another_stays_inside_when_times_are_rounded(
    outer: tuple[int, int], inner: tuple[int, int], tmp_path: Path
) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    trace.add(1, recorded(Event("inner", *inner, {}), begin=outer[0], end=outer[1]))
    whole, part = spans(tmp_path / "trace.json")
    assert whole["ts"] <= part["ts"] <= part["ts"] + part["dur"] <= whole["ts"] + whole["dur"]


def test_events_beyond_the_limit_are_left_out_and_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path, limit=3)
    for number in (1, 2, 3):
        trace.add(number, recorded(Event("plan", 0, US, {}), left_out=10))
    assert [event["name"] for event in spans(path)] == ["round 1", "plan", "round 2"]
    assert read(path)[1] == {"events": 3, "largest_number_of_events": 3, "events_left_out": 3 + 30}


def test_a_new_trace_replaces_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    TraceFile(path).add(1, recorded(Event("x" * 1000, 0, US, {})))
    TraceFile(path).add(2, recorded())
    assert [event["name"] for event in spans(path)] == ["round 2"]
