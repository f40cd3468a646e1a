"""Terminal output of a run or a sweep in progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from fedlabel.experiment import Experiment
    from fedlabel.study.sweep_run import Event

SHOWN = {"interim/accuracy": "interim accuracy", "eval/accuracy": "accuracy", "pseudo/coverage": "coverage"}
"""Metric -> what it is called."""
OnRound = Callable[[int, Mapping[str, float]], None]
"""Told of a round's number and metrics."""


class OutputClosed(Exception):
    """Nobody reads the output any more."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Has the program say so; rich would end it without a word."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self.stderr else sys.stdout).fileno())
        raise OutputClosed


def make_console(stderr: bool = False) -> Console:
    """Returns the console for all output; a user's text, with [brackets] and :colons:, is printed unchanged."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints lines that only the terminal wraps, so that they can be searched and copied as a whole."""
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def make_table(*heads: str, title: str | None = None) -> Table:
    """Returns a table whose cells wrap where they do not fit, and are never truncated."""
    return Table(*(Column(head, overflow="fold") for head in heads), title=title)


def duration(seconds: float) -> str:
    """Returns seconds as "12 s", "3 min 20 s", "2 h 5 min" or "3 d 2 h"."""
    whole = max(0, round(seconds))
    for unit, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {small}"
    return f"{whole} s"


@contextmanager
def run_progress(console: Console) -> Iterator[tuple[Callable[[Experiment], None], OnRound]]:
    """A live bar on a terminal, and in a notebook that has ipywidgets; lines elsewhere. Both with the time left."""
    is_live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    total, started = 0, 0.0
    before: int | None = None
    """Rounds that an earlier process did, of a run that is resumed."""
    bar = Progress(
        BarColumn(bar_width=max(5, min(40, console.width - 70))),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TextColumn("{task.fields[time]}", markup=False),
        console=console,
        disable=not is_live,
    )
    shown: dict[str, float] = {}
    stage = ""
    stage_name: Callable[[int], str] = str

    def on_start(experiment: Experiment) -> None:
        nonlocal total, stage_name, started
        total, stage_name = experiment.config.num_rounds, lambda number: experiment.recipe.place(number).stage.name
        started = time.monotonic()
        bar.add_task("", total=total, shown="", time="")

    def on_round(round_number: int, metrics: Mapping[str, float]) -> None:
        nonlocal stage, before
        if before is None:
            before = round_number - 1
        begins, stage = stage_name(round_number) != stage, stage_name(round_number)
        shown.update({key: metrics[key] for key in SHOWN if key in metrics})
        if "eval/accuracy" in shown:
            shown.pop("interim/accuracy", None)
        failed = int(metrics["system/failed_clients"])
        text = "  ".join(f"{SHOWN[key]} {shown[key]:.3f}" for key in SHOWN if key in shown)
        text = "  ".join(part for part in (stage, text) if part)
        text += f"  FAILED CLIENTS {failed}" if failed else ""
        spent = time.monotonic() - started
        left = spent / (round_number - before) * (total - round_number)
        passed = duration(spent) + (f", {duration(left)} left" if round_number < total else "")
        bar.update(bar.task_ids[0], completed=round_number, shown=text, time=passed)
        news = begins or failed or "eval/accuracy" in metrics or "interim/accuracy" in metrics
        if news and not is_live:
            say(console, f"round {round_number}/{total}  {text}  {passed}")

    with bar:
        yield on_start, on_round


@contextmanager
def sweep_progress(console: Console, total: int) -> Iterator[Callable[[Event], None]]:
    """A bar over all runs and one per worker on a terminal; elsewhere a line for every run that ends."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks = {"": bar.add_task("all runs", total=total)}
    started: dict[str, float] = {}
    ended: set[str] = set()  # a search that was done and lacks its metric has failed, too

    def report(event: Event) -> None:
        if event.cell is None:
            style = "yellow" if event.kind == "warning" else None
            say(console, f"{event.kind}: {event.text}", style)
            return
        path, name = event.cell.path, f"{event.cell.role} {event.cell.name}"
        if event.kind == "started":
            started[path] = time.monotonic()
            tasks[path] = bar.add_task(name, total=event.num_rounds)
            return
        if event.kind == "round":
            bar.update(tasks[path], completed=event.round_number)
            return
        ended.add(path)
        if path in tasks:
            bar.remove_task(tasks.pop(path))
        bar.update(tasks[""], completed=len(ended))
        seconds = f", {time.monotonic() - started.pop(path):.0f} s" if path in started else ""
        why = f": {event.text.strip().splitlines()[-1]}" if event.text else ""
        style = "red" if event.kind == "failed" else None
        text = f"{len(ended)}/{total} {event.kind}: {name}{seconds}{why}"
        say(console, text, style)

    with bar:
        yield report
