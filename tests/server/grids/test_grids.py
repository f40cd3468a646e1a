"""The grids alone: replies in order, errors as replies, client state, and workers that are replaced."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import server.grids.ray
from fedlabel.errors import RunError
from server.grids.base import SimulationGrid
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from tests.integration import echo_app
from tests.integration.processes import free_ports, wait_until

CLIENTS = 5


def ask(grid: SimulationGrid, clients: list[int], timeout: float | None = None, **order: int | str) -> list[Message]:
    """Sends one shared content to some clients and returns their replies."""
    content = RecordDict({"order": ConfigRecord(dict(order))})
    messages = [Message(content, client + 1, "train") for client in clients]
    return list(grid.send_and_receive(messages, timeout=timeout))


def echo(reply: Message) -> dict[str, Any]:
    return dict(reply.content.config_records["echo"])


@pytest.fixture(scope="module")
def ray_grid(shared_ray: None) -> Iterator[RayGrid]:
    with RayGrid("tests.integration.echo_app:app", CLIENTS, 2, use_gpu=False) as grid:
        yield grid


@pytest.fixture(params=["in_process", pytest.param("ray", marks=pytest.mark.slow)])
def grid(request: pytest.FixtureRequest) -> SimulationGrid:
    if request.param == "in_process":
        return InProcessGrid(echo_app.app, CLIENTS)
    ray_grid = request.getfixturevalue("ray_grid")
    assert isinstance(ray_grid, RayGrid)
    ray_grid.states = {}
    return ray_grid


def test_nodes_are_the_clients_counted_from_1(grid: SimulationGrid) -> None:
    assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5]
    assert [(echo(r)["client"], echo(r)["clients"]) for r in ask(grid, [0, 4])] == [(0, 5), (4, 5)]


def test_replies_come_in_the_order_of_the_messages(grid: SimulationGrid) -> None:
    for clients in ([3, 1, 4, 0, 2], [2, 0]):
        replies = ask(grid, clients)
        assert [echo(reply)["client"] for reply in replies] == clients
        assert [reply.metadata.src_node_id for reply in replies] == [client + 1 for client in clients]


def test_exception_becomes_an_error_reply_of_that_client_alone(grid: SimulationGrid) -> None:
    replies = ask(grid, [0, 1, 2], raises=1)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    reason = str(replies[1].error.reason)
    assert reason.startswith("KeyError: 'told to'\nTraceback (most recent call last):")
    assert "echo_app.py" in reason
    assert replies[1].metadata.src_node_id == 2


def test_state_is_each_clients_own_and_kept(grid: SimulationGrid) -> None:
    ask(grid, [0, 1])
    ask(grid, [1, 2])
    assert [echo(reply)["calls"] for reply in ask(grid, [0, 1, 2, 3])] == [2, 3, 2, 1]


def test_a_client_that_fails_keeps_the_state_it_had(grid: SimulationGrid) -> None:
    ask(grid, [1])
    assert ask(grid, [1], raises=1)[0].has_error()
    assert echo(ask(grid, [1])[0])["calls"] == 2


def test_state_can_be_saved_and_put_back(grid: SimulationGrid) -> None:
    ask(grid, [1, 3])
    saved = grid.dump_states()
    assert list(saved) == [1, 3]
    ask(grid, [1, 3])
    grid.load_states(saved)
    assert [echo(reply)["calls"] for reply in ask(grid, [1, 2, 3])] == [2, 1, 2]


def test_push_and_pull(grid: SimulationGrid) -> None:
    """Flower's other way to send: first push, then pull by id."""
    content = RecordDict({"order": ConfigRecord({})})
    ids = list(grid.push_messages([Message(content, node, "train") for node in (2, 5)]))
    assert len(set(ids)) == 2
    assert [echo(reply)["client"] for reply in grid.pull_messages(ids)] == [1, 4]


def test_run_record_is_asked_for_by_name() -> None:
    with pytest.raises(RuntimeError, match="no run record"):
        _ = InProcessGrid(echo_app.app, 1).run


@pytest.mark.slow
def test_workers_live_on(ray_grid: RayGrid) -> None:
    first = {echo(reply)["process"] for _ in range(3) for reply in ask(ray_grid, [0, 1, 2, 3, 4])}
    assert len(first) <= 2
    assert os.getpid() not in first


