"""Pacing in whole runs: the same on every grid and after a stop, and in its limits equal to the simpler method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import fedlabel.experiment
from clients.client_app import app
from fedlabel.config import load_config
from fedlabel.devices.clock import Devices
from fedlabel.devices.machines import ProfiledMachines
from fedlabel.devices.profiles import Profile
from fedlabel.record.json_files import read_metrics
from server.grids.flower import FlowerGrid
from server.grids.in_process import InProcessGrid
from server.server_app import run_federation
from server.simulation import simulate
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import TINY, assert_same_run, assert_same_weights, final_weights, run_tiny

DEVICES = (
    "devices.kind=lognormal",
    "devices.population=[{profile: phone, share: 0.6}, {profile: laptop, share: 0.4}]",
    "devices.available=1",
    "num_clients=8",
    "num_rounds=6",
    "evaluation.figures=false",
)
NOISY = ("method.name=ill", "supervision.kind=noisy", "supervision.label_rate=null", "supervision.noise_rate=0.3")
"""With statistics of a shared state."""
PACINGS = {
    "deadline": ("pacing.kind=deadline", "pacing.deadline=1.5", "pacing.partial_work=true", "sampling.kind=oort"),
    "over_selection": ("pacing.kind=over_selection", "devices.dropout_after=0.2", "sampling.kind=power_of_choice"),
    "tiers": ("pacing.kind=tiers", "pacing.tiers=2", "fraction_train=0.4"),
    "fedbuff": ("pacing.kind=fedbuff", "pacing.buffer=2", "devices.dropout_during=0.2", "sampling.kind=oort"),
    "fedasync": ("pacing.kind=fedasync", "devices.dropout_before=0.2"),
    "normalized": ("strategy.normalize_steps=true", "training.local_steps=null", "training.local_epochs=1"),
}
METHODS = {"fedbuff": NOISY}


def options(kind: str) -> tuple[str, ...]:
    tiny = [option for option in TINY if not option.startswith("method.")] if kind in METHODS else TINY
    return (*tiny, *DEVICES, *PACINGS[kind], *METHODS.get(kind, ()))


def clocked(path: Path) -> list[float]:
    return [row["system/virtual_seconds"] for row in read_metrics(path)]


@pytest.fixture(scope="module", params=PACINGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("runs") / "run"
    run_federation(load_config([], options(request.param)), InProcessGrid(), path)
    return request.param, path


def test_messages_of_flower_give_the_same(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = run
    run_federation(load_config([], options(kind)), FlowerGrid(LocalNodes(app, 8)), tmp_path / "run")
    assert_same_run(tmp_path / "run", path)
    assert clocked(tmp_path / "run") == clocked(path)
    assert clocked(path) == sorted(clocked(path))
    assert clocked(path)[-1] > 0


@pytest.mark.slow
def test_ray_gives_the_same(run: tuple[str, Path], shared_ray: None, tmp_path: Path) -> None:
    kind, path = run
    for workers in (1, 2, 3) if kind == "fedbuff" else (2,):
        more = ("grid.kind=ray", f"grid.num_workers={workers}")
        found = simulate([], [*options(kind), *more], name=f"{workers}", out=tmp_path).path
        assert_same_run(found, path)
        assert clocked(found) == clocked(path)


def test_a_stopped_run_goes_on_to_the_same(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = run

    def stop(done: int, metrics: Mapping[str, float]) -> None:
        if done in (2, 4):
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_federation(load_config([], options(kind)), InProcessGrid(), tmp_path / "run", resume, stop)
    run_federation(load_config([], options(kind)), InProcessGrid(), tmp_path / "run", True)
    assert_same_run(tmp_path / "run", path)
    assert clocked(tmp_path / "run") == clocked(path)


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices on which nothing takes any time."""
    free = Profile(math.inf, math.inf, math.inf, math.inf, math.inf, 1.0)

    def build(config: object, clients: int, seed: int, rarity: object = None) -> Devices:
        zeros = np.zeros(clients)
        machines = ProfiledMachines([free], ["free"], zeros.astype(int), zeros + 1, 86400.0, zeros)
        devices = Devices(machines, clients, (0.0, 0.0, 0.0), seed)
        monkeypatch.setattr(devices, "summary", lambda: {})  # infinite speeds have no quantiles
        return devices

    monkeypatch.setattr(fedlabel.experiment.Devices, "of", build)
    fedlabel.experiment.open_experiment.cache_clear()
    yield
    fedlabel.experiment.open_experiment.cache_clear()


