"""Names of classes, and how names and values are shown in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def shown(value: object, most: int = 100) -> str:
    """Returns a text for messages: what a terminal would obey is escaped, and what is long is cut."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value)[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def listed(values: Sequence[object], most: int = 10) -> str:
    """Returns the first values, and how many there are where there are more: "a, b, … (30 in all)"."""
    text = ", ".join(shown(value) for value in values[:most])
    return text if len(values) <= most else f"{text}, … ({len(values)} in all)"


def counted(count: int, noun: str) -> str:
    """Returns "1 image" or "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def in_order(names: Sequence[str]) -> list[str]:
    """Returns names in the order of numbers if all are numbers, and else of the alphabet."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def closest(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of `names` that is `name` but for case and blanks, or else nearly; None if none is."""
    plain = {"".join(each.casefold().split()): each for each in names}
    near = difflib.get_close_matches("".join(name.casefold().split()), plain, n=1)
    return plain[near[0]] if near else None


def alike(names: Sequence[str]) -> list[str]:
    """Returns what should be said of classes whose names differ in nothing but case or blanks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return [
        f"The classes {', '.join(f'`{name}`' for name in group)} differ in case or blanks alone; they count as "
        f"{len(group)} classes."
        for group in groups.values()
        if len(group) > 1
    ]
