"""The run folder: what is in it, resuming it, and what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from fedlabel.hardware import PACKAGE_ROOT
from fedlabel.record.json_files import read_metrics
from fedlabel.record.run_folder import RunFolder

HPARAMS = {"method.name": "fedlabel", "training.lr": 0.1, "num_clients": 20, "data.download": False}


@pytest.fixture
def folder(tmp_path: Path):
    opened = RunFolder.create(tmp_path / "runs" / "a", "seed: 0\n", HPARAMS)
    yield opened
    opened.close()


def events(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events(path).Scalars(tag)]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def figure() -> Figure:
    result = Figure(figsize=(2, 1), dpi=50)
    result.subplots().plot([0, 1], [0, 1])
    return result


def rounds(folder: RunFolder, numbers: range, offset: float = 0.0) -> None:
    for number in numbers:
        folder.log_round(number, {"eval/accuracy": number / 10 + offset})


def test_create_makes_the_whole_folder_and_leaves_nothing_beside_it(folder):
    assert folder.config_yaml.read_text() == "seed: 0\n"
    assert folder.checkpoints.is_dir()
    assert read_metrics(folder.path) == []
    assert [path.name for path in folder.path.parent.iterdir()] == ["a"]
    assert {folder.partition_json.name, folder.partition_png.name} == {"partition.json", "partition.png"}
    assert {folder.metrics_jsonl.name, folder.summary_json.name} == {"metrics.jsonl", "summary.json"}


def test_create_refuses_an_existing_run_and_leaves_it_alone(folder):
    folder.close()
    before = files(folder.path)
    with pytest.raises(ValueError, match="a exists: give another --name, or --resume"):
        RunFolder.create(folder.path, "seed: 1\n", {})
    assert files(folder.path) == before
    assert [path.name for path in folder.path.parent.iterdir()] == ["a"]


def test_create_refuses_a_file_in_its_place_and_takes_an_empty_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        RunFolder.create(tmp_path / "file", "", {})
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", "", {}).close()
    assert (tmp_path / "empty" / "config.yaml").is_file()


def test_create_that_loses_a_race_is_refused_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "a"

    def rename_too_late(self, target):
        target.mkdir()
        (target / "theirs").touch()
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    with pytest.raises(ValueError, match="exists"):
        RunFolder.create(path, "", {})
    assert list(tmp_path.rglob("*")) == [path, path / "theirs"]


def test_a_round_is_in_tensorboard_and_in_metrics_jsonl(folder):
    folder.log_round(1, {"eval/accuracy": 0.25, "comm/bytes_up": 1000.0})
    folder.log_round(
        2,
        {"eval/accuracy": np.float64(0.5)},
        lists={"eval/client_accuracy": np.array([0.5, np.nan, 1.0]), "eval/class_accuracy": torch.tensor([0, 1])},
        bins={"pseudo/confidences": np.array([0.0, 3.0, 0.0, 1.0])},
        figures={"eval/confusion": figure()},
    )
    assert [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()] == [
        {"round": 1, "eval/accuracy": 0.25, "comm/bytes_up": 1000.0},
        {"round": 2, "eval/accuracy": 0.5, "eval/client_accuracy": [0.5, None, 1.0], "eval/class_accuracy": [0.0, 1.0]},
    ]
    assert folder.read_metrics() == read_metrics(folder.path)

    read = events(folder.path)  # before `close`: a round is on disk when `log_round` returns
    assert set(read.Tags()["scalars"]) == {"eval/accuracy", "comm/bytes_up"}
    assert scalars(folder.path, "eval/accuracy") == [(1, 0.25), (2, 0.5)]
    histogram = read.Histograms("eval/client_accuracy")[0]
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (2, 2, 1.0)
    histogram = read.Histograms("pseudo/confidences")[0].histogram_value
    assert (histogram.num, histogram.bucket_limit) == (4, [0.25, 0.5, 0.75, 1.0])
    assert histogram.bucket == [0, 3, 0, 1]
    assert histogram.sum == pytest.approx(3 * 0.375 + 0.875)
    image = read.Images("eval/confusion")[0]
    assert (image.step, image.width, image.height) == (2, 100, 50)
    assert not list(folder.path.glob("*/events*")), "all events lie in the run's folder itself"


def test_numbers_that_json_has_not_become_null(folder):
    folder.log_round(1, {"train/loss": math.nan, "eval/loss": math.inf}, lists={"x": np.full(2, np.nan)})
    line = folder.metrics_jsonl.read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert folder.read_metrics() == [{"round": 1, "train/loss": None, "eval/loss": None, "x": [None, None]}]
    assert math.isnan(events(folder.path).Scalars("train/loss")[0].value)
    assert events(folder.path).Tags()["histograms"] == []


def test_text_and_figures_before_the_first_round(folder):
    folder.log_text("config", "```yaml\nseed: 0\n```")
    folder.log_figure("partition", figure())
    read = events(folder.path)
    assert b"seed: 0" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert read.Images("partition")[0].step == 0


def test_failures_are_kept_whole_in_a_file_and_by_first_line_in_tensorboard(folder):
    folder.log_failure("Round 1, client 3: ValueError: bad\nTraceback: ...\n")
    folder.log_failure("Round 1, client 4: ValueError: `x` is bad")
    folder.log_round(1, {"system/failed_clients": 2.0})
    folder.log_failure("Round 2, client 0: NoAnswer")  # a round that stops the run
    folder.close()
    assert folder.failures.read_text().splitlines() == [
        "Round 1, client 3: ValueError: bad",
        "Traceback: ...",
        "Round 1, client 4: ValueError: `x` is bad",
        "Round 2, client 0: NoAnswer",
    ]
    texts = events(folder.path).Tensors("failures/text_summary")
    assert [text.step for text in texts] == [1, 2]
    assert texts[0].tensor_proto.string_val[0].decode().splitlines() == [
        "- `Round 1, client 3: ValueError: bad`",
        "- `Round 1, client 4: ValueError: 'x' is bad`",
    ]


def test_hparams_are_in_the_runs_own_folder_and_leave_the_columns_open(folder):
    content = events(folder.path).PluginTagToContent(metadata.PLUGIN_NAME)
    assert list(content) == [metadata.SESSION_START_INFO_TAG]  # no EXPERIMENT_TAG: it would fix the columns of all runs
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["method.name"].string_value == "fedlabel"
    assert start.hparams["training.lr"].number_value == 0.1
    assert set(start.hparams) == set(HPARAMS)
    folder.write_summary({})
    assert metadata.SESSION_END_INFO_TAG in events(folder.path).PluginTagToContent(metadata.PLUGIN_NAME)


def test_resume_forgets_later_rounds_everywhere(folder):
    folder.log_text("config", "text")
    rounds(folder, range(1, 6))
    folder.close()
    resumed = RunFolder.resume(folder.path, completed_round=3)
    assert [row["round"] for row in resumed.read_metrics()] == [1, 2, 3]
    assert [step for step, _ in scalars(folder.path, "eval/accuracy")] == [1, 2, 3]
    rounds(resumed, range(4, 7), offset=0.01)
    resumed.close()
    expected = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.41), (5, 0.51), (6, 0.61)]
    assert [(row["round"], pytest.approx(row["eval/accuracy"])) for row in resumed.read_metrics()] == expected
    assert scalars(folder.path, "eval/accuracy") == expected
    read = events(folder.path)
    assert "config/text_summary" in read.Tags()["tensors"]
    assert metadata.SESSION_START_INFO_TAG in read.PluginTagToContent(metadata.PLUGIN_NAME)


def test_resume_after_a_kill_in_the_middle_of_every_write(folder):
    """Torn: the last line of metrics.jsonl, the last event; left over: temporary files."""
    rounds(folder, range(1, 4))
    folder.close()
    with open(folder.metrics_jsonl, "ab") as file:
        file.write(b'{"round": 4, "eval/accur')
    log = next(folder.path.glob("events*"))
    log.write_bytes(log.read_bytes()[:-7])
    (folder.checkpoints / ".round_000004.ckpt.0123456789ab.unfinished").write_bytes(b"half")
    assert [row["round"] for row in read_metrics(folder.path)] == [1, 2, 3]

    resumed = RunFolder.resume(folder.path, completed_round=3)
    rounds(resumed, range(4, 5))
    resumed.close()
    assert [row["round"] for row in resumed.read_metrics()] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(folder.path, "eval/accuracy")] == [1, 2, 4]  # 3 was the torn one
    assert list(folder.checkpoints.iterdir()) == []


def test_a_line_counts_once_it_has_its_end(folder):
    rounds(folder, range(1, 3))
    folder.metrics_jsonl.write_bytes(folder.metrics_jsonl.read_bytes()[:-1])
    assert [row["round"] for row in read_metrics(folder.path)] == [1]


@pytest.mark.parametrize("line", ["{broken", "[1]", "3", '{"eval/accuracy": 1}', '{"round": null}', ""])
def test_a_damaged_line_in_the_middle_is_named(folder, line):
    folder.metrics_jsonl.write_text('{"round": 1}\n' + line + '\n{"round": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(folder.path)


def test_resume_refuses_what_is_no_run_or_lacks_rounds(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        RunFolder.resume(tmp_path, 1)
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path)
    rounds(folder, range(1, 3))
    folder.close()
    before = folder.metrics_jsonl.read_bytes()
    with pytest.raises(ValueError, match="ends at round 2, but the checkpoint is of round 5"):
        RunFolder.resume(folder.path, 5)
    assert folder.metrics_jsonl.read_bytes() == before


def test_summary_is_valid_json_of_plain_numbers(folder):
    folder.write_summary(
        {"eval/accuracy": {"last": math.nan, "best": np.float32(0.5)}, "seeds": (1, np.int64(2)), "x": np.arange(2)}
    )
    text = folder.summary_json.read_text()
    assert text.startswith('{\n  "eval/accuracy": {\n    "last": null')
    assert json.loads(text) == {"eval/accuracy": {"last": None, "best": 0.5}, "seeds": [1, 2], "x": [0, 1]}


KILLED = """
import sys, pathlib
from fedlabel.record.files import write_atomic
from fedlabel.record.run_folder import RunFolder
folder = RunFolder.create(pathlib.Path(sys.argv[1]), "seed: 0", {})
for r in range(1, 100_000):
    folder.log_round(r, {"eval/accuracy": float(r)})
    write_atomic(folder.checkpoints / "latest", str(r) * 1000)
    if r == 3:
        print("go", flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_that_can_be_resumed(tmp_path):
    path = tmp_path / "a"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, cwd=PACKAGE_ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        process.send_signal(signal.SIGKILL)
    text = (path / "checkpoints" / "latest").read_text()
    completed = int(text[: len(text) // 1000])
    assert completed >= 3
    assert text == str(completed) * 1000
    resumed = RunFolder.resume(path, completed)
    resumed.log_round(completed + 1, {"eval/accuracy": 0.0})
    resumed.close()
    assert [row["round"] for row in resumed.read_metrics()] == list(range(1, completed + 2))
    assert [step for step, _ in scalars(path, "eval/accuracy")] == list(range(1, completed + 2))


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    """The second is refused and changes nothing; once the first has closed it, it may."""
    first = RunFolder.create(tmp_path / "run", "seed: 0\n", {})
    first.log_round(1, {"eval/accuracy": 0.5})
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="Another process is writing into .*run"):
        RunFolder.resume(tmp_path / "run", 0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    first.close()
    RunFolder.resume(tmp_path / "run", 1).close()
    assert [row["round"] for row in read_metrics(tmp_path / "run")] == [1]


def test_results_over_simulated_time_are_a_run_of_their_own(tmp_path: Path) -> None:
    """Rounds of 2.5 s; the third is lost, and made again."""
    path = tmp_path / "a"
    opened = RunFolder.create(path, "seed: 0\n", HPARAMS)
    for number in (1, 2, 3):
        opened.log_round(number, {"eval/accuracy": number / 10, "x/y": 1.0, "system/virtual_seconds": 2.5 * number})
    opened.close()
    again = RunFolder.resume(path, 2)
    again.log_round(3, {"eval/accuracy": 0.9, "system/virtual_seconds": 7.5})
    again.close()
    assert scalars(path / "by_simulated_seconds", "eval/accuracy") == [(2, 0.1), (5, 0.2), (7, 0.9)]
    assert events(path / "by_simulated_seconds").Tags()["scalars"] == ["eval/accuracy"]
    assert scalars(path, "eval/accuracy") == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_without_a_clock_there_is_no_folder_for_it(folder: RunFolder) -> None:
    rounds(folder, range(1, 3))
    assert not (folder.path / "by_simulated_seconds").exists()
