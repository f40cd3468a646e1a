"""Checks of configuration fields: ranges, allowed values, and keys that do not change what is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any


def no_effect(default: Any) -> Any:
    """Returns a dataclass field that does not change what a run computes: runs that differ only in it may be resumed
    from each other, reused by a sweep, and compared.
    """
    return field(default=default, metadata={"no_effect": True})


def one_of(config: object, section: str, **allowed: Sequence[str]) -> None:
    """Raises ValueError unless each named field of `config` has one of its allowed values; section: of the messages,
    e.g. "method".
    """
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            _refuse(config, section, key, f"be one of {', '.join(values)}")


def in_unit_interval(config: object, section: str, *keys: str, below_one: bool = False) -> None:
    """Raises ValueError unless the fields lie in [0, 1]; below_one: in [0, 1)."""
    for key in keys:
        value = getattr(config, key)
        if not 0 <= value <= 1 or (below_one and value == 1):
            _refuse(config, section, key, f"lie in [0, 1{')' if below_one else ']'}")


def at_least(config: object, section: str, least: int, *keys: str, null: bool = False) -> None:
    """Raises ValueError unless the fields are `least` or more; null: or None."""
    for key in keys:
        value = getattr(config, key)
        if value is None and null:
            continue
        if not value >= least:
            _refuse(config, section, key, f"be at least {least}{' (or null)' if null else ''}")


def finite(config: object, section: str, *keys: str) -> None:
    """Raises ValueError unless the fields are finite numbers of at least 0."""
    for key in keys:
        if not 0 <= getattr(config, key) < math.inf:
            _refuse(config, section, key, "be a finite number of at least 0")


def positive(config: object, section: str, *keys: str, null: bool = False) -> None:
    """Raises ValueError unless the fields are finite numbers above 0; null: or None."""
    for key in keys:
        value = getattr(config, key)
        if value is None and null:
            continue
        if not 0 < value < math.inf:
            _refuse(config, section, key, f"be a positive number{', or null' if null else ''}")


def _refuse(config: object, section: str, key: str, allowed: str) -> None:
    raise ValueError(f"`{section}.{key}` (={getattr(config, key)}) must {allowed}.")
