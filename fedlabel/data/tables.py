"""Tables: from columns of texts to float32 features, standardised by what the training samples say.

A row becomes an "image" of one pixel and as many channels as it has features, (features, 1, 1), so that everything
that handles images handles it. A column is numeric if all its training cells are numbers (or missing), and categorical
otherwise, unless `data.categorical` says. What is learnt from data (types of columns, medians, means, categories) is
learnt from training samples alone: never from the test set, and but for types not from the validation set either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.loaders import DataError, Split

if TYPE_CHECKING:
    from fedlabel.data.datasets import DataConfig

MISSING = ("", "na", "nan", "null", "none", "?")
"""Cells (in lower case) that mean: not known. In a categorical column each of them is a category like any other."""
MAX_CATEGORIES = 1000
"""A categorical column with more is taken for a mistake (names, identifiers), since every category is a feature."""

Columns = dict[str, np.ndarray]
"""Name -> (n,) texts of the cells, in the file's order of columns."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows before they are features."""

    numbers: np.ndarray
    """(n, numeric columns) float64; NaN = missing."""
    categories: np.ndarray
    """(n, categorical columns) texts."""
    labels: Tensor
    """(n,) int64."""
    names: tuple[str, ...] = ()
    """Of the numeric columns, then of the categorical ones."""
    aside: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> (n,) texts of a column that is no feature (`data.aside_columns`)."""

    def rows(self, index: Tensor) -> Table:
        """Returns the rows `index`."""
        rows = index.numpy()
        aside = {name: texts[rows] for name, texts in self.aside.items()}
        return Table(self.numbers[rows], self.categories[rows], self.labels[index], self.names, aside)

    def column(self, name: str) -> np.ndarray:
        """Returns a column, (n,): numbers, or the texts of a categorical one or of one set aside."""
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
    """What a loader of tables returns."""

    train: Table
    test: Table
    class_names: tuple[str, ...]
    rows: Tensor | None = None
    """(n,) int64, which rows of the file `train` has; None: all of it, in its order."""
    file_size: int | None = None
    """How many rows the file has; None: as many as `train`."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the data were read, a sentence each."""


def encode(train: Table, others: Sequence[Table]) -> list[Split]:
    """Makes features of rows, by what `train` says.

    Numbers: missing ones become the median, then all are shifted and scaled to mean 0 and variance 1 (a constant
    column is all 0). Categories: a feature each, 1 where the cell has it and else 0; a cell with a category that
    `train` lacks is 0 in all of them.

    Args:
        train: what is fitted, at least one row.
        others: what is only transformed; may be empty tables.

    Returns:
        `train` and the others with images (n, features, 1, 1) float32, numeric columns first.
    """
    # Imported here: scikit-learn takes a second to import, and only tables need it.
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    categories = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    parts = [part for part in ((numbers, "numbers"), (categories, "categories")) if getattr(train, part[1]).shape[1]]
    for encoder, kind in parts:
        encoder.fit(getattr(train, kind))

    def features(table: Table) -> Split:
        if not len(table.labels):
            width = sum(encoder.transform(getattr(train, kind)[:1]).shape[1] for encoder, kind in parts)
            return Split(torch.zeros(0, width, 1, 1), table.labels)
        made = [encoder.transform(getattr(table, kind)).astype(np.float32) for encoder, kind in parts]
        return Split(torch.from_numpy(np.concatenate(made, 1))[:, :, None, None], table.labels)

    return [features(table) for table in (train, *others)]


def split_off_test(
    columns: Columns,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    config: DataConfig,
    where: str,
    dropped: tuple[str, ...] = (),
) -> LoadedTable:
    """As `as_tables`, with `data.test_fraction` of the rows as test set: drawn once and for all, whatever the seed.

    Every class gives the same share. The order of the rows is kept.
    """
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(
            np.arange(len(labels)), test_size=config.test_fraction, random_state=0, stratify=labels
        )
    except ValueError as error:  # too few rows of a class, or of all
        raise DataError(
            f"{where}: no test set of `data.test_fraction` (={config.test_fraction}) can be split off {len(labels)} "
            f"rows of {len(set(labels.tolist()))} classes ({error}). Is it the right column of labels?"
        ) from error
    train, test = (np.sort(part) for part in parts)
    split = [({name: column[rows] for name, column in columns.items()}, labels[rows]) for rows in (train, test)]
    loaded = as_tables(*split[0], *split[1], class_names, config, where, dropped)
    return loaded._replace(rows=torch.from_numpy(train), file_size=len(labels))


