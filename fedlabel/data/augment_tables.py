"""Weak and strong views of rows of tables, batched and as pure functions: Gaussian jitter and feature dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def jitter(rows: Tensor, generator: torch.Generator, sd: float) -> Tensor:
    """Returns rows with Gaussian noise on every feature.

    Args:
        rows: (batch, features, 1, 1) float32, standardised. The batch may be empty.
        generator: source of the noise, on the device of `rows`.
        sd: standard deviation of the noise.
    """
    noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    return rows + sd * noise


def drop_features(rows: Tensor, generator: torch.Generator, rate: float) -> Tensor:
    """Returns rows in which each feature is set to 0 with probability `rate`, independently in each row.

    A numeric column then has its mean over the training samples. A category's feature that was 1 is then as for a
    category that training has never seen.

    Args:
        rows: as for `jitter`.
        generator: source of the choice, on the device of `rows`.
        rate: in [0, 1].
    """
    dropped = torch.rand(rows.shape, generator=generator, device=rows.device) < rate
    return rows.masked_fill(dropped, 0.0)
