"""Which class a name or a number means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.data.sets.class_names import ClassNames

CASES: list[tuple[tuple[str, ...], Any, int]] = [
    (("cat", "dog"), "dog", 1),
    (("cat", "dog"), " Dog\n", 1),
    (("cat", "Cat"), "Cat", 1),
    (("cat", "dog"), 1, 1),
    (("cat", "dog"), 1.0, 1),
    (("cat", "dog"), "1", 1),
    (("cat", "dog"), np.uint8(1), 1),
    (("cat", "dog"), np.float32(0), 0),
    (("cat", "dog"), np.str_("cat"), 0),
    (("cat", "dog"), np.bytes_(b"cat"), 0),
    (("cat", "dog"), b"dog", 1),
    (("cat", "dog"), torch.tensor(1), 1),
    (("cat", "dog"), np.array(1), 1),
    (("cat", "dog"), -1, -1),
    (("cat", "dog"), "-1", -1),
    (("cat", "dog"), None, -1),
    (("cat", "dog"), "", -1),
    (("cat", "dog"), " NaN ", -1),
    (("cat", "dog"), float("nan"), -1),
    (("1", "2"), 1, 0),
    (("1", "2"), 2, 1),
    (("1", "2"), 2.0, 1),
    (("1", "2"), "02", 1),
    (("1", "2"), -1, -1),
    (("-1", "1"), -1, 0),
    (("-1", "1"), 1, 1),
    (("-1", "1"), None, -1),
    (("0.5", "1.5"), 1.5, 1),
    (("1.0", "2.0"), 1, 0),
    (("False", "True"), True, 1),
    (("false", "true"), np.bool_(False), 0),
    (("rest", "8"), "8", 1),
    (("rest", "8"), 8, 1),
    (("rest", "8"), 0, 0),
    (("rest", "1"), 1, 1),
    (("?", "NA"), "NA", 1),  # a class, if the data have one of that name
]


@pytest.mark.parametrize(("names", "value", "expected"), CASES, ids=map(str, range(len(CASES))))
def test_names_first_then_places(names: tuple[str, ...], value: Any, expected: int) -> None:
    classes = ClassNames(names)
    assert [classes.find(value), classes.find(value)] == [expected, expected]  # the second one is remembered


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("1", "2"), 0, r"is none of the classes 1, 2$"),  # no place, which would be "1"
        (("1", "2"), 3, r"is none of the classes 1, 2$"),
        (("cat", "dog"), 2, r"is none of the classes cat, dog, or a number from 0 to 1$"),
        (("cat", "dog"), -2, "is none of"),
        (("cat", "dog"), 0.5, "is none of"),
        (("cat", "dog"), float("inf"), "is none of"),
        (("cat", "dog"), 10**400, "is none of"),
        (("cat", "dog"), "fox", "is none of"),
        (("cat", "dog"), "0_1", "is none of"),
        (("cat", "dog"), True, r"is none of the classes cat, dog, and no number of one"),
        (("cat", "dog"), [1], "is none of"),
        (("cat", "dog"), {}, "is none of"),
        (("cat", "dog"), 1j, "is none of"),
        (("cat", "dog"), np.array([1]), "is none of"),
        (("cat", "dog"), np.datetime64(1, "ns"), "is none of"),
        (("cat", "dog"), np.timedelta64(1, "s"), "is none of"),
        (("Cat", "cat"), "CAT", r"could mean several of the classes Cat, cat: write the name as it is"),
        (("1", "1.0"), 1, r"could mean several of the classes"),
        (("rest", "0"), 0, r"could mean class `rest`, by its place from 0, or `0`, by its name"),
    ],
)
def test_what_is_no_class_or_two_is_refused(names: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNames(names).find(value)


def test_many_names_are_cut_in_messages() -> None:
    with pytest.raises(ValueError, match=r"the classes 0, 1, .*, 19, … .1000 in all.$"):
        ClassNames([str(n) for n in range(1000)]).find("fox")
