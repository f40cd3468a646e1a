"""Published class counts of bags: a file with a row per bag and a column per class.

The first column has the bags' names, each once, the others how many samples of the bag are in that class:

    bag,benign,malignant
    ward 1,12,3
    ward 2,7,8
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedlabel.data.labels.bags import Bags
from fedlabel.data.labels.supervision_config import LabelKind, SupervisionConfig
from fedlabel.data.own_columns import name_of, own_column
from fedlabel.data.sets.class_names import NO_CLASS, ClassNames
from fedlabel.data.sets.config import DataConfig, DataError, data_root
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.datasets import Dataset
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.parquet_files import read_parquet
from fedlabel.shown import shown


def read_bags(path: Path, bag_of: np.ndarray, class_names: tuple[str, ...], held_out: bool) -> Bags:
    """Returns the bags of the training samples, numbered in the order of the file.

    Args:
        path: of the file.
        bag_of: (n,) texts, the name of each training sample's bag, "" = in none.
        class_names: of the data set, in the order of their numbers.
        held_out: whether samples were taken off the training set, which may have been a bag's.

    Raises:
        DataError: the file cannot be read, or counts what is not there.
    """
    where = f"`supervision.bags_file` (={path.name})"
    if not path.is_file():
        raise DataError(
            f"{where}: there is no file {path}. It must lie below data.root, or beside it if that is a file."
        )
    try:
        columns = (read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else read_csv(path)).columns
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    first, *others = columns
    names = [name_of(cell) for cell in columns[first]]
    if empty := [row for row, name in enumerate(names) if not name]:
        raise DataError(f"{where}: data row {empty[0] + 1} names no bag in its first column, {shown(first)}.")
    place = {name: row for row, name in enumerate(names)}
    if twice := [name for row, name in enumerate(names) if place[name] != row]:
        raise DataError(f"{where}: bag {shown(twice[0])} has two rows. Write one.")
    counts = np.zeros((len(names), len(class_names)), dtype=np.int64)
    for label, column in _classes(where, others, class_names).items():
        counts[:, label] = _counts(where, column, columns[column], names)
    if unknown := sorted(set(bag_of.tolist()) - set(place) - {""}):
        raise DataError(
            f"{where}: it has no row of {len(unknown)} bags that training samples are in: {listed(unknown)}."
        )
    bag = np.array([place.get(name, -1) for name in bag_of.tolist()], dtype=np.int64)
    sizes = np.bincount(bag[bag >= 0], minlength=len(names))
    wrong = np.flatnonzero(sizes != counts.sum(1))
    if len(wrong):
        row = wrong[0]
        more = f" {len(wrong) - 1} other bags do not agree, either." if len(wrong) > 1 else ""
        torn = (
            " Samples of a bag must not be held out: set data.validation_fraction=0, and data.test_file to a file of "
            "its own."
        )
        raise DataError(
            f"{where}: the counts of bag {shown(names[row])} ({listed(counts[row].tolist())}) sum to "
            f"{counts[row].sum()}, but {sizes[row]} training samples are in it.{more}{torn if held_out else ''}"
        )
    kept = np.flatnonzero(sizes)
    bag[bag >= 0] = np.searchsorted(kept, bag[bag >= 0])
    return Bags(torch.from_numpy(bag), torch.from_numpy(counts[kept]))


def _classes(where: str, columns: list[str], class_names: tuple[str, ...]) -> dict[int, str]:
    """Returns class number -> its column."""
    classes, found = ClassNames(class_names), dict[int, str]()
    for column in columns:
        try:
            label = classes.find(column)
            if label == NO_CLASS:
                raise ValueError(classes.unknown())
        except ValueError as error:
            raise DataError(f"{where}: column {shown(column)} {error}. Each but the first counts a class.") from error
        if label in found:
            raise DataError(f"{where}: columns {shown(found[label])} and {shown(column)} are of one class.")
        found[label] = column
    if not found:
        raise DataError(
            f"{where}: it has no column of a class. Each but the first counts one of {listed(class_names)}."
        )
    return found


def _counts(where: str, column: str, cells: list[str], names: list[str]) -> list[int]:
    found = []
    for name, cell in zip(names, cells, strict=True):
        try:
            value = float(cell)
        except ValueError:
            value = -1.0
        if not (value.is_integer() and 0 <= value < 2**53):
            raise DataError(
                f"{where}: bag {shown(name)} has {shown(cell) or 'nothing'} in column {shown(column)}; it must be how "
                "many of its samples are in that class, a whole number from 0 on."
            )
        found.append(int(value))
    return found


def published_bags(
    dataset: Dataset, data: DataConfig, supervision: SupervisionConfig, bag_of: np.ndarray | None
) -> Bags | None:
    """Returns the bags of the training split whose counts are read from a file; None if there are none.

    Args:
        dataset: has the samples.
        data: where they are from.
        supervision: names the file.
        bag_of: (n,) texts, the name of each training sample's bag.
    """
    for part in supervision.parts:
        if part.bags_file is not None:
            assert bag_of is not None
            root = data_root(data)
            path = (root.parent if root.is_file() else root) / part.bags_file
            return read_bags(path, bag_of, dataset.class_names, len(dataset.train.labels) < dataset.own_size)
    return None


def as_counted(labels: np.ndarray, published: Bags | None) -> np.ndarray:
    """Returns (n,) labels that match the counts of every published bag; their order within a bag is arbitrary."""
    if published is None:
        return labels
    counted, bag = labels.copy(), published.bag.numpy()
    order = np.argsort(bag, kind="stable")
    order = order[bag[order] >= 0]
    counts = published.counts.numpy()
    counted[order] = np.concatenate([np.repeat(np.arange(counts.shape[1]), row) for row in counts])
    return counted


def bags_of_column(dataset: Dataset, data: DataConfig, part: LabelKind, split: str) -> Bags | None:
    """Returns the bags of the evaluation split if it has the bag column; their counts are those of its labels."""
    assert part.bag_column is not None
    values = own_column(dataset, data, "supervision.bag_column", part.bag_column, split)
    if values is None or not (values != "").any():
        return None
    labels = (dataset.validation if split == "validation" else dataset.test).labels.numpy()
    inside = values != ""
    names, place = np.unique(values[inside].astype(str), return_inverse=True)
    bag = np.full(len(values), -1)
    bag[inside] = place
    counts = np.zeros((len(names), dataset.num_classes), dtype=np.int64)
    np.add.at(counts, (place, labels[inside]), 1)
    return Bags(torch.from_numpy(bag), torch.from_numpy(counts))
