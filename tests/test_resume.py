"""Resuming without any process killed for it: stop in the middle, go on, compare. Real kills: tests/integration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fedlabel
import server.server_app
from fedlabel.data.federation import build_federation
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.experiment import open_experiment
from fedlabel.record.run_folder import RunFolder
from server.checkpoint import latest_checkpoint, load_checkpoint
from server.simulation import simulate
from server.state import ServerState
from tests.data.arrays import write_npz

TINY = ["num_clients=4", "num_rounds=3", "fraction_train=0.5", "training.local_steps=2", "evaluation.panel_samples=0"]


def rows(path: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("system/round")} for row in found]


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(sorted((path / "checkpoints").glob("round_*.ckpt"))[-1]).model


def stop_at(round_number: int, out: Path, *overrides: str) -> None:
    def on_round(done: int, metrics: Mapping[str, float]) -> None:
        if done == round_number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate([], [*TINY, *overrides], name="x", out=out, on_round=on_round)


@pytest.mark.parametrize("every", [1, 2, 50], ids=["each round", "each second", "none yet"])
def test_stopped_run_goes_on_to_the_same_metrics(tmp_path: Path, every: int) -> None:
    whole = fedlabel.run([], [*TINY, f"checkpoint.every={every}"], name="whole", out=tmp_path)
    stop_at(2, tmp_path, f"checkpoint.every={every}")
    resumed = fedlabel.run(name="x", out=tmp_path, resume=True)
    assert rows(resumed.path) == rows(whole.path)
    assert (resumed.path / "partition.json").read_text() == (whole.path / "partition.json").read_text()


def test_finished_run_can_be_given_more_rounds_and_remembers_them(tmp_path: Path) -> None:
    fedlabel.run([], TINY, name="x", out=tmp_path)
    longer = fedlabel.run([], ["num_rounds=4"], name="x", out=tmp_path, resume=True)
    assert [row["round"] for row in rows(longer.path)] == [1, 2, 3, 4]
    assert "num_rounds: 4" in (longer.path / "config.yaml").read_text()
    again = fedlabel.run([], [], name="x", out=tmp_path, resume=True)
    assert again.summary["rounds"] == 4


def test_results_are_averaged_over_the_last_rounds_however_often_a_run_is_evaluated(tmp_path: Path) -> None:
    """The last five of seven rounds, and of nine once it has two more. Of a run of 20 that is stopped after the third
    and then ended after the fifth, the two that were evaluated: none of the first three was among the last."""
    overrides = [*TINY, "num_rounds=7", "method.confidence_threshold=0.1", "evaluation.figures=false"]
    each = fedlabel.run([], overrides, name="each", out=tmp_path)
    few = fedlabel.run([], [*overrides, "evaluation.every=50"], name="few", out=tmp_path)
    assert [row["round"] for row in few.metrics if "eval/accuracy" in row] == [3, 4, 5, 6, 7]
    for key in ("eval/accuracy", "eval/ece", "pseudo/coverage", "train/loss"):
        mean = sum(row[key] for row in each.metrics[2:]) / 5
        assert each.summary[key]["mean_last_tenth"] == few.summary[key]["mean_last_tenth"] == pytest.approx(mean)
    longer = fedlabel.run([], ["num_rounds=9"], name="few", out=tmp_path, resume=True)
    assert longer.summary["last_tenth"] == {"first": 5, "last": 9, "count": 5}
    mean = sum(row["eval/accuracy"] for row in longer.metrics[4:]) / 5
    assert longer.summary["eval/accuracy"]["mean_last_tenth"] == pytest.approx(mean)
    stop_at(3, tmp_path, *overrides, "num_rounds=20", "evaluation.every=50")
    ended = fedlabel.run([], ["num_rounds=5"], name="x", out=tmp_path, resume=True)
    assert [row["round"] for row in ended.metrics if "eval/accuracy" in row] == [4, 5]
    assert ended.summary["last_tenth"] == {"first": 1, "last": 5, "count": 2}
    mean = (ended.metrics[3]["eval/accuracy"] + ended.metrics[4]["eval/accuracy"]) / 2
    assert ended.summary["eval/accuracy"]["mean_last_tenth"] == pytest.approx(mean)


def test_number_of_threads_may_not_change(tmp_path: Path) -> None:
    fedlabel.run([], TINY, name="x", out=tmp_path)
    with pytest.raises(ValueError, match=r"grid.threads_per_worker \(saved 1, now 2\)"):
        fedlabel.run([], ["grid.threads_per_worker=2"], name="x", out=tmp_path, resume=True)


REMEMBERING = {
    "fedmatch": (
        "helpers",
        ["method.helper_interval=1", "method.confidence_threshold=0", "method.lambda_i=1", "training.lr=0.02"],
    ),
    "fedtrinet": (
        "clients",
        ["method.warmup_rounds=1", "method.quality_start=0.3", "method.ramp_end=1", "training.lr=0.3"],
    ),
    "freematch": ("shared", ["training.lr=0.02"]),
}
"""Method -> where in a checkpoint its memory is, and options under which three rounds make use of it."""


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(server.server_app, "save_png", lambda figure, path: None)
    monkeypatch.setattr(RunFolder, "_add_figure", lambda self, tag, figure, round_number: None)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", sorted(REMEMBERING))
def test_what_a_method_remembers_is_resumed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit: metrics and weights; and without that memory the weights are others."""
    where, options = REMEMBERING[method]
    overrides = [f"method.name={method}", "fraction_train=0.75", "model.name=mlp", *options]
    whole = fedlabel.run([], [*TINY, *overrides], name="whole", out=tmp_path)
    stop_at(2, tmp_path, *overrides)
    shutil.copytree(tmp_path / "x", tmp_path / "forgetful")

    def forgetting(*arguments: Any) -> ServerState:
        state = latest_checkpoint(*arguments)
        assert getattr(state, where)
        return replace(state, **{where: {}})

    resumed = fedlabel.run(name="x", out=tmp_path, resume=True)
    assert rows(resumed.path) == rows(whole.path)
    expected = final_weights(whole.path)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(resumed.path).items())
    monkeypatch.setattr(server.server_app, "latest_checkpoint", forgetting)
    forgetful = fedlabel.run(name="forgetful", out=tmp_path, resume=True)
    assert rows(forgetful.path)[:-1] == rows(whole.path)[:-1]
    assert rows(forgetful.path) != rows(whole.path)
    assert not all(torch.equal(value, expected[name]) for name, value in final_weights(forgetful.path).items())


