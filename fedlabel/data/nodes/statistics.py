"""Summed statistics of a node's folder, from which the schema of a federation is made: counts and sums, never rows.

A node writes its statistics into a small JSON file and sends it; whoever makes the schema adds them up. Sums over
pixels are whole numbers, so the sum over nodes is exactly that of all data in one place. For columns of numbers each
node sends count, mean and the sum of squared deviations from it, which add up without cancellation: Chan, Golub and
LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedlabel.data.nodes.files import ANNOTATOR, BAG, CANDIDATES, EPSILON, OWN, Defects, RawFolder, read_files
from fedlabel.data.nodes.schema import CATEGORY, MAX_NAMES, NUMBER, SEPARATOR, Column, Schema, parse_schema
from fedlabel.data.sets.cells import LARGEST, MISSING, read_numbers
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.names import in_order
from fedlabel.data.sets.table_columns import MAX_CATEGORIES
from fedlabel.errors import naming
from fedlabel.names import counted
from fedlabel.shown import shown

VERSION = 1
EMPTY = "empty"
"""Kind of a column without a filled cell: it may be of numbers or of categories elsewhere."""
MAX_BYTES = 1 << 26
"""Of a file with statistics."""


@dataclass(frozen=True)
class Pixels:
    """Sums over the pixels of one channel, as whole numbers in [0, 255]."""

    count: int
    sum: int
    squares: int
    """Sum of the squared values."""

    def __add__(self, other: Pixels) -> Pixels:
        return Pixels(self.count + other.count, self.sum + other.sum, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """The mean, of pixels in [0, 1]."""
        return float(Fraction(self.sum, 255 * self.count))

    @property
    def std(self) -> float:
        """The population standard deviation, of pixels in [0, 1]; 1 of a constant channel."""
        variance = Fraction(self.count * self.squares - self.sum**2, (255 * self.count) ** 2)
        return math.sqrt(variance) if variance else 1.0


@dataclass(frozen=True)
class Cells:
    """Sums over the cells of one column of a table."""

    name: str
    kind: str
    """number, category or empty."""
    count: int = 0
    """Cells with a number."""
    mean: float = 0.0
    """Of these."""
    squares: float = 0.0
    """Sum of their squared deviations from the mean."""
    categories: tuple[str, ...] = ()
    """All that occur, sorted."""

    def __add__(self, other: Cells) -> Cells:
        if EMPTY in (self.kind, other.kind):
            return other if self.kind == EMPTY else self
        if self.kind == CATEGORY:
            together = tuple(sorted({*self.categories, *other.categories}))
            return Cells(self.name, CATEGORY, categories=together)
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        squares = self.squares + other.squares + apart**2 * self.count * other.count / count
        return Cells(self.name, NUMBER, count, mean, squares)

    def column(self, rows: int) -> Column:
        """Returns how the column becomes features; rows: of the whole table. Missing numbers become the mean."""
        if self.kind == CATEGORY:
            return Column(self.name, CATEGORY, categories=self.categories)
        std = math.sqrt(self.squares / rows)
        return Column(self.name, NUMBER, self.mean, self.mean, std if std > 0 else 1.0)


@dataclass(frozen=True)
class Statistics:
    """What a schema needs of a node's training samples."""

    samples: int
    classes: tuple[str, ...]
    """Names of classes that occur in its labels, sorted; not how often."""
    annotators: tuple[str, ...]
    functions: tuple[str, ...]
    shape: tuple[int, ...] = ()
    """(channels, height, width) of its images; empty for tables."""
    pixels: tuple[Pixels, ...] = ()
    """Per channel."""
    columns: tuple[Cells, ...] = ()
    """Of a table, in the file's order."""

    def to_json(self) -> str:
        """Returns all of it as JSON; `load_statistics` reads it back."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def folder_statistics(path: Path, categorical: Sequence[str] = (), least: int = 1) -> Statistics:
    """Returns the statistics of the training samples in a node's folder.

    Args:
        path: the folder, see docs/data.md.
        categorical: columns of a table whose cells are categories even if they are numbers.
        least: the fewest cells that a sum may be made of, or that a name must be in.

    Raises:
        DataError: a file is missing, or cannot be read; or there are fewer samples than `least`.
        FolderError: it has defects that can be seen without a schema.
    """
    raw, defects = read_files(path)
    train = np.flatnonzero(~raw.is_test)
    columns: tuple[Cells, ...] = ()
    if raw.table is not None:
        if unknown := [name for name in categorical if name not in raw.table.columns]:
            raise DataError(f"`--categorical`: {path / raw.table.where} has no column {shown(unknown[0])}.")
        names = list(raw.table.columns)
        columns = tuple(_cells(raw, name, train, name in categorical, least, defects) for name in names)
    defects.check()
    if not len(train):
        raise DataError(f"{path} holds no training sample: all are of the split test.")
    if len(train) < least:
        raise DataError(
            f"{path} holds {counted(len(train), 'training sample')}, fewer than `--min-count` (={least}): leave the "
            "schema to the other nodes."
        )
    images = None if raw.images is None else raw.images[train]
    return Statistics(
        samples=len(train),
        classes=tuple(in_order(sorted(_classes(raw, least)))),
        annotators=_annotators(raw),
        functions=tuple(raw.votes.columns),
        shape=() if images is None else tuple(images.shape[1:]),
        pixels=() if images is None else tuple(map(_pixels, images.unbind(1))),
        columns=columns,
    )


def _pixels(channel: Tensor) -> Pixels:
    values = np.bincount(channel.numpy().ravel(), minlength=256).tolist()
    total = sum(count * value for value, count in enumerate(values))
    return Pixels(channel.numel(), total, sum(count * value**2 for value, count in enumerate(values)))


def _cells(raw: RawFolder, name: str, train: np.ndarray, categorical: bool, least: int, defects: Defects) -> Cells:
    assert raw.table is not None
    all_cells, file = raw.table.columns[name], raw.table.where
    cells = [all_cells[row] for row in train.tolist()]
    read = read_numbers(cells)
    there = read.values[~np.isnan(read.values)]
    if categorical or (read.odd and not len(there)):
        found = sorted(text for text, count in Counter(cells).items() if count >= least)
        if len(found) > MAX_CATEGORIES:
            defects.add(
                raw.table.where, None, f"column {shown(name)} has {len(found)} categories, more than {MAX_CATEGORIES}."
            )
        return Cells(name, CATEGORY, categories=tuple(found))
    for row in train.tolist():
        if all_cells[row] in read.odd:
            defects.add(
                file,
                row,
                f"{shown(name)} (={shown(all_cells[row])}) is no number, and other cells of the column are. If they "
                f"are categories, name the column in --categorical.",
            )
    if len(there) < max(1, least):
        return Cells(name, EMPTY)
    if np.abs(there).max() > LARGEST:
        defects.add(file, None, f"column {shown(name)} has a number beyond {LARGEST:g}.")
        return Cells(name, EMPTY)
    mean = math.fsum(there.tolist()) / len(there)
    return Cells(name, NUMBER, len(there), mean, math.fsum(((there - mean) ** 2).tolist()))


def _classes(raw: RawFolder, least: int) -> set[str]:
    """Returns the texts that name classes in at least `least` cells; columns of bags.csv name them for all."""
    found: Counter[str] = Counter()
    for name, cells in raw.labels.columns.items():
        if name in OWN or name.startswith(ANNOTATOR):
            several = name.endswith(CANDIDATES)
            for cell, count in Counter(cells).items():
                for each in cell.split(SEPARATOR) if several else [cell]:
                    found[each.strip()] += count
    for cells in raw.votes.columns.values():
        found.update(cells)
    names = {text for text, count in found.items() if count >= least}
    if raw.bags is not None:
        names.update(name for name in raw.bags.names if name not in (BAG, EPSILON))
    return {text for text in names if text.casefold() not in MISSING}


def _annotators(raw: RawFolder) -> tuple[str, ...]:
    return tuple(name.removeprefix(ANNOTATOR).strip() for name in raw.labels.columns if name.startswith(ANNOTATOR))


def make_schema(
    parts: Sequence[Statistics], sources: Sequence[str], classes: Sequence[str] = (), allow_flip: bool = False
) -> Schema:
    """Returns the schema of a federation from the statistics of its nodes.

    Args:
        parts: of each node, at least one.
        sources: their names in messages.
        classes: names of all classes, in the order of their numbers; empty: those that occur.
        allow_flip: see `Schema`.

    Raises:
        DataError: they do not fit together, or make no schema.
    """
    first = parts[0]
    for part, source in zip(parts, sources, strict=True):
        if part.shape != first.shape:
            raise DataError(
                f"{source} has {_inputs(part)}, and {sources[0]} has {_inputs(first)}: all nodes need the same."
            )
        names = [{cells.name for cells in each.columns} for each in (part, first)]
        if names[0] != names[1]:
            apart = sorted(names[0] ^ names[1])
            raise DataError(f"{source} and {sources[0]} have other columns: {shown(apart[0])} is in one of them only.")
    seen = in_order(sorted({name for part in parts for name in part.classes}))
    if classes and (further := [name for name in seen if name not in classes]):
        raise DataError(f"`--classes`: labels name {shown(further[0])}, too, which is none of {', '.join(classes)}.")
    samples = sum(part.samples for part in parts)
    columns = _columns(parts, sources, samples)
    pixels = [sum(each[1:], each[0]) for each in zip(*(part.pixels for part in parts), strict=True)]
    channels, height, width = first.shape or (sum(column.width for column in columns), 1, 1)
    schema = Schema(
        classes=tuple(classes or seen),
        shape=(channels, height, width),
        mean=tuple(each.mean for each in pixels),
        std=tuple(each.std for each in pixels),
        allow_flip=allow_flip,
        columns=columns,
        annotators=tuple(sorted({name for part in parts for name in part.annotators})),
        functions=tuple(sorted({name for part in parts for name in part.functions})),
    )
    return parse_schema(schema.text, "What these folders make")  # its checks are those of every schema


def _inputs(part: Statistics) -> str:
    return f"images {list(part.shape)} (channels, height, width)" if part.shape else "a table"


def _columns(parts: Sequence[Statistics], sources: Sequence[str], samples: int) -> tuple[Column, ...]:
    total: dict[str, Cells] = {}
    from_: dict[str, str] = {}
    for part, source in zip(parts, sources, strict=True):
        for cells in part.columns:
            before = total.get(cells.name)
            if before is not None and {before.kind, cells.kind} == {NUMBER, CATEGORY}:
                raise DataError(
                    f"Column {shown(cells.name)} is of kind {cells.kind} in {source}, and of kind {before.kind} in "
                    f"{from_[cells.name]}. If it holds categories, give --categorical at every node."
                )
            if before is None or before.kind == EMPTY:
                from_[cells.name] = source
            total[cells.name] = cells if before is None else before + cells
    if empty := [name for name, cells in total.items() if cells.kind == EMPTY]:
        raise DataError(f"Column {shown(empty[0])} has no cell filled at any node: leave it out of all tables.")
    made = [cells.column(samples) for cells in total.values()]
    return tuple(sorted(made, key=lambda column: column.kind != NUMBER))


def load_statistics(path: Path) -> Statistics:
    """Returns the statistics in a JSON file.

    Raises:
        DataError: it is none that `fedlabel data statistics` writes.
        FileError: the system does not let us read it.
    """
    with naming(path):
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than statistics of a folder are ({MAX_BYTES >> 20} MiB at most).")
        data = path.read_bytes()
    try:
        return _parse(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} holds no statistics of a folder ({type(error).__name__}: {shown(error)}). Write it again by "
            "`fedlabel data statistics FOLDER`."
        ) from error


def _parse(content: Any) -> Statistics:
    if content.pop("version") != VERSION:
        raise ValueError(f"it is of another version than {VERSION}")
    pixels = tuple(Pixels(**each) for each in content.pop("pixels"))
    columns = tuple(Cells(**{**each, "categories": tuple(each["categories"])}) for each in content.pop("columns"))
    lists: dict[str, Any] = {key: tuple(content.pop(key)) for key in ("classes", "annotators", "functions", "shape")}
    found = Statistics(**content, **lists, pixels=pixels, columns=columns)
    wholes = [found.samples, *found.shape, *(n for each in pixels for n in (each.count, each.sum, each.squares))]
    wholes += [each.count for each in columns]
    texts = [*found.classes, *found.annotators, *found.functions, *(each.name for each in columns)]
    texts += [text for each in columns for text in each.categories]
    floats = [number for each in columns for number in (each.mean, each.squares)]
    if not all(type(number) is int and number >= 0 for number in wholes) or found.samples < 1:
        raise ValueError("a count must be a whole number, of at least one sample")
    if not all(type(text) is str for text in texts) or len(texts) > MAX_NAMES * 10:
        raise ValueError("a name must be a text")
    if not all(type(number) is float and math.isfinite(number) for number in floats) or any(
        each.squares < 0 or each.kind not in (NUMBER, CATEGORY, EMPTY) or (each.kind == NUMBER and each.count < 1)
        for each in columns
    ):
        raise ValueError("the sums of a column must be finite numbers")
    size = math.prod(found.shape[1:]) * found.samples if found.shape else 0
    if bool(found.shape) == bool(columns) or (found.shape and len(found.shape) != 3):
        raise ValueError("it must be of images, or of a table")
    # Of numbers from 0 to 255: no sum is larger, nor a mean of squares smaller than the squared mean.
    if len(pixels) != (found.shape[0] if found.shape else 0) or any(
        each.count != size or each.squares > 255 * each.sum or each.sum**2 > each.count * each.squares
        for each in pixels
    ):
        raise ValueError("the sums of a channel are none of so many pixels")
    return found
