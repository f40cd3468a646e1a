"""Processes of a test: marked by a variable in their environment, so that all of them can be found and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlabel.hardware import PACKAGE_ROOT


def environment(**marks: str) -> dict[str, str]:
    """Returns the environment for a child that runs this very code and the tools installed beside this Python."""
    tools = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
        "PYTHONPATH": str(PACKAGE_ROOT),
        **marks,
    }


def fedlabel_command(*arguments: str) -> list[str]:
    """Returns the command line of `fedlabel ...` with this very code."""
    return [sys.executable, "-c", "from fedlabel.cli.main import main; main()", *arguments]


def start(command: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process with its output in `log`."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


def wait_until(condition: Callable[[], bool], seconds: float, what: str, every: float = 0.01) -> None:
    """Returns as soon as `condition` holds.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(every)


def marked(name: str, value: str) -> set[int]:
    """Returns the ids of the living processes, but this one, that have `name=value` in their environment."""
    wanted = f"{name}={value}".encode()
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            has_mark = wanted in (folder / "environ").read_bytes().split(b"\0")
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:  # gone meanwhile, or another user's
            continue
        if has_mark and alive:
            found.add(int(folder.name))
    return found


def stop_marked(name: str, value: str) -> None:
    """Ends all processes that `marked` finds; those that stay are killed."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        for pid in marked(name, value):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        try:
            return wait_until(lambda: not marked(name, value), seconds, "processes stay", every=0.1)
        except TimeoutError:
            continue
    raise TimeoutError(f"processes {marked(name, value)} do not end")


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback device that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