@pytest.mark.slow
def test_late_client_fails_and_its_worker_is_replaced(ray_grid: RayGrid) -> None:
    before = {echo(reply)["process"] for reply in ask(ray_grid, [0, 1, 2, 3, 4])}
    started = time.monotonic()
    replies = ask(ray_grid, [0, 1, 2, 3, 4], timeout=5.0, sleeps=3)
    assert time.monotonic() - started < 30
    assert [reply.has_error() for reply in replies] == [False, False, False, True, False]
    assert replies[3].error.reason == "TimeoutError: no answer within 5 s"

    def a_new_process_takes_part() -> bool:
        return bool({echo(reply)["process"] for reply in ask(ray_grid, [0, 1, 2, 3, 4])} - before)

    wait_until(a_new_process_takes_part, 60, "the worker was not replaced", every=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [2, 3])
def test_client_whose_worker_dies_is_asked_again(ray_grid: RayGrid, deaths: int, tmp_path: Path) -> None:
    """Twice; its state is the one it had, and the others are answered."""
    ray_grid.states = {}
    ask(ray_grid, [0, 1, 2])
    replies = ask(ray_grid, [0, 1, 2, 3], dies=1, deaths=deaths, marks=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == deaths
    assert [reply.has_error() for reply in replies] == [False, deaths == 3, False, False]
    assert [echo(replies[place])["calls"] for place in (0, 2, 3)] == [2, 2, 1]
    if deaths == 3:
        assert replies[1].error.reason == "WorkerDied: 3 workers died on it; out of memory?"
    assert echo(ask(ray_grid, [1])[0])["calls"] == (2 if deaths == 3 else 3)


def fragile_app(folder: Path, beginning: str) -> str:
    """Writes the echo app into a module that workers import, with something before it; returns its name."""
    code = "import os, signal\nfrom pathlib import Path\nmarks = Path(__file__).parent / 'marks'\n"
    name = f"fragile_{folder.name}"
    (folder / f"{name}.py").write_text(f"{code}{beginning}\nfrom tests.integration.echo_app import app\n")
    (folder / "marks").mkdir()
    return f"{name}:app"


DIES = """
deaths = len(list(marks.iterdir()))
if deaths < {}:
    (marks / f"{{os.getpid()}}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_that_die_while_they_start_are_started_again(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with RayGrid(fragile_app(tmp_path, DIES.format(3)), CLIENTS, 1, use_gpu=False) as grid:
        assert [echo(reply)["client"] for reply in ask(grid, [0, 1])] == [0, 1]
    assert len(list((tmp_path / "marks").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (
            DIES.format(99),
            "2 workers in a row of the simulation died while starting: each was killed, or out of memory",
        ),
        (
            "import no_such_module",
            "A worker .* died while starting: ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
    ids=["dies", "raises"],
)
def test_workers_that_never_start_end_the_run_in_one_sentence(
    beginning: str, message: str, shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(server.grids.ray, "STARTS", 2)
    app = fragile_app(tmp_path, beginning)
    with RayGrid(app, CLIENTS, 1, use_gpu=False) as grid, pytest.raises(RunError, match=message) as caught:
        ask(grid, [0])
    assert "\n" not in str(caught.value)


def test_ray_gets_a_short_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """39 bytes and "/ray" leave room for the 64 of a socket's name; the system takes 107."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + 38 * "x")
    assert server.grids.ray._ray_folder() is None
    monkeypatch.setenv("TMPDIR", "/" + 39 * "x")
    assert server.grids.ray._ray_folder() == "/tmp/ray"


def test_no_short_folder_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("RAY_TMPDIR", "/" + 99 * "x")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"TMPDIR \(=/x+\) is too long for Ray.*set RAY_TMPDIR to a short path"):
        server.grids.ray._ray_folder()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no-such-host.invalid:{}", "127.0.0.1:99999"]
)
def test_cluster_that_is_not_there_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = address.format(free_ports(1)[0])
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=rf"No Ray cluster answers at RAY_ADDRESS \(={address}\): .*; correct it"):
        server.grids.ray._start_ray(1)


def test_ray_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease ...")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray.init", fail)
    message = "Ray does not start: ConnectionError: Could not find any running Ray instance.; check RAY_ADDRESS (=auto)"
    with pytest.raises(RunError) as caught:
        server.grids.ray._start_ray(1)
    assert str(caught.value).startswith(message)
