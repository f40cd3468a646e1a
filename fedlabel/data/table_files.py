"""Files of tables: UCI's as they are distributed, and CSV or Parquet files of the user's, as columns of texts."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlabel.data.loaders import DataError, data_root
from fedlabel.data.tables import Columns, LoadedTable, as_tables, split_off_test

if TYPE_CHECKING:
    from fedlabel.data.datasets import DataConfig

UCI = "https://archive.ics.uci.edu/dataset"


def load_breast_cancer(config: DataConfig) -> LoadedTable:
    """Breast Cancer Wisconsin (diagnostic) of scikit-learn: 30 measurements of 569 tumours."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    columns = {str(name): column.astype(str) for name, column in zip(found.feature_names, found.data.T, strict=True)}
    names = ("malignant", "benign")
    return split_off_test(columns, np.array(names)[found.target], names, config, "breast_cancer")


ADULT = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)


def load_adult(config: DataConfig) -> LoadedTable:
    """Adult (census income of 1994, UCI 2) with its own test set; `?` is a category like any other.

    All 14 columns are kept: also `fnlwgt`, a weight of the survey, and `education-num`, which says the same as
    `education`; see `data.drop_columns`.
    """
    columns, labels = [], []
    for name in ("adult.data", "adult.test"):
        path = _find_uci(config, "adult", name, 2)
        read = _read_csv(path, ",", ADULT)
        labels.append(np.char.rstrip(read.pop("income"), "."))  # labels of the test set end in a dot
        columns.append(read)
    return as_tables(columns[0], labels[0], columns[1], labels[1], ("<=50K", ">50K"), config, "adult")


def load_bank_marketing(config: DataConfig) -> LoadedTable:
    """Bank Marketing (UCI 222), the full set of 2012; all of `bank-full.csv`, of which a test set is split off.

    `duration` is left out unless `data.drop_columns` says otherwise: how long the call took is known only when its
    outcome, the label, is known, too.
    """
    path = _find_uci(config, "bank-marketing", "bank-full.csv", 222)
    columns = _read_csv(path, ";")
    if "y" not in columns:
        raise DataError(f"{path} has no column y, only {', '.join(columns)}. Delete it and copy it again.")
    return split_off_test(columns, columns.pop("y"), ("no", "yes"), config, str(path), ("duration",))


MAGIC = (
    *("fLength", "fWidth", "fSize", "fConc", "fConc1", "fAsym", "fM3Long", "fM3Trans", "fAlpha", "fDist", "class"),
)


def load_magic(config: DataConfig) -> LoadedTable:
    """MAGIC Gamma Telescope (UCI 159), of which a test set is split off; h: hadron (background), g: gamma (signal)."""
    path = _find_uci(config, "magic", "magic04.data", 159)
    columns = _read_csv(path, ",", MAGIC)
    return split_off_test(columns, columns.pop("class"), ("h", "g"), config, str(path))


def load_table(config: DataConfig) -> LoadedTable:
    """A CSV (packed or not) or Parquet file of the user's, and a second one as test set, or a share of the first.

    CSV: UTF-8, names of the columns in the first line, separated by commas, semicolons or tabs, whichever the first
    line has most of. Parquet (a name that ends in .parquet) is read by pyarrow, which must be installed.
    """
    path = data_root(config)
    column = config.label_column
    assert column is not None
    paths = [path] if config.test_file is None else [path, path.parent / config.test_file]
    tables = [_read_file(config, each) for each in paths]
    for each, table in zip(paths, tables, strict=True):
        if column not in table:
            raise DataError(
                f"`data.label_column` (={column}): {each} has no such column, only {', '.join(table)}. If these are "
                "not the names of its columns: they must stand in the first line."
            )
    labels = [table.pop(column) for table in tables]
    for each, values in zip(paths, labels, strict=True):
        missing = np.flatnonzero(np.isin(np.char.lower(values), ("", "nan")))
        if len(missing):
            raise DataError(
                f"{each}: column {column} has no label in data row {missing[0] + 1}. Every row needs one: delete the "
                "row, or write what label it has."
            )
    names = _class_names(labels[0])
    if len(tables) == 1:
        return split_off_test(tables[0], labels[0], names, config, str(path))
    train, test = tables
    if odd := sorted(set(train) ^ set(test)):
        raise DataError(f"{paths[1]} and {path} must have the same columns; only one of them has {', '.join(odd)}.")
    return as_tables(train, labels[0], {name: test[name] for name in train}, labels[1], names, config, str(path))


def _class_names(labels: np.ndarray) -> tuple[str, ...]:
    """Returns the different labels, in the order of numbers if all are numbers and else of the alphabet."""
    names = [str(name) for name in np.unique(labels)]
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(names)


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


def _read_file(config: DataConfig, path: Path) -> Columns:
    if not path.is_file():
        key, value = ("root", config.root) if path == data_root(config) else ("test_file", config.test_file)
        raise DataError(
            f"`data.{key}` (={value}): there is no file {path}. Set data.root=<file.csv, file.csv.gz or file.parquet>, "
            "and data.test_file=<name of a file beside it>, if there is one."
        )
    return _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)


def _read_csv(path: Path, delimiter: str | None = None, names: Sequence[str] | None = None) -> Columns:
    """Returns the columns of a CSV file, without blanks around cells.

    Args:
        path: the file, packed by gzip or not.
        delimiter: between cells; None: see `load_table`.
        names: of the columns; None: they stand in the first line.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        # Adult's test set begins with a remark after a bar.
        lines = io.StringIO(text.partition("\n")[2] if names and text.startswith("|") else text, newline="")
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count) if delimiter is None else delimiter
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}. Write it again, as UTF-8.") from error
    if names is None and rows:
        names, rows = [name.strip() for name in rows[0][1]], rows[1:]
    if not names or not rows:
        raise DataError(f"{path} holds no rows. At least one is needed, below the names of the columns.")
    return _checked_columns(path, names, rows)


def _checked_columns(path: Path, names: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> Columns:
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"{path} has two columns of the name `{twice}`. Rename one of them.")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: there are {len(row)} cells, but {len(names)} columns.")
    cells = zip(*(row for _, row in rows), strict=True)
    return {name: np.char.strip(np.array(column, dtype=str)) for name, column in zip(names, cells, strict=True)}


def _read_parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"`data.root` (={path}): Parquet files are read by pyarrow, which is not installed. Install it "
            "(pip install pyarrow), or write the table as CSV."
        ) from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error} Write it again.") from error
    return _text_columns(path, {name: table[name].to_pylist() for name in table.column_names})


def _text_columns(path: Path, columns: dict[str, list[object]]) -> Columns:
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path} holds no rows. At least one is needed.")
    return {
        name: np.array(["" if cell is None else str(cell) for cell in column], dtype=str)
        for name, column in columns.items()
    }
