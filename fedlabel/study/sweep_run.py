"""Runs the unfinished part of a sweep, in worker processes, resumable at any time.

OUT/sweep.json                                   what was asked, what finished, what the searches chose
OUT/<setting>/<method>/<key value>-seed<k>/      run folders (see record/run_folder.py); all that a second call goes by
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlabel.config import ConfigError, ExperimentConfig, flatten, keys_without_effect, load_config, to_yaml
from fedlabel.errors import make_folder
from fedlabel.record.files import FolderLock, write_atomic
from fedlabel.record.json_files import read_summary
from fedlabel.record.names import CONFIG_YAML, SUMMARY_JSON
from fedlabel.record.results import lower_is_better
from fedlabel.study.sweep import SWEEP_JSON, Cell, Group, SearchConfig, SweepConfig, format_value, plan_sweep
from fedlabel.study.workers import Tell, run_parallel


def choose(scores: Mapping[float, float | None], lower: bool = False) -> float | None:
    """Returns the value with the highest (`lower`: lowest) score, the smaller one of a tie; None without a score.

    {0.05: 0.7, 0.15: 0.8, 0.45: 0.8} gives 0.15.

    Args:
        scores: value -> score; None where the run failed.
        lower: whether low scores are good.
    """
    found = {value: -score if lower else score for value, score in scores.items() if score is not None}
    return min(found, key=lambda value: (-found[value], value), default=None)


@dataclass(frozen=True)
class Event:
    """A progress event of `run_sweep`."""

    kind: str
    """started | round | done | kept (it was finished earlier) | failed | chosen | warning."""
    cell: Cell | None
    """None for chosen and warning."""
    text: str = ""
    """The error, or the chosen value."""
    round_number: int = 0
    num_rounds: int = 0


Work = Callable[[tuple[ExperimentConfig, Path, bool], Tell], None]
"""Runs a configuration into a folder, anew or (True) from its newest checkpoint; tells (round, rounds)."""


def run_sweep(sweep: SweepConfig, out: Path, workers: int, work: Work, report: Callable[[Event], None]) -> bool:
    """Runs the unfinished part of a sweep; returns whether every run was done.

    Args:
        sweep: what to run.
        out: its folder; a call on the folder of an earlier, unfinished call goes on with it.
        workers: processes, one run each at a time.
        work: see `Work`; a function of a module.
        report: called with every event.

    Raises:
        ConfigError: no run is possible, or `out` holds other runs under the same names.
        ValueError: another process runs a sweep in `out`.
    """
    groups = plan_sweep(sweep)
    done = finished_cells(groups, out)
    make_folder(out)
    with closing(FolderLock(out)):
        return _run(_Ledger(sweep, groups, out, done, report), workers, work)


def _run(ledger: _Ledger, workers: int, work: Work) -> bool:
    ledger.write()

    def take() -> _Job | None:
        cell = ledger.next()
        if cell is None:
            return None
        assert cell.config is not None
        ledger.report(Event("started", cell, num_rounds=cell.config.num_rounds))
        return _Job(work, cell, ledger.out / cell.path)

    def on_message(job: _Job, message: tuple[int, int]) -> None:
        ledger.report(Event("round", job.cell, round_number=message[0], num_rounds=message[1]))

    run_parallel(_work, workers, take, on_message, lambda job, error: ledger.finish(job.cell, error))
    return ledger.complete


@dataclass(frozen=True)
class _Job:
    work: Work
    cell: Cell
    path: Path


def _work(job: _Job, tell: Tell) -> None:
    assert job.cell.config is not None
    job.work((job.cell.config, job.path, job.path.exists()), tell)


def finished_cells(groups: Iterable[Group], out: Path) -> set[str]:
    """Returns the paths of the finished runs, after a check of every run folder that the sweep may use.

    Raises:
        ConfigError: a folder holds a run of another configuration, or of an earlier version.
    """
    done = set()
    for group in groups:
        for cell in [*group.search, *(cell for cells in group.final.values() for cell in cells)]:
            saved = out / cell.path / CONFIG_YAML
            if cell.config is None or not saved.is_file():
                continue
            if saved.read_text() != to_yaml(cell.config):  # to read it takes three times as long
                _check_same(saved, cell.config)
            if (saved.parent / SUMMARY_JSON).is_file():
                _check_summary(saved.parent)
                done.add(cell.path)
    return done


def _check_same(saved: Path, config: ExperimentConfig) -> None:
    """Raises ConfigError where a folder holds a run of another configuration."""
    try:
        found, wanted = flatten(load_config([saved])), flatten(config)
    except ValueError as error:
        raise ConfigError(f"{saved} cannot be read: {error} Move the folder away, or use another --out.") from error
    differing = [
        f"{key} (there {found.get(key)}, asked {wanted.get(key)})"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key) and key not in keys_without_effect()
    ]
    if differing:
        raise ConfigError(
            f"{saved.parent} holds a run of another configuration: {'; '.join(differing)}. Use another --out, or move "
            "the folder away to run it anew."
        )


def _check_summary(folder: Path) -> None:
    """Raises ConfigError if a finished run lacks the values that a comparison needs."""
    try:
        read_summary(folder)
    except ValueError as error:
        raise ConfigError(f"{str(error).rstrip('.')}, or use another --out.") from error


class _Ledger:
    """The progress of a sweep: finished runs, chosen values, and the next run; written to sweep.json after every
    change.
    """

    def __init__(
        self, sweep: SweepConfig, groups: list[Group], out: Path, done: set[str], report: Callable[[Event], None]
    ) -> None:
        self.sweep, self.groups, self.out, self.done, self.report = sweep, groups, out, done, report
        self.rows: dict[str, dict[str, Any]] = {}
        """Path -> a run that finished, as sweep.json has it; a search's and a final run never share one."""
        self.chosen: list[dict[str, Any]] = []
        searches = list({cell.path: cell for group in groups for cell in group.search}.values())
        self.planned = len(searches) + len(groups) * len(sweep.seeds)
        self.waiting = [cell for cell in searches if not self._known(cell)]
        for group in groups:
            self._choose(group)

    @property
    def complete(self) -> bool:
        """Whether every run of the sweep was done."""
        return sum(row["status"] == "done" for row in self.rows.values()) == self.planned

    def next(self) -> Cell | None:
        """Returns the run to start next: searches before final runs, which wait for them."""
        return self.waiting.pop(0) if self.waiting else None

    def finish(self, cell: Cell, error: str) -> None:
        """Records that a run ended; the last one of a search starts its final runs."""
        self._enter(cell, error)
        self.report(Event("failed" if error else "done", cell, error))
        if cell.role == "search":
            for group in self.groups:
                if cell in group.search:
                    self._choose(group)
        self.write()

    def write(self) -> None:
        """Writes sweep.json, in the sweep's order whatever ended first."""
        place = {(group.setting, group.method): number for number, group in enumerate(self.groups)}

        def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return place[row["setting"], row["method"]], row.get("role") == "final", row["value"] or 0, row.get("seed")

        content = {
            "sweep": asdict(self.sweep),
            "planned_runs": self.planned,
            "runs": sorted(self.rows.values(), key=order),
            "chosen": sorted(self.chosen, key=order),
        }
        write_atomic(self.out / SWEEP_JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _known(self, cell: Cell) -> bool:
        """Records a run that need not, or cannot, be started."""
        if cell.config is None:
            self._enter(cell, cell.error)
            self.report(Event("failed", cell, cell.error))
        elif cell.path in self.done:
            self._enter(cell, "")
            self.report(Event("kept", cell))
        return cell.path in self.rows

    def _enter(self, cell: Cell, error: str) -> None:
        self.rows[cell.path] = {
            "setting": cell.setting,
            "method": cell.method,
            "seed": cell.seed,
            "value": cell.value,
            "role": cell.role,
            "path": cell.path,
            "status": "failed" if error else "done",
            "error": error,
        }

    def _choose(self, group: Group) -> None:
        """Queues a group's final runs once its search is over."""
        if not all(cell.path in self.rows for cell in group.search):
            return
        value: float | None = None
        if self.sweep.search is not None:
            scores = {
                cell.value: self._score(cell, self.sweep.search) for cell in group.search if cell.value is not None
            }
            value = choose(scores, lower_is_better(self.sweep.search.metric))
            own = self.sweep.search.setting in (None, group.setting)
            warning = self._warning(group, value, scores) if own else ""
            self.chosen.append(
                {
                    "setting": group.setting,
                    "method": group.method,
                    "key": self.sweep.search.key,
                    "value": value,
                    "scores": [{"value": each, "score": score} for each, score in scores.items()],
                    "warning": warning,
                }
            )
            name = f"{group.setting} / {group.method}"
            if value is not None:
                self.report(Event("chosen", None, f"{name}: {self.sweep.search.key}={format_value(value)}"))
            if warning:
                self.report(Event("warning", None, f"{name}: {warning}"))
        cells = next(iter(group.final.values())) if value is None else group.final[value]
        if value is None and group.search:
            cells = tuple(
                replace(cell, value=None, config=None, error="no run of its search was done") for cell in cells
            )
        self.waiting += [cell for cell in cells if not self._known(cell)]

    def _score(self, cell: Cell, search: SearchConfig) -> float | None:
        """Returns the score of a finished search run; None if it failed or lacks the metric."""
        if self.rows[cell.path]["status"] != "done":
            return None
        file = self.out / cell.path / SUMMARY_JSON
        summary = read_summary(file.parent)
        found = summary.get(search.metric)
        score = found.get(search.column) if isinstance(found, dict) else None
        if score is None:
            metrics = ", ".join(key for key, value in summary.items() if isinstance(value, dict) and "last" in value)
            self._enter(cell, f"`search.metric` (={search.metric}) is not in {file}; it has {metrics}.")
            self.report(Event("failed", cell, self.rows[cell.path]["error"]))
        return score

    def _warning(self, group: Group, value: float | None, scores: Mapping[float, float | None]) -> str:
        assert self.sweep.search is not None
        if value is None or len(scores) == 1:
            return ""
        tried = ", ".join(map(format_value, scores))
        if value in (min(scores), max(scores)):
            return (
                f"{self.sweep.search.key}={format_value(value)} lies at the edge of what was tried ({tried}): a value "
                "beyond may be better; widen `search.values`."
            )
        return ""
