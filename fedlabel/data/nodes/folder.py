"""A node's folder, read by the schema: inputs as tensors, labels as a supervision record, a held-out labelled part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labels.labeling_functions import NOT_ASKED
from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.nodes.files import (
    ANNOTATOR,
    BAG,
    BAGS,
    CANDIDATES,
    EPSILON,
    LABEL,
    NOISY_CANDIDATES,
    NOISY_LABEL,
    OWN,
    SPLIT,
    Defects,
    RawFolder,
    Rows,
    read_files,
)
from fedlabel.data.nodes.schema import NUMBER, SEPARATOR, Schema
from fedlabel.data.own_columns import name_of
from fedlabel.data.sets.cells import LARGEST, read_numbers
from fedlabel.data.sets.class_names import NO_CLASS, ClassNames
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.loaders import Split
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.text_tables import TextTable
from fedlabel.shown import shown


@dataclass(frozen=True, eq=False)
class NodeData:
    """The data of a node."""

    inputs: Tensor
    """(n, channels, height, width) uint8, or (n, features, 1, 1) float32: the training samples."""
    record: Supervision
    """Their labels; its bags are in the order of bags.csv."""
    held_out: Split
    """Labelled samples to evaluate models on; may be empty."""
    noisy_counts: bool
    """Whether noise was added to the counts of some bags before they were published."""
    names: tuple[str, ...] = ()
    """How the files name the training samples; empty if they do not."""


def read_node_folder(path: Path, schema: Schema) -> NodeData:
    """Returns the data in a node's folder.

    Args:
        path: the folder, see docs/data.md.
        schema: of the federation.

    Raises:
        FolderError: it has defects; all are listed, by file and row.
        DataError: a file is missing, or cannot be read at all.
    """
    raw, defects = read_files(path, None if schema.tabular else schema.shape[0])
    return _Reading(raw, schema, defects).node_data()


def read_test_folder(path: Path, schema: Schema) -> Split:
    """Returns the labelled samples in a folder: those of the split `test`, or all if it has no column `split`.

    Raises:
        DataError: as `read_node_folder`, or there is none.
    """
    raw, defects = read_files(path, None if schema.tabular else schema.shape[0])
    if not raw.has_split:
        raw.is_test[:] = True
    held_out = _Reading(raw, schema, defects).held_out()
    defects.check()
    if len(held_out.labels) == 0:
        raise DataError(f"{path} holds no sample of the split test: nothing to evaluate models on.")
    return held_out


class _Reading:
    """Reads the cells of a folder."""

    def __init__(self, raw: RawFolder, schema: Schema, defects: Defects) -> None:
        self.raw, self.schema, self.defects = raw, schema, defects
        self.classes = ClassNames(schema.classes)
        self.inputs = self._inputs()

    def node_data(self) -> NodeData:
        raw, held_out = self.raw, self.held_out()
        candidates, noisy = self._candidates()
        annotations, votes = self._annotations(), self._votes()
        bag, counts, noisy_counts = self._bags()
        self.defects.check()
        train = torch.from_numpy(np.flatnonzero(~raw.is_test))
        if not len(train):
            raise DataError(f"{raw.path} holds no training sample: all are of the split test.")
        record = Supervision(
            candidates[train], noisy[train], annotations[train], torch.from_numpy(bag)[train], counts, votes[train]
        )
        names = tuple(raw.names[place] for place in train.tolist()) if raw.names else ()
        return NodeData(self.inputs[train], record, held_out, noisy_counts, names)

    def held_out(self) -> Split:
        """Returns the samples of the split test, each with its label."""
        rows, found = self.raw.labels, np.full(self.raw.size, NO_CLASS)
        for row, text in self._cells(rows, LABEL, test=True):
            found[rows.samples[row]] = self._class(rows.file, row, LABEL, text)
        others = [name for name in rows.columns if name not in (LABEL, SPLIT)]
        for name in others:
            for row, text in self._cells(rows, name, test=True):
                if text:
                    self.defects.add(rows.file, row, f"a sample of the split test has a `label`, and no {shown(name)}.")
        without = np.flatnonzero(self.raw.is_test & (found < 0))
        if len(without) and not self.defects.found:
            row_of = {int(sample): row for row, sample in enumerate(rows.samples.tolist())}
            for sample in without.tolist():
                name = self.raw.names[sample] if self.raw.names else str(sample)
                self.defects.add(
                    rows.file, row_of.get(sample), f"sample {shown(name)} of the split test has no `label`."
                )
        places = torch.from_numpy(np.flatnonzero(self.raw.is_test))
        return Split(self.inputs[places], torch.from_numpy(found)[places])

    def _inputs(self) -> Tensor:
        raw, schema = self.raw, self.schema
        if (raw.table is not None) != schema.tabular:
            here, there = ("a table", "images") if raw.table is not None else ("images", "a table")
            raise DataError(f"{raw.path} holds {here}, and by the schema the inputs are {there}.")
        if raw.images is not None:
            shape = tuple(raw.images.shape[1:])
            if shape != schema.shape:
                raise DataError(
                    f"{raw.path}: images are {list(shape)} (channels, height, width), and by the schema "
                    f"{list(schema.shape)}. Convert them, or agree on another schema."
                )
            return raw.images
        return self._features()

    def _features(self) -> Tensor:
        table, columns = self.raw.table, self.schema.columns
        assert table is not None
        missing = [column.name for column in columns if column.name not in table.columns]
        further = [name for name in table.columns if name not in {column.name for column in columns}]
        if missing or further:
            lacks = f" lacks {listed(missing)}" * bool(missing)
            has = f"{' and' * bool(missing)} has {listed(further)}, which the schema has not" * bool(further)
            raise DataError(f"{self.raw.path / table.where}{lacks}{has}. Its columns must be those of the schema.")
        numbers, categories = [], []
        for column in columns:
            cells = table.columns[column.name]
            if column.kind != NUMBER:
                categories.append(cells)
                continue
            read = read_numbers(cells)
            for row, cell in enumerate(cells):
                if cell in read.odd:
                    self.defects.add(table.where, row, f"{shown(column.name)} (={shown(cell)}) is no number.")
            for row in np.flatnonzero(np.abs(read.values) > LARGEST).tolist():
                self.defects.add(
                    table.where, row, f"{shown(column.name)} (={shown(cells[row])}) is beyond {LARGEST:g}."
                )
            numbers.append(read.values)
        return self.schema.features(numbers, categories)

    def _cells(self, rows: Rows, name: str, test: bool = False) -> Iterator[tuple[int, str]]:
        """Yields row and text of a column, of the rows of training samples; test: of the held-out ones."""
        wanted = ((rows.samples >= 0) & (self.raw.is_test[rows.samples] == test)).tolist()
        return ((row, text) for row, text in enumerate(rows.columns.get(name, [])) if wanted[row])

    def _class(self, file: str, row: int, column: str, text: str) -> int:
        """Returns the number of a class, -1 for an empty cell or a defect."""
        try:
            return self.classes.find(text)
        except ValueError as error:
            self.defects.add(file, row, f"`{shown(column)}` (={shown(text)}) {error}.")
            return NO_CLASS

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """Returns (n, classes) bool, the candidates, and (n,) bool, whether they may miss the truth."""
        rows, size, classes = self.raw.labels, self.raw.size, len(self.schema.classes)
        candidates, noisy = torch.ones(size, classes, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        given: dict[int, str] = {}
        for name in OWN:
            for row, text in self._cells(rows, name):
                sample = int(rows.samples[row])
                several = name in (CANDIDATES, NOISY_CANDIDATES)
                texts = [each.strip() for each in text.split(SEPARATOR)] if several and text else [text]
                found = [self._class(rows.file, row, name, each) for each in texts]
                if found == [NO_CLASS]:
                    continue
                if NO_CLASS in found:
                    self.defects.add(rows.file, row, f"`{name}` (={shown(text)}) has an empty place between two `;`.")
                elif len(set(found)) < len(found):
                    self.defects.add(rows.file, row, f"`{name}` (={shown(text)}) has a class twice.")
                elif sample in given:
                    self.defects.add(rows.file, row, f"it has both `{given[sample]}` and `{name}`: leave one empty.")
                else:
                    given[sample] = name
                    candidates[sample] = False
                    candidates[sample, found] = True
                    noisy[sample] = name in (NOISY_LABEL, NOISY_CANDIDATES)
        return candidates, noisy

    def _annotations(self) -> Tensor:
        rows, annotators = self.raw.labels, self.schema.annotators
        found = torch.full((self.raw.size, len(annotators)), NO_CLASS)
        for name in [name for name in rows.columns if name.startswith(ANNOTATOR)]:
            annotator = name.removeprefix(ANNOTATOR).strip()
            if annotator not in annotators:
                known = f"the schema has {listed(annotators) or 'none'}"
                self.defects.add(rows.file, None, f"column {shown(name)} is of no annotator of the schema: {known}.")
                continue
            for row, text in self._cells(rows, name):
                found[int(rows.samples[row]), annotators.index(annotator)] = self._class(rows.file, row, name, text)
        return found

    def _votes(self) -> Tensor:
        rows, functions = self.raw.votes, self.schema.functions
        found = torch.full((self.raw.size, len(functions)), NOT_ASKED)
        there = torch.from_numpy(rows.samples[rows.samples >= 0])
        if rows.columns:
            found[there] = NO_CLASS
        for row in np.flatnonzero(self.raw.is_test[rows.samples] & (rows.samples >= 0)).tolist():
            self.defects.add(rows.file, row, "a sample of the split test has a `label`, and no votes.")
        for name in rows.columns:
            if name not in functions:
                known = f"the schema has {listed(functions) or 'none'}"
                self.defects.add(rows.file, None, f"column {shown(name)} is no function of the schema: {known}.")
                continue
            for row, text in self._cells(rows, name):
                found[int(rows.samples[row]), functions.index(name)] = self._class(rows.file, row, name, text)
        return found

    def _bags(self) -> tuple[np.ndarray, Tensor, bool]:
        """Returns (n,) int64, the bag of each sample; (bags, classes) int64, their counts; whether these have noise."""
        rows, table = self.raw.labels, self.raw.bags
        bag, none = np.full(self.raw.size, -1), torch.zeros(0, len(self.schema.classes), dtype=torch.int64)
        named = [(row, name_of(text)) for row, text in self._cells(rows, BAG)]
        named = [(row, name) for row, name in named if name]
        if table is None:
            for row, name in named:
                self.defects.add(rows.file, row, f"it is in bag {shown(name)}, and there is no {BAGS}.")
            return bag, none, False
        if BAG not in table.columns:
            raise DataError(f"{self.raw.path / table.where} has no column `{BAG}`, only {listed(table.names)}.")
        names = [name_of(cell) for cell in table.columns[BAG]]
        place: dict[str, int] = {}
        for row, name in enumerate(names):
            if not name:
                self.defects.add(table.where, row, f"`{BAG}` is empty.")
            elif name in place:
                self.defects.add(table.where, row, f"bag {shown(name)} has a row already, row {place[name] + 1}.")
            place.setdefault(name, row)
        counts = self._counts(table)
        for row, name in named:
            if name not in place:
                self.defects.add(rows.file, row, f"it is in bag {shown(name)}, of which {table.where} has no row.")
            else:
                bag[rows.samples[row]] = place[name]
        sizes = np.bincount(bag[bag >= 0], minlength=len(names))
        for row in np.flatnonzero(sizes != counts.sum(1)).tolist():
            self.defects.add(
                table.where,
                row,
                f"the counts sum to {counts[row].sum()}, and {sizes[row]} samples are in bag {shown(names[row])}.",
            )
        for row in np.flatnonzero((sizes == 0) & (counts.sum(1) == 0)).tolist():
            self.defects.add(table.where, row, f"bag {shown(names[row])} has no sample: leave it out.")
        noise = [name_of(cell) for cell in table.columns.get(EPSILON, [])]
        return bag, torch.from_numpy(counts), any(noise)

    def _counts(self, table: TextTable) -> np.ndarray:
        columns, file = table.columns, table.where
        size = len(columns[BAG])
        counts = np.zeros((size, len(self.schema.classes)), dtype=np.int64)
        seen: set[int] = set()
        for name, cells in columns.items():
            if name in (BAG, EPSILON):
                continue
            try:
                label = self.classes.find(name)
            except ValueError as error:
                self.defects.add(file, None, f"column {shown(name)} {error}.")
                continue
            if label == NO_CLASS or label in seen:
                self.defects.add(
                    table.where, None, f"column {shown(name)} is of no class, or of one that has a column."
                )
                continue
            seen.add(label)
            for row, cell in enumerate(cells):
                if not (cell.isascii() and cell.isdigit() and len(cell) < 10):
                    self.defects.add(
                        table.where, row, f"{shown(name)} (={shown(cell)}) must be a whole number from 0 on."
                    )
                else:
                    counts[row, label] = int(cell)
        return counts
