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


def one_of(config: object, section: str, **allowed: Sequence[str | None]) -> None:
    """Raises ValueError unless each named field of `config` has one of its allowed values; section: of the messages,
    e.g. "method", or "" for keys outside any.
    """
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            names = ("null" if value is None else value for value in values)
            _refuse(config, section, key, f"be one of {', '.join(names)}")


def within(
    config: object, section: str, least: float, most: float, *keys: str, ends: str = "[]", hint: str = ""
) -> None:
    """Raises ValueError unless the fields lie between two numbers.

    Args:
        config: has the fields.
        section: of the messages.
        least: lower end of the interval.
        most: its upper end.
        keys: names of the fields.
        ends: which ends belong to it: "[]" both, "(]" the upper one, "[)" the lower one, "()" none.
        hint: what to do; appended to the message.
    """
    for key in keys:
        value = getattr(config, key)
        above = value >= least if ends[0] == "[" else value > least
        below = value <= most if ends[1] == "]" else value < most
        if not (above and below):
            _refuse(config, section, key, f"lie in {ends[0]}{_number(least)}, {_number(most)}{ends[1]}", hint)


def in_unit_interval(config: object, section: str, *keys: str, below_one: bool = False) -> None:
    """Raises ValueError unless the fields lie in [0, 1]; below_one: in [0, 1)."""
    within(config, section, 0, 1, *keys, ends="[)" if below_one else "[]")


def at_least(config: object, section: str, least: int, *keys: str, null: bool = False) -> None:
    """Raises ValueError unless the fields are `least` or more; null: or None."""
    for key in keys:
        value = getattr(config, key)
        if value is None and null:
            continue
        if not value >= least:
            _refuse(config, section, key, f"be at least {least}{' (or null)' if null else ''}")


def finite(config: object, section: str, *keys: str, least: int = 0, hint: str = "") -> None:
    """Raises ValueError unless the fields are finite numbers of at least `least`; hint: see `within`."""
    for key in keys:
        if not least <= getattr(config, key) < math.inf:
            _refuse(config, section, key, f"be a finite number of at least {least}", hint)


def positive(config: object, section: str, *keys: str, null: bool = False, hint: str = "") -> None:
    """Raises ValueError unless the fields are finite numbers above 0; null: or None; hint: see `within`."""
    for key in keys:
        value = getattr(config, key)
        if value is None and null:
            continue
        if not 0 < value < math.inf:
            _refuse(config, section, key, f"be a positive number{', or null' if null else ''}", hint)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse(config: object, section: str, key: str, allowed: str, hint: str = "") -> None:
    name = f"{section}.{key}" if section else key
    raise ValueError(f"`{name}` (={getattr(config, key)}) must {allowed}{': ' if hint else ''}{hint}.")
