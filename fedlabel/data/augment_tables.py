"""Weak and strong views of rows of tables, batched and as pure functions: Gaussian jitter and feature dropout."""

from __future__ import annotations

from torch import Tensor

from fedlabel.transfer import to_device


def jitter(rows: Tensor, noise: Tensor, sd: float) -> Tensor:
    """Returns rows with noise on every feature.

    Args:
        rows: (batch, features, 1, 1) float32, standardised. The batch may be empty.
        noise: of the same shape, standard Gaussian, on any device.
        sd: standard deviation of the noise that is added.
    """
    return rows + sd * to_device(noise, rows.device).to(rows.dtype)


def drop_features(rows: Tensor, dropped: Tensor) -> Tensor:
    """Returns rows in which some features are set to 0.

    A numeric column then has its mean over the training samples. A category's feature that was 1 is then as for a
    category that training has never seen.

    Args:
        rows: as for `jitter`.
        dropped: of the same shape, bool, on any device.
    """
    return rows.masked_fill(to_device(dropped, rows.device), 0.0)
