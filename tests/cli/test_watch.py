"""The view of a run in a terminal: running, killed and finished, wide and narrow, with and without Braille."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedlabel.cli.main import app
from fedlabel.cli.watch import FINISHED, RUNNING, STOPPED, Watched, frame, plot
from fedlabel.record.run_folder import RunFolder

CONFIG = "seed: 3\nnum_clients: 4\nnum_rounds: 10\nmethod: {name: fedlabel}\ndata: {name: digits}\n"


@pytest.fixture
def folder(tmp_path: Path):
    opened = RunFolder.create(tmp_path / "a run", CONFIG, {}, events=False)
    yield opened
    opened.close()


def add(folder: RunFolder, number: int, accuracy: float, failed: int = 0) -> None:
    numbers = {"eval/accuracy": accuracy, "train/loss": 1.0, "system/round_seconds": 30.0}
    folder.log_round(
        number,
        {**numbers, "system/failed_clients": float(failed)},
        lists={
            "eval/client_accuracy": np.array([0.5, 0.1, np.nan, 0.9]),
            "train/client_loss": np.array([np.nan, 2.0, 1.0, np.nan] if number == 1 else [0.25, *[np.nan] * 3]),
        },
    )


def text_of(path: Path, width: int = 80, height: int = 24, plain: bool = False) -> str:
    console = Console(width=width, height=height, color_system=None, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    with console:
        console.print(frame(Watched(path), width, height, plain))
    console.file.close()
    return console.export_text()


def test_a_running_run_shows_rounds_time_left_and_clients_worst_first(folder: RunFolder) -> None:
    (folder.path / "stages.json").write_text(
        json.dumps([{"name": "burn-in", "first": 1, "last": 2}, {"name": "main", "first": 3, "last": 10}])
    )
    add(folder, 1, 0.25)
    add(folder, 2, 0.5)
    assert Watched(folder.path).state == RUNNING
    text = text_of(folder.path)
    assert "a run  fedlabel on digits, 4 clients, seed 3  running" in text
    assert "round 2/10  stage: main  1 min 0 s in rounds  about 4 min 0 s left" in text
    assert "accuracy: 0.5" in text
    rows = [
        line.replace("▪", "").split() for line in text.splitlines() if line.strip()[:1].isdigit() and "│" not in line
    ]
    assert rows == [["1", "0.100", "2.000"], ["0", "0.500", "0.250"], ["3", "0.900"]]
    assert "failures" not in text


def test_a_killed_run_says_so_and_how_to_go_on(folder: RunFolder) -> None:
    add(folder, 1, 0.25, failed=2)
    folder.log_failure("Round 1, client 2: ValueError: b\x1b[31mad\n    Traceback")
    folder.close()
    assert Watched(folder.path).state == STOPPED
    text = text_of(folder.path, width=200)
    assert "STOPPED" in text
    assert f"fedlabel run --resume --name 'a run' --out {folder.path.parent}" in text.replace("\n", "")
    assert r"2 failures of clients (failures.log), the last: Round 1, client 2: ValueError: b\x1b[31mad" in text
    assert "left" not in text


def test_a_finished_run_says_its_results(folder: RunFolder) -> None:
    for number in range(1, 11):
        add(folder, number, 0.9 if number == 4 else 0.5)
    folder.write_summary({"rounds": 10})
    folder.close()
    assert Watched(folder.path).state == FINISHED
    assert "accuracy: last 0.5000, best 0.9000" in text_of(folder.path)
    result = CliRunner().invoke(app, ["watch", str(folder.path)])
    assert result.exit_code == 0
    assert "finished" in result.output


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
@pytest.mark.parametrize("plain", [True, False])
def test_a_picture_fits(folder: RunFolder, width: int, height: int, plain: bool) -> None:
    for number in range(1, 4):
        add(folder, number, 0.1 * number)
    lines = text_of(folder.path, width, height, plain).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < max(height, 14)
    assert not plain or "\n".join(lines).isascii()


def test_before_the_first_round_there_is_a_picture(folder: RunFolder) -> None:
    assert "round 0/10" in text_of(folder.path)


def test_what_is_appended_is_read_and_a_resumed_run_begins_anew(folder: RunFolder) -> None:
    add(folder, 1, 0.1)
    seen = Watched(folder.path)
    add(folder, 2, 0.2)
    add(folder, 3, 0.3)
    with open(folder.metrics_jsonl, "a") as file:
        file.write('{"round": 4, "eval/acc')  # torn, as yet
    seen.look()
    assert seen.series("eval/accuracy") == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert seen.metrics.lists["train/client_loss"] == [0.25, 2.0, 1.0, None]
    folder.close()
    resumed = RunFolder.resume(folder.path, 1, events=False)
    add(resumed, 2, 0.7)
    seen.look()
    resumed.close()
    assert seen.series("eval/accuracy") == ([1, 2], [0.1, 0.7])


def test_watching_does_not_keep_a_run_from_its_folder(folder: RunFolder) -> None:
    add(folder, 1, 0.1)
    folder.close()
    seen = Watched(folder.path)
    RunFolder.resume(folder.path, 1, events=False).close()
    assert seen.state == STOPPED


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no run (no config.yaml)" in result.output
    (tmp_path / "config.yaml").write_text("num_clients: many\nnum_rounds: 2\n")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"`num_clients` \(=many\) in .* must be a number above 0"):
        Watched(tmp_path)


def test_a_curve_goes_from_corner_to_corner() -> None:
    assert plot("t", [1, 2, 3], [0.0, 0.5, 1.0], 12, 3, plain=True) == [
        "t: 1",
        "1 |      ***",
        "  |   ***",
        "0 |***",
        "   round 1 3",
    ]
    (title, line, rounds) = plot("t", [4], [2.0], 12, 1, plain=False)
    assert title == "t: 2"
    assert "round 4" in rounds
    assert line.count("│") == 1


def test_clients_are_called_by_their_names(folder: RunFolder) -> None:
    names = ["Aachen", "[red]Bern", "Chur\x1b[31m", "D" * 99]
    folder.partition_json.write_text(json.dumps({"clients": [{"name": name} for name in names]}))
    add(folder, 1, 0.25)
    text = text_of(folder.path)
    rows = [line.strip() for line in text.splitlines() if line.strip()[1:3] == ": "]
    # worst first; client 2 has no accuracy
    assert [row.split("  ")[0] for row in rows] == ["1: [red]Bern", "0: Aachen", f"3: {'D' * 24}…"]
