"""Finds the name that a misspelled one may mean; numbers and names of things in texts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from fedlabel.shown import shown

COMPARED = 1000
"""Names; comparing takes about 10 microseconds each."""
LONGEST_CLIENT_NAME = 24
"""Characters of a client's name in charts and tables."""


def simple(name: str) -> str:
    """Returns a name without case, hyphens, underscores and spaces, for comparison."""
    return re.sub(r"[-_\s]", "", name.casefold())


def near(name: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Returns up to `most` of the names with the most similar spelling, the nearest first; empty if none is similar.

    Args:
        name: as somebody wrote it.
        names: candidates; beyond the first `COMPARED` only one that is the same but for case and blanks is found.
        most: how many, where none is the same.
        cutoff: least share of letters in common, see difflib.
    """
    by_spelling: dict[str, list[str]] = {}
    for each in names:
        by_spelling.setdefault(simple(each), []).append(each)
    spelling = simple(name)
    if spelling in by_spelling:
        return by_spelling[spelling][:most]
    found = difflib.get_close_matches(spelling, list(by_spelling)[:COMPARED], most, cutoff)
    return [each for like in found for each in by_spelling[like]][:most]


def did_you_mean(name: str, names: Iterable[str], most: int = 1) -> str:
    """Returns a sentence, with a leading space, that suggests the most similar of `names`; "" if none is similar."""
    found = near(name, names, most)
    return f" Did you mean {' or '.join(map(shown, found))}?" if found else ""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1: "1 round", "1,000 rounds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def client_label(client: int, name: str | None) -> str:
    """Returns what charts and tables call a client: its number and, if it has one, its name, short and printable."""
    return str(client) if name is None else f"{client}: {shown(name, LONGEST_CLIENT_NAME)}"
