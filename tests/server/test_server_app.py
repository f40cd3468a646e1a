"""The server before the first round: who is connected, and what a run folder is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlabel.config import load_config
from fedlabel.hardware import source_hash
from server import server_app
from server.grids import InProcessGrid, SimulationGrid
from server.server_app import RunError, connect, default_name, run_federation


class Nodes(SimulationGrid):
    """Nodes of which each answers with a partition-id and a source hash."""

    def __init__(self, partition_ids: Sequence[int], node_ids: Sequence[int] = (), source: str = "") -> None:
        super().__init__(len(partition_ids))
        self.node_ids = list(node_ids or range(1, len(partition_ids) + 1))
        self.partition_of = dict(zip(self.node_ids, partition_ids, strict=True))
        self.source = source or source_hash()
        self.absent_at_first = 0

    def get_node_ids(self) -> Iterable[int]:
        self.absent_at_first -= 1
        return [] if self.absent_at_first >= 0 else self.node_ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            self._number(message)
            node = message.metadata.dst_node_id
            answer = ConfigRecord({"partition-id": self.partition_of[node], "source-hash": self.source})
            yield Message(RecordDict({"identity": answer}), reply_to=message)


CONFIG = load_config([], ["num_clients=3", "grid.connect_timeout=0.7"])


def test_clients_are_found_by_what_nodes_say() -> None:
    grid = Nodes([2, 0, 1], node_ids=[501, 77, 9000])
    grid.absent_at_first = 1  # it waits for them
    assert connect(grid, CONFIG) == {2: 501, 0: 77, 1: 9000}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Nodes([0, 1]), r"Only 2 of `num_clients` \(=3\) nodes connected within `grid.connect_timeout` \(=0.7 s\)"),
        (Nodes([0, 1, 1]), "Nodes 2 and 3 both have partition-id 1; give each its own"),
        (Nodes([0, 1, 5]), r"No node has partition-id 2 \(1 of 3 are missing\)"),
        (Nodes([0, 1, 2], source="0123"), rf"Node 1 runs other code \(hash 0123, here {source_hash()}\)"),
    ],
)
def test_what_is_wrong_with_the_nodes_is_said(grid: Nodes, message: str) -> None:
    with pytest.raises(RunError, match=message):
        connect(grid, CONFIG)


def test_no_folder_is_made_before_the_nodes_are_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Only 2"):
        run_federation(CONFIG, Nodes([0, 1]), tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_default_name_says_what_it_is() -> None:
    config = load_config([], ["method.name=fedlabel.methods.supervised:Supervised", "seed=4"])
    assert re.fullmatch(r"[Ss]upervised-digits-seed4-\d{8}-\d{6}", default_name(config))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("training.lr=-1", r"`training.lr` \(=-1.0\) must be a positive number."),
        ("num_clients=9 grid.connect_timeout=0.1", "Only 2 of `num_clients`"),
    ],
)
def test_the_last_line_of_flowers_log_says_that_a_run_failed(
    overrides: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower writes the traceback of what is raised last; `flwr run` ends with status 0."""
    monkeypatch.chdir(tmp_path)
    context = Context(1, 0, {}, RecordDict(), {"configs": "", "overrides": overrides})
    with pytest.raises(RunError, match=rf"^fedlabel: the run FAILED .*: {reason}") as caught:
        server_app.main(InProcessGrid(ClientApp(), 2), context)
    assert caught.value.__suppress_context__
    assert not (tmp_path / "runs").exists()
