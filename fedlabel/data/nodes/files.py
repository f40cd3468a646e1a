"""Reads the files of a node's folder as they are: inputs, labels, votes and bags; for their form see docs/data.md.

What a cell means needs the schema, see `folder.py`. All defects of a folder are gathered, with file and row, before one
error tells of them: who mends a folder wants to see them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.own_columns import name_of
from fedlabel.data.sets.array_pixels import channels_first
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.image_files import EXTENSIONS, read_headers, read_pixels
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.npz_files import read_npz
from fedlabel.data.sets.parquet_files import read_parquet
from fedlabel.data.sets.text_tables import TextTable
from fedlabel.errors import file_error
from fedlabel.shown import shown

IMAGES, ARRAYS, TABLE = "images", "inputs.npz", "inputs.csv"
LABELS, VOTES, BAGS = "labels.csv", "votes.csv", "bags.csv"
PARQUET = ".parquet"
"""What a table may end in, in place of .csv."""
SAMPLE, SPLIT, BAG, EPSILON = "sample", "split", "bag", "epsilon"
LABEL, CANDIDATES, NOISY_LABEL, NOISY_CANDIDATES = "label", "candidates", "noisy_label", "noisy_candidates"
OWN = (LABEL, CANDIDATES, NOISY_LABEL, NOISY_CANDIDATES)
"""Columns of labels of which a sample has one at most."""
ANNOTATOR = "annotator:"
"""Begin of the name of a column with the labels of an annotator."""
TRAIN, TEST = "train", "test"
MAX_DEFECTS = 20
"""Defects that an error lists; it counts the others."""


class FolderError(DataError):
    """A node's folder has defects; `defects` lists them, a sentence each."""

    def __init__(self, path: Path, defects: Sequence[str]) -> None:
        self.defects = tuple(defects)
        more = f"\n… and {len(defects) - MAX_DEFECTS} more" if len(defects) > MAX_DEFECTS else ""
        text = "\n".join(defects[:MAX_DEFECTS])
        count = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
        super().__init__(f"{path} has {count}:\n{text}{more}")


@dataclass
class Defects:
    """Defects that were found in a folder."""

    path: Path
    found: list[str] = field(default_factory=list)

    def add(self, file: str, row: int | None, text: str) -> None:
        """Notes a defect; row: of the file, from 0, below the line with the names of the columns."""
        self.found.append(f"{file}{'' if row is None else f', row {row + 1}'}: {text}")

    def check(self) -> None:
        """Raises a FolderError if there is any."""
        if self.found:
            raise FolderError(self.path, self.found)


@dataclass(frozen=True, eq=False)
class Rows:
    """A file with a row for some of the samples."""

    file: str
    """Its name."""
    columns: dict[str, list[str]]
    """Name -> a text for each row; without the one that names the sample."""
    samples: np.ndarray
    """(rows,) int64, the sample of each row; -1 where it could not be found."""


@dataclass(frozen=True, eq=False)
class RawFolder:
    """The content of a node's folder."""

    path: Path
    images: Tensor | None
    """(n, channels, height, width) uint8; None for a table."""
    table: TextTable | None
    """The columns that are no labels; None for images."""
    names: tuple[str, ...]
    """How files name each of the n samples; empty for a table without a column `sample`."""
    size: int
    """n."""
    labels: Rows
    votes: Rows
    bags: TextTable | None
    is_test: np.ndarray
    """(n,) bool: held out to evaluate models on."""
    has_split: bool
    """Whether the folder says which samples these are."""


def read_files(path: Path, channels: int | None = None) -> tuple[RawFolder, Defects]:
    """Returns the content of a node's folder and its defects so far.

    Args:
        path: the folder.
        channels: of the images, by the schema; None: 1 if all are grey.

    Raises:
        DataError: there is no such folder, or a file cannot be read at all.
    """
    if not path.is_dir():
        raise DataError(f"There is no folder {path}. Give one with inputs and labels, see docs/data.md.")
    try:
        return _read(path, channels)
    except OSError as error:
        raise file_error(error, path) from error


def find_table(path: Path, name: str) -> Path | None:
    """Returns the file of a table in a folder; None if there is none.

    Args:
        path: the folder.
        name: of the file as CSV; as Parquet it ends in .parquet.

    Raises:
        DataError: there are both.
    """
    found = [each for each in (path / name, (path / name).with_suffix(PARQUET)) if each.exists()]
    if len(found) > 1:
        raise DataError(f"{path} has both {name} and {found[1].name}: leave one of them out.")
    return found[0] if found else None


def read_table(path: Path, empty_rows: bool = False) -> TextTable:
    """Returns a table of a folder; empty_rows: see `read_csv`, rows of a Parquet file are always kept.

    Raises:
        DataError: it cannot be read.
    """
    found = read_parquet(path) if path.suffix == PARQUET else read_csv(path, empty_rows=empty_rows)
    return replace(found, where=path.name)


