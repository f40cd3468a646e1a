"""`fedlabel tensorboard`: the right folder, a port that is taken, and what holds nothing."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import pytest

from fedlabel.cli.tensorboard import open_tensorboard
from fedlabel.record.run_folder import RunFolder


def test_folders_without_events_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no is no folder"):
        open_tensorboard(tmp_path / "no", 6006)
    RunFolder.create(tmp_path / "off", "seed: 0\n", {}, events=False).close()
    with pytest.raises(
        ValueError, match=r"holds nothing for TensorBoard: no run, or only such with tracking.level=off"
    ):
        open_tensorboard(tmp_path, 6006)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_it_serves_the_runs_and_takes_another_port_if_one_is_in_use(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", "seed: 0\n", {})
    folder.log_round(1, {"eval/accuracy": 0.5})
    folder.close()
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        url, note = open_tensorboard(tmp_path, port)
    assert f"Port {port} is in use by another program; this is " in note
    with urllib.request.urlopen(f"{url}data/environment", timeout=30) as answer:
        assert json.load(answer)["data_location"] == str(tmp_path)
