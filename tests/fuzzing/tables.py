"""CSV files with one thing changed in them: read as a person reads them, or refused with the file and the place.

Half of the cases change cells, columns or the way in which the file is written, and say what must come out; the others
change some bytes, after which at most so many rows may differ.
"""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.table_files import load_table
from fedlabel.data.sets.tables import LoadedTable, encode

ROWS = 60
HEADER = ["x", "n", "colour", "outcome"]
MARKS = ["", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "null", "None", "?", "-", "--", ".", "#N/A", " NA "]
LABEL_MARKS = ["", " ", "NA", "N/A", "nan", "<NA>", "null", "?", "#N/A"]
NUMBERS = {"1e2": 100, "+3": 3, " 7 ": 7, "\u00a08\u00a0": 8, ".5": 0.5, "5.": 5, "-1E-1": -0.1, "007": 7, "-0": 0}
ODD = [
    *(
        "x",
        "n.d.",
        "unknown",
        "1,5",
        "1 234",
        "5%",
        "$3",
        "1_000",
        "0x1f",
        "inf",
        "-Infinity",
        "∞",
        "１",
        "−3",
        "1e400",
    ),
    *(
        "2020-01-31",
        "31/01/2020",
        "10:30",
        "<0.5",
        "3*",
        "1.2.3",
        "--1",
        "1e",
        "e5",
        "1-2",
        "5 kg",
        "(3)",
        "true",
        "\u200b1",
    ),
    *("1" * 1500, "9" * 200, "\x1b[31m1", "²", "½", "٣", "1'000", "+-1", "0b1", "1j", "1d", "Ⅷ"),
]

Table = list[list[str]]


def sound(rng: random.Random) -> Table:
    """Rows of a number, a whole number, a colour and a label."""
    rows = []
    for _ in range(ROWS):
        label = rng.choice(("benign", "malignant"))
        colour = rng.choice(("red", "blue", "green"))
        rows.append([f"{rng.gauss(0, 3):.3f}", str(rng.randrange(50)), colour, label])
    for row, label in zip(rows, ("benign", "malignant") * 3, strict=False):
        row[3] = label
    return rows


def written(header: list[str], rows: Table, rng: random.Random) -> bytes:
    """The same table in one of the ways in which people write it."""
    delimiter = rng.choice(",;\t|")
    end = rng.choice(("\n", "\r\n", "\r"))
    always = rng.random() < 0.3

    def cell(text: str) -> str:
        if always or any(char in text for char in ',;\t|"\r\n') or text[:1] == "#":
            return '"' + text.replace('"', '""') + '"'
        return text

    lines = [delimiter.join(map(cell, row)) for row in (header, *rows)]
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), "")
    if rng.random() < 0.2:
        lines += [delimiter * (len(header) - 1)] * 2
    text = end.join(lines) + (end if rng.random() < 0.8 else "")
    content = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")))
    return gzip.compress(content) if rng.random() < 0.2 else content


def load(path: Path, content: bytes, **keys: object) -> LoadedTable | str:
    """The table, or the message of a refusal."""
    path.write_bytes(content)
    try:
        loaded = load_table(DataConfig("table", str(path), **{"label_column": "outcome", **keys}))  # type: ignore[arg-type]
        for split in encode(loaded.train, (loaded.test,)):
            assert torch.isfinite(split.images).all()
        return loaded
    except DataError as error:
        return str(error)


def check_message(message: str, path: Path) -> str | None:
    """What is wrong with a refusal."""
    if path.name not in message or len(message) > 1500 or not message.isprintable():
        return f"no message that can be shown: {message!r:.300}"
    return None


def whole(loaded: LoadedTable, name: str) -> np.ndarray:
    """A column in the order of the file."""
    parts = [loaded.train.column(name), loaded.test.column(name)]
    assert loaded.rows is not None
    rest = np.setdiff1d(np.arange(loaded.file_size or 0), loaded.rows)
    column = np.empty(loaded.file_size or 0, parts[0].dtype)
    column[loaded.rows.numpy()], column[rest] = parts
    return column


def compare(loaded: LoadedTable, rows: Table, numbers: dict[str, list[float]], labels: list[str]) -> str | None:
    """What is wrong with a table that was read."""
    if loaded.file_size != len(rows):
        return f"{loaded.file_size} rows of {len(rows)}"
    for name, wanted in numbers.items():
        column = whole(loaded, name)
        if column.dtype == object:
            return f"column {name} has become categories"
        if not np.array_equal(column, wanted, equal_nan=True):
            return f"column {name} has other numbers: {column.tolist()}"
    if whole(loaded, "colour").tolist() != [row[2] for row in rows]:
        return "column colour has other texts"
    names = (*loaded.class_names, "")
    assert loaded.rows is not None
    found = [names[label] for label in loaded.train.labels.tolist()]
    if found != [labels[row] for row in loaded.rows.tolist()] or (loaded.test.labels < 0).any():
        return f"other labels: {loaded.class_names}"
    return None


def read_as(rows: Table) -> tuple[dict[str, list[float]], list[str]]:
    """The numbers and labels of sound rows."""
    return {name: [float(row[place]) for row in rows] for place, name in ((0, "x"), (1, "n"))}, [r[3] for r in rows]


def case(seed: int, folder: Path) -> str | None:
    """One file; see above."""
    rng = random.Random(seed)
    path = folder / "mine.csv"
    return rng.choice((cells_changed, cells_changed, columns_changed, bytes_changed, bytes_changed))(rng, path)


