"""Labelling functions written by users: plain Python functions that map a sample to a class, or abstain.

A module of them is named in the configuration. Where it defines `labeling_functions`, a list, these are the functions,
in this order; otherwise they are all functions that it defines itself (decorated ones, too) and whose name has no
leading underscore, in the order in which it defines them; give decorators and other helpers one. A function gets one
sample: of images a numpy array (channels, height, width) of uint8, of tables a dictionary, column -> number or text as
in the file. It returns a class, as its number or by name, or None or -1 to abstain.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fedlabel.data.sets.class_names import NO_CLASS, ClassNames
from fedlabel.shown import shown_repr

ABSTAIN = NO_CLASS
MAX_ERROR = 200
"""Letters of a function's own error that are shown."""
NOT_ASKED = -2
"""In place of a vote on a sample that the functions were not given."""

LabelingFunction = Callable[[Any], Any]


def load_functions(module: str, key: str = "supervision.module") -> list[LabelingFunction]:
    """Returns the labelling functions of a module.

    Args:
        module: its dotted name, or the path of a file that ends in ".py".
        key: where it was given, for messages.

    Raises:
        ValueError: it cannot be imported, or has no functions.
    """
    key = f"`{key}` (={module})"
    try:
        loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR]
        raise ValueError(
            f"{key} cannot be imported: {text}. Give a module that Python finds on every "
            "node, or the path of a .py file."
        ) from error
    listed = getattr(loaded, "labeling_functions", None)
    if listed is None:
        public = [value for name, value in vars(loaded).items() if not name.startswith("_")]
        listed = [
            value
            for value in public
            if callable(value) and inspect.isfunction(inspect.unwrap(value)) and value.__module__ == loaded.__name__
        ]
    functions = list(listed) if isinstance(listed, (list, tuple)) else []
    if not functions or not all(map(callable, functions)):
        raise ValueError(f"{key} has no labelling functions: define some, or list them as `labeling_functions`.")
    return functions


def _load_file(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"labeling_functions_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@dataclass
class FunctionReport:
    """How one labelling function answered."""

    name: str
    asked: int = 0
    """Number of samples it was applied to; on each it voted, abstained, failed or gave an invalid answer."""
    votes: int = 0
    abstained: int = 0
    failed: int = 0
    first_failure: str = ""
    """The first sample it failed on, and the error; empty if it never failed."""
    invalid: int = 0
    """Number of answers that are not a class."""
    first_invalid: str = ""
    seconds: float = 0.0

    @property
    def seconds_per_1000(self) -> float:
        """Seconds per 1,000 samples; 0 if it was applied to none."""
        return 1000 * self.seconds / self.asked if self.asked else 0.0

    def warning(self) -> str | None:
        """Returns a warning if the function failed or gave invalid answers; None if it did not."""
        faults = []
        if self.failed:
            faults.append(f"fails on {self.failed:,} of {self.asked:,} samples ({self.first_failure})")
        if self.invalid:
            faults.append(f"answers {self.invalid:,} of {self.asked:,} samples with no class ({self.first_invalid})")
        return f"Labelling function `{self.name}` {' and '.join(faults)}: it abstains there." if faults else None


class Cast(NamedTuple):
    """The votes of K functions on n samples, and a report per function."""

    votes: np.ndarray
    """(n, K) int64, -1 = abstain."""
    reports: tuple[FunctionReport, ...]


def cast_votes(
    functions: Sequence[LabelingFunction], samples: Iterable[Any], class_names: Sequence[str], stop: bool = False
) -> Cast:
    """Applies functions to samples. A failure or an invalid answer is counted and becomes an abstention.

    Args:
        functions: K of them.
        samples: n.
        class_names: what they may vote for; see `fedlabel.data.sets.class_names` for what an answer means.
        stop: whether the first failure or invalid answer ends it instead.

    Raises:
        ValueError: there was one, with `stop`.
    """
    classes = ClassNames(class_names)
    reports = tuple(FunctionReport(function_name(function)) for function in functions)
    votes = []
    for place, sample in enumerate(samples):
        votes.append([_vote(*pair, sample, place, classes) for pair in zip(functions, reports, strict=True)])
        if stop:
            for report in reports:
                if report.failed or report.invalid:
                    said = report.first_failure or report.first_invalid
                    what = "fails" if report.failed else "answers with no class"
                    raise ValueError(f"Labelling function `{report.name}` {what}: {said}.")
    return Cast(np.array(votes, dtype=np.int64).reshape(-1, len(functions)), reports)


def function_name(function: LabelingFunction) -> str:
    """Returns the name of a function for messages and tables."""
    return str(getattr(function, "__name__", None) or shown_repr(function))


def _vote(function: LabelingFunction, report: FunctionReport, sample: Any, place: int, classes: ClassNames) -> int:
    report.asked += 1
    own = copy(sample)  # what it writes on it is for itself
    started = time.perf_counter()
    try:
        answer = function(own)
    except (Exception, SystemExit) as error:
        report.failed += 1
        report.first_failure = report.first_failure or f"first on sample {place}{_failure(error, sample)}"
        return ABSTAIN
    finally:
        report.seconds += time.perf_counter() - started
    try:
        vote = classes.find(answer)
    except ValueError as error:
        report.invalid += 1
        report.first_invalid = report.first_invalid or f"first sample {place} with {_invalid(answer, error)}"
        return ABSTAIN
    report.votes += vote != ABSTAIN
    report.abstained += vote == ABSTAIN
    return vote


def _failure(error: BaseException, sample: Any) -> str:
    inner = traceback.extract_tb(error.__traceback__)[1:]  # empty where it could not even be called
    where = f" in line {inner[-1].lineno}" if inner else ", which alone is what it gets"
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own __str__ is the user's, too
        text = ""
    what = f"{type(error).__name__}: {text}"[:MAX_ERROR] if text else type(error).__name__
    hint = ""
    if isinstance(error, KeyError) and isinstance(sample, dict):
        hint = f"; a sample has the columns {', '.join(map(str, islice(sample, 20)))}"
    return f"{where}: " + "".join(char if char.isprintable() else " " for char in what) + hint


def _invalid(answer: object, error: ValueError) -> str:
    if inspect.iscoroutine(answer):
        answer.close()  # else Python warns that nobody awaited it
        return "a coroutine: write the function without async"
    if inspect.isgenerator(answer):
        return "a generator: write the function with return, not yield"
    return f"{shown_repr(answer)}, which {error}"
