"""Tables: UCI's as they are distributed, and users' CSV or Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlabel.data.sets.config import DataError, data_root
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.parquet_files import read_parquet
from fedlabel.data.sets.table_columns import Rows, as_tables, check_columns, split_off_test
from fedlabel.data.sets.table_labels import LabelColumn
from fedlabel.data.sets.table_notes import column_notes
from fedlabel.data.sets.tables import LoadedTable
from fedlabel.data.sets.text_tables import TextTable, listed
from fedlabel.names import did_you_mean

if TYPE_CHECKING:
    from fedlabel.data.sets.config import DataConfig

UCI = "https://archive.ics.uci.edu/dataset"


def load_breast_cancer(config: DataConfig) -> LoadedTable:
    """Breast Cancer Wisconsin (diagnostic) of scikit-learn: 30 measurements of 569 tumours."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    columns = {str(name): list(map(str, cells)) for name, cells in zip(found.feature_names, found.data.T, strict=True)}
    file = TextTable("breast_cancer", tuple(columns), columns)
    return split_off_test(file, found.target.astype(np.int64), ("malignant", "benign"), config)


ADULT = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)


def load_adult(config: DataConfig) -> LoadedTable:
    """Adult (census income of 1994, UCI 2) with its own test set; `?` is a category like any other.

    All 14 columns are kept: also `fnlwgt`, a weight of the survey, and `education-num`, which says the same as
    `education`; see `data.drop_columns`.
    """
    names, parts = ("<=50K", ">50K"), []
    for name in ("adult.data", "adult.test"):
        file = read_csv(_find_uci(config, "adult", name, 2), ",", ADULT)
        cells = [cell.rstrip(".") for cell in file.columns.pop("income")]  # labels of the test set end in a dot
        labels = LabelColumn("income", frozenset()).numbers(file.where, cells, names)
        parts.append(Rows(file, np.arange(len(labels)), labels))
    return as_tables(parts[0], parts[1], names, config)


def load_bank_marketing(config: DataConfig) -> LoadedTable:
    """Bank Marketing (UCI 222), the full set of 2012: all of `bank-full.csv`, from which a test set is split off.

    `duration` is left out unless `data.drop_columns` says otherwise: how long the call took is known only when its
    outcome, the label, is known, too.
    """
    path = _find_uci(config, "bank-marketing", "bank-full.csv", 222)
    file = read_csv(path, ";")
    if "y" not in file.columns:
        raise DataError(f"{path} has no column y, only {listed(file.names)}. Delete it and copy it again.")
    return _split_off_test(file, "y", ("no", "yes"), config, ("duration",))


MAGIC = (
    *("fLength", "fWidth", "fSize", "fConc", "fConc1", "fAsym", "fM3Long", "fM3Trans", "fAlpha", "fDist", "class"),
)


def load_magic(config: DataConfig) -> LoadedTable:
    """MAGIC Gamma Telescope (UCI 159), from which a test set is split off; h: hadron (background), g: gamma
    (signal).
    """
    path = _find_uci(config, "magic", "magic04.data", 159)
    return _split_off_test(read_csv(path, ",", MAGIC), "class", ("h", "g"), config)


def _split_off_test(
    file: TextTable, column: str, names: tuple[str, ...], config: DataConfig, dropped: tuple[str, ...] = ()
) -> LoadedTable:
    labels = LabelColumn(column, frozenset()).numbers(file.where, file.columns.pop(column), names)
    return split_off_test(file, labels, names, config, dropped)


def load_table(config: DataConfig) -> LoadedTable:
    """A user's CSV (compressed or not) or Parquet file, and a second one, or a share of the first, as test set.

    CSV: see `read_csv`. Parquet (a name that ends in .parquet) is read by pyarrow, which must be installed. Training
    rows may lack a label; with a test set of its own even all of them may, and then the column, too.
    """
    path = data_root(config)
    column = config.label_column
    assert column is not None
    paths = [path] if config.test_file is None else [path, path.parent / config.test_file]
    files = [_read_file(config, each) for each in paths]
    for file in files:
        if column not in file.names and (len(files) == 1 or column not in files[1].names):
            raise DataError(
                f"`data.label_column` (={column}): {file.where} has no such column, only {listed(file.names)}."
                f"{did_you_mean(column, file.names)} If these are not the names of its columns: they must stand in the "
                "first line, separated by commas, semicolons, tabs or bars."
            )
    labels = LabelColumn(column, frozenset(mark.casefold() for mark in config.missing))
    cells = [file.columns.pop(column, [""] * len(file)) for file in files]
    names, train, notes = labels.read(files[0].where, cells[0])
    tests = []
    if len(files) == 2:
        if not names:
            names, test, _ = labels.read(files[1].where, cells[1])
        else:
            test = labels.numbers(files[1].where, cells[1], names)
        if len(absent := np.flatnonzero(test < 0)):
            more = f" (of {len(absent)} without)" if len(absent) > 1 else ""
            raise DataError(
                f"{files[1].where}: column {column} has no label in data row {absent[0] + 1}{more}. Every test row "
                "needs one: write it, or delete the row."
            )
        tests = [Rows(files[1], np.arange(len(test)), test)]
    if not names:
        raise DataError(
            f"{files[0].where}: column {column} has no label in any row. Write some, or name another data.label_column."
        )
    if column in names:
        raise DataError(
            f"`data.label_column` (={column}): {column} is also a label in {files[0].where}. The first line must hold "
            "the names of the columns, not data."
        )
    if not tests:
        loaded = split_off_test(files[0], train, names, config)
    else:
        check_columns(files[0], config, config.drop_columns or ())
        if odd := sorted((set(files[0].columns) ^ set(files[1].columns)) - set(config.aside_columns)):
            raise DataError(
                f"{files[1].where} and {files[0].where} must have the same columns; only one of them has {listed(odd)}."
            )
        loaded = as_tables(Rows(files[0], np.arange(len(train)), train), tests[0], names, config)
    own_notes = (*(note for file in files for note in file.notes), *notes, *loaded.notes)
    return loaded._replace(notes=(*own_notes, *column_notes(files[0].where, loaded.train, files[0].names)))


def _find_uci(config: DataConfig, folder: str, name: str, number: int) -> Path:
    """Returns `name` (or the same with .gz) in `tabular/<folder>`, `<folder>` or `data.root` itself."""
    root = data_root(config)
    places = [root / "tabular" / folder, root / folder, root]
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(
        f"`data.name` (={config.name}): there is no {name} or {name}.gz in {', '.join(map(str, places))}. Get it from "
        f"{UCI}/{number} and unpack it there, or set data.root=<folder that has it>. Tables are not downloaded."
    )


def _read_file(config: DataConfig, path: Path) -> TextTable:
    if not path.is_file():
        key, value = ("root", config.root) if path == data_root(config) else ("test_file", config.test_file)
        raise DataError(
            f"`data.{key}` (={value}): there is no file {path}. Set data.root=<file.csv, file.csv.gz or file.parquet>, "
            "and data.test_file=<name of a file beside it>, if there is one."
        )
    skipped = set(config.drop_columns or ()) - {config.label_column, *config.aside_columns}
    if path.suffix.lower() in (".parquet", ".pq"):
        return read_parquet(path, skipped)
    return read_csv(path, label_column=config.label_column, skipped=skipped, decimal=config.decimal)
