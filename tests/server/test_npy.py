"""The one reader of headers that numpy.save writes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from server.npy import NpyHeader, npy_header


def saved(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("array", "descr", "order"),
    [
        (np.zeros((2, 3), np.float32), "<f4", "C"),
        (np.zeros((2, 3), order="F"), "<f8", "F"),
        (np.array(3), "<i8", "C"),
        (np.zeros(0, bool), "|b1", "C"),
        (np.zeros((1,) * 20, ">i2"), ">i2", "C"),
    ],
)
def test_what_numpy_writes(array: np.ndarray, descr: str, order: str) -> None:
    data = saved(array)
    assert npy_header(data) == NpyHeader(descr, order, array.shape, len(data) - array.nbytes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        saved(np.zeros(3))[:20],
        saved(np.zeros(3)).replace(b"NUMPY\x01", b"NUMPY\x02"),
        saved(np.zeros(3)).replace(b"(3,)", b"f()"),
        saved(np.zeros(3, [("a", "f4")])),
        b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }".ljust(65544) + b"\n",
    ],
    ids=["empty", "cut", "version", "code", "fields", "very long"],
)
def test_what_is_no_header_is_not_evaluated(data: bytes) -> None:
    assert npy_header(data) is None
