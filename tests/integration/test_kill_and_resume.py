"""A run that was killed and resumed cannot be told from one that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

import fedlabel
import server.server
from fedlabel.record.json_files import read_metrics
from server.checkpoint import save_checkpoint
from server.state import ServerState
from tests.integration.processes import environment, fedlabel_command, marked, start, stop_marked, wait_until
from tests.integration.tiny import TINY, assert_same_run, run_tiny

FED_ADAM = ("strategy.name=FedAdam", "strategy.args.eta=0.01")
"""Its moments are part of what a round depends on."""


def rounds_in(path: Path) -> int:
    return (path / "metrics.jsonl").read_bytes().count(b"\n") if (path / "metrics.jsonl").exists() else 0


def run_and_kill(out: Path, after: int, *overrides: str, tiny: Sequence[str] = TINY) -> Path:
    """Starts `fedlabel run` and kills it, without warning, as soon as `after` rounds are in metrics.jsonl."""
    mark = uuid.uuid4().hex
    path = out / "killed"
    command = fedlabel_command("run", *tiny, *overrides, "--name", "killed", "--out", str(out))
    # Ray's agents want to tell Ray's dead server of the death before they go, by default for a minute.
    env = environment(FEDLABEL_TEST=mark, RAY_gcs_rpc_server_reconnect_timeout_s="2")
    process = start(command, out / "killed.log", out, env)
    try:
        wait_until(lambda: rounds_in(path) >= after or process.poll() is not None, 200, "no rounds")
        assert process.poll() is None, (out / "killed.log").read_text()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
        wait_until(lambda: not marked("FEDLABEL_TEST", mark), 30, "processes outlive the killed run", every=0.1)
    finally:
        stop_marked("FEDLABEL_TEST", mark)
    return path


@pytest.mark.slow
def test_kill_in_process(tmp_path: Path) -> None:
    overrides = ("num_rounds=16", "checkpoint.every=3")
    killed = run_and_kill(tmp_path, 5, *overrides)
    assert 5 <= rounds_in(killed) < 16
    assert not (killed / "summary.json").exists()
    done = subprocess.run(
        fedlabel_command("run", "--resume", "--name", "killed", "--out", str(tmp_path)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(killed, run_tiny(tmp_path, "never_killed", *overrides).path)


@pytest.mark.slow
def test_kill_on_ray_where_clients_remember(shared_ray: None, tmp_path: Path) -> None:
    overrides = ("method.name=fedtrinet", "method.warmup_rounds=2", "method.quality_start=0.2", "num_rounds=12")
    tiny = [override for override in TINY if not override.startswith("method.")]
    options = (*tiny, *overrides)
    killed = run_and_kill(tmp_path, 4, *options, "grid.kind=ray", "grid.num_workers=1", tiny=())
    assert 4 <= rounds_in(killed) < 12
    fedlabel.run(overrides=["grid.kind=ray"], name="killed", out=tmp_path, resume=True)
    assert_same_run(killed, fedlabel.run(overrides=options, name="never_killed", out=tmp_path).path)


@pytest.mark.slow
def test_workers_that_are_killed_change_nothing(tmp_path: Path) -> None:
    """Whether they train, wait or start; the clients that they had are asked again."""
    mark, path, random = uuid.uuid4().hex, tmp_path / "killed", Random(1)
    overrides = ("num_rounds=10", "fraction_train=1.0")
    ray = ("grid.kind=ray", "grid.num_workers=2")
    command = fedlabel_command("run", *TINY, *overrides, *ray, "--name", "killed", "--out", str(tmp_path))
    process = start(command, tmp_path / "killed.log", tmp_path, environment(FEDLABEL_TEST=mark))
    kills = 0
    try:
        wait_until(lambda: rounds_in(path) >= 1 or process.poll() is not None, 200, "no rounds")
        while process.poll() is None:
            workers = sorted(worker for worker in marked("FEDLABEL_TEST", mark) if is_worker(worker))
            if workers and kills < 4:
                os.kill(random.choice(workers), signal.SIGKILL)
                kills += 1
            time.sleep(random.uniform(0.2, 1.0))
        assert process.wait() == 0, (tmp_path / "killed.log").read_text()
    finally:
        stop_marked("FEDLABEL_TEST", mark)
    assert kills >= 3
    assert_same_run(path, run_tiny(tmp_path, "whole", *overrides).path)


def is_worker(pid: int) -> bool:
    """Whether a process is one of Ray's workers, busy, idle or on its way; Ray's agents have such titles, too."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile
        return False
    starting = (b"default_worker.py", b"setup_worker.py")
    return words[0].startswith((b"ray::Worker", b"ray::IDLE")) or any(w.endswith(starting) for w in words[1:2])


