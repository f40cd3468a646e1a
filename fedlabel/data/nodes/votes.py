"""Writes votes.csv of a node's folder: the votes of labelling functions that its operator has, on its own samples.

The functions run when the operator calls this, and in no federated run: a node reads votes, and never code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlabel.data.labels.labeling_functions import FunctionReport, cast_votes, function_name, load_functions
from fedlabel.data.nodes.export import write_csv
from fedlabel.data.nodes.files import SAMPLE, TABLE, VOTES, RawFolder, find_table, read_files
from fedlabel.data.sets.cells import read_numbers
from fedlabel.data.sets.config import DataError
from fedlabel.shown import shown


def write_votes(path: Path, module: str, classes: Sequence[str]) -> tuple[FunctionReport, ...]:
    """Applies functions to the training samples of a folder, writes their votes, and returns how they answered.

    Args:
        path: the folder.
        module: of the functions, see `load_functions`.
        classes: names of the classes.

    Raises:
        ValueError: the module has no functions, or two of one name; the folder has defects, votes already, or a table
            that does not name its rows.
    """
    if (there := find_table(path, VOTES)) is not None:
        raise DataError(f"{there} exists: move it away to have the votes written anew.")
    functions = load_functions(module, "MODULE")
    names = [function_name(function) for function in functions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"`MODULE` (={module}) has two functions of the name {shown(twice[0])}: name one of them anew.")
    raw, defects = read_files(path)
    defects.check()
    if not raw.names:
        raise DataError(f"{path}: {TABLE} needs a column `{SAMPLE}`, by which {VOTES} names its rows.")
    train = np.flatnonzero(~raw.is_test).tolist()
    cast = cast_votes(functions, _samples(raw, train), classes)
    rows = [
        [raw.names[row], *(classes[vote] if vote >= 0 else "" for vote in votes)]
        for row, votes in zip(train, cast.votes.tolist(), strict=True)
    ]
    write_csv(path / VOTES, [SAMPLE, *names], rows)
    return cast.reports


def _samples(raw: RawFolder, rows: Sequence[int]) -> Iterator[Any]:
    """Yields samples as functions get them, see `fedlabel.data.labels.labeling_functions`."""
    if raw.images is not None:
        yield from (raw.images[row].numpy() for row in rows)
        return
    assert raw.table is not None
    columns: dict[str, Sequence[float | str]] = {}
    for name, cells in raw.table.columns.items():
        read = read_numbers(cells)
        columns[name] = cells if read.odd else read.values.tolist()  # a missing number is NaN
    yield from ({name: cells[row] for name, cells in columns.items()} for row in rows)
