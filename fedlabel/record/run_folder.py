"""The run folder: configuration, metrics and figures of one run, on disk in a form that survives a kill at any time.

    runs/<name>/
      config.yaml         the resolved configuration
      partition.json/.png who holds what
      metrics.jsonl       one JSON object a line and a round
      events.out.*        the same numbers, and figures, for TensorBoard
      failures.log        one entry per failed client, with its traceback
      checkpoints/        see server/checkpoint.py
      summary.json        written when the run ends

Small files are replaced as a whole (`write_atomic`); `metrics.jsonl` only grows, and a line counts once it is complete.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary as summaries

from fedlabel.errors import make_folder, naming
from fedlabel.metric_tags import LOWER, Tag, find_tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # not on Windows: there folders are not locked
    fcntl = None  # type: ignore[assignment]

Hparam = str | int | float | bool
CONFIG_YAML = "config.yaml"
METRICS_JSONL = "metrics.jsonl"
FAILURES_LOG = "failures.log"
CHECKPOINTS = "checkpoints"
PARTITION_JSON = "partition.json"
SUMMARY_JSON = "summary.json"
FUNCTIONS_CSV = "labeling_functions.csv"
LEAST_AVERAGED = 5
"""Rounds over which results are averaged, where a tenth of the run is less."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_POSITIVE = 1e-12 * 1.1 ** np.arange(775)
_LIMITS = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])
"""Limits of the bins of TensorBoard's histograms."""


