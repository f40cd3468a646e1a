"""Names in messages and of classes."""

from __future__ import annotations

from fedlabel.data.sets.names import alike, in_order, listed


def test_the_first_names_stand_for_many() -> None:
    assert listed([1, 2, 3], 2) == "1, 2, … (3 in all)"
    assert listed(["a", "b"], 2) == "a, b"


def test_numbers_are_in_the_order_of_numbers() -> None:
    assert in_order(["10", "9", "1.5"]) == ["1.5", "9", "10"]
    assert in_order(["10", "9", "a"]) == ["10", "9", "a"]
    assert in_order(["10", "9", "nan"]) == ["10", "9", "nan"]


def test_names_that_look_the_same_are_grouped() -> None:
    """Also 1 and 1.0, and the ligature of f and i."""
    names = ["a b", "AB", "c", "1", "d", "C ", "1.0", "\ufb01n", "fin", "10"]
    assert alike(names) == [["a b", "AB"], ["c", "C "], ["1", "1.0"], ["\ufb01n", "fin"]]
