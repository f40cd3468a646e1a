"""Hashes of data: what changes them, and what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.data.sets.fingerprint import fingerprint
from fedlabel.data.sets.loaders import Split
from tests.data.arrays import arrays, write_npz


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_one_changed_value_of_any_part_changes_the_hash_of_inputs_and_not_of_labels(name: str, part: str) -> None:
    data = load_dataset(DataConfig(name), seed=0)
    if data.tabular:
        table = data.tables[part]
        numbers = table.numbers.copy()
        numbers[3, 2] = np.nextafter(numbers[3, 2], np.inf)
        changed = replace(data, tables={**data.tables, part: replace(table, numbers=numbers)})
    else:
        split = getattr(data, part)
        images = split.images.clone()
        images[3, 0, 2, 2] += 1
        changed = replace(data, **{part: Split(images, split.labels)})
    assert fingerprint(changed)["inputs"] != fingerprint(data)["inputs"]
    assert fingerprint(changed)["labels"] == fingerprint(data)["labels"]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_one_changed_label_or_name_changes_the_hash_of_labels_alone(part: str) -> None:
    data = load_dataset(DataConfig(), seed=0)
    split = getattr(data, part)
    labels = split.labels.clone()
    labels[5] = (labels[5] + 1) % 10
    for changed in (
        replace(data, **{part: Split(split.images, labels)}),
        replace(data, class_names=("zero", *data.class_names[1:])),
    ):
        assert fingerprint(changed)["labels"] != fingerprint(data)["labels"]
        assert fingerprint(changed)["inputs"] == fingerprint(data)["inputs"]


def test_texts_of_a_table_count_and_the_width_of_their_array_does_not() -> None:
    data = load_dataset(DataConfig("breast_cancer"), seed=0)

    def with_texts(texts: list[str], dtype: str) -> Dataset:
        """Returns the set with a further column: these texts in the first rows of each part, and then empty ones."""
        tables = {}
        for part, table in data.tables.items():
            column = np.array([*texts, *[""] * (len(table.labels) - len(texts))], dtype)
            tables[part] = replace(table, categories=column[:, None], names=(*table.names, "text"))
        return replace(data, tables=tables)

    one = fingerprint(with_texts(["a", "bé"], "U2"))
    assert fingerprint(with_texts(["a", "bé"], "U50")) == one
    assert fingerprint(with_texts(["ab", "é"], "U2"))["inputs"] != one["inputs"]


def test_it_does_not_matter_where_the_file_is(tmp_path: Path) -> None:
    same = arrays()
    hashes = []
    for place in ("a.npz", "b.npz"):
        hashes.append(fingerprint(load_dataset(write_npz(tmp_path / place, **same), seed=0)))
    assert hashes[0] == hashes[1]
    shape = fingerprint(
        replace(load_dataset(DataConfig(), 0), test=Split(torch.zeros(0, 1, 8, 8), torch.zeros(0).long()))
    )
    assert shape["inputs"] != hashes[0]["inputs"]
