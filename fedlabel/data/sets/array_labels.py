"""Labels in users' arrays: converts class numbers, names or one-hot rows to class numbers, names and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedlabel.data.sets.cells import MISSING
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.names import alike, in_order, listed
from fedlabel.data.sets.table_labels import MAYBE_CLASSES, UNLABELLED
from fedlabel.names import did_you_mean
from fedlabel.shown import shown

MAX_NAME = 200
"""Letters of a class's name; a longer one is no name."""
FEW_CLASSES = 20
"""So many classes may have a sample each; more must have two on average, or they are identifiers or measurements."""


class Labels(NamedTuple):
    """Labels as class numbers."""

    train: np.ndarray
    """(n,) int64; -1: no label."""
    test: np.ndarray
    """(m,) int64, all at least 0."""
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


class _Given(NamedTuple):
    """One array of labels in any supported form, as one label per sample."""

    values: np.ndarray
    """(n,) int64 with -1, or texts with "", for a missing label."""
    width: int | None
    """Number of columns if it was one-hot."""

    @property
    def has_label(self) -> np.ndarray:
        """(n,) bool: the sample has a label."""
        has_label: np.ndarray = self.values != "" if self.is_text else self.values >= 0
        return has_label

    @property
    def is_text(self) -> bool:
        """Whether labels are texts."""
        return self.values.dtype.kind == "U"


def number_labels(train: np.ndarray, test: np.ndarray, names: np.ndarray | None, where: Mapping[str, str]) -> Labels:
    """Numbers the classes.

    A label is a whole number (of any integer or float type) from 0 on, a text, or True or False; a column or row of
    them counts as (n,), and a one-hot (n, classes) matrix as the number of its column. In training labels -1, NaN or an
    empty text (or another of `MISSING`) say that nobody knows the class. Classes are the different training labels, in
    the order of numbers if all are numbers and else of the alphabet: labels 1, 2, 3 make three classes of these names.

    Args:
        train: labels of the training samples.
        test: of the test samples; all must have a label, and of a class of the training samples.
        names: of the classes, in their order, also of those without a training sample; labels are then such names, or
            else numbers of classes from 0. None: see above.
        where: "y_train", "y_test" and "class_names" -> what to call these arrays in messages.

    Raises:
        DataError: labels that are none of these, or no sensible classes.
    """
    given = [_read(train, where["y_train"], may_lack=True), _read(test, where["y_test"], may_lack=False)]
    kinds = ["texts" if each.is_text else f"one-hot of {each.width}" if each.width else "numbers" for each in given]
    if kinds[0] != kinds[1]:
        raise DataError(f"{where['y_train']} holds {kinds[0]}, but {where['y_test']} {kinds[1]}. Write both alike.")
    lacking = int((~given[0].has_label).sum())
    if names is not None:
        class_names = _given_names(names, where["class_names"])
        numbers = _by_names(given, class_names, where)
    elif lacking == len(given[0].values):
        raise DataError(
            f"{where['y_train']}: no sample has a label, so the classes are unknown. Name them in `class_names`, or "
            "give some labels."
        )
    elif given[0].width:
        class_names, numbers = tuple(map(str, range(given[0].width))), [each.values for each in given]
    else:
        class_names, numbers = _found_classes(given, where)
    if len(class_names) < 2:
        only = (
            f"{where['y_train']}: all labels that are known are {listed(class_names)}; at least 2 classes are needed."
        )
        raise DataError(only + (" -1 says that a sample has no label: write classes as 0, 1, ..." if lacking else ""))
    counts = [np.bincount(each[each >= 0], minlength=len(class_names)) for each in numbers]
    notes = _doubts(class_names, where["y_train"], given[0].is_text) if names is None else []
    if lacking:
        notes.append(f"{where['y_train']}: {lacking} of {len(numbers[0])} samples have no label.")
    for count, key in zip(counts, ("y_train", "y_test"), strict=True):
        if not count.all():
            without = [class_names[number] for number in np.flatnonzero(count == 0)]
            notes.append(f"{where[key]}: no sample has the label {listed(without)}.")
    return Labels(numbers[0], numbers[1], class_names, tuple(notes))


# ------------------------------------------------------------------------------------------------------------ one array


