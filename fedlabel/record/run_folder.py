"""The run folder: configuration, metrics and figures of one run, on disk in a form that survives a kill at any time.

    runs/<name>/
      config.yaml         the resolved configuration
      card.json           classes, inputs and normalisation, by which the model can be used without the data
      partition.json/.png who holds what
      metrics.jsonl       one JSON object a line and a round
      events.out.*        the same numbers, and figures, for TensorBoard
      by_simulated_seconds/ with devices: accuracy and loss over simulated time, for TensorBoard
      stages.json         first and last round of each stage, if the method has several
      failures.log        one entry per failed client, with its traceback
      checkpoints/        see server/checkpoint.py
      trace.json          with grid.profile: where the time went, see `trace`
      run_key             with real nodes: what they know the run by
      summary.json        written when the run ends

Small files are replaced as a whole (`write_atomic`); `metrics.jsonl` only grows, and a line counts once it is complete.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import summary as summaries

from fedlabel.errors import make_folder, naming
from fedlabel.metric_tags import Tag
from fedlabel.record.event_file import EventFile, NoEvents, wait_for_later_name
from fedlabel.record.files import TEMPORARY, FolderLock, append, sync_folder, temporary_name, write_atomic
from fedlabel.record.json_files import as_json, json_line, read_metrics
from fedlabel.record.layout import layout
from fedlabel.record.names import (
    BY_SECONDS,
    CHECKPOINTS,
    CONFIG_YAML,
    FAILURES_LOG,
    FUNCTIONS_CSV,
    METRICS_JSONL,
    PARTITION_JSON,
    PARTITION_PNG,
    RUN_KEY,
    SECONDS,
    STAGES_JSON,
    SUMMARY_JSON,
    SUPERVISION_JSON,
    TRACE_JSON,
)
from fedlabel.record.trace import TraceFile
from fedlabel.spans import Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Hparam = str | int | float | bool
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class RunFolder:
    """One run's folder, open for writing; make it with `create` or `resume`, and `close` it.

    All its methods raise a `FileError` where the system does not let them write.
    """

    def __init__(self, path: Path, purge_step: int | None = None, events: bool = True, own: Sequence[Tag] = ()) -> None:
        """Opens a new event file in an existing folder; not for callers, see `create` and `resume`."""
        self.path = path
        self._lock = FolderLock(path)
        self._own = own
        self._shown: set[str] = set()
        """Metrics that TensorBoard's pages have, see `layout`."""
        try:
            self._events = EventFile(path, purge_step) if events else NoEvents()
        except BaseException:
            self._lock.close()
            raise
        self._failures: list[str] = []
        self._trace: TraceFile | None = None
        self._next_round = purge_step or 1
        self._by_seconds: EventFile | None = None
        self._last_second: int | None = None
        """Simulated second up to which a resumed run is done."""

    @classmethod
    def create(
        cls,
        path: Path,
        config_yaml: str,
        hparams: Mapping[str, Hparam],
        events: bool = True,
        own: Sequence[Tag] = (),
    ) -> RunFolder:
        """Makes a new run folder, all or nothing.

        Args:
            path: the folder; its parents are made as needed.
            config_yaml: the resolved configuration, kept as config.yaml.
            hparams: dotted key -> value, shown by TensorBoard's HParams tab.
            events: whether anything is written for TensorBoard.
            own: metrics that the run's method declares, see `Method.metrics`.

        Raises:
            ValueError: the folder exists and is not empty; nothing is touched.
        """
        exists = f"{path} exists: give another --name, or --resume to go on with it."
        with naming(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ValueError(exists)
        make_folder(path.parent)
        unfinished = temporary_name(path)
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
            sync_folder(path.parent)
        folder = cls(path, events=events, own=own)
        # Without the "experiment" record: TensorBoard takes its columns from the first such record it meets, and runs
        # of other methods beside it would lose theirs. Lacking one it gathers the columns from all runs.
        # (TensorBoard 2.21 then lists metrics beside them only for --logdir on the folder that holds the runs.)
        _, session_start, _ = summaries.hparams(dict(hparams), {})
        with folder.closed_on_error():
            folder._events.add(session_start)
            folder._events.flush()
        return folder

    @classmethod
    def resume(cls, path: Path, completed_round: int, events: bool = True, own: Sequence[Tag] = ()) -> RunFolder:
        """Opens the folder of an earlier run and discards what it logged after `completed_round`.

        Later lines of metrics.jsonl are dropped, with a torn last one; TensorBoard is told to hide later events.

        Args:
            path: the folder.
            completed_round: the last round that counts.
            events: see `create`.
            own: see `create`.

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
                f"{path / METRICS_JSONL} does not go from round to round: the file was changed after the run. "
                "Restore it, or start a new run under another --name."
            )
        if len(rows) < completed_round:
            raise ValueError(
                f"{path / METRICS_JSONL} ends at round {len(rows)}, but the checkpoint is of round "
                f"{completed_round}: the file was changed after the run. Restore it, or start a new run under another "
                "--name."
            )
        rows = rows[:completed_round]
        with naming(path):
            for leftover in path.rglob(f".*{TEMPORARY}"):  # of a write that was killed
                leftover.unlink()
        write_atomic(path / METRICS_JSONL, "".join(json_line(row) for row in rows))
        if events:
            wait_for_later_name(path)
        folder = cls(path, completed_round + 1, events, own)
        seconds = rows[-1].get(SECONDS) if rows else None
        folder._last_second = None if seconds is None else math.floor(seconds)
        folder._shown = {
            tag for row in rows for tag, value in row.items() if tag != "round" and type(value) is not list
        }
        with folder.closed_on_error():
            folder._events.add(layout(folder._shown, own), completed_round)
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
        return self.path / SUPERVISION_JSON

    @property
    def functions_csv(self) -> Path:
        """Analysis of labelling functions, over all clients and per client; absent without such functions."""
        return self.path / FUNCTIONS_CSV

    @property
    def partition_png(self) -> Path:
        """Figure of the partition."""
        return self.path / PARTITION_PNG

    @property
    def metrics_jsonl(self) -> Path:
        """Metrics as one JSON object per line and round."""
        return self.path / METRICS_JSONL

    @property
    def failures(self) -> Path:
        """Every failed client with its traceback; absent if none failed."""
        return self.path / FAILURES_LOG

    @property
    def trace_json(self) -> Path:
        """Where the time went, see `TraceFile`; absent without `grid.profile`."""
        return self.path / TRACE_JSON

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits by which real clients know the run, whatever the folder is called and however often the
        run is resumed; made when first asked for.
        """
        path = self.path / RUN_KEY
        with naming(path):
            if not path.exists():
                write_atomic(path, secrets.token_hex(16))
            return path.read_text().strip()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def stages_json(self) -> Path:
        """First and last round of each stage, by name; absent if the method has only one."""
        return self.path / STAGES_JSON

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
        files: Mapping[str, str | bytes] = _NOTHING,
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
            files: name of a file in the folder -> its whole content.
        """
        for name, content in files.items():
            make_folder((self.path / name).parent)
            write_atomic(self.path / name, content)
        rows = {tag: _as_array(values) for tag, values in lists.items()}
        scalars = {tag: float(value) for tag, value in metrics.items()}
        for tag, value in scalars.items():
            self._events.add_scalar(tag, value, round_number)
        if not scalars.keys() <= self._shown:
            self._shown |= scalars.keys()
            self._events.add(layout(self._shown, self._own), round_number)
        if SECONDS in scalars and not isinstance(self._events, NoEvents):
            self._log_by_seconds(scalars)
        for tag, values in rows.items():
            self._events.add_histogram(tag, values, round_number)
        for tag, counts in bins.items():
            self._events.add_bins(tag, counts, round_number)
        for tag, figure in figures.items():
            self._events.add_figure(tag, figure, round_number)
        for tag, text in texts.items():
            self._events.add_text(tag, text, round_number)
        self._next_round = round_number
        self._flush_failures()
        self._next_round = round_number + 1
        self._events.flush()
        append(self.metrics_jsonl, json_line({"round": round_number, **scalars, **rows}))

    def _log_by_seconds(self, scalars: Mapping[str, float]) -> None:
        """Writes the results of a round once more, with the simulated second as TensorBoard's step: to a folder of its
        own, which TensorBoard shows as a run, as the steps of one run are either rounds or seconds.
        """
        if self._by_seconds is None:
            purge = None if self._last_second is None else self._last_second + 1
            make_folder(self.path / BY_SECONDS)
            wait_for_later_name(self.path / BY_SECONDS)
            self._by_seconds = EventFile(self.path / BY_SECONDS, purge)
        for tag, value in scalars.items():
            if tag.startswith("eval/"):
                self._by_seconds.add_scalar(tag, value, math.floor(scalars[SECONDS]))
        self._by_seconds.flush()

    def log_figure(self, tag: str, figure: Figure, round_number: int = 0) -> None:
        """Shows a figure in TensorBoard."""
        self._events.add_figure(tag, figure, round_number)
        self._events.flush()

    def log_text(self, tag: str, text: str, round_number: int = 0) -> None:
        """Shows Markdown in TensorBoard."""
        self._events.add_text(tag, text, round_number)
        self._events.flush()

    def log_failure(self, text: str) -> None:
        """Appends a client's failure to failures.log; its first line also shows in TensorBoard, with its round."""
        append(self.failures, text.rstrip("\n") + "\n")
        self._failures.append(text.partition("\n")[0])

    def log_trace(self, round_number: int, recorded: Recorded) -> None:
        """Adds a round to trace.json, which begins anew with the first one."""
        if self._trace is None:
            self._trace = TraceFile(self.trace_json)
        self._trace.add(round_number, recorded)

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
            if self._by_seconds is not None:
                self._by_seconds.close()
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

    def _flush_failures(self) -> None:
        if self._failures:
            text = "\n".join(f"- `{line.replace('`', chr(39))}`" for line in self._failures)
            self._events.add_text("failures", text, self._next_round)
            self._failures = []


def _as_array(values: np.ndarray | Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return array.astype(np.float64)
