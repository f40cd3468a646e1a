"""The apps under `flwr run`: on Flower's own simulation runtime, and on a SuperLink with two SuperNodes.

Flower's processes outlive `flwr run`. So every test has a FLWR_HOME and ports of its own, and all processes that have
this FLWR_HOME in their environment are stopped at its end.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlabel
from fedlabel.hardware import PACKAGE_ROOT
from server.grids.in_process import InProcessGrid
from tests.integration.processes import environment, free_ports, start, stop_marked, wait_until
from tests.integration.tiny import TINY, comparable_metrics, final_weights, run_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds Flower's processes through /proc"),
]


class Flower:
    """A clean checkout, a working directory and a FLWR_HOME; `env` is for Flower's commands."""

    def __init__(self, root: Path) -> None:
        self.checkout, self.work, self.home = root / "checkout", root / "work", root / "home"
        self.work.mkdir(parents=True)
        self.home.mkdir()
        for name in ("fedlabel", "clients", "server", "configs"):
            shutil.copytree(PACKAGE_ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(PACKAGE_ROOT / name, self.checkout)
        self.port, legacy_port = free_ports(2)
        self.env = environment(
            FLWR_HOME=str(self.home),
            FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(self.port),
            FLWR_LOCAL_CONTROL_API_PORT=str(legacy_port),
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            FLWR_DISABLE_UPDATE_CHECK="1",
            FLWR_TELEMETRY_ENABLED="0",
        )
        del self.env["PYTHONPATH"]  # what runs is what `flwr run` packed

    def run(self, *arguments: str, overrides: str) -> str:
        """Calls `flwr run`, waits for the end of the run and returns what it printed."""
        command = ["flwr", "run", str(self.checkout), *arguments, "--stream"]
        done = subprocess.run(
            [*command, "--run-config", f'overrides="{overrides}"'],
            cwd=self.work,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts one of Flower's long-lived processes."""
        return start([*arguments], self.work / f"{name}.log", self.work, self.env)

    def logs(self) -> str:
        """Returns the ends of all logs, to be shown when a test fails."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.work.glob("*.log")))

    def answers(self) -> bool:
        """Whether the SuperLink is up."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def node(self, name: str, node_config: str) -> subprocess.Popen[bytes]:
        """Starts a node that keeps its process; it runs the code that is installed, here the checkout."""
        command = [sys.executable, "-m", "clients.node", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        env = {**self.env, "PYTHONPATH": str(self.checkout)}
        return start([*command, "--node-config", node_config], self.work / f"{name}.log", self.work, env)

    def supernode(self, name: str, node_config: str) -> subprocess.Popen[bytes]:
        """Starts a SuperNode."""
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_ports(1)[0])]
        return self.start(name, *command, *(["--node-config", node_config] if node_config else []))

    def the_run(self, output: str) -> Path:
        """Returns the folder of the only run, which the log must name in full."""
        (folder,) = (self.work / "runs").iterdir()
        assert f"Results are in {folder.resolve()}" in output.replace("\n", ""), output
        return folder


@contextmanager
def flower(root: Path) -> Iterator[Flower]:
    made = Flower(root)
    try:
        yield made
    except BaseException:
        print(made.logs())  # noqa: T201
        raise
    finally:
        stop_marked("FLWR_HOME", str(made.home))


def assert_like_in_process(folder: Path, tmp_path: Path, *overrides: str) -> None:
    """Final weights and metrics of a run folder equal those of the in-process grid up to rounding."""
    expected = run_tiny(tmp_path, "in_process", *overrides).path
    ours, theirs = final_weights(folder), final_weights(expected)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    rows, expected_rows = comparable_metrics(folder), comparable_metrics(expected)
    assert [row["round"] for row in rows] == [1, 2]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row["pseudo/coverage"] > 0  # unlabelled samples took part
        assert row.keys() == expected_row.keys()
        for name, value in row.items():
            numbers = [np.nan if each is None else each for each in np.atleast_1d(value)]
            expected_numbers = [np.nan if each is None else each for each in np.atleast_1d(expected_row[name])]
            np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-5, err_msg=name)


def test_simulation_runtime(tmp_path: Path) -> None:
    overrides = ("num_clients=3", "num_rounds=2")
    with flower(tmp_path / "flower") as machine:
        nodes = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
        output = machine.run("--federation-config", nodes, overrides=" ".join([*TINY, *overrides]))
        folder = machine.the_run(output)
        # The packed code ran, not that of this repository: what `flwr run` packs is no git checkout.
        assert json.loads((folder / "summary.json").read_text())["commit"] == "unknown"
    assert any("pseudo/accuracy" in row for row in comparable_metrics(folder))
    assert_like_in_process(folder, tmp_path, *overrides)


