"""Errors that a user can resolve; any other exception is a bug."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(RuntimeError):
    """A run cannot continue; saved results remain."""


class FileError(ValueError):
    """The operating system refused to write, read or create a file or folder."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say that a disk, or what one may have of it, is full."""

_CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "take a folder on a disk that can be written",
    errno.EACCES: "take a folder that you may write, or change its permissions",
    errno.EPERM: "take a folder that you may write, or change its permissions",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ENOTDIR: "a part of this path is no folder: take another path",
    errno.EEXIST: "something that is no folder has this name: take another path",
    errno.EISDIR: "a folder has this name: move it away",
    errno.ENOTEMPTY: "a folder has this name: move it away",
    errno.ENOENT: "it, or a folder above it, is missing or cannot be made: check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.EIO: "the disk, or the connection to it, is failing",
}


def file_error(error: OSError, path: Path | str | None = None) -> FileError:
    """Returns a system error about a file as one sentence: the file, the cause, and what to do.

    Args:
        error: the system's.
        path: the file; None: the one that `error` names; where it names none it is what this command prints.
    """
    where = path or error.filename or "The output of this command"
    cure = _CURES.get(error.errno or 0, "check the path and the disk")
    saved = " What was saved stays; --resume goes on from there." if error.errno in FULL else ""
    return FileError(f"{where} cannot be written or read: {error.strerror or error}; {cure}.{saved}")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turns an OSError inside into a `FileError` that names `path`: the system names no file when a disk is full."""
    try:
        yield
    except OSError as error:
        raise file_error(error, path) from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are not there yet.

    Raises:
        FileError: the system does not let us.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(path: Path) -> None:
    """Checks that a folder exists and is writable, or can be made; changes nothing.

    Raises:
        FileError: the system would not let us.
    """
    with naming(path):
        above = next(each for each in (path, *path.absolute().parents) if each.exists())
        if above == path and not path.is_dir():
            path.mkdir()  # fails with the system's reason
        Path(tempfile.mkdtemp(prefix=".fedlabel-", dir=above)).rmdir()


def is_file(path: str | Path) -> bool:
    """Returns whether such a file exists; False for a name that no file system accepts."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
