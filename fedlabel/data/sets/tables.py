"""Tables: from columns of texts to float32 features, standardised with the training samples.

A row becomes an "image" of one pixel and as many channels as it has features, (features, 1, 1), so that everything
that handles images handles it. What is learnt from data (types of columns, medians, means, categories) is learnt from
training samples alone: never from the test set, and but for types not from the validation set either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.loaders import Split


@dataclass(frozen=True, eq=False)
class Table:
    """Rows before conversion to features."""

    numbers: np.ndarray
    """(n, numeric columns) float64; NaN = missing."""
    categories: np.ndarray
    """(n, categorical columns) texts; objects, not of a fixed width."""
    labels: Tensor
    """(n,) int64."""
    names: tuple[str, ...] = ()
    """Names of the numeric columns, then of the categorical ones."""
    aside: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> (n,) texts of a column that is not a feature (`data.aside_columns`)."""

    def rows(self, index: Tensor) -> Table:
        """Returns the rows `index`."""
        rows = index.numpy()
        aside = {name: texts[rows] for name, texts in self.aside.items()}
        return Table(self.numbers[rows], self.categories[rows], self.labels[index], self.names, aside)

    def column(self, name: str) -> np.ndarray:
        """Returns a column, (n,): numbers, or the texts of a categorical column or of one of `data.aside_columns`."""
        if name in self.aside:
            return self.aside[name]
        place, numeric = self.names.index(name), self.numbers.shape[1]
        column: np.ndarray = self.numbers[:, place] if place < numeric else self.categories[:, place - numeric]
        return column

    def row(self, place: int) -> dict[str, float | str]:
        """Returns a row's cells by column, numbers as they are in the file."""
        cells = [*self.numbers[place].tolist(), *self.categories[place].tolist()]
        return dict(zip(self.names, cells, strict=True))


class LoadedTable(NamedTuple):
    """The result of a loader of tables."""

    train: Table
    test: Table
    class_names: tuple[str, ...]
    rows: Tensor | None = None
    """(n,) int64, rows of the file in `train`; None: all of them, in order."""
    file_size: int | None = None
    """Number of rows in the file; None: as many as `train`."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data were read, a sentence each."""


class FittedColumns(NamedTuple):
    """What `encode` learns of training rows."""

    missing: np.ndarray
    """(numeric columns,) float64, what stands for a missing number."""
    mean: np.ndarray
    """(numeric columns,) float64."""
    std: np.ndarray
    """(numeric columns,) float64; 1 of a constant column."""
    categories: tuple[tuple[str, ...], ...]
    """Of each categorical column, sorted."""


def fitted_columns(train: Table) -> FittedColumns:
    """Returns what `encode` learns of these rows, at least one."""
    parts, none = {kind: encoder for encoder, kind in _fitted(train)}, np.zeros(0)
    found = tuple(tuple(texts.tolist()) for texts in parts["categories"].categories_) if "categories" in parts else ()
    if "numbers" not in parts:
        return FittedColumns(none, none, none, found)
    imputer, scaler = parts["numbers"]
    return FittedColumns(imputer.statistics_, scaler.mean_, scaler.scale_, found)


def _fitted(train: Table) -> list[tuple[Any, str]]:
    """Returns the encoders of numeric columns and of categorical ones, where there are such, with their names."""
    # Imported here: scikit-learn takes a second to import, and only tables need it.
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    categories = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    parts = [part for part in ((numbers, "numbers"), (categories, "categories")) if getattr(train, part[1]).shape[1]]
    for encoder, kind in parts:
        encoder.fit(getattr(train, kind))
    return parts


def encode(train: Table, others: Sequence[Table]) -> list[Split]:
    """Converts rows to features, with the statistics and categories of `train`.

    Numbers: missing ones become the median, then all are shifted and scaled to mean 0 and variance 1 (a constant
    column is all 0). Categories: a feature each, 1 where the cell has it and else 0; a cell with a category that
    `train` lacks is 0 in all of them.

    Args:
        train: what is fitted, at least one row.
        others: what is only transformed; may be empty tables.

    Returns:
        `train` and the others with images (n, features, 1, 1) float32, numeric columns first.
    """
    parts = _fitted(train)

    def features(table: Table) -> Split:
        if not len(table.labels):
            width = sum(encoder.transform(getattr(train, kind)[:1]).shape[1] for encoder, kind in parts)
            return Split(torch.zeros(0, width, 1, 1), table.labels)
        with np.errstate(over="ignore"):
            made = [encoder.transform(getattr(table, kind)).astype(np.float32) for encoder, kind in parts]
        beyond = np.flatnonzero(~np.isfinite(made[0]).all(0))  # categories are 0 and 1
        if len(beyond):
            raise DataError(
                f"Column {table.names[beyond[0]]} holds a number too far from those of the training rows for features "
                "of single precision. Correct it, or leave the column out by data.drop_columns."
            )
        return Split(torch.from_numpy(np.concatenate(made, 1))[:, :, None, None], table.labels)

    return [features(table) for table in (train, *others)]