def timed(*more: str) -> tuple[str, ...]:
    return ("devices.kind=preset", "devices.population=[{profile: laptop}]", "num_clients=8", *more)


@pytest.mark.parametrize("method", [(), ("strategy.name=FedAdam", "strategy.args.eta=0.01")], ids=["mean", "adam"])
def test_fedbuff_of_the_whole_cohort_without_delay_is_synchronous(
    method: tuple[str, ...], no_delay: None, tmp_path: Path
) -> None:
    """To the bit: with the strategy's state, too."""
    buffered = run_tiny(tmp_path, "b", *timed("pacing.kind=fedbuff", "pacing.buffer=5", *method)).path
    synchronous = run_tiny(tmp_path, "s", *timed(*method)).path
    assert_same_run(buffered, synchronous)


def test_fedasync_with_one_client_is_its_own_training(no_delay: None, tmp_path: Path) -> None:
    """With mixing = 1 each round goes on where the one before ended: plain SGD."""
    one = ("num_clients=1", "fraction_train=1")
    alone = run_tiny(tmp_path, "a", *timed("pacing.kind=fedasync", "pacing.mixing=1"), *one).path
    synchronous = run_tiny(tmp_path, "s", *timed(), *one).path
    assert_same_weights(final_weights(alone), final_weights(synchronous))
    half = run_tiny(tmp_path, "h", *timed("pacing.kind=fedasync", "pacing.mixing=0.5"), *one).path
    with pytest.raises(AssertionError):
        assert_same_weights(final_weights(half), final_weights(synchronous))


def test_real_nodes_have_no_simulated_devices(tmp_path: Path) -> None:
    grid = FlowerGrid(LocalNodes(app, 8))
    grid.simulated = False
    with pytest.raises(
        ValueError, match=r"`devices\.kind` \(=lognormal\) simulates devices, and these clients are real"
    ):
        run_federation(load_config([], options("deadline")), grid, tmp_path / "run")


def test_steps_of_unequal_clients_are_normalized(tmp_path: Path) -> None:
    """With as many steps for each client nothing is divided: the same run, but for the bytes of a number more."""
    plain = run_tiny(tmp_path, "p").path
    normal = run_tiny(tmp_path, "n", "strategy.normalize_steps=true").path
    assert_same_weights(final_weights(plain), final_weights(normal))


def test_a_changed_trace_is_noticed_on_resume(tmp_path: Path) -> None:
    """And one that is missing before anything is written."""
    trace = tmp_path / "trace.csv"
    row = "client,start,end,speed,up,down\n0,0,100,{},1000000,1000000\n"
    trace.write_text(row.format(500))
    traced = ("devices.kind=trace", f"devices.trace={trace}", "evaluation.figures=false")
    run_tiny(tmp_path, "run", *traced)
    trace.write_text(row.format(400))
    with pytest.raises(ValueError, match=r"changed: devices\.trace"):
        run_tiny(tmp_path, "run", *traced, "num_rounds=4", resume=True)
    trace.unlink()
    with pytest.raises(ValueError, match=r"trace\.csv"):
        run_tiny(tmp_path, "other", *traced)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "more",
    [("pacing.kind=deadline", "pacing.deadline=1"), ("pacing.kind=fedbuff",), ("devices.dropout_after=0.1",)],
    ids=["deadline", "fedbuff", "dropout"],
)
def test_error_feedback_needs_every_reply(more: tuple[str, ...]) -> None:
    feedback = ("compression.up=top_k", "compression.share=0.1", "compression.error_feedback=true")
    load_config([], [*DEVICES, *feedback])
    with pytest.raises(ValueError, match=r"`compression\.error_feedback` \(=true\) keeps what a reply left out"):
        load_config([], [*DEVICES, *feedback, *more])


def test_compressed_updates_go_with_an_asynchronous_server(tmp_path: Path) -> None:
    """The same on Flower's messages."""
    compressed = ("compression.up=int8", "compression.down=float16")
    found = (*TINY, *DEVICES, "pacing.kind=fedbuff", "pacing.buffer=2", *compressed)
    run_federation(load_config([], found), InProcessGrid(), tmp_path / "run")
    run_federation(load_config([], found), FlowerGrid(LocalNodes(app, 8)), tmp_path / "flower")
    assert_same_run(tmp_path / "run", tmp_path / "flower")
    assert clocked(tmp_path / "run") == clocked(tmp_path / "flower")
