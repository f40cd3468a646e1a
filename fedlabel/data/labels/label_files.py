"""Label files: labels of annotators or of another labeller, stored separately from the data set.

A file is an archive of numpy's (.npz) with arrays, or one array of it (.npy), or a CSV (.csv, .tsv, .txt, packed or
not) or Parquet file with columns. Each array (n,), each column of an array (n, annotators) and each column of a table
has one label per sample, in the order of the data set's training samples; what a label means is said by `class_names`.
"""

from __future__ import annotations

import sys
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedlabel.data.sets.class_names import NO_CLASS, ClassNames
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.datasets import Dataset
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.npz_files import read_npz
from fedlabel.data.sets.parquet_files import read_parquet
from fedlabel.shown import shown_repr

PICKLED = (".pt", ".pth", ".pkl", ".pickle")
CSV = (".csv", ".tsv", ".txt", ".gz")
PARQUET = (".parquet", ".pq")

Column = np.ndarray | list[str]
"""(n,) labels; of a table as a list of texts, since an array of them would be as wide as the longest."""


def read_label_file(path: Path, keys: Sequence[str], dataset: Dataset) -> np.ndarray:
    """Returns the labels of the training split, (n, annotators) int64, -1 = none.

    Args:
        path: the file.
        keys: which arrays or columns of it; none: all of them.
        dataset: says which samples the training split has, and what the classes are.

    Raises:
        DataError: the file is missing or damaged, has no such array, or one of another length or of other classes.
    """
    arrays = _read(path, keys)
    classes = ClassNames(dataset.class_names)
    columns = {
        what: column for key, array in arrays.items() for what, column in _columns(path, key, array, dataset).items()
    }
    _check_signs(path, columns, classes)
    rows = dataset.train_rows.numpy()
    return np.stack([_numbers(f"{path}: {what}", column, classes)[rows] for what, column in columns.items()], 1)


def _read(path: Path, keys: Sequence[str]) -> Mapping[str, Column]:
    """Returns the arrays or columns with these names, in this order; all of them if no names are given."""
    key, suffix = f"`supervision.labels_file` (={path.name})", path.suffix.lower()
    if suffix in PICKLED:
        raise DataError(
            f"{key}: files of this kind are unpickled, which may run code. Write the labels by numpy.savez, or as CSV."
        )
    if not path.is_file():
        raise DataError(f"{key}: there is no file {path}. It must lie below data.root, or beside it if that is a file.")
    found: Mapping[str, Column]
    try:
        if suffix in CSV:
            found = read_csv(path, empty_rows=True).columns
        elif suffix in PARQUET:
            found = read_parquet(path).columns
        elif suffix == ".npy":
            found = {path.stem: _read_npy(path)}
        else:
            names = read_npz(path, ())[1]
            found = read_npz(path, [name for name in names if name in keys or not keys])[0]
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    except (OSError, EOFError, ValueError, SyntaxError, MemoryError, tokenize.TokenError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{key}: {path} cannot be read: {cause}. Write it again by numpy.savez, or as CSV.") from error
    if missing := [name for name in keys if name not in found]:
        available = list(found) if suffix in (*CSV, *PARQUET, ".npy") else names
        raise DataError(
            f"`supervision.labels_keys`: {path} has no array or column {shown_repr(missing[0])}, only "
            f"{listed(available) or 'none at all'}."
        )
    if not found:
        raise DataError(f"{key}: {path} has no array.")
    return {name: found[name] for name in keys or found}


def _read_npy(path: Path) -> np.ndarray:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of files that Python 2 has written
        # Mapped, so that a header which claims more than there is takes no memory.
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    if array.dtype.kind == "U" and array.size and array.dtype.itemsize:
        codes = np.ascontiguousarray(array).reshape(-1).view(array.dtype.byteorder.replace("|", "=") + "u4")
        if codes.max() > sys.maxunicode:
            raise ValueError("it holds texts that are none")
    return array


def _columns(path: Path, key: str, array: Column, dataset: Dataset) -> dict[str, Column]:
    """Returns an array as columns (n,), keyed by their names in messages."""
    name, needed = f"array {key}", dataset.own_size
    if isinstance(array, list):
        while len(array) > needed and not array[-1]:  # blank lines at the end of a file
            array = array[:-1]
    shape = (len(array),) if isinstance(array, list) else array.shape
    if shape == (needed,):
        return {name: array}
    if isinstance(array, np.ndarray) and len(shape) == 2 and shape[0] == needed and shape[1]:
        if shape[1] == 1:
            return {name: array[:, 0]}
        return {f"{name}, column {place}": array[:, place] for place in range(shape[1])}
    hint = ""
    if len(shape) == 2 and shape[1] == needed:
        hint = " It seems to lie on its side: transpose it."
    elif isinstance(array, list):
        hint = " Below a first line with names of columns, every line is a sample."
    raise DataError(
        f"{path}: {name} of shape {shape} must have shape ({needed},), or ({needed}, annotators): one label for each "
        f"sample of {dataset.name}, also of those held out"
        f"{', in the order of the file.' if dataset.tabular else ' for validation.'}{hint}"
    )


def _check_signs(path: Path, columns: Mapping[str, Column], classes: ClassNames) -> None:
    """Rejects labels -1 and 1 of two classes with other names: -1 could be a class or a missing label."""
    if len(classes.names) != 2 or NO_CLASS in classes:
        return
    found: set[str] = set()
    for column in columns.values():
        found.update(str(label).strip().removesuffix(".0") for label in dict.fromkeys(_plain(column)))
    if found - {"", "nan", "None"} == {"-1", "1"}:
        raise DataError(
            f"{path}: its labels are -1 and 1 alone. If -1 is the class {listed(classes.names[:1])}, write that name; "
            "if it says that there is no label, write an empty text, or NaN."
        )


def _plain(column: Column) -> list[object]:
    """Returns the values of a column as Python objects, NaN always as the same object."""
    if isinstance(column, list):
        return list(column)
    values: list[object] = column.tolist()
    return [None if value != value else value for value in values]


def _numbers(what: str, column: Column, classes: ClassNames) -> np.ndarray:
    """Returns (n,) int64, -1 = none."""
    if isinstance(column, np.ndarray) and column.dtype.kind not in "biufUS":
        raise DataError(f"{what} of {column.dtype} must hold numbers or names of classes.")
    values, numbers = _plain(column), {}
    for value in dict.fromkeys(values):
        try:
            numbers[value] = classes.find(value)
        except ValueError as error:
            raise DataError(
                f"{what}: label {values.index(value)} (={shown_repr(value)}) {error}. Where there is no label, leave "
                f"it empty{'' if NO_CLASS in classes else ', or write -1'}."
            ) from error
    return np.array([numbers[value] for value in values], dtype=np.int64)
