"""Labels in arrays: what counts as a label, which classes there are, and what is refused, by row."""

from __future__ import annotations

import numpy as np
import pytest

from fedlabel.data.sets.array_labels import Labels, number_labels
from fedlabel.data.sets.config import DataError

WHERE = {"y_train": "f: `y_train`", "y_test": "f: `y_test`", "class_names": "f: `class_names`"}


def numbered(train: object, test: object, names: object = None) -> Labels:
    given = None if names is None else np.array(names)
    return number_labels(np.array(train), np.array(test), given, WHERE)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int64", "uint64", ">i4", "float16", "float64", "U1", "S1"]
)
def test_every_type_of_number_and_text_is_a_label(dtype: str) -> None:
    found = number_labels(np.array([2, 0, 1, 2]).astype(dtype), np.array([1, 2, 0]).astype(dtype), None, WHERE)
    assert found.train.tolist() == [2, 0, 1, 2]
    assert found.test.tolist() == [1, 2, 0]
    assert found.train.dtype == found.test.dtype == np.int64
    assert found.class_names == ("0", "1", "2")
    assert found.notes == ()


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (4, 1, 1)])
def test_a_column_and_a_row_count_as_a_list(shape: tuple[int, ...]) -> None:
    assert numbered(np.array([2, 0, 1, 2]).reshape(shape), [[1], [2], [0]]).train.tolist() == [2, 0, 1, 2]


def test_labels_from_1_make_no_class_0_and_a_gap_no_class() -> None:
    found = numbered([1, 3, 2, 1], [3, 1, 2])
    assert (found.class_names, found.train.tolist(), found.test.tolist()) == (("1", "2", "3"), [0, 2, 1, 0], [2, 0, 1])
    assert found.notes == ()
    found = numbered([8, 3, 8, 3], [3, 8])
    assert (found.class_names, found.train.tolist()) == (("3", "8"), [1, 0, 1, 0])
    assert found.notes == (
        "f: `y_train`: the labels are 3, 8, each of them a class; the numbers between them are none.",
    )


def test_minus_1_nan_and_empty_texts_say_that_nobody_knows_the_class() -> None:
    for train in ([0, -1, 1, -1], [0, np.nan, 1, -1.0]):
        found = numbered(train, [1, 0])
        assert found.train.tolist() == [0, -1, 1, -1]
        assert found.class_names == ("0", "1")
        assert found.notes == ("f: `y_train`: 2 of 4 samples have no label.",)
    found = numbered(["cat", "", "dog ", "NaN", "cat"], ["dog", "cat"])
    assert found.train.tolist() == [0, -1, 1, -1, 0]
    assert found.class_names == ("cat", "dog")


def test_texts_are_names_and_numbers_among_them_are_ordered_as_such() -> None:
    assert numbered(["10", "9", "1", "9"], ["1", "9", "10"]).class_names == ("1", "9", "10")
    assert numbered(["b", "a"], ["a", "b"]).train.tolist() == [1, 0]
    assert numbered([True, False, False], [False, True]).class_names == ("False", "True")
    found = numbered(["cat", "dog", "Unknown"], ["cat", "dog", "Unknown"])
    assert found.notes == (
        "f: `y_train`: `Unknown` is taken for a class. If it means that there is no label, write an empty text.",
    )
    assert numbered(["A", "a"], ["a", "A"], ["A", "a"]).train.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_one_hot(dtype: type) -> None:
    """Every column is a class, also the one that no sample has."""
    eye = np.eye(4, dtype=dtype)
    found = number_labels(eye[[3, 0, 1]], eye[[0, 3]], None, WHERE)
    assert (found.train.tolist(), found.test.tolist()) == ([3, 0, 1], [0, 3])
    assert found.class_names == ("0", "1", "2", "3")
    assert found.notes == (
        "f: `y_train`: no sample has the label 2.",
        "f: `y_test`: no sample has the label 1, 2.",
    )
    assert number_labels(eye[[3, 0, 1]], eye[[0, 3]], np.array(list("abcd")), WHERE).class_names == ("a", "b", "c", "d")


def test_names_declare_classes_without_a_sample() -> None:
    found = numbered([0, 1, -1], [2, 0], ["a", "b", "c"])
    assert (found.train.tolist(), found.test.tolist(), found.class_names) == ([0, 1, -1], [2, 0], ("a", "b", "c"))
    assert found.notes[1:] == ("f: `y_train`: no sample has the label c.", "f: `y_test`: no sample has the label b.")
    assert numbered([-1, -1], [1, 0], ["a", "b"]).train.tolist() == [-1, -1]
    assert numbered(["b", "a"], ["a", "b"], ["b", "a"]).train.tolist() == [0, 1]
    by_value = numbered([1, 2, 3], [3, 2, 1], [1, 2, 3])  # and not as numbers of the classes, which would shift all
    assert (by_value.train.tolist(), by_value.class_names) == ([0, 1, 2], ("1", "2", "3"))
    assert numbered([1, 2, 5], [2], [b"1", b"2", b"5"]).train.tolist() == [0, 1, 2]


def test_one_label_per_class_is_no_list_of_identifiers() -> None:
    """What decides is all labelled samples, and they need two a class where there are more than 20 classes."""
    assert len(numbered(np.arange(30), np.arange(30)).class_names) == 30
    with pytest.raises(DataError, match="30 different labels, of 59 labelled samples in all: these are rather identif"):
        numbered(np.arange(30), np.arange(29))
    assert len(numbered(np.arange(20), [0]).class_names) == 20


