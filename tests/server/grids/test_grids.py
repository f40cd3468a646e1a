"""The simulated grids alone: results in order, failures, what clients keep, and workers that are replaced."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import server.grids.ray
from fedlabel.cohort import Invitation
from fedlabel.config import load_config, to_yaml
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment, open_experiment
from server.blocks import Block, BlockResult
from server.grids.base import ClientGrid, Order
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from tests.integration import echo
from tests.integration.processes import wait_until
from tests.integration.tiny import TINY

CLIENTS = 5
ECHO = "tests.integration.echo:train"
OVERRIDES = (
    *(override for override in TINY if not override.startswith(("method.", "supervision."))),
    *("supervision.kind=noisy", "supervision.noise_rate=0.3", "method.name=elr", f"num_clients={CLIENTS}"),
)
"""Of a method whose clients keep something."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return open_experiment(to_yaml(load_config([], OVERRIDES)))


def ask(
    grid: ClientGrid, tasks: Sequence[Sequence[Block]], fold: bool = False, **order: int | str
) -> list[BlockResult]:
    """Sends a round to some clients; order: what they are to do."""
    model = open_experiment(to_yaml(load_config([], OVERRIDES))).initial_state
    return list(grid.train(Order(Invitation(1, model, echo.orders(**order), {}), {}, fold), tasks))


def each(*clients: int) -> list[list[list[int]]]:
    """Returns a task for every client."""
    return [[[client]] for client in clients]


def calls(blocks: Sequence[BlockResult]) -> dict[int, int]:
    """Client -> how often it was asked so far, of those that answered."""
    return {result.client: int(result.sums["train/loss"][0]) for block in blocks for result in block.results}


def processes(blocks: Sequence[BlockResult]) -> set[int]:
    return {int(next(iter(r.parts["model"].state.values())).view(-1)[0]) for block in blocks for r in block.results}


def reasons(blocks: Sequence[BlockResult]) -> list[tuple[str, str]]:
    return [(failure.who, failure.reason) for block in blocks for failure in block.failures]


@pytest.fixture(scope="module")
def ray_grid(shared_ray: None, experiment: Experiment) -> Iterator[RayGrid]:
    with RayGrid(2, use_gpu=False, train=ECHO) as grid:
        grid.connect(experiment)
        yield grid


@pytest.fixture(params=["in_process", pytest.param("ray", marks=pytest.mark.slow)])
def grid(request: pytest.FixtureRequest, experiment: Experiment) -> ClientGrid:
    if request.param == "in_process":
        made = InProcessGrid(echo.train)
        made.connect(experiment)
        return made
    ray_grid = request.getfixturevalue("ray_grid")
    assert isinstance(ray_grid, RayGrid)
    ray_grid._memories = {}
    return ray_grid


def test_results_come_in_the_order_of_the_blocks(grid: ClientGrid) -> None:
    for tasks in (each(0, 1, 2, 3, 4), [[[0, 1], [2]], [[3, 4]]], [[[0, 1, 2, 3, 4]]]):
        blocks = ask(grid, tasks)
        wanted = [block for task in tasks for block in task]
        assert [[result.client for result in block.results] for block in blocks] == wanted
        assert all(block.total is None for block in blocks)


def test_models_are_left_where_they_were_added_up(grid: ClientGrid, experiment: Experiment) -> None:
    numbers = sum(value.numel() for value in experiment.initial_state.values())
    for block in ask(grid, [[[0, 1], [2]]], fold=True, raises=1):
        assert [result.parts for result in block.results] == [{}]
        assert block.total is not None
        assert block.total.weights == {"model": 1.0}
        assert block.total.totals["model"].shape == (numbers,)
        assert block.total.totals["model"].dtype == torch.float64


def test_exception_is_the_failure_of_that_client_alone(grid: ClientGrid) -> None:
    blocks = ask(grid, [[[0, 1, 2]]], raises=1)
    assert list(calls(blocks)) == [0, 2]
    ((who, reason),) = reasons(blocks)
    assert who == "client 1"
    assert reason.startswith("KeyError: 'told to'\nTraceback (most recent call last):")
    assert "echo.py" in reason


