"""Suspected label errors, a file for each client, which stays with it; and labels revised by them.

`suspects/client-000.csv` has a line for each suspect, the most suspicious first: the row of the sample in the client's
data (from 0), the names of its given and of the suggested class, and the score of its label in [0, 1], low where it is
probably wrong.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedlabel.data.labels.folds import without_labels
from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.labels.supervision_config import AUDIT_ACTIONS
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.config import DataError
from fedlabel.errors import naming
from fedlabel.shown import shown, shown_repr

SUSPECTS = "suspects"
"""Folder of the files, in that of an audit."""
COLUMNS = ("row", "given_label", "suggested_label", "score")


class Suspects(NamedTuple):
    """The suspects of one client."""

    rows: np.ndarray
    """(m,) int64, positions in the client's data."""
    given: np.ndarray
    """(m,) int64, their labels."""
    suggested: np.ndarray
    """(m,) int64, the classes that they more probably have."""
    score: np.ndarray
    """(m,) float64 in [0, 1], low where the label is probably wrong."""


def file_name(client: int) -> str:
    """Returns the path of a client's file in the folder of an audit."""
    return f"{SUSPECTS}/client-{client:03d}.csv"


def to_csv(suspects: Suspects, class_names: Sequence[str]) -> str:
    """Returns the text of a client's file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place in np.argsort(suspects.score, kind="stable").tolist():
        row, given, suggested = (int(each[place]) for each in suspects[:3])
        writer.writerow((row, class_names[given], class_names[suggested], f"{suspects.score[place]:.6f}"))
    return text.getvalue()


def read_suspects(path: Path, class_names: Sequence[str]) -> Suspects:
    """Reads a client's file.

    Raises:
        DataError: it is missing, or not what `to_csv` writes.
    """
    with naming(path):
        if not path.is_file():
            raise DataError(
                f"`supervision.audit`: there is no file {path}. Give the folder that `fedlabel audit` wrote, of a "
                "federation with as many clients."
            )
        content = path.read_bytes()
    numbers = {name: number for number, name in enumerate(class_names)}
    found: list[tuple[int, int, int, float]] = []
    rows: set[int] = set()
    try:
        lines = list(csv.reader(io.StringIO(content.decode())))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"`supervision.audit`: {path} is damaged ({shown(error)}): audit the run again.") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise DataError(
            f"`supervision.audit`: {path} must begin with the line {','.join(COLUMNS)}: audit the run again."
        )
    for number, line in enumerate(lines[1:], start=2):
        try:
            row, given, suggested, score = line
            if not row.isdecimal() or len(row) > 15 or int(row) in rows:
                raise ValueError
            rows.add(int(row))
            found.append((int(row), numbers[given], numbers[suggested], float(score)))
        except (ValueError, KeyError) as error:
            raise DataError(
                f"`supervision.audit`: {path}, line {number} ({shown_repr(','.join(line))}) must hold a row that no "
                "other line has, the names of two classes of the data, and a score: put it right, or delete it."
            ) from error
    columns = list(zip(*found, strict=True)) or [()] * len(COLUMNS)
    rows_of, given_of, suggested_of = (np.array(values, dtype=np.int64) for values in columns[:3])
    return Suspects(rows_of, given_of, suggested_of, np.array(columns[3], dtype=np.float64))


def revised(
    record: Supervision, parts: Ragged, folder: Path, action: str, class_names: Sequence[str], weight: float = 1.0
) -> Supervision:
    """Returns the record with the suspects' labels revised.

    Args:
        record: of all samples.
        parts: per client the rows of its samples.
        folder: of an audit.
        action: what is done with them, see `SupervisionConfig.audit_action`.
        class_names: of the data.
        weight: of suspects, for action weight.

    Raises:
        DataError: a file is missing or damaged, or is of other samples or labels.
    """
    assert action in AUDIT_ACTIONS
    label, rows, suggested = record.label.numpy(), [], []
    for client, held in enumerate(parts):
        path = folder / file_name(client)
        found = read_suspects(path, class_names)
        inside = found.rows < len(held)
        known = np.full(len(found.rows), -1)
        known[inside] = label[held[found.rows[inside]]]
        wrong = np.flatnonzero(known != found.given)
        if len(wrong):
            raise DataError(
                f"`supervision.audit`: {path} says that row {found.rows[wrong[0]]} has the label "
                f"{shown_repr(class_names[found.given[wrong[0]]])}, and here it has not: the audit is of other data, "
                "another partition, other labels or another seed. Audit a run of this configuration."
            )
        rows.append(held[found.rows])
        suggested.append(found.suggested)
    index, classes = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(suggested))
    if action == "drop":
        mask = np.zeros(len(label), dtype=bool)
        mask[index.numpy()] = True
        return without_labels(record, mask)
    if action == "weight":
        weights = torch.ones(len(label))
        weights[index] = weight
        return replace(record, weight=weights)
    chosen = classes[:, None] == torch.arange(record.candidates.shape[1])
    candidates = record.candidates.clone()
    candidates[index] = chosen if action == "relabel" else chosen | candidates[index]
    return replace(record, candidates=candidates)
