"""Resolves class names: one rule for files, functions and the configuration.

Names come first. Where all classes are named by numbers (labels 1 and 2 of a table, -1 and 1), a number is such a name
and never a place in their order, so 1 is the class `1` even if that is the first one. Where they are not, a number is a
place, from 0 on. Upper and lower case and blanks around a name do not matter where only one class can be meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlabel.data.sets.cells import MISSING
from fedlabel.data.sets.names import listed
from fedlabel.names import did_you_mean

NO_CLASS = -1
"""In place of the number of a class: none was given. Where -1 is itself the name of a class, it means that class."""


class ClassNames:
    """The classes of a data set, found by name or number.

    Args:
        names: of the classes, in the order of their numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        numbers = [_number(name) for name in self.names]
        self.are_numbers = all(number is not None for number in numbers)
        """Whether every class is named by a number."""
        self._exact = {name: place for place, name in enumerate(self.names)}
        self._folded = _unique([(_fold(name), place) for place, name in enumerate(self.names)])
        self._by_value = _unique([(value, place) for place, value in enumerate(numbers) if value is not None])
        self._found: dict[tuple[type, Any], int] = {}

    def find(self, value: object) -> int:
        """Returns the number of the class that `value` names, -1 for a missing label: empty or missing text (also "NA",
        "?" and the like), NaN, and -1 unless a class has that name.

        Args:
            value: a text or a number, also numpy's or a tensor of one.

        Raises:
            ValueError: it means no class, or could mean two. The message goes on from a name of the value, like "is
                none of the classes a, b".
        """
        if value is None:
            return NO_CLASS
        if not isinstance(value, (str, int, float)):
            value = _scalar(value)
        key = (type(value), value)
        found = self._found.get(key)
        if found is None:
            found = self._find(value)
            if len(self._found) < 10_000:
                self._found[key] = found
        return found

    def _find(self, value: object) -> int:
        if isinstance(value, (str, bool)):
            text = str(value)
            for names, key in ((self._exact, text), (self._folded, _fold(text))):
                if key in names:
                    return self._one(names[key])
            if isinstance(value, bool):
                raise ValueError(f"is none of the classes {self.listed()}, and no number of one")
            if _fold(text) in MISSING:
                return NO_CLASS
            number = _number(text)
        elif isinstance(value, (int, float)):
            if value != value:
                return NO_CLASS
            number = _number(value)
        else:
            number = None
        if number is None:
            raise ValueError(self.unknown())
        by_name = self._by_value.get(number)
        by_place = int(number) if not self.are_numbers and number in range(len(self.names)) else None
        if by_name is not None and by_place is not None and by_name != by_place:
            raise ValueError(
                f"could mean class `{self.names[by_place]}`, by its place from 0, or `{self.names[by_name]}`, by its "
                "name: write the name of another class"
            )
        found = by_place if by_name is None else self._one(by_name)
        if found is not None:
            return found
        if number == NO_CLASS:
            return NO_CLASS
        raise ValueError(self.unknown())

    def _one(self, place: int) -> int:
        if place == _SEVERAL:
            raise ValueError(f"could mean several of the classes {self.listed()}: write the name as it is")
        return place

    def unknown(self) -> str:
        """Returns the message for a value that names no class."""
        places = f", or a number from 0 to {len(self.names) - 1}" if not self.are_numbers else ""
        return f"is none of the classes {self.listed()}{places}"

    def __contains__(self, number: float) -> bool:
        """Whether this number is a class."""
        return number in self._by_value

    def listed(self) -> str:
        """Returns the names for a message, the first 20 of them."""
        return listed(self.names, 20)


def find_classes(key: str, given: Sequence[str], names: Sequence[str], left: str) -> list[int]:
    """Returns the numbers of the classes that a list of the configuration names.

    Args:
        key: of the list, e.g. "data.positive_classes".
        given: the list.
        names: of all classes.
        left: what would be left if the list named all of them, e.g. "none for the rest".

    Raises:
        ValueError: it names something else, a class twice, or all classes.
    """
    classes, where = ClassNames(names), f"`{key}` (=[{', '.join(given)}])"
    found = []
    for name in given:
        try:
            place = classes.find(name)
            if place == NO_CLASS:
                raise ValueError(classes.unknown())
        except ValueError as error:
            raise ValueError(f"{where}: {name} {error}.{did_you_mean(name, names)}") from error
        found.append(place)
    if len(set(found)) < len(found):
        raise ValueError(f"{where} names a class twice: {', '.join(names[place] for place in found)}.")
    if len(found) == len(names):
        raise ValueError(f"{where} names all {len(names)} classes, which leaves {left}: leave one out.")
    return found


_SEVERAL = -2


def _unique(pairs: list[tuple[Any, int]]) -> dict[Any, int]:
    """Returns key -> index, `_SEVERAL` if a key has several."""
    found: dict[Any, int] = {}
    for key, place in pairs:
        found[key] = _SEVERAL if key in found else place
    return found


def _fold(text: str) -> str:
    return text.strip().casefold()


def _number(value: str | float) -> float | None:
    """Returns the finite number that a text or number represents; None if there is none."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and "_" not in str(value) else None


def _scalar(value: object) -> object:
    """Returns numpy scalars, and arrays and tensors without dimensions, as a Python text or number; `_NO_SCALAR` for
    other values.
    """
    if isinstance(value, np.generic) and value.dtype.kind not in "biufSU":
        return _NO_SCALAR  # dates come out as integers
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, (str, int, float)) else _NO_SCALAR


_NO_SCALAR = object()
