"""A run with `--profile`: metrics and trace on both grids, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from typer.testing import CliRunner

import fedlabel
from clients.client_app import app as client_app
from fedlabel.cli.main import app
from fedlabel.config import keys_without_effect, load_config, parse_config
from fedlabel.metric_tags import find_tag
from fedlabel.record.json_files import read_metrics
from server.grids.flower import FlowerGrid
from server.server_app import run_federation
from server.simulation import RunResult
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import TINY

RAY = ["grid.kind=ray", "grid.num_workers=2"]


def run(out: Path, name: str, *overrides: str, resume: bool = False) -> RunResult:
    return fedlabel.run([], [*TINY, *overrides], name=name, out=out, resume=resume)


def spans(path: Path) -> list[dict[str, Any]]:
    content = json.loads((path / "trace.json").read_text())
    return [event for event in content["traceEvents"] if event["ph"] == "X"]


def results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{tag: value for tag, value in row.items() if not tag.startswith("system/")} for row in rows]


def test_parts_of_a_round_in_this_process(tmp_path: Path) -> None:
    found = run(tmp_path, "a", "grid.profile=true", "num_rounds=2")
    for row in found.metrics:
        seconds = {tag: value for tag, value in row.items() if "seconds_" in tag}
        assert all(find_tag(tag) for tag in seconds)
        parts = {tag.removeprefix("system/seconds_") for tag in seconds}
        assert {"plan", "views", "steps", "audit", "reduce", "evaluate", "other"} <= parts
        assert "wait" not in parts
    whole = [event for event in spans(found.path) if event["name"].startswith("round ")]
    assert [event["name"] for event in whole] == ["round 1", "round 2"]
    for row, event in zip(found.metrics, whole, strict=True):
        together = sum(value for tag, value in row.items() if tag.startswith("system/seconds_"))
        assert together == pytest.approx(event["dur"] / 1e6, abs=2e-6)
        assert together >= row["system/round_seconds"] - 1e-3
    assert "system/seconds_write" in found.metrics[1]


def test_a_part_is_called_the_same_in_metrics_and_trace(tmp_path: Path) -> None:
    found = fedlabel.run([], [*TINY, "num_rounds=1"], name="a", out=tmp_path, profile=True)
    parts = {tag.removeprefix("system/seconds_") for row in found.metrics for tag in row}
    named = {event["name"].partition(":")[0] for event in spans(found.path)} - {"round 1"}
    assert named
    assert named <= parts | {"write"}


def test_results_are_those_of_a_run_without(tmp_path: Path) -> None:
    plain, profiled = run(tmp_path, "a", "num_rounds=2"), run(tmp_path, "b", "num_rounds=2", "grid.profile=true")
    assert results(plain.metrics) == results(profiled.metrics)
    assert not any("seconds_" in tag for row in plain.metrics for tag in row if tag != "system/round_seconds")
    assert not (plain.path / "trace.json").exists()


def test_a_run_may_be_resumed_with_and_without(tmp_path: Path) -> None:
    assert "grid.profile" in keys_without_effect()
    run(tmp_path, "a", "num_rounds=1")
    run(tmp_path, "a", "num_rounds=2", "grid.profile=true", resume=True)
    path = tmp_path / "a"
    assert [event["name"] for event in spans(path) if event["name"].startswith("round ")] == ["round 2"]
    run(tmp_path, "a", "num_rounds=3", resume=True)
    assert [any("seconds_steps" in tag for tag in row) for row in read_metrics(path)] == [False, True, False]


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    asked = ["run", *TINY, "num_rounds=2", "--name", "a", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, [*asked, "--profile"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "server: round 2" in shown.output
    assert "steps" in shown.output
    assert "https://ui.perfetto.dev, with " in shown.output
    again = CliRunner().invoke(app, [*asked, "--resume"], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output
    assert "forward and backward" not in again.output


def test_of_nodes_only_the_server_is_measured(tmp_path: Path) -> None:
    """Nobody would fetch what a node records."""
    nodes = LocalNodes(client_app, 5)
    sent: list[str] = []
    push = nodes.push_messages

    def watching(messages: Iterable[Message]) -> Iterable[str]:
        told = list(messages)
        sent.extend(
            str(m.content.config_records["config"]["experiment"]) for m in told if m.metadata.message_type == "train"
        )
        return push(told)

    nodes.push_messages = watching  # type: ignore[method-assign]
    config = load_config([], [*TINY, "num_rounds=1", "grid.profile=true"])
    run_federation(config, FlowerGrid(nodes), tmp_path / "a")
    (row,) = read_metrics(tmp_path / "a")
    assert {"system/seconds_wait", "system/seconds_transfer", "system/seconds_evaluate"} <= set(row)
    assert "system/seconds_steps" not in row
    assert len(sent) == 3
    assert not any(parse_config(text).grid.profile for text in sent)


@pytest.mark.slow
def test_workers_have_tracks_and_seconds_of_their_own(tmp_path: Path, shared_ray: None) -> None:
    found = run(tmp_path, "a", "grid.profile=true", "num_rounds=3", *RAY)
    last = found.metrics[-1]
    assert {"wait", "transfer", "reduce", "evaluate"} <= {tag.removeprefix("system/seconds_") for tag in last}
    assert {"transfer", "plan", "views", "steps"} <= {tag.removeprefix("system/worker_seconds_") for tag in last}
    assert "system/seconds_steps" not in last
    events = spans(found.path)
    rounds = [event for event in events if event["name"].startswith("round ")]
    clients = [event for event in events if event["name"] == "other: clients"]
    assert {event["pid"] for event in clients} <= {2, 3}
    assert all(event["args"]["clients"] for event in clients)
    begin, end = rounds[0]["ts"], rounds[-1]["ts"] + rounds[-1]["dur"]
    assert all(begin <= event["ts"] and event["ts"] + event["dur"] <= end for event in clients)
    assert results(found.metrics) == results(run(tmp_path, "b", "num_rounds=3").metrics)
