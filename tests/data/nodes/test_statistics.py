"""The schema of summed statistics is that of all data in one place, and no statistic is a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlabel.data.nodes.files import FolderError
from fedlabel.data.nodes.statistics import Statistics, folder_statistics, load_statistics, make_schema
from fedlabel.data.sets.config import DataError
from tests.data.nodes.folders import pixels, write

HEADER = "age,job,site"


def schema_of(folders: list[Path], tmp_path: Path, **options: Any) -> Any:
    """By way of the files that nodes send."""
    parts = []
    for place, folder in enumerate(folders):
        path = tmp_path / f"{place}.json"
        path.write_text(folder_statistics(folder).to_json())
        parts.append(load_statistics(path))
    return make_schema(parts, list(map(str, folders)), **options)


def test_sums_over_images_are_those_of_all_in_one_place(tmp_path: Path) -> None:
    shares = [pixels(3, 1), pixels(50, 2) // 7, pixels(1, 3)]
    folders = [write(tmp_path / f"node{n}", images) for n, images in enumerate(shares)]
    central = make_schema([folder_statistics(write(tmp_path / "all", np.concatenate(shares)))], ["all"], ["a", "b"])
    assert schema_of(folders, tmp_path, classes=["a", "b"]) == central  # whole numbers: to the bit
    values = np.concatenate(shares) / 255
    np.testing.assert_allclose([*central.mean, *central.std], [values.mean(), values.std()], rtol=1e-12)


def test_sums_over_a_table_are_those_of_all_in_one_place(tmp_path: Path) -> None:
    """Also where the mean is a million times the deviation; a missing number counts as the mean."""
    rng = np.random.default_rng(0)
    rows = [f"{1e6 + rng.normal()!r},{job},{rng.normal(3, 2):.2f}" for job in rng.choice(["b", "a", "c"], 90)]
    rows[3], rows[40] = f",{rows[3].split(',', 1)[1]}", f",{rows[40].split(',', 1)[1]}"
    cuts = [rows[:5], rows[5:60], rows[60:]]
    folders = [write(tmp_path / f"node{n}", inputs="\n".join([HEADER, *part])) for n, part in enumerate(cuts)]
    central = make_schema(
        [folder_statistics(write(tmp_path / "all", inputs="\n".join([HEADER, *rows])))], ["all"], ["x", "y"]
    )
    found = schema_of(folders, tmp_path, classes=["x", "y"])
    assert [column.name for column in found.columns] == ["age", "site", "job"]
    assert found.columns[2] == central.columns[2]
    assert found.columns[2].categories == ("a", "b", "c")
    for ours, theirs in zip(found.columns[:2], central.columns[:2], strict=True):
        np.testing.assert_allclose([ours.mean, ours.std], [theirs.mean, theirs.std], rtol=1e-12)
        assert ours.missing == ours.mean
    ages = np.array([float(row.split(",")[0] or "nan") for row in rows])
    filled = np.where(np.isnan(ages), np.nanmean(ages), ages)
    np.testing.assert_allclose(central.columns[0].std, filled.std(), rtol=1e-9)


def test_names_are_those_of_all_nodes(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", labels="sample,label,annotator:zoe\n0,dog,\n1,,cat", votes="sample,f\n3,owl"),
        write(tmp_path / "b", labels="sample,candidates,annotator:ann\n0,dog; bee,", bags="bag,ant,epsilon\n1,0,2"),
    ]
    found = schema_of(folders, tmp_path)
    assert found.classes == ("ant", "bee", "cat", "dog", "owl")
    assert (found.annotators, found.functions) == (("ann", "zoe"), ("f",))
    with pytest.raises(DataError, match="`--classes`: labels name ant, too, which is none of dog, cat"):
        schema_of(folders, tmp_path, classes=["dog", "cat"])


def test_samples_of_the_split_test_do_not_count(tmp_path: Path) -> None:
    labels = "sample,label,split\n0,dog,test\n1,cat,"
    found = folder_statistics(write(tmp_path / "a", labels=labels))
    assert (found.samples, found.pixels[0].count) == (7, 7 * 20)
    assert found.pixels[0].sum == int(pixels()[1:].sum())


def test_a_file_of_statistics_holds_no_row(tmp_path: Path) -> None:
    rows = [f"{1000 + n}.125,job{n % 2},0" for n in range(30)]
    folder = write(tmp_path / "a", inputs="\n".join([HEADER, *rows]))
    text = folder_statistics(folder).to_json()
    assert not [row for row in range(30) if f"{1000 + row}.125" in text]
    assert len(text) < 1200  # as many numbers as columns, however many rows
    assert set(json.loads(text)) == {"version", *Statistics.__dataclass_fields__}


def test_what_few_samples_have_is_left_out(tmp_path: Path) -> None:
    """By `--min-count`: names of rare classes and categories, sums of few cells, and folders of few samples."""
    rows = [f"{'' if n < 7 else n},{'pilot' if n < 2 else 'cook'},{n},{'owl' if n == 3 else 'cat'}" for n in range(9)]
    folder = write(tmp_path / "node", inputs="\n".join(["age,job,site,label", *rows]))
    every, few = folder_statistics(folder), folder_statistics(folder, least=3)
    assert every.classes == ("cat", "owl")
    assert few.classes == ("cat",)
    kinds = {cells.name: (cells.kind, cells.count, cells.categories) for cells in few.columns}
    assert kinds == {"age": ("empty", 0, ()), "job": ("category", 0, ("cook",)), "site": ("number", 9, ())}
    assert {cells.name: cells.kind for cells in every.columns}["age"] == "number"
    for rare in ("pilot", "owl"):
        assert rare in every.to_json()
        assert rare not in few.to_json()
    with pytest.raises(DataError, match=r"holds 9 training samples, fewer than `--min-count` \(=10\)"):
        folder_statistics(folder, least=10)


def test_nodes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    numbers = write(tmp_path / "n", inputs=f"{HEADER}\n1,2,3\n4,5,6")
    texts = write(tmp_path / "t", inputs=f"{HEADER}\n1,x,3\n4,y,6")
    other = write(tmp_path / "o", inputs="age,job\n1,x\n4,y")
    images = write(tmp_path / "i")
    with pytest.raises(DataError, match=r"Column job is of kind category in .*t, and of kind number in .*n\."):
        schema_of([numbers, texts], tmp_path)
    with pytest.raises(DataError, match="have other columns: site is in one of them only"):
        schema_of([texts, other], tmp_path)
    with pytest.raises(DataError, match=r"has a table, and .* has images \[1, 4, 5\]"):
        schema_of([images, other], tmp_path)
    assert folder_statistics(numbers, ["job"]).columns[1].categories == ("2", "5")
    with pytest.raises(DataError, match="`--categorical`: .* has no column toil"):
        folder_statistics(numbers, ["toil"])


def test_a_column_that_is_empty_at_one_node_is_what_it_is_elsewhere(tmp_path: Path) -> None:
    empty = write(tmp_path / "e", inputs=f"{HEADER}\n1,,3\n4,,6")
    texts = write(tmp_path / "t", inputs=f"{HEADER}\n1,x,3\n4,y,6")
    for order in ([empty, texts], [texts, empty]):
        assert schema_of(order, tmp_path, classes=["a", "b"]).columns[2].categories == ("x", "y")
    with pytest.raises(DataError, match="Column job has no cell filled at any node"):
        schema_of([empty, empty], tmp_path)


def test_an_odd_cell_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=re.escape("inputs.csv, row 3: age (=many) is no number")):
        folder_statistics(write(tmp_path / "a", inputs=f"{HEADER}\n1,x,3\n2,x,3\nmany,y,6"))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"samples": 0},
        {"samples": 1.0},
        {"samples": True},
        {"samples": 9},  # the sums are of 8 images
        {"classes": [3]},
        {"classes": None},
        {"shape": [1, 4]},
        {"pixels": []},
        {"pixels": [{"count": 160, "sum": 10, "squares": 2551}]},  # no pixel is above 255
        {"pixels": [{"count": 160, "sum": 1600, "squares": 15999}]},  # less than the squared mean
        {"columns": [{"name": "a", "kind": "empty", "count": 0, "mean": 0.0, "squares": 0.0, "categories": []}]},
        {
            "columns": [
                {"name": "a", "kind": "number", "count": 1, "mean": float("nan"), "squares": 0.0, "categories": []}
            ]
        },
        {"more": 1},
    ],
)
def test_a_file_that_is_no_statistics_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads(folder_statistics(write(tmp_path / "a")).to_json())
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    load_statistics(path)
    path.write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=r"s.json holds no statistics of a folder"):
        load_statistics(path)
