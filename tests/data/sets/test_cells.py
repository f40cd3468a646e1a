"""What a cell means: numbers are written in one way, marks are known, and what looks like a number is told apart."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedlabel.data.sets.cells import is_number, looks_like, read_numbers


def test_numbers_marks_and_what_is_neither() -> None:
    read = read_numbers(["1", "", "NA", "n/a", "1e2", "+3", ".5", "5.", "-0", "1_0", "inf", "x", "NA"])
    nan = float("nan")
    assert np.array_equal(read.values, [1, nan, nan, nan, 100, 3, 0.5, 5, 0, nan, nan, nan, nan], equal_nan=True)
    assert read.marks == {"NA": 2, "n/a": 1}
    assert read.odd == {"1_0", "inf", "x"}
    assert read.leading_zero is None
    assert read_numbers(["1", "007"]).leading_zero == "007"


def test_marks_of_the_owner_are_texts_or_numbers() -> None:
    read = read_numbers(["-999", "-999.00", "N.D.", "99", "1"], frozenset(("-999", "n.d.")))
    assert np.isnan(read.values).tolist() == [True, True, True, False, False]
    assert read.odd == frozenset()
    assert read.marks == {"-999": 1, "-999.00": 1, "N.D.": 1}


def test_decimal_commas() -> None:
    cells = ["3,14", "1.234,5", "-1.234.567,8", "1.234", "12", ",5", "5,", "2,5e1", "", "1.5", "1,2,3", "12.34,5", ","]
    read = read_numbers(cells, decimal="comma")
    expected = [3.14, 1234.5, -1234567.8, 1234, 12, 0.5, 5, 25]
    assert read.values[:8].tolist() == expected
    assert read.odd == {"1.5", "1,2,3", "12.34,5", ","}


@pytest.mark.parametrize(
    "text", ["１", "٣", "1_000", "0x1", "1j", "1e", ".", "", "--1", " 1", "1 ", "infinity", "nan", "²"]
)
def test_what_is_no_number_though_python_may_read_one(text: str) -> None:
    assert not is_number(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("3,14", "decimal comma"),
        ("1,234", "comma"),
        ("1,234.5", "thousands"),
        ("1 234", "thousands"),
        ("1\u202f234,5", "thousands"),
        ("1.234.567", "thousands"),
        ("5%", "something around it"),
        ("$3.50", "something around it"),
        ("5 kg", "something around it"),
        ("(3.5)", "something around it"),
        ("1_000", "underscores"),
        ("0x1F", "hexadecimal"),
        ("-Infinity", "infinity"),
        ("１２", "another kind"),
        ("−3", "another kind"),
        ("2020-01-31", "date"),
        ("31/01/2020", "date"),
        ("31 Jan 2020", "date"),
        ("2020-01-31T10:00:00Z", "date"),
        ("10:30", "time"),
        ("120/80", "no number"),
        ("3.2*", "no number"),
    ],
)
def test_what_looks_like_a_number_is_named(text: str, what: str) -> None:
    found = looks_like(text)
    assert found is not None
    assert what in found[0]


@pytest.mark.parametrize("text", ["red", "10th", "18-24", "65+", "<5", "5A", "Mar-20", "unknown", "", "x" * 100])
def test_categories_do_not_look_like_numbers(text: str) -> None:
    assert looks_like(text) is None


def test_time_grows_with_the_length_of_a_cell() -> None:
    started = time.process_time()
    for text in ("1" * 100_000 + "x", "1," * 50_000, "1 " * 50_000, "-" * 100_000, "1." * 50_000):
        assert not is_number(text)
        assert read_numbers([text], decimal="comma").odd == {text}
        assert looks_like(text) is None
    assert time.process_time() - started < 2
