"""A federation over TLS with registered nodes, set up by the commands of docs/deployment.md."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlabel.hardware import PACKAGE_ROOT
from tests.integration.markdown import Shell, blocks
from tests.integration.processes import environment, free_ports, stop_marked, wait_until

NEEDS = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds Flower's processes through /proc"),
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
    ),
]
"""Marks of tests with such a federation."""
PAGE = blocks(PACKAGE_ROOT / "docs" / "deployment.md")
MARK = "FEDLABEL_TEST_OF_THE_PAGE"
PROGRAMS = {
    "fedlabel": "from fedlabel.cli.main import main; main()",
    "fedlabel-node": "from clients.node import main; main()",
}


class Federation:
    """A server and nodes on this machine, each with a terminal of its own.

    Args:
        root: a new folder for all of them.
        node_configs: of each node, what it is started with; `{server}` stands for the server's working directory.
    """

    def __init__(self, root: Path, node_configs: Sequence[str]) -> None:
        self.root, self.checkout, self._node_configs = root, root / "checkout", node_configs
        for name in ("fedlabel", "clients", "server", "configs", "scripts"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE_ROOT / name, self.checkout / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(PACKAGE_ROOT / name, self.checkout)
        self.door, superlink = free_ports(2)
        self.superlink = f"127.0.0.1:{superlink}"
        self.env = environment(**{MARK: str(root)})
        del self.env["PYTHONPATH"]  # what runs is what was installed
        self.env["PATH"] = f"{self._installed()}{os.pathsep}{self.env['PATH']}"
        settings = self._settings(FEDERATION=root / "federation", NAME="localhost", PORT=self.door)
        self.server = self._terminal("server", f"{settings}\nexport SUPERLINK={self.superlink}")
        numbers = range(len(node_configs))
        self.nodes = [self._terminal(f"terminal{number}", self._node_settings(number)) for number in numbers]

    def _settings(self, **values: object) -> str:
        lines = [f"export {name}='{value}'" for name, value in (("SOURCE", self.checkout), *values.items())]
        return "\n".join([*lines, "export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1"])

    def _node_settings(self, number: int) -> str:
        return self._settings(
            NODE=self.root / f"node{number}",
            NODE_NAME=f"clinic-{number}",
            AUTHORITY=self.root / "federation/certificates/ca.crt",
            SERVER=f"localhost:{self.door}",
            NODE_CONFIG=self._node_configs[number].format(server=self.root / "federation/server"),
            FEDERATION=self.root / "federation",  # where the server's half of a block runs
        )

    def _terminal(self, name: str, settings: str) -> Shell:
        (self.root / name).mkdir(parents=True)
        shell = Shell(self.root / name, self.env)
        shell.run(settings)
        return shell

    def _installed(self) -> Path:
        """Returns a folder of programs with those of `pip install`, so that this very code is the installed one."""
        folder = self.root / "bin"
        folder.mkdir(parents=True)
        for name, code in PROGRAMS.items():
            program = folder / name
            program.write_text(f"#!/bin/sh\nPYTHONPATH={self.checkout} exec {sys.executable} -c '{code}' \"$@\"\n")
            program.chmod(0o755)
        return folder

    def url(self, port: str, path: str) -> int:
        """Returns the status with which the door, or the SuperLink, answers."""
        trusted = ssl.create_default_context(cafile=str(self.root / "federation/certificates/ca.crt"))
        request = urllib.request.Request(f"https://localhost:{port}{path}", method="POST", data=b"")
        if path == "/health":
            request = urllib.request.Request(f"https://localhost:{port}{path}")
        try:
            with urllib.request.urlopen(request, timeout=5, context=trusted) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def set_up(self) -> None:
        """Makes certificates and starts SuperLink and door."""
        self.server.run(PAGE["2. Certificates"][0])
        self.server.run(PAGE["3. SuperLink and door"][0])
        self.starts()

    def start_nodes(self) -> None:
        """Makes and registers the nodes' keys, starts the nodes, and waits until all are online."""
        for node in self.nodes:
            for block in PAGE["4. A node"][1:]:
                node.run(block)
        wait_until(lambda: self.online() == len(self.nodes), 90 + 30 * len(self.nodes), "nodes are not online", every=1)

    def starts(self) -> None:
        """Starts SuperLink and door as the page says, and waits for them, as a person would."""
        self.server.run(PAGE["3. SuperLink and door"][1])
        port = self.superlink.partition(":")[2]
        wait_until(
            lambda: self.url(port, "/health") == 200 and self.url(str(self.door), "/") == 403, 90, "no SuperLink"
        )

    def online(self) -> int:
        """Returns how many SuperNodes are online."""
        listed = self.server.run("FLWR_HOME=$FEDERATION/server/flwr flwr supernode list federation --format json")
        return sum(node["status"] == "online" for node in json.loads(listed)["nodes"])

    def logs(self) -> str:
        """The ends of all logs, to be shown when a test fails."""
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in sorted(self.root.glob("**/*.log")))


@contextmanager
def federation_of(root: Path, node_configs: Sequence[str]) -> Iterator[Federation]:
    """Gives a `Federation`, and ends all of its processes; logs are printed if something fails."""
    made = Federation(root, node_configs)
    try:
        yield made
    except BaseException:
        print(made.logs())  # noqa: T201
        raise
    finally:
        stop_marked(MARK, str(made.root))
