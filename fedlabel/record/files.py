"""Writing files and folders so that a kill at any time, a full disk or a second process leaves no half of one."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from fedlabel.errors import naming

try:
    import fcntl
except ImportError:  # not on Windows: there folders are not locked
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".unfinished"
"""End of the names of files and folders that are being written."""


class FolderLock:
    """Locks a folder against writes by other processes, until it is closed or this process ends in any way."""

    def __init__(self, path: Path) -> None:
        """Takes the lock.

        Raises:
            ValueError: another process (or another part of this one) has it, or there is no such folder.
        """
        self._folder = -1
        """-1 where nothing is locked."""
        if fcntl is None:
            return
        with naming(path):
            self._folder = os.open(path, os.O_RDONLY)
        if not _flock(self._folder, fcntl.LOCK_EX):
            time.sleep(0.05)  # `is_locked` of somebody who watches may have it for a moment
            if not _flock(self._folder, fcntl.LOCK_EX):
                os.close(self._folder)
                raise ValueError(
                    f"Another process is writing into {path}: wait until it has finished, or stop it first."
                )

    def close(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


def is_locked(path: Path) -> bool | None:
    """Returns whether some process writes into a folder (see `FolderLock`); None where folders are not locked."""
    if fcntl is None:
        return None
    with naming(path):
        folder = os.open(path, os.O_RDONLY)
    try:
        return not _flock(folder, fcntl.LOCK_SH)
    finally:
        os.close(folder)


def _flock(folder: int, kind: int) -> bool:
    """Takes a lock and returns True, or returns False if another one is in its way."""
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_atomic(path: Path, *data: bytes | memoryview | str) -> None:
    """Writes a file atomically: whenever the process is killed, `path` holds either its previous content or all of
    `data`.

    Args:
        path: the file; its folder exists.
        data: its content, one piece after the other; text is written as UTF-8.

    Raises:
        FileError: the system does not let us; `path` is as it was.
    """
    unfinished = temporary_name(path)
    with naming(path):
        try:
            with open(unfinished, "xb") as file:
                for piece in data:
                    file.write(piece.encode() if isinstance(piece, str) else piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):  # it was never made
                unfinished.unlink()
            raise
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Returns a unique name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")


def append(path: Path, text: str) -> None:
    """Appends text to a file, which is made if need be, and waits until it is on the disk.

    Raises:
        FileError: the system does not let us.
    """
    with naming(path), open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes new names in a folder survive a power failure; Windows cannot open folders and has no such step."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
