"""Clients that raise, send NaN or die: reported by round and name, counted, and the round goes on with the rest."""

from __future__ import annotations

import json
from pathlib import Path

import flwr.serverapp.strategy
import numpy as np
import pytest
import torch

from fedlabel.config import ExperimentConfig, load_config, to_yaml
from fedlabel.experiment import open_experiment
from fedlabel.methods.batch import State
from fedlabel.methods.federated_transition import FederatedTransition
from fedlabel.record.json_files import read_metrics
from fedlabel.seeding import numpy_generator
from server.checkpoint import load_checkpoint
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from server.sampling import History, Pool, uniform
from server.server_app import RunError, run_federation
from tests.integration import cohorts
from tests.integration.tiny import TINY, assert_same_run, assert_same_weights, final_weights, run_tiny

KILLS = 4
"""Workers that are killed, one a round."""
ALL_TRAIN = ("fraction_train=1.0", "num_rounds=2")


def tiny(*overrides: str) -> ExperimentConfig:
    return load_config([], [*TINY, *overrides])


def run_with(way: str, config: ExperimentConfig, path: Path, kind: str = "in_process", resume: bool = False) -> None:
    """Runs with one of the ways in `cohorts`, on Ray with one worker."""
    if kind == "in_process":
        run_federation(config, InProcessGrid(getattr(cohorts, way)), path, resume)
    else:
        with RayGrid(1, use_gpu=False, train=f"tests.integration.cohorts:{way}") as ray_grid:
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


MORTAL = """
import os, signal
from pathlib import Path
from fedlabel.cohort import train_cohort

marks = Path(__file__).parent / "marks"

def train(experiment, invitation, clients, memories):
    found = train_cohort(experiment, invitation, clients, memories)
    mark = marks / str(invitation.round_number)
    if invitation.round_number % 5 in clients and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return found
"""


