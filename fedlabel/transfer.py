"""Sends tensors to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device.

    From the CPU to a GPU it goes through page-locked memory: any other is copied only when the device has done all the
    work it was given before.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