def _read(labels: np.ndarray, where: str, may_lack: bool) -> _Given:
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.shape[0] > 1:
        return _read_one_hot(labels, where)
    if labels.ndim == 0 or labels.size != max(labels.shape):
        raise DataError(
            f"{where} is {labels.dtype} of shape {labels.shape}; it must be one label per sample, of shape (n,), or a "
            "one-hot matrix (n, classes)."
        )
    labels = labels.reshape(-1)
    kind = labels.dtype.kind
    if kind in "US":
        values = _texts(labels, where)
    elif kind == "b":
        values = np.where(labels, "True", "False")
    elif kind in "iuf":
        values = _whole_numbers(labels, where)
    else:
        raise DataError(f"{where} is {labels.dtype}; labels must be whole numbers, texts, or True and False.")
    given = _Given(values, None)
    lacking = np.flatnonzero(~given.has_label)
    if len(lacking) and not may_lack:
        marks = ", ".join(dict.fromkeys(repr(label.item()) for label in labels[lacking[:1000]]))
        raise DataError(
            f"{where}: {len(lacking)} of {len(labels)} samples have no label ({shown(marks)}): "
            f"{listed(lacking.tolist())}. Every test sample needs one: leave these out, or label "
            "them. If that is a class, call it otherwise."
        )
    return given


def _read_one_hot(matrix: np.ndarray, where: str) -> _Given:
    numeric = matrix.dtype.kind in "biuf"
    one = matrix == 1
    odd = np.flatnonzero((one.sum(1) != 1) | ((matrix != 0) & ~one).any(1)) if numeric else np.arange(len(matrix))
    if len(odd):
        raise DataError(
            f"{where} is {matrix.dtype} of shape {matrix.shape}, and its row {odd[0]} is not one-hot (a single 1, else "
            "0). Write one label per sample, (n,): of probabilities `y.argmax(1)`, and -1 for no label. Several "
            "annotators' labels come from a file of their own: supervision.labels_file and supervision.labels_keys."
        )
    return _Given(one.argmax(1).astype(np.int64), matrix.shape[1])


def _whole_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    """Returns int64; NaN becomes -1."""
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)
        odd = np.flatnonzero(~np.isnan(labels) & ((labels != np.floor(labels)) | np.isinf(labels)))
        if len(odd):
            raise DataError(
                f"{where}: the label of sample {odd[0]} (={labels[odd[0]]}) is no whole number ({len(odd)} are not). "
                "Labels must be classes; numbers to be predicted (regression) are not supported."
            )
        labels = np.where(np.isnan(labels), -1, labels)
    _refuse_at(labels < -1, labels, where, "must be at least 0 (-1: no label)")
    _refuse_at(labels > 2**53, labels, where, "is too large for a class: write such labels as texts")
    top = np.iinfo(labels.dtype).max if labels.dtype.kind == "u" else None
    if top is not None and top - 1 not in labels:  # all up to it is another matter
        what = f"is what -1 becomes in {labels.dtype}. For no label write -1 in a signed type (int64); a class: as text"
        _refuse_at(labels == top, labels, where, what)
    return labels.astype(np.int64)


def _refuse_at(wrong: np.ndarray, labels: np.ndarray, where: str, what: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        also = f" (and so of {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise DataError(f"{where}: the label of sample {rows[0]} (={labels[rows[0]]}) {what}{also}.")


def _texts(labels: np.ndarray, where: str) -> np.ndarray:
    """Returns texts without surrounding blanks; "" for marks of a missing label."""
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} holds bytes that are no UTF-8 ({error}). Write texts.") from error
    long = np.flatnonzero(np.char.str_len(labels) > 2 * MAX_NAME)  # with room for blanks around it
    if len(long):
        raise DataError(
            f"{where}: the label of sample {long[0]} (={shown(labels[long[0]])}) is no name of a class: write at most "
            f"{MAX_NAME} letters."
        )
    different, place = np.unique(labels.astype(f"U{2 * MAX_NAME}"), return_inverse=True)
    texts = [str(text).strip() for text in different]
    for text, index in zip(texts, range(len(texts)), strict=True):
        doubtful = text == "-1" or text.casefold() in MAYBE_CLASSES
        if doubtful or len(text) > MAX_NAME or not text.isprintable():
            row = int(np.flatnonzero(place == index)[0])
            hint = "an empty text for no label, or another name" if doubtful else f"at most {MAX_NAME} letters"
            raise DataError(f"{where}: the label of sample {row} (={shown(text)}) is no name of a class: write {hint}.")
    found = np.array(["" if text.casefold() in MISSING else text for text in texts], dtype=str)
    values: np.ndarray = found[place]
    return values


# -------------------------------------------------------------------------------------------------------------- classes


