"""The name that somebody may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def simple(name: str) -> str:
    """Returns a name without case, hyphens, underscores and spaces, by which people's spellings differ."""
    return re.sub(r"[-_\s]", "", name.lower())


def near(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Returns up to `most` of the names that are spelt like `name`, the nearest first; none if none is near."""
    by_spelling: dict[str, list[str]] = {}
    for each in known:
        by_spelling.setdefault(simple(each), []).append(each)
    found = difflib.get_close_matches(simple(name), by_spelling, n=most)
    return [each for spelling in found for each in by_spelling[spelling]][:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a sentence, with a space before it, that names the nearest of `known`; "" if none is near."""
    found = near(name, known)
    return f" Did you mean {found[0]}?" if found else ""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural but for 1: "1 round", "1,000 rounds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
