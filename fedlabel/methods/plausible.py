"""What statistics of a client must be, whoever sent them: counts, flags, shares. See `Method.check_statistics`."""

from __future__ import annotations

from torch import Tensor

SLACK = 1e-3
"""Relative error that sums of float32 may have."""


def check_counts(name: str, values: Tensor, most: float) -> None:
    """Looks at counts of samples, whole or expected.

    Args:
        name: of the statistic.
        values: any shape.
        most: what they may add up to.

    Raises:
        ValueError: one is below 0, or the sum is above `most`.
    """
    if (values < 0).any():
        raise ValueError(f"its statistic {name} has a count below 0 (={float(values.min()):g})")
    if values.sum() > most * (1 + SLACK):
        raise ValueError(f"its statistic {name} counts {float(values.sum()):g} samples, and it can have {most:g}")


def check_flags(name: str, values: Tensor) -> None:
    """Raises ValueError unless each value is 0 or 1."""
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"its statistic {name} must hold only 0 and 1")


def check_shares(name: str, values: Tensor, total: Tensor) -> None:
    """Looks at probabilities.

    Args:
        name: of the statistic, or of the shared state.
        values: (..., classes).
        total: (...), what each row has to add up to: 1, or 0 for one that says nothing.

    Raises:
        ValueError: one is below 0, or a row adds up to something else.
    """
    if (values < 0).any() or ((values.sum(-1) - total).abs() > SLACK).any():
        raise ValueError(f"{name} must be probabilities: at least 0, each row with the sum 1")
