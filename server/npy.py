"""Parses the header of an array in numpy.save's format. A client's bytes are never evaluated as code."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_MAGIC = b"\x93NUMPY\x01\x00"
"""A file of numpy.save starts with this, then with the length of its header in two bytes."""
_LONGEST = 1024
"""Bytes of a header; numpy writes 128 for an array of a few dimensions."""
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z?]\d{0,2})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,15},? ?)*)\), \} *\n"
)


class NpyHeader(NamedTuple):
    """The header of an array."""

    descr: str
    """The text of its dtype, e.g. "<f4"; may be invalid."""
    order: str
    """C or F, the order of its values."""
    shape: tuple[int, ...]
    start: int
    """Length of the header in bytes."""


def npy_header(data: bytes) -> NpyHeader | None:
    """Returns the header of a file of numpy.save; None unless it is of version 1.0, for an array of plain values."""
    return _parsed(data[: min(10 + int.from_bytes(data[8:10], "little"), _LONGEST)])


@lru_cache(maxsize=1024)  # a model's arrays have the same few headers in every reply
def _parsed(header: bytes) -> NpyHeader | None:
    found = _HEADER.fullmatch(header[10:]) if header.startswith(_MAGIC) else None
    if found is None:
        return None
    shape = tuple(int(size) for size in found[3].replace(b",", b" ").split())
    return NpyHeader(found[1].decode(), "F" if found[2] == b"True" else "C", shape, len(header))