def cells_changed(rng: random.Random, path: Path) -> str | None:
    """One to three cells of a column are something else."""
    rows = sound(rng)
    numbers, labels = read_as(rows)
    kind, place = rng.choice(("mark", "number", "odd", "label mark", "label variant", "missing key")), rng.randrange(2)
    chosen = rng.sample(range(6, ROWS), rng.randint(1, 3))
    refused, keys = False, {}
    if kind == "mark":
        for row in chosen:
            rows[row][place], numbers[HEADER[place]][row] = rng.choice(MARKS), float("nan")
    elif kind == "missing key":
        text, key = rng.choice((("-999", "-999"), ("-999.0", "-999"), ("n.d.", "N.D."), ("not done", "not done")))
        keys = {"missing": ("other", key)}
        for row in chosen:
            rows[row][place], numbers[HEADER[place]][row] = text, float("nan")
    elif kind == "number":
        for row in chosen:
            rows[row][place], numbers[HEADER[place]][row] = rng.choice(list(NUMBERS.items()))
    elif kind == "odd":
        refused = True
        for row in chosen:
            rows[row][place] = rng.choice(ODD)
    elif kind == "label mark":
        for row in chosen:
            rows[row][3], labels[row] = rng.choice(LABEL_MARKS), ""
    else:
        refused = True
        for row in chosen:
            rows[row][3] = rng.choice(("Benign", "MALIGNANT", "none", "-", "x" * 300, "ｂenign"))
    loaded = load(path, written(HEADER, rows, rng), **keys)
    if isinstance(loaded, str):
        return check_message(loaded, path) if refused else f"{kind} refused: {loaded}"
    return f"accepted {[rows[row] for row in chosen]}" if refused else compare(loaded, rows, numbers, labels)


def columns_changed(rng: random.Random, path: Path) -> str | None:
    """A whole column is something else, or there is one more."""
    rows = sound(rng)
    numbers, labels = read_as(rows)
    header, keys, said = list(HEADER), {}, ""
    kind = rng.choice(
        ("comma", "comma unsaid", "dates", "index", "id", "leak", "constant", "empty", "dropped", "ragged")
    )
    if kind.startswith("comma"):
        for row in rows:
            row[0] = row[0].replace(".", ",")
        keys = {"decimal": "comma"} if kind == "comma" else {}
    elif kind == "dates":
        for number, row in enumerate(rows):
            row[0] = f"2020-{number % 12 + 1:02}-{number % 28 + 1:02}"
    elif kind == "ragged":
        row = rng.choice(rows)
        row.append("1") if rng.random() < 0.5 else row.pop()
    else:
        header.insert(0, "" if kind == "index" else "more")
        keys, said = ({"drop_columns": ("more",)}, "") if kind == "dropped" else ({}, "mine.csv: ")
        for number, row in enumerate(rows):
            more = {
                "index": str(number),
                "id": str(number + 1),
                "leak": row[3][0],
                "constant": "7",
                "empty": rng.choice(MARKS),
                "dropped": "note " * rng.choice((0, 1, 50_000)) + rng.choice(ODD),
            }
            row.insert(0, more[kind])
    loaded = load(path, written(header, rows, rng), **keys)
    if kind in ("comma unsaid", "dates", "ragged"):
        return check_message(loaded, path) if isinstance(loaded, str) else f"{kind} accepted"
    if isinstance(loaded, str):
        return f"{kind} refused: {loaded}"
    if not any(said in note for note in loaded.notes) and said:
        return f"{kind} not said"
    return compare(loaded, rows if len(header) == 4 else [row[1:] for row in rows], numbers, labels)


def bytes_changed(rng: random.Random, path: Path) -> str | None:
    """Some bytes are others, more or fewer."""
    rows = sound(rng)
    numbers, labels = read_as(rows)
    content = bytearray(written(HEADER, rows, rng))
    changes: list[Callable[[int], None]] = [
        lambda at: content.__setitem__(at, rng.randrange(256)),
        lambda at: content.__setitem__(at, rng.choice(b'",;\t\r\n0-.x')),
        lambda at: content.insert(at, rng.choice(b'",;\t\r\n0-.x\0\xff')),
        lambda at: content.__delitem__(at),
        lambda at: content.__delitem__(slice(at, at + 40)),
        lambda at: content.extend(content[at : at + 40]),
    ]
    count = rng.randint(1, 3)
    for _ in range(count):
        rng.choice(changes)(rng.randrange(len(content)))
    loaded = load(path, bytes(content))
    if isinstance(loaded, str):
        return check_message(loaded, path)
    columns = {}
    for name, wanted in numbers.items():
        if name in loaded.train.names:  # its name may be another now
            columns[name] = whole(loaded, name)
            if columns[name].dtype == object:
                return f"column {name} has become categories"
            same = sum((Counter(columns[name].tolist()) & Counter(wanted)).values())
            if same < ROWS - 5 * count or abs(len(columns[name]) - ROWS) > 5 * count:
                return f"column {name} lost {ROWS - same} of {ROWS} numbers"
    known = Counter(loaded.class_names[label] for label in loaded.train.labels.tolist() if label >= 0)
    known += Counter(loaded.class_names[label] for label in loaded.test.labels.tolist())
    if sum((known & Counter(labels)).values()) < ROWS - 5 * count:
        return f"other labels: {known}"
    return None
