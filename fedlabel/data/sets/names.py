"""Names of classes, and how they are listed in messages."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

from fedlabel.data.sets.cells import is_number
from fedlabel.shown import shown


def listed(values: Sequence[object], most: int = 10) -> str:
    """Returns the first values, and the total number if there are more: "a, b, … (30 in all)"."""
    text = ", ".join(shown(value) for value in values[:most])
    return text if len(values) <= most else f"{text}, … ({len(values)} in all)"


def in_order(names: Sequence[str]) -> list[str]:
    """Returns names sorted as numbers if all are numbers, else alphabetically."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    return sorted(names, key=numbers.__getitem__) if all(map(math.isfinite, numbers.values())) else sorted(names)


def alike(names: Iterable[str]) -> list[list[str]]:
    """Returns groups of names that are the same number, or equal up to case, blanks and look-alike characters."""
    groups: dict[float | str, list[str]] = {}
    for name in names:
        folded = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(float(name) if is_number(name) else folded, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
