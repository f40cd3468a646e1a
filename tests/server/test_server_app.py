"""A run as a whole: when its folder is made, what it is called, and what Flower's log says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.client_app import app
from fedlabel.config import ConfigError, load_config
from fedlabel.errors import RunError
from server import server_app
from server.grids.flower import FlowerGrid
from server.request import default_name
from server.server_app import _log_line, _run_here, run_federation
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import TINY, assert_same_run
from tests.server.test_nodes import CONFIG, Nodes


def test_no_folder_is_made_before_the_nodes_are_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Only 2"):
        run_federation(CONFIG, FlowerGrid(Nodes([0, 1])), tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_default_name_says_what_it_is() -> None:
    config = load_config([], ["method.name=fedlabel.methods.supervised:Supervised", "seed=4"])
    assert re.fullmatch(r"[Ss]upervised-digits-seed4-\d{8}-\d{6}", default_name(config))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("training.lr=-1", r"`training.lr` \(=-1\) must be a positive number."),
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
        server_app.main(LocalNodes(ClientApp(), 2), context)
    assert caught.value.__suppress_context__
    assert not (tmp_path / "runs").exists()


def test_a_deployed_round_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"train/loss": 0.51234, "eval/accuracy": 0.8, "system/failed_clients": 0.0, "system/round_seconds": 3.21}
    with caplog.at_level("INFO", "fedlabel"):
        _log_line(3, {**metrics, "pseudo/ece": 0.1})
        _log_line(4, {"system/failed_clients": 2.0, "system/round_seconds": 3.0})
    assert caplog.messages == [
        "Round 3: loss 0.5123, accuracy 0.8000, 3.2 s",
        "Round 4: failed clients 2, 3.0 s",
    ]


def run_config(**asked: str | bool) -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(asked))


def test_flwr_run_resumes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after round 2 of 3: what was begun as a second run goes on as the first would have."""
    monkeypatch.chdir(tmp_path)
    overrides = " ".join([*TINY, "num_clients=2", "num_rounds=3"])
    whole = _run_here(LocalNodes(app, 2), run_config(name="whole", overrides=overrides))
    nodes = LocalNodes(app, 2)

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return LocalNodes.answer(nodes, message)

    with monkeypatch.context() as patch:
        patch.setattr(nodes, "answer", stop)
        with pytest.raises(KeyboardInterrupt):
            _run_here(nodes, run_config(name="killed", overrides=overrides))
    with pytest.raises(ConfigError, match=r"runs/killed exists: give another name, or resume=true to go on with it"):
        _run_here(nodes, run_config(name="killed", overrides=overrides))
    killed = _run_here(nodes, run_config(name="killed", resume=True))
    assert (killed, whole) == (tmp_path / "runs" / "killed", tmp_path / "runs" / "whole")
    assert_same_run(killed, whole)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resume": True}, "^resume needs name: which run folder to go on with"),
        ({"name": "none", "resume": True}, r"none/config.yaml does not exist: there is no such run to resume"),
        ({"name": "../out"}, r"^name \(=../out\) must be the name of one folder, without a slash\.$"),
        ({"name": "new", "resume": "yes"}, r"^`resume` \(=yes\) must be true or false"),
    ],
)
def test_what_flwr_run_cannot_resume_is_said(
    asked: dict[str, str | bool], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        _run_here(LocalNodes(app, 2), run_config(**asked))
    assert not (tmp_path / "runs").exists()