@pytest.mark.slow
def test_workers_that_are_killed_change_nothing(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in every round, when it has trained a client that remembers: no failed client, no other number."""
    (tmp_path / "marks").mkdir()
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    known = [override for override in TINY if not override.startswith(("method.", "supervision."))]
    noisy = ("supervision.kind=noisy", "supervision.noise_rate=0.3", "method.name=elr")
    config = load_config([], [*known, *noisy, "fraction_train=1.0", f"num_rounds={KILLS}"])
    with RayGrid(2, use_gpu=False, train="mortal:train") as grid:
        run_federation(config, grid, tmp_path / "killed")
    assert len(list((tmp_path / "marks").iterdir())) == KILLS
    assert [row["system/failed_clients"] for row in read_metrics(tmp_path / "killed")] == [0] * KILLS
    run_with("healthy", config, tmp_path / "alone")
    assert_same_run(tmp_path / "killed", tmp_path / "alone")


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


def test_a_run_stops_with_fewer_replies_than_it_needs(tmp_path: Path) -> None:
    """Three of five are usable: enough for 3, too few for 4; one of the two others is refused, one fails."""
    run_with("two_fail", tiny("fraction_train=1.0", "num_rounds=1", "strategy.min_replies=3"), tmp_path / "three")
    assert read_metrics(tmp_path / "three")[0]["system/refused_replies"] == 1
    message = (
        r"Only 3 of 5 clients gave a usable reply, `strategy.min_replies` is 4, in round 1.*client 1: RuntimeError"
    )
    with pytest.raises(RunError, match=message):
        run_with("two_fail", tiny("fraction_train=1.0", "num_rounds=1", "strategy.min_replies=4"), tmp_path / "four")


def test_poisoned_statistics_leave_no_trace(tmp_path: Path) -> None:
    """The noise matrix, the model and all else are as if the client had failed."""
    noisy = ("supervision.kind=noisy", "supervision.noise=symmetric", "supervision.noise_rate=0.3")
    known = [override for override in TINY if not override.startswith(("method.", "supervision."))]
    config = load_config([], [*known, *noisy, "method.name=ill", "method.noise.warmup_rounds=0", *ALL_TRAIN])
    run_with("poisoned", config, tmp_path / "poisoned")
    run_with("only_raises", config, tmp_path / "without")
    (first, second) = failures(tmp_path / "poisoned")
    assert first.startswith("Round 1, client 3: BadReply: its statistic counts counts ")
    assert second.startswith("Round 2, client 3: BadReply: its statistic counts counts ")
    assert_same_run(tmp_path / "poisoned", tmp_path / "without")
    found, expected = (
        load_checkpoint(tmp_path / name / "checkpoints" / "round_000002.ckpt").shared
        for name in ("poisoned", "without")
    )
    assert_same_weights(found, expected)


def test_a_strategy_that_cannot_combine_what_is_left_stops_the_run_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("n is too small")

    monkeypatch.setattr(flwr.serverapp.strategy.FedMedian, "aggregate_train", fail)
    message = r"FedMedian cannot combine 3 replies \(ValueError: n is too small\) in round 1, .*client 1: RuntimeError"
    with pytest.raises(RunError, match=message):
        run_with("two_fail", tiny(*ALL_TRAIN, "strategy.name=FedMedian"), tmp_path / "run")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (torch.full((1, 10, 10), torch.nan), "transition holds NaN or infinity"),
        (torch.full((1, 10, 10), 0.2), "transition must be probabilities"),
    ],
)
def test_a_broken_shared_state_is_neither_saved_nor_sent(
    made: torch.Tensor, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = FederatedTransition.update

    def broken(self: FederatedTransition, shared: State, total: State) -> State:
        return update(self, shared, total) | ({"transition": made} if shared["rounds"] == 1 else {})

    monkeypatch.setattr(FederatedTransition, "update", broken)
    noisy = ("supervision.kind=noisy", "supervision.noise=symmetric", "supervision.noise_rate=0.3")
    known = [override for override in TINY if not override.startswith(("method.", "supervision."))]
    config = load_config([], [*known, *noisy, "method.name=ill", *ALL_TRAIN])
    with pytest.raises(RunError, match=f"Method ill made a shared state .* in round 2: {reason}"):
        run_with("healthy", config, tmp_path / "run")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_checkpoint(saved).shared["transition"].isfinite().all()


def test_client_state_is_kept_between_rounds(kind: str, tmp_path: Path) -> None:
    """Every client trains in every round and reports how often it has: 1, 2, 3."""
    text = [override for override in TINY if not override.startswith("method.")]
    text += ["method.name=elr", "supervision.label_rate=null", "supervision.kind=noisy", "supervision.noise_rate=0.3"]
    config = load_config([], [*text, "num_clients=3", "fraction_train=1.0", "num_rounds=3"])
    run_with("counting", config, tmp_path / "run", kind)
    assert [row["train/loss"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_round_without_usable_samples_keeps_the_model(tmp_path: Path) -> None:
    """The one client of the round has no label: nothing to learn from, no division by zero, and no failure."""
    text = [override for override in TINY if not override.startswith("method.")]
    few = ["method.name=supervised", "supervision.labels_total=1", "seed=1", "fraction_train=0.2", "num_rounds=1"]
    config = load_config([], [*text, *few])
    federation = open_experiment(to_yaml(config)).federation
    rng = numpy_generator(config.seed, "cohort", 1)
    (client,) = uniform(Pool(config.num_clients, History()), 1, rng)
    assert not federation.labeled[federation.parts[client]].any()
    run_with("healthy", config, tmp_path / "run")
    assert_same_weights(final_weights(tmp_path / "run"), open_experiment(to_yaml(config)).initial_state)
    assert all(np.isfinite(row["eval/accuracy"]) for row in read_metrics(tmp_path / "run"))
    assert all(value.dtype == torch.float32 for value in final_weights(tmp_path / "run").values())
