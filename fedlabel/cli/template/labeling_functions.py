"""Labelling functions: each looks at one sample and returns a class, by name or number, or None to abstain.

A sample of a table is a dictionary, column -> number or text; of images a uint8 array (channels, height, width).
They may be wrong and may contradict each other: a label model estimates, without any label, how far to trust each.
"""

from collections.abc import Mapping

Row = Mapping[str, float]


def large(row: Row) -> str | None:
    """Large cells are often malignant, small ones often benign."""
    radius = row["worst radius"]
    return "malignant" if radius > 18 else "benign" if radius < 14 else None


def ragged(row: Row) -> str | None:
    """So are outlines with many dents."""
    dents = row["worst concave points"]
    return "malignant" if dents > 0.16 else "benign" if dents < 0.1 else None


def uneven(row: Row) -> str | None:
    """An uneven texture is a weaker sign."""
    return "malignant" if row["worst texture"] > 30 else "benign" if row["worst texture"] < 21 else None
