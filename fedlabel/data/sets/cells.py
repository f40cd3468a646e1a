"""Parses a cell of a table: a number, a mark for a missing value, a text that resembles a number, or another text.

Only one way to write a number is read: digits, a point before decimals, an exponent. Python's `float` reads more than
people write (`1_000`, `infinity`, digits of other scripts) and less (`1,5`), so that it decides nothing here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

MISSING = frozenset(("", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "-nan", "null", "none", "?", "-", "--", "."))
"""Cells (in lower case) that mean: not known, where numbers stand beside them. In a categorical column each of them is
a category like any other."""
LARGEST = 1e30
"""Numbers beyond are taken for damage: float32 features and their squares could not hold them."""

_PLAIN = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PLAIN_CHARACTERS = re.compile(r"[^0-9.eE+-]")
_COMMA = re.compile(r"([+-]?)([0-9]{1,3}(?:\.[0-9]{3})+|[0-9]*)(?:,([0-9]*))?([eE][+-]?[0-9]+)?")
_GROUPED = r"[0-9]{1,3}([ ,'’\u00a0\u202f][0-9]{3})+"
_UNIT = r"(%|‰|[$€£¥]|[kmcµ]?m|[kmµ]?g|lbs?|ft|in|°?[CF]|[mµn]?s|min|h|hrs?|y|yrs?|years?|days?|[kM]?Pa|mmHg|ml|[lL])"
_LOOKS = (
    (re.compile(r"[+-]?(inf|infinity|∞)", re.IGNORECASE), "infinity", "Write a number, or leave it empty."),
    (
        re.compile(r"[+-]?[0-9]+,[0-9]+"),
        "a number with a decimal comma, or with a comma between thousands",
        "For decimal commas set data.decimal=comma; else write it without commas.",
    ),
    (
        re.compile(
            rf"[+-]?({_GROUPED}([.,][0-9]+)?|[0-9]{{1,3}}(\.[0-9]{{3}}){{2,}}|[0-9]{{1,3}}(\.[0-9]{{3}})+,[0-9]+)"
        ),
        "a number with marks between thousands",
        "Write it without them (numbers like 1.234,5 are read with data.decimal=comma).",
    ),
    (re.compile(r"[+-]?0[xX][0-9a-fA-F]+"), "a hexadecimal number", "Write it with decimal digits."),
    (re.compile(r"[+-]?[0-9]+(_[0-9]+)+(\.[0-9]*)?"), "a number with underscores", "Write it without them."),
    (
        re.compile(
            r"([0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}|[0-9]{1,2}[-/.][0-9]{1,2}[-/.]([0-9]{4}|[0-9]{2})|"
            r"[0-9]{1,2}[ -][^\W\d]{3,9}\.?[ -][0-9]{2,4})([T ]+[0-9]{1,2}:[0-9]{2}.*)?"
        ),
        "a date",
        "Write it as a number (days since some day, month, weekday).",
    ),
    (
        re.compile(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?( ?[aApP]\.?[mM]\.?)?"),
        "a time",
        "Write it as a number (such as minutes).",
    ),
    (
        re.compile(rf"[+-]?[$€£¥]? ?[+-]?[0-9]+([.,][0-9]+)* ?{_UNIT}?|\([0-9]+([.,][0-9]+)*\)"),
        "a number with something around it",
        "Write the number alone.",
    ),
)
_RANGE = re.compile(r"([<>≤≥]=? ?)?[0-9.]+( ?(-|–|to) ?[0-9.]+|\+)?")
"""Such as age bands (18-24, 65+): categories, though all their characters are digits and signs."""


def as_text(cell: object) -> str:
    """Returns a cell of a table in Python as a file would have it: "" for None, NaN and pandas' NA."""
    try:
        missing = cell is None or bool(cell != cell)
    except TypeError:  # NA equals nothing, and differs from nothing
        missing = True
    return "" if missing else str(cell).strip()


def is_number(text: str) -> bool:
    """Whether a cell is a number in the one supported notation."""
    return _PLAIN.fullmatch(text) is not None


def looks_like(text: str) -> tuple[str, str] | None:
    """Returns what a cell that resembles a number is, and how to mend it; None for any other text."""
    if len(text) > 60:
        return None
    for pattern, what, cure in _LOOKS:
        if pattern.fullmatch(text):
            return what, cure
    usual = unicodedata.normalize("NFKC", text).replace("−", "-").strip()
    if usual != text and (is_number(usual) or looks_like(usual)):
        return "a number in characters of another kind", f"Write `{usual}`."
    signs_only = any(char.isdigit() for char in text) and not any(char.isalpha() for char in text)
    if signs_only and not _RANGE.fullmatch(text):
        return "no number, though of digits", "Write numbers alone, one in a cell."
    return None


@dataclass(frozen=True, eq=False)
class Numbers:
    """Cells read as numbers."""

    values: np.ndarray
    """(n,) float64; NaN where missing or `odd`."""
    marks: dict[str, int]
    """Marks of missing numbers, except the empty cell, as written -> count."""
    odd: frozenset[str]
    """Cells that are neither numbers nor marks."""
    leading_zero: str | None
    """A whole number that begins with 0, if there is one."""


def read_numbers(cells: list[str], further: Collection[str] = (), decimal: str = "point") -> Numbers:
    """Reads cells as numbers; see `Numbers`.

    Args:
        cells: n texts without blanks around them.
        further: marks besides `MISSING`, in lower case; a number marks every number that equals it.
        decimal: what stands before decimals, point or comma; with comma, points may stand between thousands.
    """
    different, all_marks = set(cells), MISSING.union(further)
    absent = {cell for cell in different if cell.casefold() in all_marks}
    rest = list(different - absent)
    if decimal == "comma":
        value_of = {cell: number for cell in rest if (number := _with_comma(cell)) is not None}
    else:
        value_of = _with_point(rest)
    for mark in further:
        if is_number(mark):
            absent |= {cell for cell, value in value_of.items() if value == float(mark)}
    odd = frozenset(cell for cell in rest if cell not in value_of) if len(value_of) < len(rest) else frozenset()
    if absent or odd or decimal == "comma":
        value_of |= dict.fromkeys((*absent, *odd), float("nan"))
        values = np.fromiter(map(value_of.__getitem__, cells), np.float64, len(cells))
    else:  # the same, without a look into a large dictionary for each
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    filled = absent - {""}
    marks = {mark: cells.count(mark) for mark in sorted(filled)[:100]}
    leading_zero = next((cell for cell in rest if cell[:1] == "0" and len(cell) > 1 and cell.isdigit()), None)
    return Numbers(values, marks, odd, leading_zero)


def _with_point(cells: list[str]) -> dict[str, float]:
    """Returns the numeric values of the cells that are numbers."""
    if not _PLAIN_CHARACTERS.search("".join(cells)):  # then `float` reads what `_PLAIN` matches, only faster
        try:
            return dict(zip(cells, map(float, cells), strict=True))
        except ValueError:
            pass
    return {cell: float(cell) for cell in cells if _PLAIN.fullmatch(cell)}


def _with_comma(cell: str) -> float | None:
    """Returns the value of a number like 1234,5 or 1.234,5; None if the cell is not one."""
    parts = _COMMA.fullmatch(cell)
    if parts is None or not (parts[2] or parts[3]):
        return None
    return float(f"{parts[1]}{parts[2].replace('.', '') or '0'}.{parts[3] or '0'}{parts[4] or ''}")