def as_tables(
    train: Columns,
    train_labels: np.ndarray,
    test: Columns,
    test_labels: np.ndarray,
    class_names: tuple[str, ...],
    config: DataConfig,
    where: str,
    dropped: tuple[str, ...] = (),
) -> LoadedTable:
    """Drops columns, decides on their types by the training rows, and reads numbers and labels."""
    left_out = dropped if config.drop_columns is None else config.drop_columns
    aside = config.aside_columns
    for key, names in (("drop_columns", left_out), ("categorical", config.categorical or ()), ("aside_columns", aside)):
        unknown = [name for name in names if name not in train]
        if unknown:
            raise DataError(f"`data.{key}`: {where} has no column {unknown[0]}, only {', '.join(train)}.")
    kept = [name for name in train if name not in left_out and name not in aside]
    if not kept:
        raise DataError(f"`data.drop_columns` (={list(left_out)}) leaves no column of {where}: keep at least one.")
    if config.categorical is None:
        categorical = [name for name in kept if _numbers(train[name]) is None]
    else:
        categorical = [name for name in kept if name in config.categorical]
    for name in categorical:
        count = len(np.unique(train[name]))
        if count > MAX_CATEGORIES:
            raise DataError(
                f"{where}: column {name} has {count} categories, more than {MAX_CATEGORIES}. Leave it out by "
                f"data.drop_columns=[{name}], or see why not all its cells are numbers."
            )

    def table(columns: Columns, labels: np.ndarray, part: str) -> Table:
        numbers = [_checked_numbers(columns[name], name, where, part) for name in kept if name not in categorical]
        texts = [columns[name] for name in categorical]
        empty = np.empty((len(labels), 0))
        return Table(
            numbers=np.stack(numbers, 1) if numbers else empty,
            categories=np.stack(texts, 1) if texts else empty.astype(str),
            labels=_label_numbers(labels, class_names, where, part),
            names=(*(name for name in kept if name not in categorical), *categorical),
            aside={name: columns[name] for name in aside},
        )

    return LoadedTable(table(train, train_labels, "training"), table(test, test_labels, "test"), class_names)


def _label_numbers(labels: np.ndarray, class_names: tuple[str, ...], where: str, part: str) -> Tensor:
    place = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(set(labels.tolist()) - set(class_names))
    if unknown:
        raise DataError(
            f"{where}: the {part} rows have the label `{unknown[0]}`, which is none of {', '.join(class_names)}."
        )
    return torch.tensor([place[label] for label in labels.tolist()], dtype=torch.int64)


def _numbers(cells: np.ndarray) -> np.ndarray | None:
    """Returns (n,) float64, NaN where missing; None if a cell is no number, or none is one."""
    missing = np.isin(np.char.lower(cells), MISSING)
    if missing.all():
        return None
    try:
        return np.where(missing, "nan", cells).astype(np.float64)
    except ValueError:
        return None


def _checked_numbers(cells: np.ndarray, name: str, where: str, part: str) -> np.ndarray:
    """As `_numbers`, of a column that must hold nothing else; it may be all missing."""
    values = np.full(len(cells), np.nan) if np.isin(np.char.lower(cells), MISSING).all() else _numbers(cells)
    if values is None:
        wrong = next(cell for cell in cells if _numbers(np.array([cell, "0"])) is None)
        raise DataError(
            f"{where}: column {name} is numeric, but `{wrong}` of its {part} rows is no number. Correct it, or name "
            "the column in data.categorical."
        )
    if np.isinf(values).any():
        raise DataError(f"{where}: column {name} holds infinity in its {part} rows. Write a number, or leave it empty.")
    return values
