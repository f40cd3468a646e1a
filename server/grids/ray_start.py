"""Starts a Ray of our own, or joins a cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from typing import Any

from fedlabel.errors import RunError

SOCKET_PATH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
"""Bytes that Ray's folder for temporary files may have in its path: the system takes 107 for a socket's."""


def start_ray(num_workers: int) -> None:
    """Starts a Ray of our own, or joins the cluster that RAY_ADDRESS names.

    Raises:
        ValueError: no folder is short enough for Ray's sockets.
        RunError: it does not start, or there is no such cluster.
    """
    import ray
    from ray.job_config import JobConfig

    class Job(JobConfig):
        """Its workers search modules as PYTHONPATH says: Ray would have them look in the working directory first."""

        _py_driver_sys_path = property(lambda self: [], lambda self, paths: None)

    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    # Not a cluster that someone else started here.
    local: dict[str, Any] = {
        "num_cpus": num_workers,
        "include_dashboard": False,
        "_temp_dir": None if address else _ray_folder(),
    }
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            job_config=Job(),
            **({} if address else local),
        )
    except Exception as error:  # of whatever part of Ray it was
        lines = str(error).strip().splitlines() or [""]
        cure = f"check RAY_ADDRESS (={address}), or unset it" if address else "try again, or take grid.kind=in_process"
        raise RunError(f"Ray does not start: {type(error).__name__}: {lines[0]}; {cure}.") from error


def _check_address(address: str) -> None:
    """Checks that a server answers at "host:port" or "ray://host:port": without one Ray ends this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"No Ray cluster answers at RAY_ADDRESS (={address}): {getattr(error, 'strerror', None) or error}; correct "
            "it, or unset it to use this machine alone."
        ) from error


def _ray_folder() -> str | None:
    """Returns the folder for Ray's sockets; None for Ray's default."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if sys.platform != "linux" or len(os.fsencode(os.path.join(usual, "ray"))) <= SOCKET_PATH:
        return None
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        try:
            with tempfile.TemporaryFile(dir=place):
                return os.path.join(place, "ray")
        except OSError:
            continue
    raise ValueError(
        f"TMPDIR (={usual}) is too long for Ray, whose sockets lie there (at most {SOCKET_PATH - len('/ray')} bytes), "
        "and /tmp cannot be written: set RAY_TMPDIR to a short path, or take grid.kind=in_process."
    )