@pytest.mark.slow
def test_kill_on_ray_with_momentum_on_the_server(shared_ray: None, tmp_path: Path) -> None:
    overrides = (*FED_ADAM, "num_rounds=16")
    ray = ("grid.kind=ray", "grid.num_workers=1")
    killed = run_and_kill(tmp_path, 3, *overrides, *ray)
    assert 3 <= rounds_in(killed) < 16
    run_tiny(tmp_path, "killed", *overrides, *ray, resume=True)
    assert_same_run(killed, run_tiny(tmp_path, "never_killed", *overrides).path)


class Killed(BaseException):
    """Stands for a kill at an exact point."""


@pytest.mark.parametrize("point", ["before the checkpoint", "in the checkpoint", "after the checkpoint"])
def test_stop_at_every_point_of_a_round(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(folder: Path, checkpoint: ServerState, keep: int) -> Path:
        if checkpoint.round_number != 2:
            return save_checkpoint(folder, checkpoint, keep)
        if point == "in the checkpoint":
            (folder / ".round_000002.ckpt.0123456789ab.unfinished").write_bytes(b"fedlabel-check")
        if point == "after the checkpoint":
            save_checkpoint(folder, checkpoint, keep)
        raise Killed

    monkeypatch.setattr(server.server, "save_checkpoint", stopping)
    with pytest.raises(Killed):
        run_tiny(tmp_path, "killed", *FED_ADAM)
    assert rounds_in(tmp_path / "killed") == 2
    monkeypatch.undo()
    resumed = run_tiny(tmp_path, "killed", *FED_ADAM, resume=True).path
    assert_same_run(resumed, run_tiny(tmp_path, "never_killed", *FED_ADAM).path)
    assert not list(resumed.rglob(".*"))


@pytest.mark.parametrize("torn", ['{"round": 3, "train/lo', '{"round": 3}'])
def test_torn_line_of_a_killed_write_is_dropped(torn: str, tmp_path: Path) -> None:
    path = run_tiny(tmp_path, "torn", "num_rounds=2").path
    with open(path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert [row["round"] for row in read_metrics(path)] == [1, 2]
    resumed = run_tiny(tmp_path, "torn", resume=True).path
    assert_same_run(resumed, run_tiny(tmp_path, "whole").path)


def test_resumed_run_goes_on_for_more_rounds(tmp_path: Path) -> None:
    run_tiny(tmp_path, "grown", "num_rounds=1")
    result = run_tiny(tmp_path, "grown", resume=True)
    assert result.summary["rounds"] == 3
    assert_same_run(result.path, run_tiny(tmp_path, "whole").path)


def test_momentum_matters(tmp_path: Path) -> None:
    """The comparisons above could fail: a strategy without its memory gives other weights."""
    run_tiny(tmp_path, "forgetful", *FED_ADAM, "num_rounds=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.server, "restore_strategy", lambda strategy, state: None)
        forgetful = run_tiny(tmp_path, "forgetful", *FED_ADAM, resume=True).path
    with pytest.raises(AssertionError):
        assert_same_run(forgetful, run_tiny(tmp_path, "whole", *FED_ADAM).path)
