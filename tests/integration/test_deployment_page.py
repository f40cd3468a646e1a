"""docs/deployment.md, word for word: a federation over TLS whose nodes are registered, and who does not get in."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlabel.hardware import PACKAGE_ROOT
from tests.integration.markdown import Shell, blocks
from tests.integration.processes import environment, free_ports, start, stop_marked, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds Flower's processes through /proc"),
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
    ),
]
PAGE = blocks(PACKAGE_ROOT / "docs" / "deployment.md")
DEPLOY = PACKAGE_ROOT / "scripts" / "deploy"
MARK = "FEDLABEL_TEST_OF_THE_PAGE"


class Federation:
    """A server and two nodes on this machine, each with a terminal of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkout = root, root / "checkout"
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
        self.nodes = [self._terminal(f"terminal{number}", self._node_settings(number)) for number in range(2)]

    def _settings(self, **values: object) -> str:
        lines = [f"export {name}='{value}'" for name, value in (("SOURCE", self.checkout), *values.items())]
        return "\n".join([*lines, "export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1"])

    def _node_settings(self, number: int) -> str:
        return self._settings(
            NODE=self.root / f"node{number}",
            NODE_NAME=f"clinic-{number}",
            AUTHORITY=self.root / "federation/certificates/ca.crt",
            SERVER=f"localhost:{self.door}",
            NODE_CONFIG=f'data="{self.root}/federation/server/trial/client-00{number}" client={number} min-count=5',
            FEDERATION=self.root / "federation",  # where the server's half of a block runs
        )

    def _terminal(self, name: str, settings: str) -> Shell:
        (self.root / name).mkdir(parents=True)
        shell = Shell(self.root / name, self.env)
        shell.run(settings)
        return shell

    def _installed(self) -> Path:
        """Returns a folder of programs with that of `pip install`, so that this very code is the installed one."""
        folder = self.root / "bin"
        folder.mkdir(parents=True)
        program = folder / "fedlabel-node"
        program.write_text(f'#!/bin/sh\nPYTHONPATH={self.checkout} exec {sys.executable} -m clients.node "$@"\n')
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


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The page up to its run."""
    made = Federation(tmp_path_factory.mktemp("deployment") / "page")
    try:
        made.server.run(PAGE["2. Certificates"][0])
        made.server.run(PAGE["3. SuperLink and door"][0])
        made.server.run(PAGE["A trial without data of your own"][0])
        made.starts()
        for node in made.nodes:
            for block in PAGE["4. A node"][1:]:
                node.run(block)
        wait_until(lambda: made.online() == 2, 90, "nodes are not online", every=1)
        yield made
    except BaseException:
        print(made.logs())  # noqa: T201
        raise
    finally:
        stop_marked(MARK, str(made.root))


def test_the_settings_are_those_of_the_page() -> None:
    """What the tests write in place of the blocks that are the reader's own."""
    for block, names in (
        (PAGE["1. Settings"][0], {"SOURCE", "FEDERATION", "NAME", "PORT", "SUPERLINK"}),
        (PAGE["4. A node"][0], {"NODE", "NODE_NAME", "AUTHORITY", "SERVER", "NODE_CONFIG"}),
    ):
        exported = set(re.findall(r"([A-Z_]+)=", block))
        assert exported == names | {"FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"}


def run_folders(federation: Federation) -> list[Path]:
    return list((federation.root / "federation/server").glob("runs/*"))


def test_a_run(federation: Federation) -> None:
    first, second = PAGE["5. A run"]
    output = federation.server.run(first)
    (folder,) = run_folders(federation)
    assert f"Results are in {folder}" in output.replace("\n", "")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (folder / "failures.log").exists()
    assert "Results are in" in federation.server.run(second)
    minutes = (federation.server.seconds + sum(node.seconds for node in federation.nodes)) / 60
    print(f"the commands took {minutes:.1f} minutes")  # noqa: T201


def test_a_node_runs_no_code_but_its_own(federation: Federation) -> None:
    """Not a line of an app that somebody changed: it is found out by its hash."""
    changed, ran = federation.root / "changed", federation.root / "ran"
    shutil.copytree(federation.checkout, changed)
    with (changed / "clients/client_app.py").open("a") as file:
        file.write(f"\nopen({str(ran)!r}, 'w').close()\n")
    command = PAGE["5. A run"][0].replace('"$SOURCE"', f'"{changed}"')
    output = re.sub(r"\s+", " ", federation.server.run(command))
    assert re.search(r"the run FAILED.*other code", output)
    assert not ran.exists()


def test_others_see_nothing_but_the_way_of_nodes(federation: Federation) -> None:
    """Runs, keys and the SuperLink's own processes are not reached through the door, however it is written."""
    door, own = str(federation.door), federation.superlink.partition(":")[2]
    for path in ("/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/pull-task", "/health", "/docs"):
        assert federation.url(door, path) == 403
    for path in ("/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes", "/v1/fleet//x"):
        assert federation.url(door, path) == 403
    assert federation.url(own, "/v1/control/list-nodes") not in (0, 403)  # it is there
    assert federation.url(door, "/v1/fleet/activate-node") not in (0, 403)


