"""Columns that name the client or the bag of each sample, and are not features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlabel.data.partition import PartitionConfig
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.cells import MISSING
from fedlabel.data.sets.config import SETS, DataConfig, DataError, data_root
from fedlabel.data.sets.datasets import Dataset
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.npz_files import read_npz
from fedlabel.shown import shown


def with_columns_aside(data: DataConfig, wanted: Mapping[str, str]) -> DataConfig:
    """Returns a configuration in which the columns that assign clients or bags are not features.

    Args:
        data: of the data set.
        wanted: key of the configuration -> column.

    Raises:
        DataError: a column is the one of the labels, or the data set has no columns of its own.
    """
    for key, name in wanted.items():
        if name == data.label_column:
            raise DataError(f"`{key}` (={name}) is the column of the labels: name another one.")
        if not SETS[data.name].tabular and data.name not in ("npz", "arrays"):
            raise DataError(f"`{key}` (={name}) is for tables and data.name=npz or arrays, not for {data.name}.")
    if not SETS[data.name].tabular:
        return data
    aside = dict.fromkeys([*data.aside_columns, *wanted.values()])
    return replace(data, aside_columns=tuple(aside))


def own_column(dataset: Dataset, data: DataConfig, key: str, name: str, part: str = "train") -> np.ndarray | None:
    """Returns one text for every sample of `part`, (n,) object, "" if it is missing; None if the part lacks the column.

    Numbers are written in one way: 7.0 is "7", as missing cells make other programs write it.

    Args:
        dataset: has the samples.
        data: where they are from. Of an npz file the column is an array with a value for every training sample, and
            another one, with `_test` behind its name, for every test sample, if it is there.
        key: of the configuration that names the column.
        name: of the column.
        part: "train", "validation" or "test".

    Raises:
        DataError: there is no such column, or it is of another length.
    """
    if dataset.tables:
        table = dataset.tables[part]
        values = list(table.column(name)) if name in (*table.names, *table.aside) else None
    else:
        values = _array(dataset, data, key, name, part) if part != "validation" else None
    return None if values is None else np.array([name_of(value) for value in values], dtype=object)


def own_rows(
    dataset: Dataset, data: DataConfig, config: PartitionConfig, names: Sequence[str], split: str
) -> Ragged | None:
    """Returns every client's own rows of the evaluation split; None if the column is missing or names no client."""
    if config.column is None:
        return None
    values = own_column(dataset, data, f"{config.key}.column", config.column, split)
    if values is None:
        return None
    place = {name: client for client, name in enumerate(names)}
    owner = np.array([place.get(value, -1) for value in values.tolist()], dtype=np.int64)
    return Ragged.by_owner(owner, len(names)) if (owner >= 0).any() else None


def _array(dataset: Dataset, data: DataConfig, key: str, name: str, part: str) -> list[object] | None:
    path = data_root(data)
    size = dataset.own_size if part == "train" else len(dataset.test.labels)
    name += "_test" * (part == "test")
    arrays, names = read_npz(path, [name])
    if name not in arrays:
        if part == "test":
            return None
        raise DataError(f"`{key}` (={shown(name)}): {path} has no such array, only {listed(names)}.")
    array = arrays[name]
    if array.shape != (size,) or array.dtype.kind not in "biufUS":
        raise DataError(
            f"`{key}` (={shown(name)}): {path}: this array is {array.dtype} of shape {array.shape}; it must hold a "
            f"number or a text for each {part.replace('train', 'training')} sample, ({size},)."
        )
    found: list[object] = (array[dataset.train_rows.numpy()] if part == "train" else array).tolist()
    return found


def name_of(value: object) -> str:
    """Returns the name of the client or bag in a cell, "" if it is missing; see `own_column`."""
    if value is None or value != value:
        return ""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = text.strip()
    if text.casefold() in MISSING:
        return ""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 and "_" not in text else text