def test_what_a_client_keeps_is_its_own(grid: ClientGrid) -> None:
    ask(grid, each(0, 1))
    ask(grid, [[[1, 2]]])
    assert calls(ask(grid, [[[0, 1], [2, 3]]])) == {0: 2, 1: 3, 2: 2, 3: 1}


def test_a_client_that_fails_keeps_what_it_had(grid: ClientGrid) -> None:
    ask(grid, each(1))
    assert calls(ask(grid, [[[0, 1]]], raises=1)) == {0: 1}
    assert calls(ask(grid, each(1))) == {1: 2}


def test_what_clients_keep_can_be_saved_and_put_back(grid: ClientGrid) -> None:
    ask(grid, each(1, 3))
    saved = grid.dump_memories()
    assert list(saved) == [1, 3]
    ask(grid, each(1, 3))
    grid.load_memories(saved)
    assert calls(ask(grid, each(1, 2, 3))) == {1: 2, 2: 1, 3: 2}


def test_what_clients_kept_can_be_looked_up_after_they_have_trained(grid: ClientGrid) -> None:
    ask(grid, each(1))
    memory_of = grid.memory_of([1, 2])
    assert memory_of is not None
    ask(grid, each(1, 2))
    assert memory_of(1)["early_target"].tolist() == [1]
    assert memory_of(2) == {}


@pytest.mark.slow
def test_workers_live_on(ray_grid: RayGrid) -> None:
    first = set().union(*(processes(ask(ray_grid, each(0, 1, 2, 3, 4))) for _ in range(3)))
    assert len(first) <= 2
    assert os.getpid() not in first


@pytest.mark.slow
def test_the_object_store_does_not_grow(ray_grid: RayGrid) -> None:
    """Neither with rounds nor with what clients keep: the last of each client is held, and the last order."""
    import ray
    from ray._private.internal_api import node_stats  # Ray counts it nowhere in public

    def used() -> int:
        (node,) = ray.nodes()
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        return int(stats.store_stats.num_local_objects)

    for _ in range(3):
        ask(ray_grid, each(0, 1, 2, 3, 4), fold=True)
    before = used()
    for _ in range(20):
        ask(ray_grid, each(0, 1, 2, 3, 4), fold=True)
    wait_until(lambda: used() <= before + 2, 60, "objects are left", every=0.5)  # Ray frees them now and then