def supernode(federation: Federation, *changed: str, port: int = 0) -> str:
    """Starts a SuperNode in the foreground, otherwise than the page says; it must end, and its output is returned."""
    command = ["flower-supernode", "--superlink", f"localhost:{port or federation.door}", "--max-retries", "1"]
    command += ["--host", "127.0.0.1", "--port", str(free_ports(1)[0]), *changed]
    log = federation.root / "refused.log"
    process = start(command, log, federation.root, federation.env)
    try:
        assert process.wait(timeout=150) != 0
    finally:
        process.kill()
        process.wait()
    return log.read_text()


@contextmanager
def tampered_door(federation: Federation) -> Iterator[int]:
    """A second door whose certificate has another signature than the authority's; gives its port."""
    certificates, port = federation.root / "federation/certificates", free_ports(1)[0]
    changed = bytearray(ssl.PEM_cert_to_DER_cert((certificates / "server.crt").read_text()))
    changed[-1] ^= 1
    (federation.root / "tampered.crt").write_text(ssl.DER_cert_to_PEM_cert(bytes(changed)))
    command = [sys.executable, str(DEPLOY / "door.py"), "--port", str(port), "--superlink", "https://127.0.0.1:1"]
    command += ["--ca", str(certificates / "ca.crt"), "--key", str(certificates / "server.key")]
    command += ["--certificate", str(federation.root / "tampered.crt")]
    process = start(command, federation.root / "tampered.log", federation.root, federation.env)

    def listens() -> bool:
        with socket.socket() as each:
            return each.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, 60, "no second door", every=0.2)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_who_does_not_get_in(federation: Federation, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"], check=True)
    subprocess.run([DEPLOY / "certificates.sh", tmp_path / "other", "localhost"], check=True, capture_output=True)
    before = federation.online()
    trusting = ("--root-certificates", str(federation.root / "federation/certificates/ca.crt"))
    registered = ("--auth-supernode-private-key", str(federation.root / "node0/key"))
    unknown = ("--auth-supernode-private-key", str(tmp_path / "key"))
    assert "All SuperNodes must be registered" in supernode(federation, *trusting)
    assert "Failed to activate SuperNode" in supernode(federation, *trusting, *unknown)
    assert "Server disconnected" in supernode(federation, "--insecure")
    other = ("--root-certificates", str(tmp_path / "other/ca.crt"))
    assert "certificate verify failed" in supernode(federation, *other, *registered)
    with tampered_door(federation) as port:
        assert "certificate signature failure" in supernode(federation, *trusting, *registered, port=port)
    assert federation.online() == before == 2


def test_a_new_key_and_a_restored_state(federation: Federation) -> None:
    """After both, the federation has the same two clients, and runs."""
    backup, make, register, move = PAGE["7. Keeping it"]
    server, node = federation.server, federation.nodes[0]
    old = (federation.root / "node0/key").read_text()
    node.run(PAGE["6. Stopping"][0])
    for block in (make, register, move):
        node.run(block)
    assert (federation.root / "node0/key").read_text() != old
    server.run(backup)
    server.run(PAGE["6. Stopping"][1])
    state = federation.root / "federation/server/state.db"
    wait_until(lambda: federation.url(federation.superlink.partition(":")[2], "/health") == 0, 60, "it does not end")
    for file in state.parent.glob("state.db*"):
        file.unlink()
    shutil.move(state.with_name("state.backup.db"), state)
    federation.starts()
    node.run(PAGE["4. A node"][-1])
    wait_until(lambda: federation.online() == 2, 120, "nodes are not online", every=1)
    runs = len(run_folders(federation))
    output = server.run(PAGE["5. A run"][0].replace("num_rounds=2", "num_rounds=1"))
    assert len(run_folders(federation)) == runs + 1
    assert "the run is finished" in re.sub(r"\s+", " ", output)


def options(program: str) -> set[str]:
    """The options that a program of Flower has."""
    told = subprocess.run(
        [program, "--help"], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    return set(re.findall(r"--[a-z][a-z-]+", told.stdout))


def test_services_and_containers_use_options_that_there_are() -> None:
    files = [*DEPLOY.glob("*.service"), DEPLOY / "compose.yaml"]
    text = "\n".join(re.sub(r"^ *#.*", "", file.read_text(), flags=re.MULTILINE) for file in files)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--certificate", "--key", "--ca"}  # the door's
    assert len(used) > 10
    assert used - options("flower-superlink") - options("flower-supernode") == set()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_services_are_read_by_systemd(unit: Path) -> None:
    """All that it misses is the installation."""
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if unit.name in line]
    assert all("is not executable: No such file" in line for line in lines), lines
