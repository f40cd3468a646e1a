"""Columns of tables as people have them: which are numbers, which are categories, and what is said or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.data.sets.table_files import load_table
from fedlabel.data.sets.tables import LoadedTable

LABELS = ("benign", "malignant", "malignant")
ROWS = 60


def rows_with(cells: list[str], labels: tuple[str, ...] = LABELS) -> str:
    """A table of 60 rows, of which `cells` and `labels` go round."""
    lines = [f'"{cells[i % len(cells)]}",{i * 7 % 11},{labels[i % len(labels)]}' for i in range(ROWS)]
    return "\n".join(["a,b,outcome", *lines, ""])


def load(tmp_path: Path, content: str, test: str | None = None, **keys: object) -> LoadedTable:
    path = tmp_path / "mine.csv"
    path.write_text(content, encoding="utf-8")
    if test is not None:
        (tmp_path / "test.csv").write_text(test, encoding="utf-8")
        keys["test_file"] = "test.csv"
    return load_table(DataConfig("table", str(path), **{"label_column": "outcome", **keys}))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mark", ["N/A", "-", "<NA>", ".", "NA", "n.a.", "NaN", "null", "None", "?", "--", "#N/A"])
def test_a_mark_leaves_a_column_of_numbers_what_it_is(tmp_path: Path, mark: str) -> None:
    loaded = load(tmp_path, rows_with(["1", "2", mark, "4"]))
    assert loaded.train.names == ("a", "b")
    assert loaded.train.categories.shape == (48, 0)
    rows = loaded.rows.numpy()
    expected = np.array([1, 2, np.nan, 4])[rows % 4]
    assert np.array_equal(loaded.train.column("a"), expected, equal_nan=True)
    assert f"missing numbers are marked in the columns: a (`{mark}` 15)." in loaded.notes[0]


def test_marks_of_the_owner(tmp_path: Path) -> None:
    content = rows_with(["1", "2", "-999", "4", "not done"])
    with pytest.raises(DataError, match=r"column a, data row 5: `not done`.*data\.missing=\['not done'\]"):
        load(tmp_path, content)
    column = load(tmp_path, content, missing=[-999, "Not done"]).train.column("a")
    assert sorted(set(column[~np.isnan(column)].tolist())) == [1, 2, 4]
    categories = load(tmp_path, content, categorical=["a"])
    assert set(categories.train.column("a").tolist()) == {"1", "2", "-999", "4", "not done"}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["3,14", "2"], "a number with a decimal comma.*data.decimal=comma"),
        (["1,234", "2,500"], "comma between thousands"),
        (["5%", "7%"], "something around it"),
        (["2020-01-31", "2021-02-01"], "a date"),
        (["0x10", "0x20"], "hexadecimal"),
        (["1_000", "5"], "underscores"),
        (["１", "２"], "characters of another kind. Write `[12]`"),
        (["1", "2", "inf"], "data row 3: `inf`, infinity"),
        (["1", "2", "1e300"], r"data row 3: `1e300` is beyond 1e\+30"),
        (["1", "2", "3", "4 or more"], r"data row 4: `4 or more`, which is no number, while \d+ of its 48"),
        (["1", "y" * 5000], r", data row 2: a text of 5000 characters, `y{100}…`"),
        (["1", "2", "\x1b[31mred"], r"data row 3: `\\x1b\[31mred`"),
        (["blue", "red\u0a00green"], r", data row \d: `red.u0a00green` holds characters that no text has"),
        ([f"patient {i}" for i in range(60)], r" has 48 categories in 48 training rows.*drop_columns=\[a\]"),
    ],
)
def test_what_is_neither_numbers_nor_categories_is_named(tmp_path: Path, cells: list[str], message: str) -> None:
    with pytest.raises(DataError, match=r"mine\.csv: column a.*" + message) as caught:
        load(tmp_path, rows_with(cells))
    assert str(caught.value).isprintable()
    assert load(tmp_path, rows_with(cells), drop_columns=["a"]).train.names == ("b",)


def test_decimal_commas_are_read_where_they_are_told(tmp_path: Path) -> None:
    content = rows_with(["3,14", "1.234,5", "2"])
    column = load(tmp_path, content, decimal="comma").train.column("a")
    assert sorted(set(column.tolist())) == [2, 3.14, 1234.5]
    with pytest.raises(DataError, match="`3.14`, a number with a decimal point, .* With data.decimal=comma"):
        load(tmp_path, rows_with(["3.14", "2,5"]), decimal="comma")
    with pytest.raises(ValueError, match=r"`data.decimal` \(=,\) must be one of point, comma"):
        load(tmp_path, content, decimal=",")


def test_ages_grades_and_yes_or_no_are_categories(tmp_path: Path) -> None:
    for cells in (["18-24", "25-64", "65+", "<18"], ["9th", "10th", "MSc", "PhD"], ["yes", "no"], ["True", "False"]):
        loaded = load(tmp_path, rows_with(cells))
        assert set(loaded.train.column("a").tolist()) == set(cells)
        assert loaded.notes == ()


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        (["00123", "12345"], "read as numbers, though some begin with 0 .*: a .`00123`."),
        (["5", "x", "y", "z"], "read as categories, though some cells are numbers: a .12 numbers, and texts like `x`"),
        (["", "NA"], "left out, since no training row has a cell filled: a"),
        (["7"], "the same in all training rows, and so of no use: a"),
        (["7", ""], None),
        (["red"], "the same in all training rows, and so of no use: a"),
        ([str(i + 1) for i in range(60)], r"counts the rows, and is read as a number: a.*drop_columns=\[a\]"),
        ([str(i * i) for i in range(60)], None),
        (["B", "M", "M"], r"each value .* so that the column tells the label: a.*drop_columns=\[a\]"),
        (["0", "1", "2"], "each value .* so that the column tells the label: a"),
        (["B", "M"], None),
        (
            ["-999", *[str(i / 10) for i in range(19)]],
            r"far from all other .*: a \(-999, \d of them\).*missing=\['-999'\]",
        ),
        (["1000000000", *[str(i) for i in range(19)]], r"far from all other numbers of the column: a \(1e\+09"),
        (["25", *[str(i) for i in range(19)]], None),
    ],
)
def test_what_the_owner_should_know_is_said(tmp_path: Path, cells: list[str], note: str | None) -> None:
    notes = load(tmp_path, rows_with(cells)).notes
    if note is None:
        assert notes == ()
        return
    assert len(notes) == 1
    assert re.search(r"mine\.csv: " + note, notes[0])


def test_a_first_line_of_data_is_seen(tmp_path: Path) -> None:
    content = "1.5,2,benign\n" + rows_with(["1", "2"]).partition("\n")[2]
    with pytest.raises(DataError, match="benign is also a label in .*The first line must hold the names"):
        load(tmp_path, content, label_column="benign")
    notes = load(tmp_path, content.replace("benign", "outcome", 1)).notes
    assert "is its first line one of data? It is taken for the names of the columns, such as 1.5." in notes[0]


def test_categories_of_test_rows_alone_are_said_and_a_text_among_numbers_is_refused(tmp_path: Path) -> None:
    test = "a,b,outcome\nred,1,benign\npink,2,malignant\n"
    loaded = load(tmp_path, rows_with(["red", "blue"]), test)
    assert "test rows have categories that no training row has" in loaded.notes[0]
    assert "a (1 rows, such as `pink`)" in loaded.notes[0]
    with pytest.raises(DataError, match=r"test\.csv: column a, data row 1: `red` is no number"):
        load(tmp_path, rows_with(["1", "2"]), test)


def test_categories_may_not_become_more_numbers_than_memory_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlabel.data.sets.table_columns.MAX_ONE_HOT", 48 * 3 - 1)
    with pytest.raises(DataError, match=r"column a has 3 categories: .* 3 features of 48 rows, more than 143 numbers"):
        load(tmp_path, rows_with(["x", "y", "z"]))


def test_names_that_are_missed_by_little(tmp_path: Path) -> None:
    content = rows_with(["1", "2"])
    for key in ("drop_columns", "categorical", "aside_columns"):
        with pytest.raises(DataError, match=rf"`data\.{key}`: .*no column A, only a, b\. Did you mean a\?"):
            load(tmp_path, content, **{key: ["A"]})
        with pytest.raises(DataError, match=rf"`data\.{key}`: outcome is the column of labels"):
            load(tmp_path, content, **{key: ["outcome"]})
    with pytest.raises(DataError, match="has no such column, only a, b, outcome. Did you mean outcome"):
        load(tmp_path, content, label_column="Outcome")
    with pytest.raises(DataError, match="no column but that of the labels"):
        load(tmp_path, "outcome\n" + "x\ny\n" * 9)


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("mark", ["", "NA", "n/a", "nan", "<NA>", "null", "?"])
def test_rows_without_a_label_are_for_training(tmp_path: Path, mark: str) -> None:
    """40 of 60 rows have a label, of which 8 are for testing; the order of the file is kept."""
    loaded = load(tmp_path, rows_with(["1", "2", "3", "4"], ("benign", "malignant", mark)))
    assert loaded.class_names == ("benign", "malignant")
    assert torch.bincount(loaded.test.labels).tolist() == [4, 4]
    expected = torch.tensor([0, 1, -1])[loaded.rows % 3]
    assert torch.equal(loaded.train.labels, expected)
    assert (loaded.train.labels < 0).sum() == 20
    assert f"column outcome has no label in 20 of 60 rows ({f'`{mark}`' if mark else 'empty'} 20)" in loaded.notes[0]


def test_marks_of_the_owner_are_no_labels_either(tmp_path: Path) -> None:
    content = rows_with(["1", "2"], ("0", "1", "-1"))
    loaded = load(tmp_path, content)
    assert loaded.class_names == ("-1", "0", "1")
    assert any(
        "`-1` (20 rows) is taken for a class. If it means no label, set data.missing=['-1']" in n for n in loaded.notes
    )
    assert load(tmp_path, content, missing=[-1]).class_names == ("0", "1")
    assert load(tmp_path, rows_with(["1", "2"], ("1", "-1"))).class_names == ("-1", "1")


def test_plus_and_minus_are_classes(tmp_path: Path) -> None:
    assert load(tmp_path, rows_with(["1", "2", "3"], ("+", "-"))).class_names == ("+", "-")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("benign", "-", "malignant"), r"holds `-` 20 times, first in data row 2: .*data\.missing=\['-'\]"),
        (("mild", "none", "severe"), r"holds `none` 20 times.*data\.missing=\[none\]"),
        (("benign", "Benign "), r"`benign` \(data row 1\) and `Benign` \(data row 2\), the same but for case"),
        (("a  b", "a b"), "the same but for case, blanks or look"),
        (("1", "1.0", "0"), r"`1` \(data row 1\) and `1.0` \(data row 2\), the same number"),
        (
            tuple(f"{i}.5" for i in range(30)),
            "30 different labels in 60 rows, such as 0.5, 1.5, 2.5 .*a number to predict",
        ),
        (tuple(f"id{i}" for i in range(60)), "60 different labels in 60 rows.*an identifier"),
        (("benign", "m" * 300), "a text of 300 characters in data row 2: `m{40}.*at most 200"),
        (("benign", "b\x07"), r" holds characters that no text has in data row 2: `b.x07`"),
        (("", "NA"), " has no label in any row"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=r"mine\.csv: column outcome.*" + message):
        load(tmp_path, rows_with(["1", "2"], labels))


def test_any_text_and_any_number_is_a_class(tmp_path: Path) -> None:
    assert load(tmp_path, rows_with(["1", "2"], ("1000000000", "10", "9"))).class_names == ("9", "10", "1000000000")
    notes = load(
        tmp_path, rows_with(["1", "2", "3", "4", "5"], tuple(str(i) for i in range(24))), test_fraction=0.5
    ).notes
    assert "24 different numbers, each a class. Is it a number to predict?" in notes[0]


def test_training_rows_may_lack_all_labels_if_the_test_rows_have_some(tmp_path: Path) -> None:
    test = "a,b,outcome\n1,1,benign\n2,2,malignant\n"
    for content in (rows_with(["1", "2"], ("",)), rows_with(["1", "2"]).replace("outcome", "else", 1)):
        keys = {} if "outcome" in content else {"aside_columns": ["else"]}
        if keys:
            test = "a,b,else,outcome\n1,1,x,benign\n2,2,y,malignant\n"
        loaded = load(tmp_path, content, test, **keys)
        assert loaded.class_names == ("benign", "malignant")
        assert (loaded.train.labels == -1).all()
        assert loaded.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            "a,b,outcome\n1,1,benign\n2,2,NA\n2,2,\n",
            r"test\.csv: column outcome has no label in data row 2 .of 2 without",
        ),
        ("a,b,outcome\n1,1,Benign\n", r"data row 1 has the label `Benign`.*Did you mean benign\?"),
        ("a,outcome\n1,benign\n", "must have the same columns; only one of them has b"),
    ],
)
def test_test_files_that_do_not_fit(tmp_path: Path, test: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows_with(["1", "2"]), test)


def test_the_data_set_keeps_what_is_to_be_said(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(rows_with(["1", "N/A", "3"]))
    load_dataset.cache_clear()
    data: Dataset = load_dataset(DataConfig("table", str(tmp_path / "mine.csv"), label_column="outcome"), seed=0)
    assert len(data.notes) == 2
    assert "`N/A`" in data.notes[0]
