"""How Ray is started or joined, and what is said where it cannot be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import server.grids.ray_start
from fedlabel.errors import RunError
from tests.integration.processes import free_ports


def test_ray_gets_a_short_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """39 bytes and "/ray" leave room for the 64 of a socket's name; the system takes 107."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + 38 * "x")
    assert server.grids.ray_start._ray_folder() is None
    monkeypatch.setenv("TMPDIR", "/" + 39 * "x")
    assert server.grids.ray_start._ray_folder() == "/tmp/ray"


def test_no_short_folder_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("RAY_TMPDIR", "/" + 99 * "x")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"TMPDIR \(=/x+\) is too long for Ray.*set RAY_TMPDIR to a short path"):
        server.grids.ray_start._ray_folder()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no-such-host.invalid:{}", "127.0.0.1:99999"]
)
def test_cluster_that_is_not_there_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = address.format(free_ports(1)[0])
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=rf"No Ray cluster answers at RAY_ADDRESS \(={address}\): .*; correct it"):
        server.grids.ray_start.start_ray(1)


def test_ray_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease ...")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray.init", fail)
    message = "Ray does not start: ConnectionError: Could not find any running Ray instance.; check RAY_ADDRESS (=auto)"
    with pytest.raises(RunError) as caught:
        server.grids.ray_start.start_ray(1)
    assert str(caught.value).startswith(message)