FAR = [0, 1, 2, 10**9]


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([0, 1.5, 1, 0.5], [0, 1], None, r"`y_train`: the label of sample 1 \(=1.5\) is no whole number \(2 are not\)"),
        ([0, np.inf, 1], [0, 1], None, r"sample 1 \(=inf\) is no whole number"),
        ([0, 1e300, 1], [0, 1], None, r"sample 1 \(=1e\+300\) is too large for a class"),
        ([0, -2, 1, -3], [0, 1], None, r"sample 1 \(=-2\) must be at least 0 \(-1: no label\) \(and so of 1 more"),
        ([0, -100, 1], [0, 1], None, r"sample 1 \(=-100\) must be at least 0"),
        (np.array([0, 255, 1], np.uint8), [0, 1], None, r"sample 1 \(=255\) is what -1 becomes in uint8"),
        (np.array([0, 2**64 - 1, 1], np.uint64), [0, 1], None, r"sample 1 \(=18446744073709551615\) is too large"),
        (FAR, [0, 1], None, r"sample 3 \(=1000000000\) is far from the others \(0, 1, 2\).*write -1; .*as texts"),
        ([0, 1, 2, 999], [0, 1], None, r"sample 3 \(=999\) is far from the others"),
        (
            [0, 1, 0],
            [0, -1, 1, -1],
            None,
            r"`y_test`: 2 of 4 samples have no label \(-1\): 1, 3\. Every test sample",
        ),
        ([0, 1, 0], [0, np.nan, 1], None, r"`y_test`: 1 of 3 samples have no label \(nan\): 1\."),
        (["a", "b"], ["a", "", "b"], None, r"`y_test`: 1 of 3 samples have no label \(''\): 1\."),
        ([-1, 1, 1, -1], [1, 1], None, r"are 1; at least 2 classes are needed. -1 says .* write classes as 0, 1"),
        ([1, 1], [1], None, "all labels that are known are 1; at least 2 classes are needed.$"),
        ([-1, -1], [0, 1], None, "no sample has a label, so the classes are unknown. Name them in `class_names`"),
        (
            [0, 1, 0],
            [0, 4],
            None,
            r"`y_test`: the label of sample 1 \(=4\) is none of the classes: 0, 1\. A class with",
        ),
        (["left", "right"], ["Left"], None, r"sample 0 \(=Left\) is none .* left, right. Did you mean left\?"),
        (["a", "b"], [0, 1], None, "`y_train` holds texts, but .*`y_test` numbers. Write both alike"),
        (np.eye(3), [0, 1], None, "`y_train` holds one-hot of 3, but .*`y_test` numbers"),
        (np.eye(3), np.eye(4), None, "`y_train` holds one-hot of 3, but .*`y_test` one-hot of 4"),
        (np.full((3, 2), 0.5), [0, 1], None, r"float64 of shape \(3, 2\), and its row 0 is not one-hot.*argmax"),
        ([[0, 1], [0, 0]], [0, 1], None, "its row 1 is not one-hot"),
        ([[0, 1], [2, 1]], [0, 1], None, "its row 1 is not one-hot.*supervision.labels_keys"),
        ([["a", "b"], ["b", "a"]], [0, 1], None, "its row 0 is not one-hot"),
        (np.zeros((2, 2, 2)), [0, 1], None, r"of shape \(2, 2, 2\); it must be one label per sample"),
        ([0j, 1j], [0, 1], None, "is complex128; labels must be"),
        (np.array(["2020-01-01"], "datetime64[D]"), [0], None, "labels must be whole numbers, texts, or True"),
        (["a", "b" * 201], ["a"], None, r"label of sample 1 \(=b{100}…\) is no name of a class: .*at most 200 letters"),
        (["a", "b" * 401], ["a"], None, r"label of sample 1 \(=b{100}…\) is no name of a class: .*at most 200 letters"),
        (["a", "\x1b[31m"], ["a"], None, r"label of sample 1 \(=\\x1b\[31m\) is no name of a class"),
        (
            ["1", "-1"],
            ["1"],
            None,
            r"label of sample 1 \(=-1\) is no name of a class: write an empty text for no label",
        ),
        (np.array([b"a", b"\xff"]), ["a"], None, "`y_train` holds bytes that are no UTF-8"),
        ([0, 1, 2], [0], ["a", "b"], r"sample 2 \(=2\) must lie in \[0, 1\], as there are 2 `class_names`"),
        ([1, 2], [1], ["a", "b"], r"\(=2\) must lie in \[0, 1\].* Labels from 1 to 2: subtract 1"),
        (["a", "c"], ["a"], ["a", "b"], r"sample 1 \(=c\) is none of the classes: a, b"),
        ([0, 1], [0], ["a", "a"], "`class_names` has the name `a` twice"),
        ([0, 1], [0], ["a", ""], "`class_names` has the name `` "),
        ([0, 1], [0], [0.5, 1.5], "`class_names` is float64"),
        ([0, 1], [0], [["a", "b"], ["c", "d"]], r"`class_names` is <U1 of shape \(2, 2\); it must be a list of texts"),
        (np.eye(3), np.eye(3), ["a", "b"], "`y_train` has 3 columns, but .*`class_names` 2 names"),
    ],
)
def test_what_is_no_label_is_refused_by_key_and_sample(
    train: object, test: object, names: object, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        numbered(train, test, names)
    assert "f: `" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_256_labels_of_a_byte_are_classes() -> None:
    labels = np.arange(512).astype(np.uint8)
    assert len(number_labels(labels, labels, None, WHERE).class_names) == 256