@pytest.mark.slow
def test_late_client_fails_and_its_worker_is_replaced(ray_grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others were in its task: these are tried again one by one."""
    before = processes(ask(ray_grid, each(0, 1, 2, 3, 4)))
    monkeypatch.setattr(ray_grid, "_timeout", 6.0)
    for tasks in (each(0, 1, 2, 3, 4), [[[0, 1]], [[2, 3], [4]]]):
        started = time.monotonic()
        blocks = ask(ray_grid, tasks, sleeps=3)
        assert time.monotonic() - started < 59  # it sleeps for 60
        assert list(calls(blocks)) == [0, 1, 2, 4]
        assert reasons(blocks) == [("client 3", "TimeoutError: no answer within 6 s")]
    monkeypatch.setattr(ray_grid, "_timeout", 600.0)

    def a_new_process_takes_part() -> bool:
        return bool(processes(ask(ray_grid, each(0, 1, 2, 3, 4))) - before)

    wait_until(a_new_process_takes_part, 60, "the worker was not replaced", every=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("deaths", "tasks"), [(2, each(0, 1, 2, 3)), (3, each(0, 1, 2, 3)), (9, [[[0, 1], [2, 3]]])])
def test_clients_whose_worker_dies_are_asked_again(
    ray_grid: RayGrid, deaths: int, tasks: list[list[list[int]]], tmp_path: Path
) -> None:
    """A task goes to two more workers, then each of its clients to three: what they kept is what they had."""
    ray_grid._memories = {}
    ask(ray_grid, each(0, 1, 2))
    blocks = ask(ray_grid, tasks, fold=True, dies=1, deaths=deaths, marks=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == min(deaths, 6)
    dead = deaths > 2
    assert calls(blocks) == {0: 2, **({} if dead else {1: 2}), 2: 2, 3: 1}
    assert reasons(blocks) == [("client 1", "WorkerDied: 3 workers died on it; out of memory?")] * dead
    alone = InProcessGrid(echo.train)
    alone.connect(open_experiment(to_yaml(load_config([], OVERRIDES))))
    expected = ask(alone, tasks, fold=True, **({"raises": 1} if dead else {}))
    for block, other in zip(blocks, expected, strict=True):
        assert block.total is not None
        assert other.total is not None
        assert block.total.weights == other.total.weights
        for part, total in other.total.totals.items():  # but for the process's id
            assert torch.equal(block.total.totals[part][1:], total[1:])
    assert calls(ask(ray_grid, each(1))) == {1: 2 if dead else 3}


@pytest.mark.slow
def test_fewer_workers_share_a_gpu_that_is_too_small(
    shared_ray: None, experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    """The task runs again; where one worker is left, the client fails."""
    with RayGrid(2, use_gpu=False, train=ECHO) as grid, caplog.at_level(logging.WARNING, "fedlabel"):
        grid.connect(experiment)
        blocks = ask(grid, each(0, 1, 2), fills=1)
        assert list(calls(blocks)) == [0, 2]
        ((who, reason),) = reasons(blocks)
        assert (who, reason.partition("\n")[0]) == ("client 1", "OutOfMemoryError: CUDA out of memory.")
        assert caplog.messages == ["The GPU's memory was too small for its workers: the run goes on with 1."]
        assert len(processes(ask(grid, each(0, 1, 2, 3)))) == 1


def fragile(folder: Path, beginning: str) -> str:
    """Writes the echo into a module that workers import, with something before it; returns its name."""
    code = "import os, signal\nfrom pathlib import Path\nmarks = Path(__file__).parent / 'marks'\n"
    name = f"fragile_{folder.name}"
    (folder / f"{name}.py").write_text(f"{code}{beginning}\nfrom tests.integration.echo import train\n")
    (folder / "marks").mkdir()
    return f"{name}:train"


DIES = """
deaths = len(list(marks.iterdir()))
if deaths < {}:
    (marks / f"{{os.getpid()}}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


FULL = """
import torch
import server.grids.ray_worker as worker
usual = worker.{0}
def full(*arguments):
    try:
        (marks / "first").mkdir()
    except FileExistsError:
        return usual(*arguments)
    raise torch.OutOfMemoryError("CUDA out of memory.")
worker.{0} = full
"""
"""For the first worker that comes there, the GPU is full."""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["open_experiment", "unpack_order"])
def test_fewer_workers_share_a_gpu_that_is_full_before_or_between_clients(
    where: str,
    shared_ray: None,
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    train = fragile(tmp_path, FULL.format(where))
    with RayGrid(2, use_gpu=False, train=train) as grid, caplog.at_level(logging.WARNING, "fedlabel"):
        grid.connect(experiment)
        blocks = ask(grid, each(0, 1, 2, 3))
        assert (list(calls(blocks)), reasons(blocks)) == ([0, 1, 2, 3], [])
        own = [record.message for record in caplog.records if record.name == "fedlabel"]  # Ray has words of its own
        assert own == ["The GPU's memory was too small for its workers: the run goes on with 1."]


@pytest.mark.slow
def test_workers_that_die_while_they_start_are_started_again(
    shared_ray: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with RayGrid(1, use_gpu=False, train=fragile(tmp_path, DIES.format(3))) as grid:
        grid.connect(experiment)  # which waits for it: its start is no part of a round
        assert len(list((tmp_path / "marks").iterdir())) == 3
        assert list(calls(ask(grid, each(0, 1)))) == [0, 1]
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
    beginning: str,
    message: str,
    shared_ray: None,
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(server.grids.ray, "STARTS", 2)
    train = fragile(tmp_path, beginning)
    with RayGrid(1, use_gpu=False, train=train) as grid, pytest.raises(RunError, match=message) as caught:
        grid.connect(experiment)
    assert "\n" not in str(caught.value)
