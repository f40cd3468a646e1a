"""From columns of texts to tables: training and test rows, numeric and categorical columns.

A column is numeric if all its training cells are numbers or marks for missing ones. It is categorical if few of them
are or look like numbers, or `data.categorical` says so. What lies between is refused: nobody but the owner of the file
knows whether one odd cell is a missing number or a hundred numbers are codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fedlabel.data.sets.cells import LARGEST, Numbers, is_number, looks_like, read_numbers
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.stratified import split_stratified
from fedlabel.data.sets.tables import LoadedTable, Table
from fedlabel.data.sets.text_tables import TextTable, as_list, listed, quoted, summed, unreadable
from fedlabel.names import did_you_mean
from fedlabel.shown import shown

if TYPE_CHECKING:
    from fedlabel.data.sets.config import DataConfig

MAX_CATEGORIES = 1000
"""A categorical column with more is taken for a mistake (names, identifiers), since every category is a feature."""
MAX_ONE_HOT = 2**28
"""So many numbers (1 GiB) may the categories of all columns become."""
MANY = 20
"""More categories than this must have two rows each on average."""
MAX_TEXT = 1000
"""Characters of a cell that is a number or a category."""
SAMPLE = 2000
"""So many cells that are no numbers are looked at to tell what they look like."""


class Rows(NamedTuple):
    """Training or test rows of a file."""

    file: TextTable
    rows: np.ndarray
    """(n,) indices of the rows in the file, in its order."""
    labels: np.ndarray
    """(n,) int64; -1 = none."""

    def cells(self, name: str) -> list[str]:
        """Returns the cells of a column; raises if one is too long for a number or a category."""
        cells = self.file.cells(name, self.rows)
        if max(map(len, cells), default=0) > MAX_TEXT:
            place = next(place for place, cell in enumerate(cells) if len(cell) > MAX_TEXT)
            raise DataError(
                f"{self.place(name, place)}: a text of {len(cells[place])} characters, {quoted(cells[place])}. Neither "
                f"a number nor a category has more than {MAX_TEXT}: leave the column out by "
                f"data.drop_columns={as_list(name)}."
            )
        return cells

    def place(self, name: str, row: int) -> str:
        """Returns how messages name a cell."""
        return f"{self.file.where}: column {shown(name)}, data row {self.rows[row] + 1}"


def split_off_test(
    file: TextTable, labels: np.ndarray, class_names: tuple[str, ...], config: DataConfig, dropped: tuple[str, ...] = ()
) -> LoadedTable:
    """As `as_tables`, with `data.test_fraction` of the labelled rows as test set: drawn once, whatever the seed.

    Every class gives the same share. The order of the rows is kept. Rows without a label are all for training.

    Args:
        file: its columns, but for that of the labels.
        labels: (n,) int64, -1 = none.
        class_names: of the classes.
        config: what to do with the columns.
        dropped: what to leave out if `data.drop_columns` is null.
    """
    labeled = np.flatnonzero(labels >= 0)
    sizes = np.bincount(labels[labeled], minlength=len(class_names))
    count = int(np.ceil(config.test_fraction * len(labeled)))
    reason = ""
    if len(single := np.flatnonzero(sizes < 2)):
        rows = [int(row) + 1 for row in np.flatnonzero(np.isin(labels, single))[:1]]
        there = f"one row (data row {rows[0]})" if rows else "no row"
        reason = f"class {quoted(class_names[single[0]])} has {there}, and a class needs two"
    elif not len(class_names) <= count <= len(labeled) - len(class_names):
        reason = f"of {count} test rows and {len(labeled) - count} training rows every class needs one"
    if reason:
        raise DataError(
            f"{file.where}: no test set of `data.test_fraction` (={config.test_fraction}) can be split off "
            f"{len(labeled)} rows of {len(class_names)} classes: {reason}. Is it the right column of labels? "
            "If so, add rows or delete the class, or give test rows in a file of their own."
        )
    place = np.argsort(np.argsort(class_names))  # the draw goes by the alphabet, however the classes are numbered
    _, test = split_stratified(place[labels[labeled]], config.test_fraction, seed=0)
    test = np.sort(labeled[test])
    train = np.setdiff1d(np.arange(len(labels)), test)
    parts = [Rows(file, rows, labels[rows]) for rows in (train, test)]
    loaded = as_tables(parts[0], parts[1], class_names, config, dropped)
    return loaded._replace(rows=torch.from_numpy(train), file_size=len(labels))


def as_tables(
    train: Rows, test: Rows, class_names: tuple[str, ...], config: DataConfig, dropped: tuple[str, ...] = ()
) -> LoadedTable:
    """Drops columns, decides on their types by the training rows, and reads their cells.

    Args:
        train: the training rows.
        test: the test rows, with the same columns.
        class_names: of the classes.
        config: what to do with the columns.
        dropped: what to leave out if `data.drop_columns` is null.

    Raises:
        DataError: a column that is named does not exist, or a cell is not what it should be.
    """
    left_out = dropped if config.drop_columns is None else config.drop_columns
    check_columns(train.file, config, left_out)
    kept = [name for name in train.file.columns if name not in {*left_out, *config.aside_columns}]
    if not set(train.file.names) - {config.label_column}:
        raise DataError(f"{train.file.where} has no column but that of the labels. At least one is needed.")
    if not kept:
        raise DataError(
            f"`data.drop_columns` (={list(left_out)}) leaves no column of {train.file.where}: keep at least one."
        )
    reading = _Reading(train, test, config)
    for name in kept:
        reading.read(name)
    if not reading.numbers and not reading.categories:
        raise DataError(f"{train.file.where}: no column but that of the labels has a cell filled in the training rows.")
    tables = [reading.table(part, rows) for part, rows in enumerate((train, test))]
    return LoadedTable(tables[0], tables[1], class_names, notes=reading.notes)


def check_columns(file: TextTable, config: DataConfig, left_out: Sequence[str]) -> None:
    """Checks that the columns that the configuration names exist, and are not the label column.

    Raises:
        DataError: see above.
    """
    keys = (
        ("drop_columns", left_out),
        ("categorical", config.categorical or ()),
        ("aside_columns", config.aside_columns),
    )
    for key, names in keys:
        for name in names:
            if name == config.label_column:
                raise DataError(
                    f"`data.{key}`: {name} is the column of labels, which is no feature anyway. Take it out."
                )
            if name not in file.names:
                others = [each for each in file.names if each != config.label_column]
                raise DataError(
                    f"`data.{key}`: {file.where} has no column {shown(name)}, only {listed(others)}."
                    + did_you_mean(name, others)
                )


class _Reading:
    """Reads columns one after the other."""

    def __init__(self, train: Rows, test: Rows, config: DataConfig) -> None:
        self.train, self.test, self.config = train, test, config
        self.marks = frozenset(mark.casefold() for mark in config.missing)
        self.numbers: dict[str, list[np.ndarray]] = {}  # of training and of test rows
        self.categories: dict[str, list[np.ndarray]] = {}
        self.width = 0  # features that categories make
        self.missing: list[str] = []  # what stands for missing numbers
        self.empty: list[str] = []
        self.zeros: list[str] = []
        self.mixed: list[str] = []
        self.test_only: list[str] = []  # categories that only test rows have

    def read(self, name: str) -> None:
        """Decides the type of a column, and reads it."""
        cells, others = self.train.cells(name), self.test.cells(name)
        found = read_numbers(cells, self.marks, self.train.file.decimal)
        numeric = np.isfinite(found.values).any()
        if not numeric and not found.odd and np.isnan(found.values).all():
            self.empty.append(name)
            return
        if name in (self.config.categorical or ()) or (found.odd and self._are_categories(name, cells, found)):
            self._read_categories(name, cells, others)
            return
        tested = read_numbers(others, self.marks, self.test.file.decimal)
        if tested.odd:
            place = next(place for place, cell in enumerate(others) if cell in tested.odd)
            raise DataError(
                f"{self.test.place(name, place)}: {quoted(others[place])} is no number, while all training cells of "
                f"the column are. Correct it; or {self._ways_out(name, others[place])}."
            )
        for rows, read in ((self.train, found), (self.test, tested)):
            if len(large := np.flatnonzero(np.abs(read.values) > LARGEST)):
                raise DataError(
                    f"{rows.place(name, large[0])}: {quoted(rows.cells(name)[large[0]])} is beyond {LARGEST:g}, no "
                    "measurement. Write a number, or leave it empty."
                )
        self.numbers[name] = [found.values, tested.values]
        marks = Counter(found.marks) + Counter(tested.marks)
        if marks:
            self.missing.append(f"{shown(name)} ({', '.join(f'{quoted(m)} {n}' for m, n in marks.most_common(5))})")
        if found.leading_zero:
            self.zeros.append(f"{shown(name)} ({quoted(found.leading_zero)})")

    def _are_categories(self, name: str, cells: list[str], found: Numbers) -> bool:
        """Whether a column in which some cells are neither numbers nor missing is categorical.

        Raises:
            DataError: half of its cells or more are numbers, or look like such.
        """
        plain, odd = int((~np.isnan(found.values)).sum()), sum(cell in found.odd for cell in cells)
        sample = list(islice((cell for cell in cells if cell in found.odd), SAMPLE))
        looks = {cell: looks_like(cell) for cell in set(sample)}
        share = sum(looks[cell] is not None for cell in sample) / len(sample)
        if plain + share * odd < (plain + odd) / 2:
            if plain:
                self.mixed.append(f"{shown(name)} ({plain} numbers, and texts like {quoted(sample[0])})")
            return True
        first = next((cell for cell in sample if looks[cell] is not None), sample[0]) if share >= 0.5 else sample[0]
        place, look = cells.index(first), looks[first]
        what, cure = look or ("which is no number", "Correct it.")
        if self.train.file.decimal == "comma" and is_number(first):
            what, cure = "a number with a decimal point", "With data.decimal=comma write decimals behind a comma."
        among = f", while {plain} of its {len(cells)} training cells are numbers" if plain else ""
        raise DataError(
            f"{self.train.place(name, place)}: {quoted(first)}, {what}{among}. {cure} Or "
            f"{self._ways_out(name, first if look is None else None)}."
        )

    def _ways_out(self, name: str, cell: str | None) -> str:
        categorical = as_list(*(self.config.categorical or ()), name)
        dropped = as_list(*(self.config.drop_columns or ()), name)
        ways = (
            f"set data.categorical={categorical} if these are categories, data.drop_columns={dropped} to leave them out"
        )
        if cell is None or shown(cell) != cell:  # what is cut cannot be copied
            return ways
        return f"set data.missing={as_list(*self.config.missing, cell)} if it means a missing value; or {ways}"

    def _read_categories(self, name: str, cells: list[str], others: list[str]) -> None:
        counts = Counter(cells)
        head = f"{self.train.file.where}: column {shown(name)} has {len(counts)} categories"
        drop = f"data.drop_columns={as_list(*(self.config.drop_columns or ()), name)}"
        if len(counts) > MAX_CATEGORIES:
            raise DataError(
                f"{head}, more than {MAX_CATEGORIES}. Leave it out by {drop}, or see why not all its cells are numbers."
            )
        for part, texts in ((self.train, cells), (self.test, others)):
            if (found := unreadable(set(texts))) is not None:
                raise DataError(
                    f"{part.place(name, texts.index(found))}: {quoted(found)} holds characters that no text has. Is "
                    f"the file damaged? Correct it, or leave the column out by {drop}."
                )
        asked = name in (self.config.categorical or ())
        if not asked and len(counts) > MANY and len(counts) > len(cells) / 2:
            raise DataError(
                f"{head} in {len(cells)} training rows, such as {quoted(next(iter(counts)))}: names, identifiers or "
                f"free text? Leave it out by {drop}, or set data.categorical="
                f"{as_list(*(self.config.categorical or ()), name)} if they are categories."
            )
        self.width += len(counts)
        if self.width * len(cells) > MAX_ONE_HOT:
            raise DataError(
                f"{head}: with those of the columns before it they would become {self.width} features of {len(cells)} "
                f"rows, more than {MAX_ONE_HOT:,} numbers. Leave columns with many categories out by {drop}."
            )
        if new := set(others) - set(counts):
            rows = sum(cell in new for cell in others)
            self.test_only.append(f"{shown(name)} ({rows} rows, such as {quoted(min(new))})")
        self.categories[name] = [np.array(part, dtype=object) for part in (cells, others)]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the columns, a sentence per kind."""
        kinds = (
            (self.missing, "missing numbers are marked in the columns"),
            (self.empty, "left out, since no training row has a cell filled"),
            (self.zeros, "read as numbers, though some begin with 0 (codes? then name them in data.categorical)"),
            (self.mixed, "read as categories, though some cells are numbers"),
            (
                self.test_only,
                "test rows have categories that no training row has, which are no feature, in the columns",
            ),
        )
        return tuple(f"{self.train.file.where}: {what}: {summed(columns)}." for columns, what in kinds if columns)

    def table(self, part: int, rows: Rows) -> Table:
        """Returns the table of the training rows (0) or of the test rows (1)."""
        numbers = np.empty((len(rows.rows), len(self.numbers)))
        for place, read in enumerate(self.numbers.values()):
            numbers[:, place] = read[part]
        categories = np.empty((len(rows.rows), len(self.categories)), dtype=object)
        for place, texts in enumerate(self.categories.values()):
            categories[:, place] = texts[part]
        return Table(
            numbers=numbers,
            categories=categories,
            labels=torch.from_numpy(rows.labels),
            names=(*self.numbers, *self.categories),
            aside={
                name: np.array(rows.cells(name), dtype=object)
                for name in self.config.aside_columns
                if name in rows.file.columns
            },
        )