def _read(path: Path, channels: int | None) -> tuple[RawFolder, Defects]:
    defects = Defects(path)
    of_inputs = find_table(path, TABLE)
    kinds = [name for name in (IMAGES, ARRAYS) if (path / name).exists()] + ([of_inputs.name] if of_inputs else [])
    if len(kinds) != 1:
        there = (
            "has " + " and ".join(kinds)
            if kinds
            else f"holds {listed(sorted(p.name for p in path.iterdir())) or 'nothing'}"
        )
        raise DataError(f"{path} {there}. Inputs are one of {IMAGES}/, {ARRAYS} and {TABLE} (or .parquet).")
    images: Tensor | None = None
    table: TextTable | None = None
    names: tuple[str, ...] = ()
    within: dict[str, list[str]] = {}
    if of_inputs is not None:
        table, within, names = _read_table(of_inputs, defects)
        size = len(table)
    else:
        images, names = (_read_images if kinds[0] == IMAGES else _read_arrays)(path, channels)
        size = len(images)
    place = {name: number for number, name in enumerate(names)}
    of_labels, of_votes, of_bags = (find_table(path, name) for name in (LABELS, VOTES, BAGS))
    if of_labels is not None:
        if within:
            raise DataError(
                f"{path}: {kinds[0]} has columns of labels ({listed(list(within))}), and there is {of_labels.name}, "
                "too. Leave one of them out; a feature needs another name."
            )
        labels = _rows(of_labels, place, defects)
    else:
        labels = Rows(kinds[0], within, np.arange(size if within else 0))
    votes = Rows(VOTES, {}, np.arange(0)) if of_votes is None else _rows(of_votes, place, defects)
    bags = None if of_bags is None else read_table(of_bags)
    known = {LABEL, CANDIDATES, NOISY_LABEL, NOISY_CANDIDATES, BAG, SPLIT}
    for name in labels.columns:
        if name not in known and not name.startswith(ANNOTATOR):
            defects.add(
                labels.file, None, f"column {shown(name)} is none of {', '.join(sorted(known))}, {ANNOTATOR}NAME."
            )
    is_test = np.zeros(size, dtype=bool)
    for row, text in enumerate(labels.columns.get(SPLIT, [])):
        if text not in ("", TRAIN, TEST):
            defects.add(
                labels.file, row, f"`{SPLIT}` (={shown(text)}) must be {TRAIN} or {TEST}, or empty for {TRAIN}."
            )
        elif text == TEST and labels.samples[row] >= 0:
            is_test[labels.samples[row]] = True
    has_split = SPLIT in labels.columns
    return RawFolder(path, images, table, names, size, labels, votes, bags, is_test, has_split), defects


def _read_images(path: Path, channels: int | None) -> tuple[Tensor, tuple[str, ...]]:
    root = path / IMAGES
    paths = sorted(each for each in root.rglob("*") if each.suffix.lower() in EXTENSIONS and each.name[0] != ".")
    if not paths:
        raise DataError(f"{root} holds no image. At least one is needed; see docs/data.md.")
    headers, mode = read_headers(paths)
    mode = "RGB" if channels == 3 else mode
    return torch.from_numpy(read_pixels(paths, mode, headers[0].size)), tuple(
        each.relative_to(root).as_posix() for each in paths
    )


def _read_arrays(path: Path, channels: int | None) -> tuple[Tensor, tuple[str, ...]]:
    where = path / ARRAYS
    arrays, names = read_npz(where, ["x"])
    if "x" not in arrays:
        raise DataError(
            f"{where} lacks the array `x`; it holds {listed(names) or 'nothing'}. `numpy.savez(file, x=...)`."
        )
    x = arrays["x"]
    if x.dtype != np.uint8 or x.ndim == 0 or len(x) == 0:
        raise DataError(
            f"{where}: `x` is {x.dtype} of shape {x.shape}; it must be uint8 with an image at least: nodes could not "
            "know whether others scale floats alike. `numpy.rint(255 * x).astype('uint8')` of values in [0, 1]."
        )
    images = np.ascontiguousarray(channels_first(x, f"{where}: `x`"))
    return torch.from_numpy(images), tuple(map(str, range(len(images))))


def _read_table(path: Path, defects: Defects) -> tuple[TextTable, dict[str, list[str]], tuple[str, ...]]:
    """Returns the columns of features, those of labels, and the samples' names; path: of the file."""
    found = read_table(path)
    names: tuple[str, ...] = ()
    if SAMPLE in found.columns:
        names = tuple(map(name_of, found.columns[SAMPLE]))
        first: dict[str, int] = {}
        for row, name in enumerate(names):
            if not name:
                defects.add(path.name, row, f"`{SAMPLE}` is empty: give every row a name, or leave the column out.")
            elif name in first:
                defects.add(path.name, row, f"`{SAMPLE}` (={shown(name)}) is that of row {first[name] + 1}, too.")
            first.setdefault(name, row)
    of_labels = {*OWN, BAG, SPLIT}
    within = {name: cells for name, cells in found.columns.items() if name in of_labels or name.startswith(ANNOTATOR)}
    columns = {name: cells for name, cells in found.columns.items() if name not in within and name != SAMPLE}
    if not columns:
        raise DataError(f"{path} has no column but those of labels. At least one is needed.")
    return TextTable(path.name, tuple(columns), columns), within, names


def _rows(path: Path, place: dict[str, int], defects: Defects) -> Rows:
    """Returns a file with a row for some samples; place: name of a sample -> its number."""
    file, columns = path.name, dict(read_table(path, empty_rows=True).columns)
    if SAMPLE not in columns:
        raise DataError(f"{path} has no column `{SAMPLE}`, only {listed(list(columns))}. See docs/data.md.")
    if not place:
        raise DataError(
            f"{path.parent}: the table of inputs needs a column `{SAMPLE}`, by which {file} names its rows."
        )
    samples = np.full(len(columns[SAMPLE]), -1)
    first: dict[str, int] = {}
    for row, cell in enumerate(columns.pop(SAMPLE)):
        name = cell if cell in place else name_of(cell)
        if name not in place:
            defects.add(file, row, f"there is no sample {shown(cell) or '(empty)'}.")
        elif name in first:
            defects.add(file, row, f"sample {shown(name)} has a row already, row {first[name] + 1}.")
        else:
            samples[row] = place[name]
            first[name] = row
    return Rows(file, columns, samples)
