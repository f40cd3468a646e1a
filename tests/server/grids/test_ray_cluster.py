"""The Ray grid on a cluster of two machines, which are two raylets here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import environment
from tests.integration.tiny import TINY, assert_same_run, run_tiny

SCRIPT = """
import os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from fedlabel.config import load_config
from server.grids.ray import RayGrid
from server.server_app import run_federation

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
try:
    out, *overrides = sys.argv[1:]
    with RayGrid(2, use_gpu=False, train="tests.integration.cohorts:marking") as grid:
        run_federation(load_config([], overrides), grid, Path(out))
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_gives_the_same(tmp_path: Path) -> None:
    """Workers have one CPU each, so there is one on either machine."""
    marks = tmp_path / "marks"
    marks.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cluster"), *TINY],
        env=environment(FEDLABEL_TEST_MARKS=str(marks)),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(marks.iterdir())) == 2
    assert_same_run(tmp_path / "cluster", run_tiny(tmp_path, "alone").path)