@pytest.mark.usefixtures("no_figures")
def test_a_stage_begins_with_fresh_weights_and_is_resumed(tmp_path: Path) -> None:
    """Round 2 begins the second stage: from other weights than the first did, with the end of round 1 beside them."""
    overrides = ["method.name=llp_bp", "method.stage_rounds=1", "supervision.kind=bags", "supervision.bag_size=4"]
    overrides += ["model.name=mlp", "training.lr=0.01", "checkpoint.keep=3"]
    whole = fedlabel.run([], [*TINY, *overrides], name="whole", out=tmp_path)
    stop_at(2, tmp_path, *overrides)
    resumed = fedlabel.run(name="x", out=tmp_path, resume=True)
    assert rows(resumed.path) == rows(whole.path)
    expected = final_weights(whole.path)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(resumed.path).items())
    first, second, third = (load_checkpoint(path) for path in sorted((whole.path / "checkpoints").glob("round_*.ckpt")))
    assert first.previous == {}
    for later in (second, third):
        assert all(torch.equal(value, first.model[name]) for name, value in later.previous.items())
    name = "net.hidden.weight"
    start = open_experiment((whole.path / "config.yaml").read_text())
    fresh, first_of_all = start.fresh_state(2)[name].cpu(), start.initial_state[name].cpu()
    assert (fresh - first_of_all).abs().mean() > 0.01  # drawn anew
    assert (second.model[name] - fresh).abs().mean() < 0.2 * (second.model[name] - first.model[name]).abs().mean()
    down = [row["comm/bytes_down"] for row in rows(whole.path)]
    assert down[1] == down[2] > 1.9 * down[0]  # type: ignore[operator]


