"""The JSON files of a run: the types that JSON has, and reading what runs wrote."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedlabel.errors import naming
from fedlabel.record.names import METRICS_JSONL, PARTITION_JSON, SUMMARY_JSON


def as_json(value: object) -> Any:
    """Returns `value` in JSON's types: arrays as lists, NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_line(row: Mapping[str, object]) -> str:
    """Returns a line of JSON, see `as_json`."""
    return json.dumps(as_json(row), allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rounds in a run folder's metrics.jsonl, one dictionary each; NaN and infinity read as None.

    A last line without its end, of a process that was killed while it wrote, is left out.

    Args:
        path: the run folder.

    Raises:
        ValueError: there is no metrics.jsonl, or a complete line of it is not what `RunFolder.log_round` writes.
    """
    file = path / METRICS_JSONL
    with naming(file):
        if not file.is_file():
            raise ValueError(f"{file} does not exist: {path} is not the folder of a run.")
        lines = file.read_bytes().split(b"\n")[:-1]
    return [_read_round(file, number, line) for number, line in enumerate(lines, start=1)]


class MetricsFollower:
    """Reads a metrics.jsonl that grows, each line once.

    Args:
        path: the run folder.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._read, self._inode = path / METRICS_JSONL, 0, 0
        self.rows: list[dict[str, Any]] = []
        """The rounds so far, without their lists."""
        self.written = 0.0
        """When the file was changed last, in seconds since 1970."""
        self.lists: dict[str, list[float | None]] = {}
        """Tag -> the last number that there was at each place of the lists, e.g. of each client."""

    def read(self) -> None:
        """Adds the rounds that have been written since the last call.

        Raises:
            ValueError: see `read_metrics`.
        """
        with naming(self._file), open(self._file, "rb") as file:
            status = os.fstat(file.fileno())
            inode, self.written = status.st_ino, status.st_mtime
            if inode != self._inode:  # resuming a run replaces the file
                self.rows, self.lists, self._read, self._inode = [], {}, 0, inode
            file.seek(self._read)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            row = _read_round(self._file, len(self.rows) + 1, line)
            for tag in [tag for tag, value in row.items() if type(value) is list]:
                new, old = row.pop(tag), self.lists.get(tag, [])
                old = old if len(old) == len(new) else new
                self.lists[tag] = [was if value is None else value for value, was in zip(new, old, strict=True)]
            self.rows.append(row)


def _read_round(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """Returns the round in a line of metrics.jsonl."""
    try:
        row = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        row = None
    if not _is_round(row):
        raise ValueError(
            f"{file}, line {number} is damaged: {line[:80]!r}. Put it back as it was, or remove it if it is the last."
        )
    assert isinstance(row, dict)
    return row


def _no_number(text: str) -> None:
    """JSON has neither NaN nor infinity, and we write none."""
    raise ValueError(text)


def _is_round(row: Any) -> bool:
    """Whether a line holds a round and metrics, each a number, None, or a list of such."""
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        return False
    numbers = (int, float, type(None))
    return all(
        type(value) in numbers or (type(value) is list and all(type(each) in numbers for each in value))
        for value in row.values()
    )


def read_summary(path: Path) -> dict[str, Any]:
    """Returns the content of a run folder's summary.json.

    Raises:
        ValueError: it is damaged, or was written when results were averaged over the last ten evaluations.
    """
    file = path / SUMMARY_JSON
    try:
        summary = json.loads(file.read_text())
        means = [value for value in summary.values() if isinstance(value, dict) and "best" in value]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): move {path} away and run it again.") from error
    if any("mean_last_tenth" not in value for value in means):
        raise ValueError(
            f"{file} is of an earlier version, whose mean was that of the last ten evaluations, not of the last tenth "
            f"of the rounds: move {path} away and run it again."
        )
    return dict(summary)


def read_client_names(path: Path) -> dict[int, str]:
    """Returns client -> its name, of the clients that a run folder's partition.json names; {} without such a file.

    Clients have names where a column of the data assigns samples to them (partition.kind=column).

    Raises:
        ValueError: the file is damaged.
    """
    file = path / PARTITION_JSON
    with naming(file):
        if not file.is_file():
            return {}
        text = file.read_bytes()
    try:
        clients = list(json.loads(text)["clients"])
        named = {each.get("client", place): each["name"] for place, each in enumerate(clients) if "name" in each}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): restore it, or move it away.") from error
    return {int(client): str(name) for client, name in named.items()}
