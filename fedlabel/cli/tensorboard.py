"""Starts TensorBoard on a folder of runs."""

from __future__ import annotations

import logging
from pathlib import Path

from tensorboard import program

from fedlabel.errors import naming

PORTS_TRIED = 20


def open_tensorboard(folder: Path, port: int) -> tuple[str, str]:
    """Starts TensorBoard in a thread of this process.

    Args:
        folder: a run's, or one that holds runs at any depth.
        port: of this machine; if it is taken, one of the next.

    Returns:
        The address, and a note if it is at another port than asked for.

    Raises:
        ValueError: there is no such folder, it holds no events, or no port is free.
    """
    with naming(folder):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give that of a run, or one that holds runs, e.g. runs.")
        if next(folder.rglob("events.out.tfevents.*"), None) is None:
            raise ValueError(
                f"{folder} holds nothing for TensorBoard: no run, or only such with tracking.level=off. Give the "
                "folder of a run, or one that holds runs."
            )
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it says that TensorFlow is not installed
    for tried in range(port, min(port + PORTS_TRIED, 2**16)):
        server = program.TensorBoard()
        server.configure(argv=("tensorboard", "--logdir", str(folder.absolute()), "--port", str(tried)))
        try:
            url = str(server.launch())
        except program.TensorBoardPortInUseError:
            continue
        except program.TensorBoardServerException as error:
            raise ValueError(f"TensorBoard cannot be started: {error.msg}.") from error
        return url, "" if tried == port else f"Port {port} is in use by another program; this is {tried}."
    raise ValueError(f"The ports from {port} on are all in use: give another one with --port.")