def other_inputs(path: Path) -> None:
    arrays = dict(np.load(path))
    arrays["x_train"][3, 2, 2] ^= 1
    np.savez(path, **arrays)


def other_test_labels(path: Path) -> None:
    arrays = dict(np.load(path))
    arrays["y_test"] = arrays["y_test"][::-1]
    np.savez(path, **arrays)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("change", "changed"),
    [(other_inputs, "inputs"), (other_test_labels, "partition and supervision, labels")],
    ids=["inputs", "test labels"],
)
def test_a_run_is_not_gone_on_with_on_other_data(change: Callable[[Path], None], changed: str, tmp_path: Path) -> None:
    """Who holds which samples does not depend on inputs. A file of the same content may lie elsewhere."""
    path, kept = tmp_path / "set.npz", tmp_path / "kept.npz"
    write_npz(path)
    shutil.copy(path, kept)
    overrides = ["data.name=npz", f"data.root={path}", "num_clients=2", "supervision.label_rate=0.5", "num_rounds=1"]
    overrides += ["training.local_steps=1", "evaluation.panel_samples=0", "model.name=mlp"]
    run_path = fedlabel.run([], overrides, name="x", out=tmp_path).path
    change(path)
    for cached in (load_dataset, build_federation, open_experiment):  # as in another process
        cached.cache_clear()
    with pytest.raises(
        ValueError, match=rf"not what they were when the run began; changed: {changed} \(hash .* here, "
    ):
        fedlabel.run([], ["num_rounds=2"], name="x", out=tmp_path, resume=True)
    assert len(rows(run_path)) == 1
    fedlabel.run([], ["num_rounds=2", f"data.root={kept}"], name="x", out=tmp_path, resume=True)
    assert len(rows(run_path)) == 2


def test_a_run_of_many_clients_says_which_are_shown_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are listed: the hash, which a resumed run compares, is of all nevertheless."""
    monkeypatch.setattr(fedlabel.data.federation, "LISTED_CLIENTS", 3)
    monkeypatch.setattr(fedlabel.data.federation, "SHOWN_CLIENTS", 2)
    for cached in (open_experiment, build_federation):
        cached.cache_clear()
    path = fedlabel.run([], TINY, name="x", out=tmp_path).path
    assert {len(row["eval/client_accuracy"]) for row in rows(path) if "eval/client_accuracy" in row} == {2}
    assert [client["client"] for client in json.loads((path / "partition.json").read_text())["clients"]] == [0, 2]
    read = EventAccumulator(str(path)).Reload()
    (text,) = read.Tensors("clients/text_summary")[0].tensor_proto.string_val
    assert b"show 2 of 4 clients, evenly spaced (0, 2, ..., 2)" in text
    assert len(fedlabel.run([], ["num_rounds=4"], name="x", out=tmp_path, resume=True).metrics) == 4
    written = json.loads((path / "partition.json").read_text())
    (path / "partition.json").write_text(json.dumps({**written, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match="changed: partition and supervision"):
        fedlabel.run([], ["num_rounds=5"], name="x", out=tmp_path, resume=True)
    for cached in (open_experiment, build_federation):  # the hash of what is in them is of many clients
        cached.cache_clear()


@pytest.mark.usefixtures("no_figures")
def test_a_partition_file_of_an_older_version_is_said_and_a_broken_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fedlabel.run([], TINY, name="x", out=tmp_path).path / "partition.json"
    written = json.loads(path.read_text())
    del written["data"]
    path.write_text(json.dumps(written))
    fedlabel.run([], ["num_rounds=4"], name="x", out=tmp_path, resume=True)
    assert "is of an older version and has no hash of inputs and labels" in caplog.text
    for broken in ("{", "[]", '{"sha256": "x", "data": 3}'):
        path.write_text(broken)
        with pytest.raises(
            ValueError, match=r"partition.json cannot be read \(\w+\), so it is unknown whether the data"
        ):
            fedlabel.run([], ["num_rounds=5"], name="x", out=tmp_path, resume=True)
