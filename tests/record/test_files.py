"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from fedlabel.errors import FileError
from fedlabel.record.files import write_atomic


@pytest.mark.parametrize("data", [b"\x00\xffbytes", "text: ü", "", b""])
def test_write_atomic_replaces_and_leaves_no_other_file(tmp_path, data):
    path = tmp_path / "file"
    write_atomic(path, "old and longer than what follows")
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match=f"^{path} cannot be written or read: No space left on device; make room there"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_write_atomic_leaves_the_file_as_readable_as_any(tmp_path):
    (tmp_path / "usual").touch()
    write_atomic(tmp_path / "file", "x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
