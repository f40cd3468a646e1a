"""The label column of a table: the class of every row, and rows without a label."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fedlabel.data.sets.cells import MISSING, is_number
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.text_tables import as_list, listed, quoted, unreadable
from fedlabel.names import did_you_mean
from fedlabel.shown import shown

MAYBE_CLASSES = frozenset(("none", "-", "--", "."))
"""Of the marks for what is not known those that are also used as names of classes (lesion: none; test: -)."""
MAX_NAME = 200
"""Characters of a class's name."""
MANY = 20
"""More classes than this must have two rows each on average."""
UNLABELLED = ("-1", "unknown", "unlabeled", "unlabelled", "missing", "not known")
"""Names of classes of which it is said that they may mean no label."""


@dataclass(frozen=True)
class LabelColumn:
    """How labels are read."""

    name: str
    missing: frozenset[str]
    """Further marks (`data.missing`), in lower case."""

    def read(self, where: str, cells: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
        """Returns the classes in a column, the label of every row, and notes.

        Args:
            where: what to call the file.
            cells: n texts.

        Returns:
            The names in the order of numbers if all are numbers and else of the alphabet; (n,) int64, -1 = no label;
            sentences.

        Raises:
            DataError: it cannot be told which class a row has, or the column does not hold classes.
        """
        counts = Counter(cells)
        names = [name for name in counts if not self._absent(name)]
        head = f"{where}: column {shown(self.name)}"
        if (found := unreadable(names)) is not None:
            raise DataError(
                f"{head} holds characters that no text has in data row {cells.index(found) + 1}: {quoted(found)}. Is "
                "the file damaged? Correct it."
            )
        self._check_doubtful(head, names, cells)
        self._check_spellings(head, names, cells)
        self._check_number(head, names, sum(counts[name] for name in names))
        names.sort()
        if all(map(is_number, names)):
            names.sort(key=float)
        notes = self._notes(head, names, counts, len(cells))
        return tuple(names), self.numbers(where, cells, names), notes

    def numbers(self, where: str, cells: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """Returns (n,) int64, the index of each cell in `names`, -1 = no label.

        Raises:
            DataError: a cell is none of them.
        """
        place = {name: number for number, name in enumerate(names)}
        for cell in set(cells) - set(names):
            place[cell] = -1 if self._absent(cell) else -2
        numbers = np.fromiter(map(place.__getitem__, cells), np.int64, len(cells))
        if len(wrong := np.flatnonzero(numbers == -2)):
            cell = cells[wrong[0]]
            raise DataError(
                f"{where}: data row {wrong[0] + 1} has the label {quoted(cell)}, which is none of {listed(names)} of "
                f"the training rows.{did_you_mean(cell, names)} Correct it, or delete the row."
            )
        return numbers

    def _absent(self, cell: str) -> bool:
        lower = cell.casefold()
        if lower in self.missing or (lower in MISSING and lower not in MAYBE_CLASSES):
            return True
        return len(cell) <= MAX_NAME and is_number(cell) and float(cell) in map(float, filter(is_number, self.missing))

    def _check_doubtful(self, head: str, names: Collection[str], cells: Sequence[str]) -> None:
        for name in names:
            if name.casefold() in MAYBE_CLASSES and not (name == "-" and "+" in names):
                raise DataError(
                    f"{head} holds {quoted(name)} {cells.count(name)} times, first in data row {cells.index(name) + 1}:"
                    f" a class, or no label? If no label, set data.missing={as_list(name)}; if a class, write "
                    "it otherwise."
                )
            if len(name) > MAX_NAME:
                raise DataError(
                    f"{head} holds a text of {len(name)} characters in data row {cells.index(name) + 1}: "
                    f"{quoted(name)}. Names of classes have at most {MAX_NAME}. Is it the right column of labels?"
                )

    def _check_spellings(self, head: str, names: Collection[str], cells: Sequence[str]) -> None:
        seen: dict[object, str] = {}
        for name in names:
            key: object = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
            key = float(name) if is_number(name) else key
            if (other := seen.setdefault(key, name)) != name:
                rows = [f"{quoted(each)} (data row {cells.index(each) + 1})" for each in (other, name)]
                same = "the same number" if isinstance(key, float) else "the same but for case, blanks or look"
                raise DataError(f"{head} holds {rows[0]} and {rows[1]}, {same}: one class or two? Write it in one way.")

    def _check_number(self, head: str, names: Sequence[str], labelled: int) -> None:
        fractions = all(map(is_number, names)) and any(float(name) % 1 for name in names)
        if len(names) > MANY and (fractions or len(names) > labelled / 2):
            raise DataError(
                f"{head} holds {len(names)} different labels in {labelled} rows, such as {listed(names, 3)}. Is it a "
                "number to predict, or an identifier? Labels are classes: put ranges of it together, or name another "
                "data.label_column."
            )

    def _notes(self, head: str, names: Sequence[str], counts: Counter[str], rows: int) -> list[str]:
        present = set(names)
        absent = {cell: count for cell, count in counts.items() if cell not in present}
        found = []
        if absent:
            marks = ", ".join(
                f"{quoted(cell) if cell else 'empty'} {count}" for cell, count in sorted(absent.items())[:9]
            )
            found.append(
                f"{head} has no label in {sum(absent.values())} of {rows} rows ({marks}); of training rows these are "
                "unlabelled."
            )
        if meant := [name for name in names if name.casefold() in UNLABELLED and len(names) > 2]:
            found.append(
                f"{head}: {quoted(meant[0])} ({counts[meant[0]]} rows) is taken for a class. If it means no label, set "
                f"data.missing={as_list(meant[0])}."
            )
        if len(names) > MANY and all(map(is_number, names)):
            found.append(
                f"{head} holds {len(names)} different numbers, each a class. Is it a number to predict? Then put "
                "ranges of it together."
            )
        return found