class FolderLock:
    """Locks a folder against writes by other processes, until it is closed or this process ends in any way."""

    def __init__(self, path: Path) -> None:
        """Takes the lock.

        Raises:
            ValueError: another process (or another part of this one) has it, or there is no such folder.
        """
        self._folder = -1
        """-1 where nothing is locked."""
        if fcntl is None:
            return
        with naming(path):
            self._folder = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._folder)
            raise ValueError(
                f"Another process is writing into {path}: wait until it has finished, or stop it first."
            ) from None

    def close(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


class EventFile:
    """A new file of events for TensorBoard.

    Not `torch.utils.tensorboard.SummaryWriter`: it writes in a thread, so that a full disk shows as a traceback of that
    thread and, at the next call, as an error that names no file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Creates the file; `purge_step`: TensorBoard hides entries of earlier files from this step on."""
        # TensorBoard reads the files of a folder in the order of their names, and takes what has "tfevents" in it.
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        )
        self.path = folder / name
        with naming(self.path):
            self._file = open(self.path, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"), None)
        if purge_step is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add(self, summary: Summary, step: int | None = None) -> None:
        """Adds a summary made by `torch.utils.tensorboard.summary`."""
        self._write(Event(summary=summary), step)

    def flush(self) -> None:
        """Writes buffered events to the operating system."""
        with naming(self.path):
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with naming(self.path):
            self._file.close()

    def _write(self, event: Event, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = step
        with naming(self.path):
            self._records.write(event.SerializeToString())


class RunFolder:
    """One run's folder, open for writing; make it with `create` or `resume`, and `close` it.

    All its methods raise a `FileError` where the system does not let them write.
    """

    def __init__(self, path: Path, purge_step: int | None = None) -> None:
        """Opens a new event file in an existing folder; not for callers, see `create` and `resume`."""
        self.path = path
        self._lock = FolderLock(path)
        try:
            self._events = EventFile(path, purge_step)
        except BaseException:
            self._lock.close()
            raise
        self._failures: list[str] = []
        self._next_round = purge_step or 1

    @classmethod
    def create(cls, path: Path, config_yaml: str, hparams: Mapping[str, Hparam]) -> RunFolder:
        """Makes a new run folder, all or nothing.

        Args:
            path: the folder; its parents are made as needed.
            config_yaml: the resolved configuration, kept as config.yaml.
            hparams: dotted key -> value, shown by TensorBoard's HParams tab.

        Raises:
            ValueError: the folder exists and is not empty; nothing is touched.
        """
        exists = f"{path} exists: give another --name, or --resume to go on with it."
        with naming(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ValueError(exists)
        make_folder(path.parent)
        unfinished = _temporary(path)
        try:
            make_folder(unfinished / CHECKPOINTS)
            write_atomic(unfinished / CONFIG_YAML, config_yaml)
            write_atomic(unfinished / METRICS_JSONL, "")
            try:
                unfinished.rename(path)
            except OSError as error:  # another process filled the folder meanwhile
                raise ValueError(exists) from error
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        with naming(path.parent):
            _sync_folder(path.parent)
        folder = cls(path)
        # Without the "experiment" record: TensorBoard takes its columns from the first such record it meets, and runs
        # of other methods beside it would lose theirs. Lacking one it gathers the columns from all runs.
        # (TensorBoard 2.21 then lists metrics beside them only for --logdir on the folder that holds the runs.)
        _, session_start, _ = summaries.hparams(dict(hparams), {})
        with folder.closed_on_error():
            folder._events.add(session_start)
            folder._events.flush()
        return folder

    @classmethod
    def resume(cls, path: Path, completed_round: int) -> RunFolder:
        """Opens the folder of an earlier run and discards what it logged after `completed_round`.

        Later lines of metrics.jsonl are dropped, with a torn last one; TensorBoard is told to hide later events.

        Raises:
            ValueError: there is no run in `path`, another process writes it, or its metrics.jsonl is damaged or lacks
                `completed_round`.
        """
        with naming(path):
            found = (path / CONFIG_YAML).is_file()
        if not found:
            raise ValueError(f"{path} holds no run (no config.yaml): nothing to resume. Check --name and --out.")
        FolderLock(path).close()  # before anything is changed
        rows = read_metrics(path)
        if [row["round"] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError(
                f"{path / 'metrics.jsonl'} does not go from round to round: the file was changed after the run. "
                "Restore it, or start a new run under another --name."
            )
        if len(rows) < completed_round:
            raise ValueError(
                f"{path / 'metrics.jsonl'} ends at round {len(rows)}, but the checkpoint is of round "
                f"{completed_round}: the file was changed after the run. Restore it, or start a new run under another "
                "--name."
            )
        rows = rows[:completed_round]
        with naming(path):
            for leftover in path.rglob(f".*{_TEMPORARY}"):  # of a write that was killed
                leftover.unlink()
        write_atomic(path / METRICS_JSONL, "".join(_json_line(row) for row in rows))
        _wait_for_later_name(path)
        folder = cls(path, purge_step=completed_round + 1)
        with folder.closed_on_error():
            folder._events.flush()
        return folder

    @property
    def config_yaml(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_YAML

    @property
    def partition_json(self) -> Path:
        """Sample indices of every client."""
        return self.path / PARTITION_JSON

    @property
    def supervision_json(self) -> Path:
        """Audit of the labels: kinds per client, sizes of candidate sets, counts of noisy labels."""
        return self.path / "supervision.json"

    @property
    def functions_csv(self) -> Path:
        """Analysis of labelling functions, over all clients and per client; absent without such functions."""
        return self.path / FUNCTIONS_CSV

    @property
    def partition_png(self) -> Path:
        """Figure of the partition."""
        return self.path / "partition.png"

    @property
    def metrics_jsonl(self) -> Path:
        """Metrics as one JSON object per line and round."""
        return self.path / METRICS_JSONL

    @property
    def failures(self) -> Path:
        """Every failed client with its traceback; absent if none failed."""
        return self.path / FAILURES_LOG

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def summary_json(self) -> Path:
        """The run's summary, written at its end."""
        return self.path / SUMMARY_JSON

    def log_round(
        self,
        round_number: int,
        metrics: Mapping[str, float],
        *,
        lists: Mapping[str, np.ndarray | Tensor] = _NOTHING,
        bins: Mapping[str, np.ndarray] = _NOTHING,
        figures: Mapping[str, Figure] = _NOTHING,
        texts: Mapping[str, str] = _NOTHING,
        files: Mapping[str, str] = _NOTHING,
    ) -> None:
        """Writes one round to TensorBoard and then to metrics.jsonl, whose line commits the round.

        Args:
            round_number: the round, TensorBoard's step.
            metrics: tag -> scalar. NaN and infinity become null in metrics.jsonl.
            lists: tag -> (n,) numbers, e.g. one per client: lists in metrics.jsonl, histograms (of the finite ones) in
                TensorBoard.
            bins: tag -> (n,) how many values are in each of n equal parts of [0, 1]: a histogram in TensorBoard only.
            figures: tag -> figure; TensorBoard only.
            texts: tag -> Markdown; TensorBoard only.
            files: name of a file in the folder -> its whole text.
        """
        for name, text in files.items():
            write_atomic(self.path / name, text)
        rows = {tag: _as_array(values) for tag, values in lists.items()}
        scalars = {tag: float(value) for tag, value in metrics.items()}
        for tag, value in scalars.items():
            self._events.add(summaries.scalar(tag, value), round_number)
        for tag, values in rows.items():
            finite = values[np.isfinite(values)]
            if len(finite):
                self._events.add(summaries.histogram(tag, finite, _LIMITS), round_number)
        for tag, counts in bins.items():
            self._add_bins(tag, counts, round_number)
        for tag, figure in figures.items():
            self._add_figure(tag, figure, round_number)
        for tag, text in texts.items():
            self._events.add(summaries.text(tag, text), round_number)
        self._next_round = round_number
        self._flush_failures()
        self._next_round = round_number + 1
        self._events.flush()
        _append(self.metrics_jsonl, _json_line({"round": round_number, **scalars, **rows}))

    def log_figure(self, tag: str, figure: Figure, round_number: int = 0) -> None:
        """Shows a figure in TensorBoard."""
        self._add_figure(tag, figure, round_number)
        self._events.flush()

    def log_text(self, tag: str, text: str, round_number: int = 0) -> None:
        """Shows Markdown in TensorBoard."""
        self._events.add(summaries.text(tag, text), round_number)
        self._events.flush()

    def log_failure(self, text: str) -> None:
        """Appends a client's failure to failures.log; its first line also shows in TensorBoard, with its round."""
        _append(self.failures, text.rstrip("\n") + "\n")
        self._failures.append(text.partition("\n")[0])

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json and marks the run as finished in TensorBoard's HParams tab."""
        write_atomic(self.summary_json, json.dumps(as_json(summary), indent=2, allow_nan=False) + "\n")
        _, _, session_end = summaries.hparams({}, {})
        self._events.add(session_end)
        self._events.flush()

    def read_metrics(self) -> list[dict[str, Any]]:
        """See the function `read_metrics`."""
        return read_metrics(self.path)

    def close(self) -> None:
        """Closes the event file and releases the folder's lock."""
        try:
            self._flush_failures()
            self._events.close()
        finally:
            self._lock.close()

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the folder if something inside fails."""
        try:
            yield
        except BaseException:
            with suppress(ValueError):  # what failed before is to be told
                self.close()
            raise

    def _add_bins(self, tag: str, counts: np.ndarray, round_number: int) -> None:
        limits = np.linspace(0, 1, len(counts) + 1)[1:]
        middles = limits - 0.5 / len(counts)
        histogram = summaries.histogram_raw(
            tag,
            min=0.0,
            max=1.0,
            num=float(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=limits.tolist(),
            bucket_counts=counts.tolist(),
        )
        self._events.add(histogram, round_number)

    def _add_figure(self, tag: str, figure: Figure, round_number: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: of no use where there are no figures

        # Not through pyplot, which keeps global state and looks for a display.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._events.add(summaries.image(tag, pixels, dataformats="HWC"), round_number)

    def _flush_failures(self) -> None:
        if self._failures:
            text = "\n".join(f"- `{line.replace('`', chr(39))}`" for line in self._failures)
            self._events.add(summaries.text("failures", text), self._next_round)
            self._failures = []


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
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError):
            row = None
        if not _is_round(row):
            raise ValueError(
                f"{file}, line {number} is damaged: {line[:80]!r}. Put it back as it was, or remove it if it is the "
                "last."
            )
        rows.append(row)
    return rows


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


def last_tenth(num_rounds: int) -> range:
    """Returns the rounds over which results are averaged: the last tenth, at least 5, all if there are fewer.

    60 rounds: 55 to 60; 16: 12 to 16; 2: 1 and 2.
    """
    count = max(LEAST_AVERAGED, -(-num_rounds // 10))
    return range(max(1, num_rounds + 1 - count), num_rounds + 1)


def is_evaluated(round_number: int, num_rounds: int, every: int) -> bool:
    """Returns whether the global model is evaluated after a round: each `every`-th one, and all of the last tenth.

    So neither how often a run is evaluated nor how fast it starts decides over which rounds its results are averaged.
    60 rounds with `every` 4: 4, 8, ..., 52, and 55 to 60.
    """
    return round_number % every == 0 or round_number in last_tenth(num_rounds)


def averaged_rounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns first and last round of the last tenth, and the number of its rounds with an evaluation.

    All of them do, but where a method has no model as yet (interim/accuracy), or in a run that was resumed with another
    number of rounds: one of 20 rounds with evaluation.every=10, stopped after the 12th and resumed for 15, has 13 to 15
    of 11 to 15.

    Args:
        rows: as `read_metrics` returns them.
    """
    window = last_tenth(rows[-1]["round"] if rows else 0)
    return {"first": window.start, "last": window.stop - 1, "count": len(_averaged(rows))}


def _averaged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    window = last_tenth(rows[-1]["round"] if rows else 0)
    return [row for row in rows if row["round"] in window and row.get("eval/accuracy") is not None]


def name_mean(rounds: Mapping[str, int]) -> str:
    """Returns the description of a mean over `averaged_rounds`: "mean of rounds 55–60"."""
    first, last, count = rounds["first"], rounds["last"], rounds["count"]
    if first >= last:
        return f"mean of round {last}"
    return f"mean of {f'{count} of ' if count < last + 1 - first else ''}rounds {first}–{last}"


def summarize(
    rows: Sequence[Mapping[str, Any]], key: str = "eval/accuracy", own: Sequence[Tag] = ()
) -> dict[str, float]:
    """Returns last and best value of a metric and its mean over the last tenth of the rounds (see `last_tenth`).

    The mean of every metric is over the same rounds: those of the last tenth with an evaluation. Only rows that have
    the key with a finite value count; without such rows, or without one among these, it is NaN. Best is the lowest
    where `lower_is_better`, else the highest.

    Values 0.1, 0.2, ..., 1.2 and then 0.5 in 13 rounds: last 0.5, best 1.2, and the last five are 0.9, 1.0, 1.1, 1.2
    and 0.5, of mean 0.94.

    Args:
        rows: as `read_metrics` returns them; the last one tells how many rounds there are.
        key: the metric's tag.
        own: see `lower_is_better`.
    """
    values, recent = ([float(row[key]) for row in rs if row.get(key) is not None] for rs in (rows, _averaged(rows)))
    if not values:
        return dict.fromkeys(("last", "best", "mean_last_tenth"), math.nan)
    best: Callable[[list[float]], float] = min if lower_is_better(key, own) else max
    mean = math.fsum(recent) / len(recent) if recent else math.nan
    return {"last": values[-1], "best": best(values), "mean_last_tenth": mean}


def best_row(rows: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    """Returns the first row with the best value of a metric; None if no row has one."""
    sign = 1 if lower_is_better(key) else -1
    return min((row for row in rows if row.get(key) is not None), key=lambda row: sign * row[key], default=None)


def lower_is_better(key: str, own: Sequence[Tag] = ()) -> bool:
    """Returns whether lower values of a metric are better, see `metric_tags`; False for an undeclared one.

    Args:
        key: the metric's tag.
        own: what the run's method declares, see `Method.metrics`.
    """
    tag = find_tag(key, own)
    return tag is not None and tag.direction == LOWER


def write_atomic(path: Path, *data: bytes | memoryview | str) -> None:
    """Writes a file atomically: whenever the process is killed, `path` holds either its previous content or all of
    `data`.

    Args:
        path: the file; its folder exists.
        data: its content, one piece after the other; text is written as UTF-8.

    Raises:
        FileError: the system does not let us; `path` is as it was.
    """
    unfinished = _temporary(path)
    with naming(path):
        try:
            with open(unfinished, "xb") as file:
                for piece in data:
                    file.write(piece.encode() if isinstance(piece, str) else piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):  # it was never made
                unfinished.unlink()
            raise
        _sync_folder(path.parent)


_TEMPORARY = ".unfinished"


def _temporary(path: Path) -> Path:
    """Returns a unique name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY}")


def _append(path: Path, text: str) -> None:
    with naming(path), open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes new names in a folder survive a power failure; Windows cannot open folders and has no such step."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _wait_for_later_name(path: Path) -> None:
    """Waits until a new event file sorts after the old ones, as TensorBoard reads them by name (second, host, pid)."""
    stamps = [int(file.name.split(".")[3]) for file in path.glob("events.out.tfevents.*")]
    wait = max(stamps, default=0) + 1 - time.time()
    if 0 < wait <= 1:  # more: the clock was set back, or the folder comes from elsewhere
        time.sleep(wait)


def _json_line(row: Mapping[str, object]) -> str:
    return json.dumps(as_json(row), allow_nan=False) + "\n"


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


def _as_array(values: np.ndarray | Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return array.astype(np.float64)
