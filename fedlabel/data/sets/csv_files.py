"""Reads CSV files as columns of texts, compressed or not, in memory and time linear in the size of the file.

Nothing is guessed that changes what is read: a row with another number of cells than the first line, a quote that is
not closed, bytes that are no text, a file of another kind are refused with their line.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.text_tables import Interner, TextTable, check_names, quoted

MAX_LINE = 2**25
"""Characters of a line, and so of a cell. Longer ones are taken for damage."""
MAX_GROWTH = 100
"""A packed file may hold so many times its own size, beyond `FREE_GROWTH`; more is taken for a bomb."""
FREE_GROWTH = 2**24
CHUNK = 2**18
"""About so many cells are held as rows before they are put into columns."""
DELIMITERS = ",;\t|"

_GZIP = b"\x1f\x8b"
_OTHER_KINDS = {
    b"PK\x03\x04": "a ZIP file or an Excel workbook. Unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook. Save the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file. Let its name end in .parquet",
    b"BZh": "packed by bzip2. Unpack it, or pack it by gzip",
    b"\xfd7zXZ": "packed by xz. Unpack it, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd. Unpack it, or pack it by gzip",
    b"7z\xbc\xaf": "packed by 7-Zip. Unpack it, or pack it by gzip",
    b"%PDF": "a PDF. Export the table as CSV",
    b"<!DOCTYPE": "a page of a web site. Download the file itself",
    b"<!doctype": "a page of a web site. Download the file itself",
    b"<html": "a page of a web site. Download the file itself",
}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_csv(
    path: Path,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    label_column: str | None = None,
    skipped: Collection[str] = (),
    decimal: str = "point",
    empty_rows: bool = False,
) -> TextTable:
    """Returns the columns of a CSV file, without blanks around cells.

    Args:
        path: the file, packed by gzip or not; UTF-8, or UTF-16 or UTF-32 with a byte order mark.
        delimiter: between cells; None: the one that makes `label_column` a column, else the one that the first line
            has most of, of commas, semicolons, tabs and bars.
        names: of the columns; None: they stand in the first line.
        label_column: see `delimiter`.
        skipped: names of columns that are read over.
        decimal: see `TextTable`.
        empty_rows: whether rows without a filled cell are rows, too, also at the end; and blank lines, in a file of one
            column.

    Raises:
        DataError: the file cannot be read, or is no table.
    """
    limit = csv.field_size_limit(MAX_LINE)  # one for the whole process: put back below
    try:
        with _opened(path) as (binary, most), _as_text(path, binary) as text:
            lines = _lines(path, text, most)
            first = list(islice(lines, 1))
            if first and names and first[0].startswith("|"):
                first = []  # Adult's test set begins with a remark after a bar.
            if first and (told := re.fullmatch(r'"?sep=(.)"?', first[0].rstrip("\r\n"))):  # so Excel says it
                delimiter, first = told[1], []
            offset = 1 - len(first)
            first += islice(lines, 20)
            delimiter = delimiter or _delimiter(first, label_column)
            reader = csv.reader(chain(first, lines), delimiter=delimiter, skipinitialspace=True, strict=True)
            return _Reading(path, reader, offset, skipped, empty_rows).table(names, decimal)
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}. Write it again, as UTF-8.") from error
    finally:
        csv.field_size_limit(limit)


class _Reading:
    """Reads rows, in chunks of the file."""

    def __init__(self, path: Path, reader: Any, offset: int, skipped: Collection[str], empty_rows: bool) -> None:
        self.path, self.reader, self.offset, self.skipped, self.empty_rows = path, reader, offset, skipped, empty_rows
        self.before = offset  # line where the row before this one ended
        self.empty: list[list[str]] = []  # rows without a filled cell, so far the last ones
        self.multiline: list[int] = []  # lines where rows begin that go over several

    @property
    def line(self) -> int:
        """The line of the file where the newest row ends."""
        return self.reader.line_num + self.offset

    def table(self, names: Sequence[str] | None, decimal: str) -> TextTable:
        if names is None:
            names = [name.strip() for name in next(self.rows(), [])]
            self.before = self.line
        self.remark = bool(names) and names[0].startswith("#")
        check_names(str(self.path), names)
        kept = [(place, name) for place, name in enumerate(names) if name not in self.skipped]
        columns: dict[str, list[str]] = {name: [] for _, name in kept}
        intern = {name: Interner() for name in columns}
        rows = self.full_rows(len(names), {place for place, _ in kept})
        while chunk := list(islice(rows, max(1, CHUNK // len(names)) if names else 1)):
            for place, name in kept:
                columns[name].extend(intern[name]([row[place].strip() for row in chunk]))
        notes = self.notes
        if unnamed := [place for place, name in kept if not name]:
            notes.append(self.without_name(unnamed, columns.pop("")))
        if not columns or not len(next(iter(columns.values()))):
            raise DataError(f"{self.path} holds no rows. At least one is needed, below the names of the columns.")
        return TextTable(str(self.path), tuple(filter(None, names)), columns, tuple(notes), decimal)

    def rows(self, blank: bool = False) -> Iterator[list[str]]:
        """Yields the rows that are not blank; `blank`: also blank rows, as one empty cell."""
        try:
            for row in self.reader:
                if row and (len(row) > 1 or row[0].strip()):
                    yield row
                elif blank:
                    yield [""]
                self.before = self.line
        except csv.Error as error:
            reason = "a quote that is opened there is not closed, or one is not written twice"
            if "limit" in str(error):
                reason = f"a cell has more than {MAX_LINE} characters"
            raise DataError(
                f"{self.path} cannot be read as CSV: line {self.before + 1}: {reason}. Correct the line; a quote "
                'inside a quoted cell is written twice ("").'
            ) from error

    def full_rows(self, width: int, kept: set[int]) -> Iterator[list[str]]:
        """Yields the rows, checked, without trailing rows that have no filled cell."""
        for row in self.rows(blank=self.empty_rows and width == 1):
            if len(row) != width:
                remark = ""
                if row[0].startswith("#") or self.remark:
                    remark = " If a line that begins with # is a remark, delete it."
                raise DataError(
                    f"{self.path}, line {self.before + 1}: there are {len(row)} cells for {width} columns. Correct "
                    f"the line; a cell that holds the character between cells must be quoted.{remark}"
                )
            if self.line > self.before + 1:
                self.check_lines(row, kept)
            if not any(row) and not self.empty_rows:
                self.empty.append(row)
                continue
            if self.empty:
                yield from self.empty
                self.empty = []
            yield row

    def check_lines(self, row: list[str], kept: set[int]) -> None:
        """Rejects line breaks in cells of wanted columns: with an unbalanced quote a cell swallows rows without another
        symptom.
        """
        for place, cell in enumerate(row):
            if place in kept and ("\n" in cell or "\r" in cell):
                raise DataError(
                    f"{self.path}, line {self.before + 1}: cell {place + 1} goes on to line {self.line}: "
                    f"{quoted(cell)}. If a quote is not closed: correct it; else leave the column out by "
                    "data.drop_columns, or its line breaks."
                )
        self.multiline.append(self.before + 1)

    @property
    def notes(self) -> list[str]:
        """Notes on the rows."""
        found = []
        if self.multiline:
            found.append(
                f"{self.path}: {len(self.multiline)} rows go over several lines, the first from line "
                f"{self.multiline[0]}, in columns that are left out; if that is not meant, a quote is not closed."
            )
        if self.empty:
            found.append(f"{self.path}: {len(self.empty)} rows at the end have no cell filled and were left out.")
        return found

    def without_name(self, places: list[int], cells: list[str]) -> str:
        """Returns a note on a column without a name: the row numbers that pandas writes, or empty.

        Raises:
            DataError: it is something else.
        """
        column = f"column {places[0] + 1} has no name"
        if not any(cells):  # several without a name have come into one
            return f"{self.path}: {column} and no cell filled, and was left out."
        if len(places) == 1 and cells in ([str(row + start) for row in range(len(cells))] for start in (0, 1)):
            return f"{self.path}: {column} and holds the numbers of the rows, and was left out."
        raise DataError(f"{self.path}: {column}. Write one in the first line.")


def _delimiter(lines: list[str], label_column: str | None) -> str:
    for delimiter in DELIMITERS:
        try:
            header = next(filter(None, csv.reader(lines, delimiter=delimiter, skipinitialspace=True)), [])
        except csv.Error:
            continue
        if len(header) > 1 and label_column in [name.strip() for name in header]:
            return delimiter
    head = next((line for line in lines if line.strip()), "")
    return max(DELIMITERS, key=head.count)


# -------------------------------------------------------------------------------------------------- from bytes to lines


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader, int | None]]:
    """Yields the bytes of a file, decompressed, and their largest possible number."""
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(0)
        if not start.startswith(_GZIP):
            yield file, None
            return
        size = file.seek(0, io.SEEK_END)
        most = MAX_GROWTH * size + FREE_GROWTH
        file.seek(max(0, size - 4))
        if (
            int.from_bytes(file.read(), "little") > most
        ):  # what gzip says of itself: it need not be true, but saves time
            raise _grown(path)
        file.seek(0)
        with gzip.open(file) as unpacked:
            yield unpacked, most  # type: ignore[misc]


def _as_text(path: Path, binary: io.BufferedReader) -> io.TextIOWrapper:
    """Returns the bytes decoded, with the encoding detected from the first ones."""
    start = binary.peek(16)[:16]
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), None)
    if start.startswith(_GZIP):
        kind = "packed twice. Unpack it once"
    if kind is not None:
        raise DataError(f"{path} cannot be read as CSV: it is {kind}.")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(binary, encoding, newline="")


def _lines(path: Path, text: io.TextIOWrapper, most: int | None) -> Iterator[str]:
    """Yields the lines of a file with their line endings, of any kind."""
    read = 0
    for number, line in enumerate(iter(partial(text.readline, MAX_LINE), ""), 1):
        read += len(line)
        if most is not None and read > most:
            raise _grown(path)
        if "\0" in line:
            raise DataError(
                f"{path} cannot be read as CSV: line {number} holds a NUL byte. If it is UTF-16, write it again as "
                "UTF-8; else it is damaged, or no text."
            )
        if len(line) == MAX_LINE:
            raise DataError(
                f"{path} cannot be read as CSV: line {number} has {MAX_LINE} characters or more. Is it the right file?"
            )
        yield line


def _grown(path: Path) -> DataError:
    return DataError(
        f"{path} cannot be read as CSV: unpacked, it is more than {MAX_GROWTH} times as large as packed. If it is "
        "meant to be, unpack it by hand."
    )


def _no_text(path: Path, error: UnicodeDecodeError) -> DataError:
    """Returns the message for bytes that are not in the file's encoding, with the first such line."""
    place = ""
    if error.encoding == "utf-8":
        try:
            with _opened(path) as (binary, _):
                for number, line in enumerate(iter(partial(binary.readline, MAX_LINE), b""), 1):
                    try:
                        line.decode()
                    except UnicodeDecodeError as found:
                        place = f"line {number} holds the byte 0x{line[found.start]:02X}, which is no UTF-8"
                        break
        except (OSError, EOFError, zlib.error) as damage:  # the end of a packed file, where it is checked
            place = str(damage)
    return DataError(
        f"{path} cannot be read as CSV: {place or error}. Write it again as UTF-8: in Excel as `CSV UTF-8`, elsewhere "
        "by iconv -f WINDOWS-1252 -t UTF-8 (if that is what it is written in)."
    )
