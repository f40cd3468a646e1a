"""A federation on this machine's loopback device for scripts: a SuperLink, SuperNodes, `flwr run`, each a process.

All have a FLWR_HOME and ports of their own, and those that have this FLWR_HOME in their environment are ended with it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedlabel.hardware import PACKAGE_ROOT
from tests.integration.processes import environment, free_ports, start, stop_marked, wait_until

Process = subprocess.Popen[bytes]


class Loopback:
    """A clean copy of the code, a working directory (for runs and logs) and a FLWR_HOME.

    Args:
        root: a new folder.
        resident: whether nodes are started with `clients.node`, which keeps a process; else with Flower's own command.
    """

    def __init__(self, root: Path, resident: bool) -> None:
        self.checkout, self.work, self.home, self.resident = root / "checkout", root / "work", root / "home", resident
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
        self.env["PYTHONPATH"] = str(self.checkout)
        connection = f'[superlink.loopback]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(connection)
        self._started = 0

    def start(self, name: str, *command: str) -> Process:
        """Starts a process with a log of its own."""
        self._started += 1
        return start([*command], self.work / f"{self._started:03d}-{name}.log", self.work, self.env)

    def superlink(self) -> Process:
        """Starts the SuperLink and waits until it answers."""
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(self.work / "state.db")]  # a SuperLink that is started again knows its nodes
        process = self.start("superlink", *command, "--disable-runtime-dependency-installation")
        wait_until(lambda: self.answers() or process.poll() is not None, 120, "no SuperLink", every=0.1)
        return process

    def supernode(self, client: int, *settings: str) -> Process:
        """Starts a node; settings: further entries of its configuration."""
        own = [sys.executable, "-m", "clients.node"] if self.resident else ["flower-supernode"]
        connection = ["--insecure", "--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1"]
        config = " ".join([f"partition-id={client}", *settings])
        return self.start(f"node{client}", *own, *connection, "--port", str(free_ports(1)[0]), "--node-config", config)

    def run(self, overrides: str, **run_config: str) -> Process:
        """Starts `flwr run`; it ends when the run does."""
        config = [f'overrides="{overrides}"', *(f"{name}={value}" for name, value in run_config.items())]
        command = ["flwr", "run", str(self.checkout), "loopback", "--stream", "--run-config", " ".join(config)]
        return self.start("run", *command)

    def answers(self) -> bool:
        """Whether the SuperLink is up."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def logs(self, last: int = 3000) -> str:
        """Returns the ends of all logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-last:]}" for log in sorted(self.work.glob("*.log")))


@contextmanager
def loopback(root: Path, resident: bool) -> Iterator[Loopback]:
    """Gives a `Loopback` and ends all of its processes."""
    made = Loopback(root, resident)
    try:
        yield made
    finally:
        stop_marked("FLWR_HOME", str(made.home))
        time.sleep(0.1)
