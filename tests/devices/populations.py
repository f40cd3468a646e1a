"""Devices for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlabel.devices.clock import Devices
from fedlabel.devices.config import DevicesConfig, PopulationPart

PHONES = (PopulationPart("phone"),)
MIXED = (PopulationPart("phone", 0.5), PopulationPart("laptop", 0.3), PopulationPart("hospital_server", 0.2))


def devices(
    num_clients: int = 1, seed: int = 0, rarity: np.ndarray | None = None, kind: str = "preset", **keys: Any
) -> Devices:
    if kind != "trace":
        keys.setdefault("population", PHONES)
    return Devices.of(DevicesConfig(kind, **keys), num_clients, seed, rarity)
