"""The schema: what is written is read back, and what is none is refused with the key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.data.nodes.schema import Column, Schema, load_schema, parse_schema
from fedlabel.data.sets.config import DataError
from tests.data.nodes.folders import IMAGES, TABLE

ODD = replace(
    IMAGES,
    classes=("0", "no", "1e5", "null", "é: #x", "~"),
    mean=(0.1 + 0.2,),
    std=(1e-300,),
    allow_flip=True,
    label_epsilon=0.7,
)


@pytest.mark.parametrize("schema", [IMAGES, TABLE, ODD])
def test_what_is_written_is_read_back(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(schema.text, encoding="utf-8")
    found = load_schema(tmp_path / "schema.yaml")
    assert found == schema
    assert found.hash == schema.hash
    assert replace(found, annotators=("ann",)).hash != schema.hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 2", "`version` (=2) must be 1"),
        ("- dog", "- cat", "`classes` has cat twice"),
        ("- dog", "- 'd;g'", "the class d;g has a `;` in its name"),
        ("- dog\n- owl\n", "", "`classes` (=['cat']) must name at least 2"),
        ("- dog", "- ' dog'", "blanks around it"),
        ("- 4\n", "- 1\n", "`shape` (=[1, 1, 5]) must be [channels, height, width]"),
        ("- 4\n", "- 4.5\n", "`shape` (=4.5) must be a whole number"),
        ("std:\n- 0.25", "std:\n- 0", "`std` (=[0.0]) must have a number for each of 1 channels, each above 0"),
        ("std:\n- 0.25", "std:\n- .inf", "`std` (=.inf) must be a finite number"),
        ("mean:\n- 0.5", "mean:\n- dark", "`mean` (=dark) must be a finite number"),
        ("allow_flip: false", "allow_flip: 3", "`allow_flip` (=3) must be true or false"),
        ("allow_flip: false", "flip: false", "it has the key `flip`, which is none of"),
        ("version: 1", "version: ${oc.env:HOME}", "${"),
        ("annotators:", "label_epsilon: -1\nannotators:", "`label_epsilon` (=-1.0) must be above 0"),
    ],
)
def test_what_is_no_schema_is_refused(old: str, new: str, message: str) -> None:
    assert old in IMAGES.text
    with pytest.raises(DataError) as error:
        parse_schema(IMAGES.text.replace(old, new, 1), "here")
    assert str(error.value).startswith("here is no schema: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((TABLE.columns[1], TABLE.columns[0]), "those of numbers must come first"),
        ((TABLE.columns[0], TABLE.columns[0]), "`columns` has age twice"),
        ((replace(TABLE.columns[0], std=0.0),), "`std` (=0.0) of column age must be above 0"),
        ((Column("job", "category", categories=("a", "a")),), "column job has a category twice"),
        ((Column("job", "category"),), "its columns make no feature"),
        ((Column("job", "text"),), "`kind` (=text) of column job must be number or category"),
    ],
)
def test_columns_that_make_no_features_are_refused(columns: tuple[Column, ...], message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_schema(replace(TABLE, columns=columns).text, "here")
    assert message in str(error.value)


def test_a_missing_file_says_how_one_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`fedlabel data schema FOLDER --out schema.yaml` makes one"):
        load_schema(tmp_path / "schema.yaml")


def test_cells_become_features() -> None:
    """(cell - 2) / 4, a missing one as 3; a category that the schema lacks is 0 everywhere."""
    found = TABLE.features([np.array([2.0, 10.0, np.nan])], [["cook", "pilot", ""]])
    assert found.shape == (3, 4, 1, 1)
    expected = [[0.0, 0, 1, 0], [2.0, 0, 0, 0], [0.25, 1, 0, 0]]
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected), rtol=0, atol=0)
