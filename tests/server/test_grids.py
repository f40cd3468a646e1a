"""The grids alone: replies in order, errors as replies, client state, and workers that are replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from server.grids import InProcessGrid, RayGrid, SimulationGrid
from tests.integration import echo_app
from tests.integration.processes import wait_until

CLIENTS = 5


def ask(grid: SimulationGrid, clients: list[int], timeout: float | None = None, **order: int) -> list[Message]:
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