@contextmanager
def deployed(root: Path, resident: bool = False) -> Iterator[tuple[Flower, list[subprocess.Popen[bytes]]]]:
    """A SuperLink on loopback with two SuperNodes, clients 0 and 1, or nodes that keep their process and their memory;
    gives the processes, the SuperLink's first.
    """
    with flower(root) as machine:
        connection = f'[superlink.loopback]\naddress = "127.0.0.1:{machine.port}"\ninsecure = true\n'
        (machine.home / "config.toml").write_text(connection)
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(machine.port)]
        superlink = machine.start("superlink", *command, "--disable-runtime-dependency-installation")
        wait_until(lambda: machine.answers() or superlink.poll() is not None, 60, "no SuperLink", every=0.2)
        processes = [superlink]
        for i in range(2):
            memory = f'memory="{machine.work / f"memory{i}"}"'
            if resident:
                processes.append(machine.node(f"node{i}", f"partition-id={i} {memory}"))
            else:
                processes.append(machine.supernode(f"node{i}", f"partition-id={i} num-partitions=2"))
        yield machine, processes
    for process in processes:
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """See `deployed`; none of its processes may end meanwhile."""
    with deployed(tmp_path_factory.mktemp("deployment") / "flower") as (machine, processes):
        yield machine
        assert [process.poll() for process in processes] == [None] * 3


def test_superlink_with_two_supernodes(deployment: Flower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared with hidden labels: as in this process where clients are taken for real ones."""
    overrides = ("num_clients=2", "num_rounds=2", "fraction_train=1.0", "grid.timeout=120")
    output = deployment.run("loopback", overrides=" ".join([*TINY, *overrides]))
    folder = deployment.the_run(output)
    assert not any("pseudo/accuracy" in row for row in comparable_metrics(folder))
    monkeypatch.setattr(InProcessGrid, "simulated", False)
    assert_like_in_process(folder, tmp_path, *overrides)


def test_supernode_without_partition_id_is_named(deployment: Flower) -> None:
    node = deployment.supernode("nameless", "")
    try:
        overrides = ("num_clients=3", "num_rounds=2", "grid.timeout=120")
        output = deployment.run("loopback", overrides=" ".join([*TINY, *overrides]))
    finally:
        node.terminate()
        node.wait(timeout=30)
    text = re.sub(r"\s+", " ", output)
    assert re.search(
        r"the run FAILED .*Node \d+ does not answer: .*This node has no `partition-id`: start the SuperNode", text
    )


def test_nodes_that_keep_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run no code that was sent, remember on their disk, and give the same result."""
    overrides = (
        "num_clients=2",
        "num_rounds=2",
        "fraction_train=1.0",
        "method.name=proden",
        "supervision.kind=partial",
    )
    overrides = (*overrides, "supervision.label_rate=null", "supervision.partial_ratio=0.3", "grid.timeout=120")
    settings = [each for each in TINY if not each.startswith("method.")]
    with deployed(tmp_path / "flower", resident=True) as (machine, processes):
        folder = machine.the_run(machine.run("loopback", overrides=" ".join([*settings, *overrides])))
        assert [process.poll() for process in processes] == [None] * 3
        key = (folder / "run_key").read_text()
        for client in range(2):
            kept = sorted(path.name for path in (machine.work / f"memory{client}" / key).iterdir())
            assert kept == [f"client{client}-00000{number}.memory" for number in (1, 2)]
    monkeypatch.setattr(InProcessGrid, "simulated", False)
    expected = fedlabel.run(overrides=[*settings, *overrides], name="expected", out=tmp_path).path
    for name, value in final_weights(folder).items():
        torch.testing.assert_close(value, final_weights(expected)[name], rtol=1e-5, atol=1e-6)


def test_a_lost_node_fails_its_client_and_the_run_goes_on(tmp_path: Path) -> None:
    """Killed after the first round. Flower's SuperLink then answers in its place, with an id that is no client's."""
    overrides = " ".join(
        [*TINY, "num_clients=2", "num_rounds=3", "fraction_train=1.0", "grid.timeout=200", "grid.min_nodes=1"]
    )
    with deployed(tmp_path / "flower") as (machine, processes), ThreadPoolExecutor(1) as background:
        running = background.submit(machine.run, "loopback", overrides=overrides)
        metrics = "runs/*/metrics.jsonl"
        wait_until(
            lambda: running.done() or any(path.read_text() for path in machine.work.glob(metrics)), 400, "no round"
        )
        processes[2].kill()
        folder = machine.the_run(running.result())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert [row["system/failed_clients"] for row in (rows[0], rows[2])] == [0, 1]
    assert re.search(r"Round [23], client 1: Error: Node Unavailable", (folder / "failures.log").read_text())
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 3
