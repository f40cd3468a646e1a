"""Disks that are full and folders that cannot be: one sentence and exit status 2, and what was saved stays whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as summaries
from typer.testing import CliRunner

import fedlabel
from fedlabel.cli.main import app
from fedlabel.errors import FileError
from fedlabel.record.event_file import EventFile
from tests.integration.processes import environment, fedlabel_command
from tests.integration.tiny import TINY, assert_same_run, run_tiny

QUICK = ("evaluation.figures=false", "training.local_steps=1", "strategy.name=FedAdam", "strategy.args.eta=0.01")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("runs"), "whole", *QUICK).path


# fsyncs of a run of three rounds, one for a file and one for its folder: 5 make the run's folder, 4 say who holds what,
# 3 are a round's line and checkpoint, 2 the summary's.
@pytest.mark.parametrize("call", [1, 5, 8, 10, 13, 16, 18])
def test_a_disk_that_is_full_at_any_moment(
    call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FileError, match=rf"^{tmp_path}.* No space left on device; make room there\. What was saved stays"
    ):
        run_tiny(tmp_path, "x", *QUICK)
    monkeypatch.undo()
    if not (tmp_path / "x").exists():  # before there was a run
        assert not list(tmp_path.iterdir())
        return
    assert_same_run(run_tiny(tmp_path, "x", *QUICK, resume=True).path, whole)


def test_events_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    """TensorBoard's own writer would fail in a thread."""
    events = EventFile(tmp_path)
    events.close()
    events._file = open("/dev/full", "wb")  # noqa: SIM115
    events._records = RecordWriter(events._file)
    events.add(summaries.scalar("x", 1.0), 1)
    for call in (events.flush, events.close):
        with pytest.raises(FileError, match=rf"^{events.path} cannot be written or read: No space left on device"):
            call()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_a_small_disk(small_disk: Path, whole: Path) -> None:
    """Room for two checkpoints; with more of it the run goes on to the same bits. Said in one line, without locals."""
    command = fedlabel_command("run", *TINY, *QUICK, "--name", "x", "--out", str(small_disk))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {small_disk}/x/")
    assert "cannot be written or read: No space left on device; make room there." in line
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    assert_same_run(fedlabel.run(name="x", out=small_disk, resume=True).path, whole)


SWEEP = "methods: {one: []}\nsettings: {all: [num_rounds=1]}\nseeds: [0]\n"
PLACES = {
    "below a file": ("{}/file/out", "Not a directory; a part of this path is no folder"),
    "a file": ("{}/file", "File exists; something that is no folder has this name"),
    "too long": ("{}/" + 300 * "x", "File name too long; take a shorter name"),
    "no disk": ("/proc/out", "No such file or directory; it, or a folder above it, is missing or cannot be made"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["run", "partition", "sweep", "compare"])
def test_an_impossible_out(command: str, place: str, whole: Path, tmp_path: Path) -> None:
    if place == "no disk" and not Path("/proc/self").exists():
        pytest.skip("no /proc")
    (tmp_path / "file").touch()
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    path, message = PLACES[place]
    arguments = {"run": [*TINY], "partition": [*TINY], "sweep": [str(tmp_path / "sweep.yaml")], "compare": [str(whole)]}
    out = path.format(tmp_path)
    result = CliRunner().invoke(app, [command, *arguments[command], "--out", out])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()  # nothing is printed before
    assert line.startswith("Error: ")
    assert out in line
    assert message in line


def test_a_bug_shows_where_it_is_without_local_variables(tmp_path: Path) -> None:
    code = (
        "import fedlabel.config, fedlabel.cli.main\ndef list(*a):\n    labels = 'secret'\n    raise KeyError('bug')\n"
    )
    code += "fedlabel.config.load_config = list\nfedlabel.cli.main.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "partition"], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'bug'"
    assert "│" not in done.stderr
