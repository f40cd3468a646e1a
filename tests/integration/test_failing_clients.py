"""Clients that raise, send NaN or die: reported by round and name, counted, and the round goes on with the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.config import ExperimentConfig, load_config, to_yaml
from fedlabel.experiment import open_experiment
from fedlabel.tracking import read_metrics
from server.checkpoint import load_checkpoint
from server.grids import InProcessGrid, RayGrid
from server.server_app import RunError, run_federation
from server.strategy import sample_cohort
from tests.integration import client_apps
from tests.integration.tiny import TINY, assert_same_run, assert_same_weights, final_weights, run_tiny

ALL_TRAIN = ("fraction_train=1.0", "num_rounds=2")


def tiny(*overrides: str) -> ExperimentConfig:
    return load_config([], [*TINY, *overrides])


def run_with(app: str, config: ExperimentConfig, path: Path, kind: str = "in_process", resume: bool = False) -> None:
    """Runs with one of the apps in `client_apps`, on Ray with one worker."""
    if kind == "in_process":
        grid = InProcessGrid(getattr(client_apps, app), config.num_clients)
        run_federation(config, grid, path, resume)
    else:
        name = f"tests.integration.client_apps:{app}"
        with RayGrid(name, config.num_clients, 1, use_gpu=False) as ray_grid:
            run_federation(config, ray_grid, path, resume)


@pytest.fixture(params=["in_process", pytest.param("ray", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """In which way clients are simulated."""
    if request.param == "ray":
        request.getfixturevalue("shared_ray")
    return str(request.param)


def failures(path: Path) -> list[str]:
    return [line for line in (path / "failures.log").read_text().splitlines() if line.startswith("Round ")]


def test_failures_are_reported_and_counted(tmp_path: Path) -> None:
    run_with("two_fail", tiny(*ALL_TRAIN), tmp_path / "run")
    first = next(iter(final_weights(tmp_path / "run")))
    assert failures(tmp_path / "run") == [
        "Round 1, client 1: RuntimeError: this client always raises",
        f"Round 1, client 3: NotFinite: {first} of its model holds NaN or infinity",
        "Round 2, client 1: RuntimeError: this client always raises",
        f"Round 2, client 3: NotFinite: {first} of its model holds NaN or infinity",
    ]
    assert "in _always_raise" in (tmp_path / "run" / "failures.log").read_text()  # the traceback
    assert [row["system/failed_clients"] for row in read_metrics(tmp_path / "run")] == [2, 2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["system/failed_clients"] == 4


def test_round_goes_on_with_the_mean_of_the_rest(tmp_path: Path) -> None:
    config = tiny("fraction_train=1.0", "num_rounds=1")
    run_with("two_fail", config, tmp_path / "run")
    experiment = open_experiment(to_yaml(config))
    parts = [experiment.train(client, experiment.initial_state, 1).parts["model"] for client in (0, 2, 4)]
    total = sum(part.weight for part in parts)
    expected = {
        name: (sum(part.state[name].double() * part.weight for part in parts) / total).float()  # type: ignore[union-attr]
        for name in experiment.initial_state
    }
    assert_same_weights(final_weights(tmp_path / "run"), expected)


@pytest.mark.slow
def test_worker_that_dies_fails_its_client_only(shared_ray: None, tmp_path: Path) -> None:
    config = tiny(*ALL_TRAIN)
    run_with("three_fail", config, tmp_path / "ray", "ray")
    starts = [
        "Round 1, client 1: RuntimeError: this client always raises",
        "Round 1, client 2: WorkerDied: ",
        "Round 1, client 3: NotFinite: ",
        "Round 2, client 1: RuntimeError: this client always raises",  # client 2 is back, in a new worker
        "Round 2, client 3: NotFinite: ",
    ]
    for line, start in zip(failures(tmp_path / "ray"), starts, strict=True):
        assert line.startswith(start)
    assert [row["system/failed_clients"] for row in read_metrics(tmp_path / "ray")] == [3, 2]
    # The others give what they give in one process.
    run_with("three_fail_alive", config, tmp_path / "alone")
    assert_same_run(tmp_path / "ray", tmp_path / "alone")


def test_all_failed_stops_the_run_with_its_checkpoint(kind: str, tmp_path: Path) -> None:
    config = tiny(*ALL_TRAIN, "num_rounds=3")
    message = r"All 5 clients failed in round 2, .*checkpoints stay.*Round 2, client 0: RuntimeError: this client"
    path = tmp_path / "run"
    with pytest.raises(RunError, match=message):
        run_with("all_fail_from_round_2", config, path, kind)
    assert [row["round"] for row in read_metrics(path)] == [1]
    assert not (path / "summary.json").exists()
    assert len(failures(path)) == 5
    (checkpoint,) = (path / "checkpoints").iterdir()
    assert load_checkpoint(checkpoint).round_number == 1
    # Healed, the run goes on as if nothing had been.
    resumed = run_tiny(tmp_path, "run", *ALL_TRAIN, "num_rounds=3", resume=True).path
    assert_same_run(resumed, run_tiny(tmp_path, "whole", *ALL_TRAIN, "num_rounds=3").path)


def test_client_state_is_kept_between_rounds(kind: str, tmp_path: Path) -> None:
    """Every client trains in every round and reports how often it has: 1, 2, 3."""
    run_with("counting", tiny("num_clients=3", "fraction_train=1.0", "num_rounds=3"), tmp_path / "run", kind)
    assert [row["train/times_seen"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_round_without_usable_samples_keeps_the_model(tmp_path: Path) -> None:
    """The one client of the round has no label: nothing to learn from, no division by zero, and no failure."""
    text = [override for override in TINY if not override.startswith("method.")]
    few = ["method.name=supervised", "supervision.labels_total=1", "seed=1", "fraction_train=0.2", "num_rounds=1"]
    config = load_config([], [*text, *few])
    federation = open_experiment(to_yaml(config)).federation
    (client,) = sample_cohort(config.seed, 1, config.num_clients, config.fraction_train)
    assert not federation.labeled[federation.parts[client]].any()
    run_with("healthy", config, tmp_path / "run")
    assert_same_weights(final_weights(tmp_path / "run"), open_experiment(to_yaml(config)).initial_state)
    assert all(np.isfinite(row["eval/accuracy"]) for row in read_metrics(tmp_path / "run"))
    assert all(value.dtype == torch.float32 for value in final_weights(tmp_path / "run").values())
