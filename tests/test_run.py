"""A whole run through the public door: what it leaves, and what TensorBoard will find in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fedlabel
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.study.output import write_comparison
from fedlabel.study.runs import read_comparison
from server.simulation import RunResult
from tests.data.arrays import write_npz

TINY = ["num_clients=4", "num_rounds=2", "fraction_train=0.5", "training.local_steps=2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    overrides = [*TINY, "method.confidence_threshold=0.1"]  # untrained models: let some pass
    return fedlabel.run(overrides=overrides, name="run", out=tmp_path_factory.mktemp("runs"))


def test_tensorboard_finds_every_tag(result: RunResult) -> None:
    events = EventAccumulator(str(result.path), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/loss_supervised",
        "train/loss_unsupervised",
        "pseudo/coverage",
        "pseudo/accuracy",
        "pseudo/from_global",
        "eval/accuracy",
        "eval/loss",
        "eval/mean_client_accuracy",
        "eval/worst_client_accuracy",
        "eval/worst_10pct_client_accuracy",
        "eval/jain_index",
        "eval/client_accuracy_sd",
        "eval/ece",
        "pseudo/ece",
        "pseudo/ece_kept",
        "pseudo/correct_wrong_ratio",
        "system/round_seconds",
        "system/failed_clients",
        "comm/bytes_up",
        "comm/bytes_down",
    } <= set(tags["scalars"])
    assert {
        "eval/class_accuracy",
        "eval/client_accuracy",
        "pseudo/client_coverage",
        "pseudo/class_accuracy",
        "pseudo/confidences",
    } <= set(tags["histograms"])
    for event in events.Histograms("pseudo/confidences"):
        assert event.histogram_value.num == sum(event.histogram_value.bucket) > 0
    assert set(tags["images"]) == {
        *("partition", "eval/confusion", "eval/clients", "pseudo/samples", "pseudo/reliability"),
        *("pseudo/precision_coverage", "pseudo/experts"),
    }
    assert "config/text_summary" in tags["tensors"]
    assert not (set(tags["images"]) | set(tags["scalars"])) & set(
        tags["histograms"]
    )  # TensorBoard shows a tag under one plugin only
    for row in result.metrics:
        logged = {event.step: event.value for event in events.Scalars("eval/accuracy")}
        assert logged[row["round"]] == pytest.approx(row["eval/accuracy"])


def test_summary_holds_what_scripts_rely_on(result: RunResult) -> None:
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert set(summary["eval/accuracy"]) == {"last", "best", "mean_last_tenth"}
    assert summary["eval/accuracy"]["last"] == result.metrics[-1]["eval/accuracy"]
    assert (summary["rounds"], summary["seed"], summary["method"], summary["dataset"]) == (2, 0, "fedlabel", "digits")
    assert {"seconds", "commit", "versions", "hardware", "comm/bytes_up", "comm/bytes_down"} <= set(summary)


def test_check_9_upload_is_one_model_and_a_few_scalars(result: RunResult) -> None:
    """Two clients a round, float32 weights; npy headers (128 bytes an array) and counts are the small rest."""
    state = Experiment(load_config([], TINY)).initial_state
    model = sum(4 * value.numel() for value in state.values())
    small = len(state) * 200 + 2000
    for row in result.metrics:
        assert 2 * model < row["comm/bytes_up"] < 2 * (model + small)
        assert 2 * model < row["comm/bytes_down"] < 2 * (model + small)


def test_what_is_evaluated_on_does_not_touch_training(tmp_path: Path) -> None:
    validation = fedlabel.run(overrides=[*TINY, "evaluation.split=validation"], name="v", out=tmp_path)
    test = fedlabel.run(overrides=[*TINY, "evaluation.split=test"], name="t", out=tmp_path)
    assert [row["train/loss"] for row in validation.metrics] == [row["train/loss"] for row in test.metrics]
    assert [row["eval/loss"] for row in validation.metrics] != [row["eval/loss"] for row in test.metrics]


def test_a_table_is_learnt_from_few_labels_and_judged_by_auc(tmp_path: Path) -> None:
    """Ten labels of each class: measured accuracies of seeds 0 to 4 are 0.86 to 0.94, AUC 0.95 to 0.99."""
    few = ["supervision.labels_per_class=10", "supervision.label_rate=null", "partition.kind=iid"]
    overrides = ["data.name=breast_cancer", "model.name=mlp", "model.hidden_layers=[32,16]", "method.name=fixmatch"]
    size = ["num_clients=4", "num_rounds=5", "fraction_train=1.0"]
    result = fedlabel.run(overrides=[*overrides, *few, *size], name="run", out=tmp_path)
    last = result.metrics[-1]
    assert last["eval/accuracy"] > 0.85
    assert last["eval/auc"] > 0.95
    assert last["pseudo/coverage"] > 0
    events = EventAccumulator(str(result.path), size_guidance={"images": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("eval/auc")] == pytest.approx(
        [row["eval/auc"] for row in result.metrics]
    )
    assert "eval/confusion" in events.Tags()["images"]
    assert "pseudo/samples" not in events.Tags()["images"]  # rows are no pictures
    write_comparison(read_comparison([result.path]), tmp_path / "compared")
    with (tmp_path / "compared" / "compare_runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["auc"]) == pytest.approx(result.summary["eval/auc"]["mean_last_tenth"])
    assert "AUC" in (tmp_path / "compared" / "compare.md").read_text()


def test_a_binary_task_of_images_has_an_auc_and_its_classes_are_named(tmp_path: Path) -> None:
    result = fedlabel.run(overrides=[*TINY, "data.positive_classes=[1,3,5,7,9]"], name="run", out=tmp_path)
    assert 0 < result.metrics[-1]["eval/auc"] <= 1
    assert len(result.metrics[-1]["eval/class_accuracy"]) == 2
    assert json.loads((result.path / "partition.json").read_text())["dataset"] == "digits (1+3+5+7+9 against the rest)"


def test_a_run_without_figures_has_the_same_numbers(result: RunResult, tmp_path: Path) -> None:
    overrides = [*TINY, "method.confidence_threshold=0.1", "evaluation.figures=false"]
    plain = fedlabel.run(overrides=overrides, name="plain", out=tmp_path)
    assert not (plain.path / "partition.png").exists()
    events = EventAccumulator(str(plain.path), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == []
    assert [row["eval/accuracy"] for row in plain.metrics] == [row["eval/accuracy"] for row in result.metrics]


def small_npz(path: Path, **changes: object) -> list[str]:
    """Writes an npz file and returns overrides for a run of one round on it."""
    write_npz(path, **changes)
    overrides = ["data.name=npz", f"data.root={path}", "num_clients=2", "supervision.label_rate=0.5", "num_rounds=1"]
    return [*overrides, "training.local_steps=1", "evaluation.panel_samples=0", "model.name=mlp"]


def test_what_a_loader_has_to_say_is_logged_once_by_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = small_npz(tmp_path / "set.npz", weights=np.zeros(3))
    fedlabel.run([], overrides, name="x", out=tmp_path)
    said = [record for record in caplog.records if "weights of it is used only" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelname == "WARNING"


def test_a_file_that_was_changed_is_read_again_in_the_same_process(tmp_path: Path) -> None:
    overrides = small_npz(tmp_path / "set.npz")
    first = json.loads((fedlabel.run([], overrides, name="x", out=tmp_path).path / "partition.json").read_text())
    small_npz(tmp_path / "set.npz", x_test=np.full((6, 5, 4), 99, np.uint8))
    other = json.loads((fedlabel.run([], overrides, name="y", out=tmp_path).path / "partition.json").read_text())
    assert first["data"]["inputs"] != other["data"]["inputs"]
    assert first["data"]["labels"] == other["data"]["labels"]
