"""Weak and strong views of rows of tables, batched and as pure functions: Gaussian jitter and feature dropout."""

from __future__ import annotations

from torch import Tensor

from fedlabel.seeding import Draws
from fedlabel.transfer import to_device


def jitter(rows: Tensor, draws: Draws, sd: float) -> Tensor:
    """Returns rows with Gaussian noise on every feature.

    Args:
        rows: (batch, features, 1, 1) float32, standardised. The batch may be empty.
        draws: source of the noise.
        sd: standard deviation of the noise.
    """
    noise = to_device(draws.normal(rows.shape), rows.device).to(rows.dtype)
    return rows + sd * noise


def drop_features(rows: Tensor, draws: Draws, rate: float) -> Tensor:
    """Returns rows in which each feature is set to 0 with probability `rate`, independently in each row.

    A numeric column then has its mean over the training samples. A category's feature that was 1 is then as for a
    category that training has never seen.

    Args:
        rows: as for `jitter`.
        draws: source of the choice.
        rate: in [0, 1].
    """
    dropped = to_device(draws.uniform(rows.shape) < rate, rows.device)
    return rows.masked_fill(dropped, 0.0)
