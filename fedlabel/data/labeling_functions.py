"""Labelling functions that users write: plain Python functions from a sample to a class, or to nothing.

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
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ABSTAIN = -1
NOT_ASKED = -2
"""In place of a vote on a sample that the functions were not given."""

LabelingFunction = Callable[[Any], Any]


def load_functions(module: str) -> list[LabelingFunction]:
    """Returns the functions of a module.

    Args:
        module: its dotted name, or the path of a file that ends in ".py".

    Raises:
        ValueError: it cannot be imported, or has no functions.
    """
    key = f"`supervision.module` (={module})"
    try:
        loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"{key} cannot be imported: {type(error).__name__}: {error}. Give a module that Python finds on every "
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


def cast_votes(functions: Sequence[LabelingFunction], samples: Iterable[Any], class_names: Sequence[str]) -> np.ndarray:
    """Returns the functions' votes on n samples, (n, functions) int64.

    Raises:
        ValueError: a function fails, or returns something that is no class.
    """
    number_of = {name: number for number, name in enumerate(class_names)}
    votes = [
        [_vote(function, sample, place, number_of) for function in functions] for place, sample in enumerate(samples)
    ]
    return np.array(votes, dtype=np.int64).reshape(-1, len(functions))


def function_name(function: LabelingFunction) -> str:
    """Returns what to call a function in messages and tables."""
    return str(getattr(function, "__name__", repr(function)))


def _vote(function: LabelingFunction, sample: Any, place: int, number_of: dict[str, int]) -> int:
    name = function_name(function)
    try:
        answer = function(copy(sample))  # what it writes on it is for itself
    except Exception as error:
        inner = traceback.extract_tb(error.__traceback__)[1:]  # empty where it could not even be called
        where = f", in line {inner[-1].lineno}" if inner else ", which alone is what it gets"
        hint = "Let it return None where it cannot tell." if inner else "Write it as a function of one sample."
        if isinstance(error, KeyError) and isinstance(sample, dict):
            hint = f"A sample has the columns {', '.join(sample)}."
        raise ValueError(
            f"Labelling function `{name}` fails on sample {place}{where}: {type(error).__name__}: {error}. " + hint
        ) from error
    if answer is None:
        return ABSTAIN
    try:
        if isinstance(answer, (bool, np.bool_)):  # True is no vote for class 1, nor False one for class 0
            raise TypeError
        vote = number_of[answer] if isinstance(answer, str) else operator.index(answer)
    except (KeyError, TypeError):
        vote = NOT_ASKED
    if not ABSTAIN <= vote < len(number_of):
        raise ValueError(
            f"Labelling function `{name}` says {answer!r} of sample {place}: it must return a class, one of "
            f"{', '.join(number_of)} or its number from 0 to {len(number_of) - 1}, or None to abstain."
        )
    return vote
