"""Files of labels beside a data set: of annotators, of another labeller, of people.

A file is an archive of numpy's (.npz) with arrays, or one array of it (.npy), or a CSV (.csv, .tsv, .txt, packed or
not) or Parquet file with columns. Each array (n,), each column of an array (n, annotators) and each column of a table
has one label per sample, in the order of the data set's training samples; what a label means is said by `class_names`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlabel.data.class_names import NO_CLASS, ClassNames, shown
from fedlabel.data.datasets import Dataset
from fedlabel.data.loaders import DataError
from fedlabel.data.table_files import _read_csv, _read_parquet

_BROKEN = (zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile)
PICKLED = (".pt", ".pth", ".pkl", ".pickle")
TABLES = (".csv", ".tsv", ".txt", ".gz", ".parquet")


def read_label_file(path: Path, keys: Sequence[str], dataset: Dataset) -> np.ndarray:
    """Returns the labels of the training split, (n, annotators) int64, -1 = none.

    Args:
        path: the file.
        keys: which arrays or columns of it; none: all of them.
        dataset: says which samples the training split has, and what the classes are.

    Raises:
        DataError: the file is missing or damaged, has no such array, or one of another length or of other classes.
    """
    if path.suffix.lower() in PICKLED:
        raise DataError(
            f"`supervision.labels_file` (={path.name}): files of this kind are unpickled, which may run code. Write "
            "the labels by numpy.savez, or as CSV."
        )
    arrays = _read_tables(path) if path.suffix.lower() in TABLES else _read_arrays(path)
    for key in keys:
        if key not in arrays:
            raise DataError(
                f"`supervision.labels_keys`: {path} has no array or column {shown(key)}, only "
                f"{', '.join(map(str, arrays)) or 'none at all'}."
            )
    if not arrays:
        raise DataError(f"`supervision.labels_file`: {path} has no array.")
    classes = ClassNames(dataset.class_names)
    _check_signs(path, [arrays[key] for key in keys or arrays], classes)
    rows = dataset.train_rows.numpy()
    columns = [
        _numbers(f"{path}: {what}", values, classes)[rows]
        for key in keys or arrays
        for what, values in _columns(path, key, arrays[key], dataset)
    ]
    return np.stack(columns, 1)


def _read_tables(path: Path) -> dict[str, np.ndarray]:
    try:
        return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except DataError as error:
        raise DataError(f"`supervision.labels_file` (={path.name}): {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, as numpy leaves a broken archive open.
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy":
                return {path.stem: np.lib.format.read_array(file, allow_pickle=False)}
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, MemoryError, *_BROKEN) as error:
        raise DataError(
            f"`supervision.labels_file` (={path.name}): {path} cannot be read as .npz ({error}). It must lie below "
            "data.root, or beside it if that is a file."
        ) from error


def _columns(path: Path, key: str, array: np.ndarray, dataset: Dataset) -> list[tuple[str, np.ndarray]]:
    """Returns an array as columns (n,), each with what to call it."""
    name, needed = f"array {key}", dataset.own_size
    if array.ndim == 2 and len(array) == needed and array.shape[1]:
        places = range(array.shape[1])
        return [(name if array.shape[1] == 1 else f"{name}, column {place}", array[:, place]) for place in places]
    if array.shape == (needed,):
        return [(name, array)]
    hint = ""
    if array.ndim == 2 and array.shape[1] == needed:
        hint = " It seems to lie on its side: transpose it."
    elif path.suffix.lower() in TABLES:
        hint = ' Below a first line with names, every line is a sample; write an empty label of a single column as "".'
    raise DataError(
        f"{path}: {name} of shape {array.shape} must have shape ({needed},), or ({needed}, annotators): one label for "
        f"each sample of {dataset.name}, also of those held out"
        f"{', in the order of the file.' if dataset.tabular else ' for validation.'}{hint}"
    )


def _check_signs(path: Path, arrays: Sequence[np.ndarray], classes: ClassNames) -> None:
    """Refuses labels -1 and 1 alone, of two classes of other names: is -1 a class, or no label?"""
    if len(classes.names) != 2 or NO_CLASS in classes or not all(array.dtype.kind in "iufU" for array in arrays):
        return
    texts = {str(label).strip().removesuffix(".0") for array in arrays for label in np.unique(array)}
    if texts - {"", "nan"} == {"-1", "1"}:
        raise DataError(
            f"{path}: its labels are -1 and 1 alone. If -1 is the class {classes.names[0]}, write that name; if it "
            "says that there is no label, write an empty text, or NaN."
        )


def _numbers(what: str, values: np.ndarray, classes: ClassNames) -> np.ndarray:
    """Returns (n,) int64, -1 = none."""
    if values.dtype.kind not in "biufUS":
        raise DataError(f"{what} of {values.dtype} must hold numbers or names of classes.")
    found, first, place = np.unique(values, return_index=True, return_inverse=True)
    numbers = np.full(len(found), NO_CLASS)
    for i, (value, row) in enumerate(zip(found, first, strict=True)):
        try:
            numbers[i] = classes.find(value)
        except ValueError as error:
            raise DataError(
                f"{what}: label {row} (={shown(value.item())}) {error}. Where there is no label, leave it empty"
                f"{'' if NO_CLASS in classes else ', or write -1'}."
            ) from error
    told: np.ndarray = numbers[place]
    return told
