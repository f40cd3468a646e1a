"""Sums at repeated indices, in the same order on every device."""

from __future__ import annotations

from torch import Tensor


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
