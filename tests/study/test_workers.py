"""Jobs in processes: all are run, what fails fails alone, and no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedlabel.study.workers import PATIENCE, Tell, run_parallel
from tests.integration.processes import environment, marked, stop_marked, wait_until

pytestmark = pytest.mark.slow


def work(job: str, tell: Tell) -> None:
    if job == "bad value":
        raise ValueError("`key` (=1) must be 2.")
    if job == "bug":
        raise KeyError("nobody expects this")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "endless":
        tell("begun")
        time.sleep(600)
    tell(job.upper())
    tell(os.getpid())


def run_all(jobs: list[str], count: int = 2) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Returns job -> error, and job -> what it told."""
    left, errors, said = list(jobs), {}, {job: [] for job in jobs}
    run_parallel(
        work,
        count,
        lambda: left.pop(0) if left else None,
        lambda job, message: said[job].append(message),
        lambda job, error: errors.update({job: error}),
    )
    return errors, said


def test_what_fails_fails_alone() -> None:
    """Six jobs, two workers: one of them is killed in the middle and replaced; all others are run."""
    errors, said = run_all(["a", "killed", "bad value", "b", "bug", "c"])
    assert {job for job, error in errors.items() if not error} == {"a", "b", "c"}
    assert errors["bad value"] == "`key` (=1) must be 2."  # the user's own mistake: one line
    assert errors["bug"].startswith("Traceback")
    assert errors["bug"].strip().endswith("KeyError: 'nobody expects this'")
    assert "exit status -9" in errors["killed"]
    assert [said[job][0] for job in "abc"] == ["A", "B", "C"]
    assert len({said[job][1] for job in "abc"} - {os.getpid()}) <= 3


def test_take_is_asked_again_when_a_job_has_ended() -> None:
    """A job that becomes possible only when another has ended, as a sweep's final runs do, is run."""
    ended: list[str] = []
    waiting = ["first"]

    def finished(job: str, error: str) -> None:
        ended.append(job)
        waiting.extend(["second"] if job == "first" else [])

    run_parallel(work, 2, lambda: waiting.pop() if waiting else None, lambda job, message: None, finished)
    assert ended == ["first", "second"]


def test_workers_end_when_the_caller_fails() -> None:
    """They are told to end, and do at once, before the patience is over after which they would be killed."""
    begun: list[int] = []
    failed: list[float] = []

    def told(job: str, message: Any) -> None:
        begun.append(len(multiprocessing.active_children()))
        failed.append(time.monotonic())
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        run_parallel(work, 1, iter(["endless", None]).__next__, told, lambda job, error: None)
    assert begun == [1]
    assert multiprocessing.active_children() == []
    assert time.monotonic() - failed[0] < PATIENCE


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(signal_number: int, tmp_path: Path) -> None:
    """Two workers in the middle of endless jobs; the parent is interrupted, ended or killed: all go."""
    mark = str(tmp_path)
    code = (
        "import signal\n"
        "from fedlabel.study.workers import run_parallel\n"
        "from tests.study.test_workers import work\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "jobs = iter(['endless', 'endless', None, None])\n"
        "run_parallel(work, 2, jobs.__next__, lambda job, message: print(message, flush=True), print)\n"
    )
    log = tmp_path / "log"
    with open(log, "wb") as file:
        parent = subprocess.Popen(
            [sys.executable, "-c", code], env=environment(FEDLABEL_TEST_WORKERS=mark), stdout=file, stderr=file
        )
    try:
        wait_until(lambda: log.read_text().count("begun") == 2, 60, f"no start: {log.read_text()}")
        parent.send_signal(signal_number)
        parent.wait(20)
        wait_until(lambda: not marked("FEDLABEL_TEST_WORKERS", mark), 15, "a worker stays")
    finally:
        stop_marked("FEDLABEL_TEST_WORKERS", mark)