def _given_names(names: np.ndarray, where: str) -> tuple[str, ...]:
    if names.dtype.kind not in "USiu" or names.size != max(names.shape, default=1):
        raise DataError(f"{where} is {names.dtype} of shape {names.shape}; it must be a list of texts.")
    flat = names.reshape(-1)
    texts = _texts(flat, where).tolist() if names.dtype.kind in "US" else [str(name) for name in flat]
    odd = next((name for name, count in Counter(texts).items() if count > 1 or not name), None)
    if odd is not None:
        raise DataError(
            f"{where} has the name `{odd}` {'twice' if odd else '(none, or a missing one)'}: give each one."
        )
    return tuple(texts)


def _by_names(given: Sequence[_Given], names: tuple[str, ...], where: Mapping[str, str]) -> list[np.ndarray]:
    """Returns numbers of the classes `names`, -1 = none."""
    if given[0].width not in (None, len(names)):
        raise DataError(
            f"{where['y_train']} has {given[0].width} columns, but {where['class_names']} {len(names)} names: one each."
        )
    different = set().union(*(np.unique(each.values[each.has_label]).tolist() for each in given))
    if given[0].is_text or (given[0].width is None and different and {str(label) for label in different} <= set(names)):
        return _places(given, {name: number for number, name in enumerate(names)}, where)
    for each, key in zip(given, ("y_train", "y_test"), strict=True):
        wrong = np.flatnonzero(each.values >= len(names))
        if len(wrong):
            from_1 = different and min(different) == 1 and max(different) == len(names)
            raise DataError(
                f"{where[key]}: the label of sample {wrong[0]} (={each.values[wrong[0]]}) must lie in "
                f"[0, {len(names) - 1}], as there are {len(names)} `class_names`."
                + (f" Labels from 1 to {len(names)}: subtract 1, or write the names as labels." if from_1 else "")
            )
    return [each.values for each in given]


def _found_classes(given: Sequence[_Given], where: Mapping[str, str]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Returns the names of the training labels, and all labels as numbers of them."""
    train = given[0]
    different = np.unique(train.values[train.has_label]).tolist()
    samples = sum(int(each.has_label.sum()) for each in given)
    if len(different) > FEW_CLASSES and 2 * len(different) > samples:
        raise DataError(
            f"{where['y_train']} holds {len(different)} different labels, of {samples} labelled samples in all: these "
            "are rather identifiers or measurements. Labels must be classes, which several samples have in common."
        )
    if not train.is_text and different[-1] >= 100 + 10 * len(different):
        _refuse_at(
            train.values == different[-1],
            train.values,
            where["y_train"],
            f"is far from the others ({listed(different[:-1]) or 'there are none'}). If it means that there is no "
            "label, write -1; if it is a class, write labels as texts, or list the classes in `class_names`",
        )
    names = tuple(in_order([str(label) for label in different]))
    return names, _places(given, {name: number for number, name in enumerate(names)}, where)


def _places(given: Sequence[_Given], number: Mapping[str, int], where: Mapping[str, str]) -> list[np.ndarray]:
    """Returns (n,) int64 per array, the index of each label; -1 = none."""
    numbers = []
    for each, key in zip(given, ("y_train", "y_test"), strict=True):
        different, place = np.unique(each.values, return_inverse=True)
        nothing = "" if each.is_text else -1
        for label in different.tolist():
            if label != nothing and str(label) not in number:
                row = int(np.flatnonzero(each.values == label)[0])
                raise DataError(
                    f"{where[key]}: the label of sample {row} (={shown(label)}) is none of the classes: "
                    f"{listed(list(number))}."
                    + did_you_mean(str(label), number)
                    + " A class without a training sample must be named in `class_names`, with all others."
                )
        table = np.array([-1 if label == nothing else number[str(label)] for label in different.tolist()], np.int64)
        numbers.append(table[place])
    return numbers


def _doubts(names: tuple[str, ...], where: str, are_texts: bool) -> list[str]:
    """Returns warnings about the classes that were found in labels."""
    if are_texts:
        pairs = alike(names)
        if pairs:
            raise DataError(
                f"{where} holds the labels {' and '.join(f'`{name}`' for name in pairs[0])}, which look the same: "
                "one class or two? Write one in one way; list two in `class_names`, with all others."
            )
        return [
            f"{where}: `{name}` is taken for a class. If it means that there is no label, write an empty text."
            for name in names
            if name.casefold() in UNLABELLED and len(names) > 2
        ]
    first, last = int(names[0]), int(names[-1])
    if last - first == len(names) - 1:
        return []
    return [f"{where}: the labels are {listed(names)}, each of them a class; the numbers between them are none."]
