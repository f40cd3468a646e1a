"""Notes on the columns of a table: columns that reveal the label, are constant, or identify rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedlabel.data.sets.cells import is_number
from fedlabel.data.sets.tables import Table
from fedlabel.data.sets.text_tables import as_list, listed, summed
from fedlabel.shown import shown

FAR = 5
"""A number is far from the others if the gap is so many times their range."""
SENTINELS = frozenset((-1, -8, -88, -888, *(sign * (10**digits - 1) for digits in range(1, 7) for sign in (1, -1))))
"""Numbers that are often written for missing ones, told apart if the gap is as wide as the range of the others."""


def column_notes(where: str, train: Table, names: Sequence[str]) -> Iterator[str]:
    """Yields sentences about the columns of a table.

    Args:
        where: what to call the file.
        train: its training rows.
        names: of all the columns of the file.
    """
    if data := [name for name in names if is_number(name) and not name.isdigit()]:
        yield (
            f"{where}: is its first line one of data? It is taken for the names of the columns, such as "
            f"{listed(data, 5)}."
        )
    constant, telling, counting, far = [], [], [], []
    labels = train.labels.numpy()
    for name in train.names:
        column = train.column(name)
        numeric = column.dtype != object
        values = np.unique(column[~np.isnan(column)]) if numeric else np.array(sorted(set(column.tolist())), object)
        whole = not numeric or not np.isnan(column).any()
        if len(values) == 1 and whole:
            constant.append(name)
        elif 5 * len(values) <= len(column) and _tells(column, values, labels):
            telling.append(name)
        if numeric and _counts(values, len(column)):
            counting.append(name)
        elif numeric and (found := _far(values, column)) is not None:
            far.append((name, found))
    if constant:
        yield f"{where}: the same in all training rows, and so of no use: {listed(constant)}."
    if telling:
        yield (
            f"{where}: each value stands with one label only, so that the column tells the label: {listed(telling)}. "
            f"If it is not known before the label is, set data.drop_columns={as_list(*telling[:5])}."
        )
    if counting:
        yield (
            f"{where}: counts the rows, and is read as a number: {listed(counting)}. If it is an identifier, set "
            f"data.drop_columns={as_list(*counting[:5])}."
        )
    if far:
        parts = [f"{shown(name)} ({value:g}, {count} of them)" for name, (value, count) in far]
        yield (
            f"{where}: far from all other numbers of the column: {summed(parts)}. If it stands for a missing one, set "
            f"data.missing={as_list(f'{far[0][1][0]:g}')}; if it is damage, correct it."
        )


def _tells(column: np.ndarray, values: np.ndarray, labels: np.ndarray) -> bool:
    """Whether every value occurs with one label only, though it occurs in five labelled rows on average."""
    known = labels >= 0
    column, labels = column[known], labels[known]
    if len(np.unique(labels)) < 2:
        return False
    if column.dtype == object:
        place = {value: number for number, value in enumerate(values.tolist())}
        codes = np.fromiter(map(place.__getitem__, column.tolist()), np.int64, len(column))
    else:
        codes = np.searchsorted(values, column)  # missing ones come last
    count = len(np.unique(codes))
    pairs = np.unique(codes * (labels.max() + 1) + labels)
    return len(pairs) == count and 5 * count <= len(codes)


def _counts(values: np.ndarray, rows: int) -> bool:
    """Whether a column numbers the rows of the file, test rows included."""
    if len(values) < max(rows, 20) or not (values % 1 == 0).all():
        return False
    return bool(values[-1] - values[0] < 2 * rows)


def _far(values: np.ndarray, column: np.ndarray) -> tuple[float, int] | None:
    """Returns the smallest or largest number and its frequency, if it is far from all others."""
    if len(values) < 5:
        return None
    for value, near, other in ((values[0], values[1], values[-1]), (values[-1], values[-2], values[0])):
        gap, spread, count = abs(value - near), abs(other - near), int((column == value).sum())
        if gap > FAR * spread or (value in SENTINELS and count > 1 and gap > spread):
            return float(value), count
    return None
