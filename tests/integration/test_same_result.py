"""One seed, one result: whatever carries the messages and however many workers there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import fedlabel
from clients.client_app import app
from fedlabel.config import load_config
from fedlabel.record.run_folder import read_metrics
from server.grids.flower import FlowerGrid
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from server.server_app import run_federation
from tests.integration import cohorts
from tests.integration.client_apps import always_raise, by_client
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import (
    TINY,
    assert_same_run,
    assert_same_weights,
    comparable_metrics,
    final_weights,
    run_tiny,
)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("runs"), "in_process").path


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ray_gives_the_same_as_in_process(in_process: Path, num_workers: int, shared_ray: None, tmp_path: Path) -> None:
    path = run_tiny(tmp_path, "ray", "grid.kind=ray", f"grid.num_workers={num_workers}").path
    assert_same_run(path, in_process)


MANY = (
    *(option for option in TINY if not option.startswith(("num_clients", "fraction_train", "num_rounds", "training."))),
    *("num_clients=40", "fraction_train=0.9", "num_rounds=2", "training.local_steps=1", "training.batch_size=8"),
)
"""36 clients a round: blocks of two, whose models are added up where they ran."""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "run"
    run_federation(load_config([], MANY), InProcessGrid(cohorts.only_raises), path)
    assert [row["system/failed_clients"] for row in read_metrics(path)] == [1, 1]  # a hole in a block
    return path


def test_messages_of_flower_give_the_same(many: Path, tmp_path: Path) -> None:
    nodes = LocalNodes(by_client({3: always_raise}), 40)
    run_federation(load_config([], MANY), FlowerGrid(nodes), tmp_path / "run")
    assert_same_run(tmp_path / "run", many)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ray_gives_the_same_in_blocks(many: Path, num_workers: int, shared_ray: None, tmp_path: Path) -> None:
    with RayGrid(num_workers, use_gpu=False, train="tests.integration.cohorts:only_raises") as grid:
        run_federation(load_config([], MANY), grid, tmp_path / "run")
    assert_same_run(tmp_path / "run", many)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in stacks of ten and six."""
    path = tmp_path_factory.mktemp("stacked") / "run"
    run_federation(load_config([], MANY), InProcessGrid(), path)
    return path


def test_stacks_give_the_same_after_a_stop_and_other_bits_than_clients_alone(stacked: Path, tmp_path: Path) -> None:
    def stop(done: int, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(load_config([], MANY), InProcessGrid(), tmp_path / "run", on_round=stop)
    run_federation(load_config([], MANY), InProcessGrid(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", stacked)
    alone = load_config([], [*MANY, "grid.stack=off"])
    run_federation(alone, InProcessGrid(), tmp_path / "alone")
    with pytest.raises(AssertionError):
        assert_same_weights(final_weights(tmp_path / "alone"), final_weights(stacked))
    run_federation(alone, FlowerGrid(LocalNodes(app, alone.num_clients)), tmp_path / "nodes")
    assert_same_run(tmp_path / "nodes", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ray_gives_the_same_in_stacks(stacked: Path, num_workers: int, shared_ray: None, tmp_path: Path) -> None:
    with RayGrid(num_workers, use_gpu=False) as grid:
        run_federation(load_config([], MANY), grid, tmp_path / "run")
    assert_same_run(tmp_path / "run", stacked)


@pytest.mark.parametrize("name", ["FedAdam", "Krum"])
def test_strategies_of_flower_give_the_same(name: str, tmp_path: Path) -> None:
    config = load_config([], [*TINY, f"strategy.name={name}"])
    run_federation(config, InProcessGrid(), tmp_path / "here")
    run_federation(config, FlowerGrid(LocalNodes(app, config.num_clients)), tmp_path / "there")
    assert_same_run(tmp_path / "there", tmp_path / "here")


def test_the_comparison_sees_another_seed(in_process: Path, tmp_path: Path) -> None:
    other = run_tiny(tmp_path, "other", "seed=1").path
    assert comparable_metrics(other) != comparable_metrics(in_process)
    with pytest.raises(AssertionError):
        assert_same_run(other, in_process)


def test_the_run_uses_both_experts(in_process: Path) -> None:
    """The tiny run is worth comparing: labels, both experts and all clients' models enter it."""
    rows = comparable_metrics(in_process)
    assert any(0 < row["pseudo/from_global"] < 1 for row in rows)
    assert all(row["pseudo/coverage"] > 0 for row in rows)
    assert all(value.isfinite().all() for value in final_weights(in_process).values())


REMEMBERING = {
    "dp_ssl": [
        *("num_rounds=4", "method.functions_rounds=2", "method.assignment_rounds=1", "method.label_model_rounds=1"),
        *("method.num_functions=10", "method.confidence_threshold=0.2"),
    ],
    "fedmatch": ["method.helper_interval=1", "method.confidence_threshold=0", "method.lambda_i=1", "training.lr=0.01"],
    "fedtrinet": ["method.warmup_rounds=1", "method.quality_start=0.2", "method.ramp_end=1"],
    "freematch": [],
    "fixmatch": ["method.mask.kind=cbafed", "method.mask.base=0", "method.mask.cap=0.2", "method.mask.debias=prior"],
    "llp_bp": [
        "method.stage_rounds=1",
        "method.evidence=previous",
        "supervision.kind=bags",
        "supervision.label_rate=null",
        "supervision.bag_size=5",
    ],
    "semifl": [
        "method.confidence_threshold=0.2",
        "supervision.labels_at=server",
        "strategy.name=FedAvgM",
        "strategy.args.server_momentum=0.5",
    ],
}
"""Method -> options under which its memory, helpers, stages, shared state or server training matter in three rounds."""


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(REMEMBERING))
def test_ray_gives_the_same_with_what_methods_remember(method: str, shared_ray: None, tmp_path: Path) -> None:
    shared = [override for override in TINY if not override.startswith("method.")]
    options = [*shared, f"method.name={method}", *REMEMBERING[method]]
    here = fedlabel.run(overrides=options, name="in_process", out=tmp_path).path
    there = fedlabel.run(overrides=[*options, "grid.kind=ray", "grid.num_workers=2"], name="ray", out=tmp_path).path
    assert any(row.get("pseudo/coverage", 0) > 0 for row in comparable_metrics(here))
    assert_same_run(there, here)
