"""docs/deployment.md, word for word: a federation over TLS whose nodes are registered, and who does not get in."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # pylint: disable=no-name-in-module
from flwr.proto.node_pb2 import Node  # pylint: disable=no-name-in-module
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedlabel.hardware import PACKAGE_ROOT
from tests.integration.deployment import NEEDS, PAGE, Federation, federation_of
from tests.integration.processes import environment, free_ports, start, wait_until

pytestmark = NEEDS
DEPLOY = PACKAGE_ROOT / "scripts" / "deploy"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The page up to its run."""
    own = [f'data="{{server}}/trial/client-00{number}" client={number} min-count=5' for number in range(2)]
    with federation_of(tmp_path_factory.mktemp("deployment") / "page", own) as made:
        made.set_up()
        made.server.run(PAGE["A trial without data of your own"][0])
        made.start_nodes()
        yield made


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


class Signed:
    """Signs requests as a node does, with any key, in the name of any other, at any time.

    Args:
        key: a private key's file.
        name: the file of the public key that the request names.
        seconds: how long ago it says that it was signed.
    """

    def __init__(self, key: Path, name: Path, seconds: float = 0) -> None:
        private = load_ssh_private_key(key.read_bytes(), None)
        public = load_ssh_public_key(name.read_bytes())
        assert isinstance(private, EllipticCurvePrivateKey)
        assert isinstance(public, EllipticCurvePublicKey)
        self._private, self._public, self._seconds = private, public_key_to_bytes(public), seconds

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """See `flwr.supernode.node_auth_http_interceptor`."""
        signed_at = (now() - timedelta(seconds=self._seconds)).isoformat()
        headers = context.request.headers
        headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = b64encode(self._public).decode()
        headers[TIMESTAMP_HEADER] = signed_at
        headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(sign_message(self._private, signed_at.encode())).decode()
        return call_next(context)


def heartbeat(federation: Federation, node_id: int, signed: Signed) -> bool:
    """Says through the door that a node is alive; returns whether the SuperLink believes it.

    Raises:
        httpx.HTTPStatusError: it does not.
    """
    trusted = (federation.root / "federation/certificates/ca.crt").read_bytes()
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    with FleetHttpClient.from_server_address(
        f"localhost:{federation.door}", False, trusted, [version, signed]
    ) as client:
        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=30)
        return bool(client.SendNodeHeartbeat(request).success)


def test_a_nodes_identity_is_its_private_key(federation: Federation, tmp_path: Path) -> None:
    """Its public key and its number are no secrets: who knows both, or has heard a request, cannot speak for it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"], check=True)
    registered = json.loads((federation.root / "federation/nodes/clinic-0.json").read_text())
    node_id, own, name = int(registered["node-id"]), federation.root / "node0/key", federation.root / "node0/key.pub"
    other = federation.root / "node1/key"
    assert heartbeat(federation, node_id, Signed(own, name))
    refused = {
        "signed by somebody else": Signed(tmp_path / "key", name),
        "signed by another registered node": Signed(other, name),
        "another registered node": Signed(other, other.with_suffix(".pub")),
        "nobody that is registered": Signed(tmp_path / "key", tmp_path / "key.pub"),
        "heard 10 minutes ago": Signed(own, name, seconds=600),
        "of the future": Signed(own, name, seconds=-600),
    }
    for case, signed in refused.items():
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            assert not heartbeat(federation, node_id, signed), case


def test_nothing_answers_in_the_clear(federation: Federation) -> None:
    """Neither the door nor the SuperLink behind it."""
    for address in (f"localhost:{federation.door}", federation.superlink):
        with pytest.raises(httpx.TransportError):
            httpx.post(f"http://{address}/v1/fleet/activate-node", timeout=10, trust_env=False)


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
