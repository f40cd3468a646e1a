"""Somebody else's texts in our messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlabel.shown import shown, shown_repr


def test_what_a_terminal_would_obey_is_escaped_and_what_is_long_is_cut() -> None:
    assert shown("é\x1b[31m\n\u202e") == r"é\x1b[31m\n\u202e"
    assert shown("a\nb\r", keep="\n") == "a\nb\\r"
    assert shown("a" * 200, 5) == "aaaaa…"
    assert shown("a" * 5, 5) == "aaaaa"
    assert shown(-3) == "-3"


class Rude:
    def __repr__(self) -> str:
        raise KeyError("no")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[31m\nb", r"'a\x1b[31m\nb'"),
        (Rude(), "<Rude, whose repr fails: KeyError>"),
        ("x" * 1000, "'" + "x" * 59 + "…"),
        (np.ones((2, 2)), "array([[1., 1.], [1., 1.]])"),
    ],
)
def test_values_of_any_class_are_shown_in_one_short_line(value: Any, text: str) -> None:
    assert shown_repr(value) == text
