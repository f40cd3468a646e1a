"""Sums at repeated indices, in the same order on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def add_at(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Adds `values` to the rows `index` of `total`, in place, and returns it.

    As `index_add_`, which on a GPU adds in the order in which threads arrive: the same seed would give other last bits.

    Args:
        total: (rows, ...).
        index: (n,) int64, rows, which may repeat.
        values: (n, ...).
    """
    if not total.is_cuda:
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)  # sorts the places, then adds


class IndexedSums:
    """`add_at` for one index and many values: on a GPU the index is sorted once, and not in every call.

    Values are added one after the other, in the order of the index, on every device.

    Args:
        index: (n,) int64, rows, which may repeat.
        rows: number of rows.
        sort: whether to sort the index; None: on a GPU. On a CPU adding in place is several times faster.
    """

    def __init__(self, index: Tensor, rows: int, sort: bool | None = None) -> None:
        self._index = index
        self._sort = (index.is_cuda if sort is None else sort) and len(index) > 0
        if self._sort:
            self._order = index.argsort(stable=True)
            self._ends = pad(torch.bincount(index, minlength=rows).cumsum(0), (1, 0))

    def add_to(self, total: Tensor, values: Tensor) -> Tensor:
        """Adds `values` (n, ...) to the rows of `total` (rows, ...), in place, and returns it."""
        if not self._sort:
            return total.index_add_(0, self._index, values)
        # A second dimension chooses the kernel that has one thread, and so one order, per sum.
        sorted_values = values[self._order].view(len(values), -1)
        sums = torch.segment_reduce(sorted_values, "sum", offsets=self._ends, initial=0.0, unsafe=True)
        return total.add_(sums.view_as(total))
