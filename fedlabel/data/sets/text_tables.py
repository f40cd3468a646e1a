"""A table file as columns of texts: the common result of all file readers, and names of its parts in messages."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedlabel.data.sets.config import DataError
from fedlabel.shown import shown

INTERNED = 4096
"""So many different cells of a column are kept once, however often they stand there."""

Columns = dict[str, list[str]]
"""Name -> texts of the cells, in the file's order of columns."""


@dataclass(frozen=True, eq=False)
class TextTable:
    """The cells of a file, without surrounding blanks. No array of fixed width: it would be as wide as the longest
    cell.
    """

    where: str
    """The name of the file in messages."""
    names: tuple[str, ...]
    """Names of all its columns."""
    columns: Columns
    """The wanted columns."""
    notes: tuple[str, ...] = ()
    decimal: str = "point"
    """The decimal separator of its numbers: point or comma."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def cells(self, name: str, rows: np.ndarray) -> list[str]:
        """Returns the cells of a column in the rows `rows`."""
        column = self.columns[name]
        return column if len(rows) == len(column) else [column[row] for row in rows.tolist()]


@dataclass(eq=False)
class Interner:
    """Gives equal cells of a column the same object, so that short and frequent ones take 8 bytes each."""

    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, cells: list[str]) -> Iterable[str]:
        """Returns the cells, equal ones as the same object."""
        if len(self.seen) < INTERNED:
            for cell in set(cells):
                self.seen.setdefault(cell, cell)
        return map(self.seen.get, cells, cells)


def quoted(text: str) -> str:
    """Returns a cell or a name in backquotes, see `shown`."""
    return f"`{shown(text)}`"


def unreadable(texts: Iterable[str]) -> str | None:
    """Returns a text with invalid characters (control characters, unassigned ones), if there is one.

    They are what is left of bytes that are missing or too many in UTF-16, where they hide the ends of lines.
    """
    for text in texts:
        odd = [] if text.isprintable() else [char for char in text if char not in "\t\n\r"]
        if any(unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") for char in odd):
            return text
    return None


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Returns names for a message, the first `limit` of them."""
    return summed([shown(name) for name in names], limit)


def summed(parts: Sequence[str], limit: int = 5) -> str:
    """Returns the parts of a sentence for a note, the first `limit` of them."""
    return ", ".join(parts[:limit]) + (f" and {len(parts) - limit} more" if len(parts) > limit else "")


def as_list(*texts: str) -> str:
    """Returns a list as the value of a key on the command line, its texts quoted where YAML needs it."""
    plain = [all(char.isalnum() or char in "_-." for char in text) and text[:1].isalnum() for text in texts]
    in_quotes = ["'" + shown(text).replace("'", "''") + "'" for text in texts]
    return f"[{','.join(text if bare else quote for text, bare, quote in zip(texts, plain, in_quotes, strict=True))}]"


def check_names(where: str, names: Sequence[str]) -> None:
    """Checks that every column has a name of its own.

    Raises:
        DataError: two have the same.
    """
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        places = [str(place + 1) for place, name in enumerate(names) if name == twice[0]]
        raise DataError(
            f"{where} has two columns of the name {quoted(twice[0])} (numbers {listed(places, 5)}). Rename one of them."
        )
