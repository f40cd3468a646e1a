"""Sample indices per client in two arrays, so that a million clients cost no more than their samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Ragged(Sequence[np.ndarray]):
    """A sequence of int64 arrays of any lengths, stored one after the other.

    Part k is a view, `rows[offsets[k] : offsets[k + 1]]`. The arrays are shared by all readers: do not write to them.

    Args:
        rows: (n,) int64, all parts, concatenated.
        offsets: (parts + 1,) int64, where each part begins; from 0 to n, never falling.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        assert len(offsets)
        assert offsets[0] == 0
        assert offsets[-1] == len(rows)
        self.rows = rows
        self.offsets = offsets

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> Ragged:
        """Returns the same parts as a `Ragged`; itself if it is one."""
        if isinstance(parts, Ragged):
            return parts
        parts = list(parts)
        rows = np.concatenate([*parts, np.empty(0, dtype=np.int64)]).astype(np.int64, copy=False)
        return cls.of_lengths(rows, np.array([len(part) for part in parts], dtype=np.int64))

    @classmethod
    def of_lengths(cls, rows: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Returns `rows` cut into parts of these lengths, (parts,) integers that sum to the number of rows."""
        return cls(rows, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @classmethod
    def by_owner(cls, owner: np.ndarray, parts: int) -> Ragged:
        """Returns per part the sorted indices of `owner`, (n,) integers in [0, parts), that name it; -1: nobody's."""
        order = np.argsort(owner, kind="stable")
        lengths = np.bincount(owner[owner >= 0], minlength=parts)
        return cls.of_lengths(order[len(order) - lengths.sum() :], lengths)

    @property
    def lengths(self) -> np.ndarray:
        """(parts,) int64."""
        return np.diff(self.offsets)

    @property
    def part_of_row(self) -> np.ndarray:
        """(n,) int64, the part of each of `rows`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def owner(self, count: int) -> np.ndarray:
        """Returns (count,) int64, the part that holds each of the indices 0 .. count - 1; -1: none does."""
        owner = np.full(count, -1)
        owner[self.rows] = self.part_of_row
        return owner

    def where(self, mask: np.ndarray) -> Ragged:
        """Returns as many parts, of the rows under `mask`, (n,) bool."""
        kept = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(self.rows[mask], kept[self.offsets])

    def take(self, parts: np.ndarray) -> Ragged:
        """Returns the parts with these numbers, (m,) integers, in this order."""
        return Ragged.of_lengths(self.rows[self.places(parts)], self.lengths[parts])

    def places(self, parts: np.ndarray) -> np.ndarray:
        """Returns where in `rows` those of some parts are, part by part, int64."""
        lengths = self.lengths[parts]
        before = np.cumsum(lengths) - lengths
        return np.arange(lengths.sum()) + np.repeat(self.offsets[parts] - before, lengths)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Returns (parts,) int64, the sum of each part; values: (n,) integers or bools, one for each of `rows`."""
        # `np.add.reduceat` would give an empty part the value that follows it.
        running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        offsets = self.offsets.tolist()
        return (self.rows[start:stop] for start, stop in pairwise(offsets))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> Ragged: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]  # counts from the end if negative, and raises IndexError, as a list does
        return self.rows[self.offsets[place] : self.offsets[place + 1]]
