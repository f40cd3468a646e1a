"""CSV files as people have them: read, or refused with the line, in memory that grows with the file."""

from __future__ import annotations

import csv
import gzip
import time
import tracemalloc
from pathlib import Path

import pytest

from fedlabel.data.sets import csv_files
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.text_tables import TextTable

TEXT = "a,b,outcome\n1,x,yes\n2, y ,no\n"
COLUMNS = {"a": ["1", "2"], "b": ["x", "y"], "outcome": ["yes", "no"]}


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def read(tmp_path: Path, content: str | bytes, skipped: tuple[str, ...] = ()) -> TextTable:
    path = tmp_path / "mine.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_csv(path, label_column="outcome", skipped=skipped)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_ends_of_lines_and_delimiters(tmp_path: Path, encoding: str, end: str, delimiter: str) -> None:
    content = TEXT.replace(",", delimiter).replace("\n", end).encode(encoding)
    assert read(tmp_path, content).columns == COLUMNS
    assert read(tmp_path, packed(content)).columns == COLUMNS


@pytest.mark.parametrize(
    "content",
    [
        TEXT.rstrip("\n"),
        "\n\n" + TEXT.replace("\n", "\n  \n\n"),
        "sep=;\n" + TEXT.replace(",", ";"),
        '"a","b","outcome"\n"1","x","yes"\n"2"," y ","no"\n',
        "\u00a0a,b,outcome\n1\u00a0,x,yes\n2,y,no\n",
    ],
)
def test_the_same_table_written_in_other_ways(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content).columns == COLUMNS


def test_the_label_column_decides_on_the_delimiter(tmp_path: Path) -> None:
    table = read(tmp_path, "size, in cm, of it;outcome\n3,5;yes\n4,5;no\n")
    assert table.columns == {"size, in cm, of it": ["3,5", "4,5"], "outcome": ["yes", "no"]}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (",a,b,outcome\n0,1,x,yes\n1,2,y,no\n", "column 1 has no name and holds the numbers of the rows, and was left"),
        ("a,b,outcome,\n1,x,yes,\n2,y,no,\n", "column 4 has no name and no cell filled, and was left out"),
        ("a,b,outcome,,\n1,x,yes,,\n2,y,no,,\n", "column 4 has no name and no cell filled, and was left out"),
        (TEXT + ",,\n , ,\n", "2 rows at the end have no cell filled and were left out"),
    ],
)
def test_what_is_left_out_is_said(tmp_path: Path, content: str, note: str) -> None:
    table = read(tmp_path, content)
    assert table.columns == COLUMNS
    assert [each for each in table.notes if note in each]


def test_a_row_without_cells_in_the_middle_stays(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT + ",,\n3,z,no\n").columns["a"] == ["1", "2", "", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT + "1,2\n", r"line 4: there are 2 cells for 3 columns"),
        ("# by me\n" + TEXT, r"line 2: .*begins with # is a remark"),
        (TEXT + "#end\n", r"line 4: .*begins with # is a remark"),
        (TEXT + '3,"z,no\n4,w,no\n', r"line 4: a quote that is opened there is not closed"),
        (TEXT + '3,"z" z,no\n', r"line 4: a quote that is opened there is not closed, or one is not written twice"),
        (TEXT + '3,"z,no\n4,w",no\n', r"line 4: cell 2 goes on to line 5: `z,no\\n4,w`"),
        (TEXT.encode() + b"3,\xe9,no\n", r"line 4 holds the byte 0xE9, which is no UTF-8.*iconv"),
        (TEXT.encode("utf-16-le"), "line 1 holds a NUL byte. If it is UTF-16"),
        (TEXT.encode("utf-16")[:-1], "cannot be read as CSV"),
        (TEXT.replace("x", "\0"), "line 2 holds a NUL byte"),
        (b"PK\x03\x04" + bytes(40), "a ZIP file or an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1", "an Excel workbook"),
        (b"PAR1" + bytes(40), "a Parquet file"),
        ("<!DOCTYPE html><html>", "a page of a web site"),
        (packed(packed(TEXT.encode())), "packed twice"),
        (packed(TEXT.encode() * 50)[:-12], "cannot be read as CSV"),
        (packed(TEXT.encode() + b"3,\xff")[:-8] + bytes(8), "CRC check failed"),
        (packed(b"x,outcome\n" + b"1,y\n" * 2**23), "more than 100 times as large as packed"),
        ("a,a,outcome\n1,2,x\n", r"two columns of the name `a` \(numbers 1, 2\)"),
        ("a,,outcome\n1,2,x\n", "column 2 has no name. Write one"),
        ("a,b,outcome\n", "holds no rows"),
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        (",".join(["a"] * 200_000) + "\n", "two columns of the name `a`"),
    ],
)
def test_refusals_name_the_line_and_the_cure(tmp_path: Path, content: str | bytes, message: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=r"mine\.csv.*" + message) as caught:
        read(tmp_path, content)
    assert str(caught.value).isprintable()
    assert time.process_time() - started < 5


def test_a_bomb_that_lies_about_its_size_is_stopped_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "FREE_GROWTH", 2**12)
    bomb = packed(b"a,outcome\n" + b"1,x\n" * 2**20)
    with pytest.raises(DataError, match="more than 100 times as large as packed"):
        read(tmp_path, bomb[:-4] + bytes(4))
    assert read(tmp_path, packed(TEXT.encode())).columns == COLUMNS


def test_columns_left_out_may_hold_anything_and_cost_nothing(tmp_path: Path) -> None:
    """100 kB in one cell of 20,000 rows: a column of fixed width would take 8 GB."""
    rows = [f"{i % 50},{'x' * 200_000 if i == 7 else 'short'},{'ab'[i % 2]}" for i in range(20_000)]
    content = "n,note,outcome\n" + "\n".join(rows) + '\n1,"two\nlines",a\n'
    limit = csv.field_size_limit()
    tracemalloc.start()
    table = read(tmp_path, content, ("note",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert csv.field_size_limit() == limit
    assert list(table.columns) == ["n", "outcome"]
    assert table.names == ("n", "note", "outcome")
    assert len(table) == 20_001
    assert "1 rows go over several lines, the first from line 20002" in table.notes[0]
    assert peak < 20 * len(content)


def test_memory_grows_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short cells are the worst: a text of two digits takes 51 bytes where the file has 3, a second mention 8."""
    monkeypatch.setattr(csv_files, "CHUNK", 2**12)
    content = "a,b,outcome\n" + "".join(f"{i % 90 + 10},{i % 70 + 10},{i % 2}\n" for i in range(50_000))
    tracemalloc.start()
    read(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(content) + 2**20  # a piece of the file, as rows, comes on top
