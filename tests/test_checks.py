"""Range checks: what is let through, and what the messages say."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, positive, within

Check = Callable[[Any], None]
CHECKS: dict[str, Check] = {
    "one_of": lambda config: one_of(config, "method", x=("a", "b")),
    "one_of_or_null": lambda config: one_of(config, "method", x=(None, "b")),
    "closed": lambda config: within(config, "method", 1, 65536, "x"),
    "open": lambda config: within(config, "method", 0, 1, "x", ends="()"),
    "above": lambda config: within(config, "method", 0, 1e9, "x", ends="(]", hint="it is in seconds"),
    "in_unit_interval": lambda config: in_unit_interval(config, "method", "x"),
    "below_one": lambda config: in_unit_interval(config, "method", "x", below_one=True),
    "at_least": lambda config: at_least(config, "method", 2, "x"),
    "at_least_or_null": lambda config: at_least(config, "method", 2, "x", null=True),
    "finite": lambda config: finite(config, "method", "x"),
    "finite_from_1": lambda config: finite(config, "method", "x", least=1, hint="1 is no tail"),
    "positive": lambda config: positive(config, "method", "x"),
    "positive_or_null": lambda config: positive(config, "method", "x", null=True),
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("one_of", ["a", "b"]),
        ("one_of_or_null", [None, "b"]),
        ("closed", [1, 65536]),
        ("open", [1e-9, 0.999]),
        ("above", [1e-9, 1e9]),
        ("in_unit_interval", [0, 0.5, 1]),
        ("below_one", [0, 0.999]),
        ("at_least", [2, 3]),
        ("at_least_or_null", [2, None]),
        ("finite", [0, 1e30]),
        ("finite_from_1", [1, 1e30]),
        ("positive", [1e-30, 1e30]),
        ("positive_or_null", [1, None]),
    ],
)
def test_what_is_allowed(name: str, values: list[Any]) -> None:
    for value in values:
        CHECKS[name](SimpleNamespace(x=value))


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("one_of", ["c", "", "A"], "be one of a, b."),
        ("one_of_or_null", ["a"], "be one of null, b."),
        ("closed", [0, 65537, math.nan], "lie in [1, 65536]."),
        ("open", [0, 1, math.nan], "lie in (0, 1)."),
        ("above", [0, 1.1e9, math.inf], "lie in (0, 1e+09]: it is in seconds."),
        ("in_unit_interval", [-0.1, 1.1, math.nan, math.inf], "lie in [0, 1]."),
        ("below_one", [-0.1, 1, 1.0, math.nan], "lie in [0, 1)."),
        ("at_least", [1, math.nan], "be at least 2."),
        ("at_least_or_null", [1, math.nan], "be at least 2 (or null)."),
        ("finite", [-1, math.inf, math.nan], "be a finite number of at least 0."),
        ("finite_from_1", [0.5, math.inf, math.nan], "be a finite number of at least 1: 1 is no tail."),
        ("positive", [0, -1, math.inf, math.nan], "be a positive number."),
        ("positive_or_null", [0, math.inf, math.nan], "be a positive number, or null."),
    ],
)
def test_what_is_refused_and_how(name: str, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match="must") as error:
            CHECKS[name](SimpleNamespace(x=value))
        assert str(error.value) == f"`method.x` (={value}) must {allowed}"


def test_every_named_field_is_looked_at() -> None:
    config = SimpleNamespace(x=0.5, y=2)
    for check in (
        lambda: one_of(config, "method", x=(0.5,), y=("a",)),  # type: ignore[arg-type]
        lambda: within(config, "method", 0, 1, "x", "y"),
        lambda: in_unit_interval(config, "method", "x", "y"),
        lambda: at_least(SimpleNamespace(x=5, y=2), "method", 3, "x", "y"),
        lambda: finite(SimpleNamespace(x=5, y=math.inf), "method", "x", "y"),
        lambda: positive(SimpleNamespace(x=None, y=0), "method", "x", "y", null=True),
    ):
        with pytest.raises(ValueError, match=r"^`method\.y` \(="):
            check()


def test_a_key_outside_any_section_is_named_without_one() -> None:
    with pytest.raises(ValueError, match=r"^`seed` \(=-1\) must be at least 0\.$"):
        at_least(SimpleNamespace(seed=-1), "", 0, "seed")
