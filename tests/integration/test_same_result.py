"""One seed, one result: whatever carries the messages and however many workers there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.tiny import assert_same_run, comparable_metrics, final_weights, run_tiny


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("runs"), "in_process").path


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ray_gives_the_same_as_in_process(in_process: Path, num_workers: int, shared_ray: None, tmp_path: Path) -> None:
    path = run_tiny(tmp_path, "ray", "grid.kind=ray", f"grid.num_workers={num_workers}").path
    assert_same_run(path, in_process)


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
