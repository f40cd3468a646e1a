"""A node's folder: each kind of label is read as it is meant, and each defect is named by file and row."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.nodes.files import FolderError
from fedlabel.data.nodes.folder import NodeData, read_node_folder, read_test_folder
from fedlabel.data.sets.config import DataError
from tests.data.nodes.folders import IMAGES, TABLE, pixels, write

ALL_KINDS = {
    "labels": "sample,label,candidates,noisy_label,noisy_candidates,bag,annotator:bob,split\n"
    "0,cat,,,,,,\n1,,cat; owl,,,,,train\n2,,,dog,,,,\n3,,,,dog;owl,,,\n4,,,,,ward 7,,\n5,,,,,,owl,\n6,dog,,,,,,test",
    "bags": "bag,owl,cat\nward 7,1,0",
    "votes": "sample,wings\n7,owl\n5,",
}


def kinds(data: NodeData) -> list[str]:
    return [KIND_NAMES[kind] for kind in data.record.kind.tolist()]


def test_each_kind_of_label_is_read(tmp_path: Path) -> None:
    data = read_node_folder(write(tmp_path / "a", **ALL_KINDS), IMAGES)
    assert kinds(data) == [
        *("label", "candidates", "noisy label", "noisy candidates", "bag", "annotators", "votes"),
    ]
    record = data.record
    assert record.candidates.int().tolist() == [
        *([1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]),
    ]
    assert record.annotations.tolist() == [[-1, -1]] * 5 + [[-1, 2], [-1, -1]]
    assert record.bag.tolist() == [-1, -1, -1, -1, 0, -1, -1]
    assert record.bag_counts.tolist() == [[0, 0, 1]]
    assert record.votes.tolist() == [[-2, -2]] * 5 + [[-1, -1], [-1, 2]]
    assert data.held_out.labels.tolist() == [1]
    assert data.names == ("0", "1", "2", "3", "4", "5", "7")
    assert torch.equal(data.held_out.images[0, 0], torch.from_numpy(pixels()[6]))
    assert torch.equal(data.inputs[:, 0], torch.from_numpy(pixels()[[0, 1, 2, 3, 4, 5, 7]]))
    assert not data.noisy_counts


def test_inputs_alone_are_enough(tmp_path: Path) -> None:
    data = read_node_folder(write(tmp_path / "a"), IMAGES)
    assert kinds(data) == ["nothing"] * 8
    assert len(data.held_out.labels) == 0


def test_counts_with_a_budget_have_noise(tmp_path: Path) -> None:
    labels = "sample,bag\n0,x\n1,x"
    for cell, noisy in (("", False), ("0.5", True)):
        folder = write(tmp_path / f"a{noisy}", labels=labels, bags=f"bag,cat,epsilon\nx,2,{cell}")
        assert read_node_folder(folder, IMAGES).noisy_counts is noisy


def test_images_are_named_by_their_path(tmp_path: Path) -> None:
    for name, value in (("b/2.png", 200), ("a.png", 100), ("b/1.png", 0)):
        path = tmp_path / "a" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 4), value).save(path)
    (tmp_path / "a" / "labels.csv").write_text("sample,label\nb/2.png,owl\n")
    data = read_node_folder(tmp_path / "a", IMAGES)
    assert data.names == ("a.png", "b/1.png", "b/2.png")
    assert data.inputs[:, 0, 0, 0].tolist() == [100, 0, 200]
    assert data.record.label.tolist() == [-1, -1, 2]
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a" / "images" / "a.png")
    with pytest.raises(DataError, match=r"images are \[3, 4, 5\] .* and by the schema \[1, 4, 5\]"):
        read_node_folder(tmp_path / "a", IMAGES)


def test_a_table_has_labels_in_columns_of_its_own_or_in_a_file(tmp_path: Path) -> None:
    within = write(
        tmp_path / "a", inputs="age,job,label,candidates,split\n2,cook,owl,,\n,pilot,,cat;dog,\n10,,dog,,test"
    )
    beside = write(
        tmp_path / "b",
        inputs="sample,age,job\nx,2,cook\ny,,pilot\nz,10,",
        labels="sample,label,split,candidates\nz,dog,test,\nx,owl,,\ny,,,cat;dog",
    )
    found = [read_node_folder(folder, TABLE) for folder in (within, beside)]
    assert torch.equal(found[0].inputs, found[1].inputs)
    assert found[0].inputs.flatten(1).tolist() == [[0, 0, 1, 0], [0.25, 0, 0, 0]]
    for data in found:
        assert data.record.candidates.int().tolist() == [[0, 0, 1], [1, 1, 0]]
        assert data.held_out.labels.tolist() == [1]
    (within / "labels.csv").write_text("sample,label\n1,owl\n")
    with pytest.raises(DataError, match=r"has columns of labels \(label, candidates, split\), and there is labels.csv"):
        read_node_folder(within, TABLE)


def as_parquet(folder: Path) -> None:
    """Writes the tables of a folder as Parquet, with numbers as numbers, in place of CSV."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    for path in folder.glob("*.csv"):
        found = csv.read_csv(path, convert_options=csv.ConvertOptions(strings_can_be_null=True))
        assert any(not pyarrow.types.is_string(each.type) for each in found.schema)
        parquet.write_table(found, path.with_suffix(".parquet"))
        path.unlink()


def test_tables_may_be_parquet(tmp_path: Path) -> None:
    """Each kind of label, of images and of rows."""
    rows = "\n".join(f"{n},{2 * n + 0.5},{'cook' if n % 2 else ''}" for n in range(8))
    table = replace(TABLE, annotators=IMAGES.annotators, functions=IMAGES.functions)
    for schema, inputs in ((IMAGES, {}), (table, {"inputs": f"sample,age,job\n{rows}"})):
        folder = write(tmp_path / schema.classes[0] / str(schema.tabular), **ALL_KINDS, **inputs)
        expected = read_node_folder(folder, schema)
        as_parquet(folder)
        assert not list(folder.glob("*.csv"))
        found = read_node_folder(folder, schema)
        assert torch.equal(found.inputs, expected.inputs)
        assert found.names == expected.names
        for name in ("candidates", "noisy", "annotations", "bag", "bag_counts", "votes"):
            assert torch.equal(getattr(found.record, name), getattr(expected.record, name)), name
        assert torch.equal(found.held_out.labels, expected.held_out.labels)


def test_a_defect_of_a_parquet_table_has_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", labels="sample,label\n0,cat\n1,cow")
    as_parquet(folder)
    with pytest.raises(FolderError, match=r"labels\.parquet, row 2: `label` \(=cow\) is none of the classes"):
        read_node_folder(folder, IMAGES)


def test_one_table_is_not_there_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", labels="sample,label\n0,cat")
    (folder / "labels.parquet").touch()
    with pytest.raises(DataError, match=r"has both labels\.csv and labels\.parquet: leave one of them out"):
        read_node_folder(folder, IMAGES)


def test_a_node_without_pyarrow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = write(tmp_path / "a")
    (folder / "votes.parquet").touch()
    with pytest.raises(DataError, match=r"votes\.parquet: Parquet files are read by pyarrow, which is not installed"):
        read_node_folder(folder, IMAGES)


DEFECTS = {
    "labels.csv, row 1: there is no sample 8.": {"labels": "sample,label\n8,cat"},
    "labels.csv, row 2: sample 1 has a row already, row 1.": {"labels": "sample,label\n1,cat\n1,dog"},
    "labels.csv, row 2: `label` (=cow) is none of the classes cat, dog, owl": {"labels": "sample,label\n0,cat\n1,cow"},
    "labels.csv, row 1: `candidates` (=cat;cat) has a class twice.": {"labels": "sample,candidates\n0,cat;cat"},
    "labels.csv, row 1: `candidates` (=cat;) has an empty place": {"labels": "sample,candidates\n0,cat;"},
    "labels.csv, row 1: it has both `label` and `noisy_label`": {"labels": "sample,label,noisy_label\n0,cat,dog"},
    "labels.csv: column weight is none of": {"labels": "sample,label,weight\n0,cat,3"},
    "labels.csv: column annotator:eve is of no annotator": {"labels": "sample,annotator:eve\n0,cat"},
    "labels.csv, row 1: `annotator:ann` (=cow) is none": {"labels": "sample,annotator:ann\n0,cow"},
    "labels.csv, row 1: `split` (=dev) must be train or test": {"labels": "sample,split,label\n0,dev,cat"},
    "labels.csv, row 1: sample 0 of the split test has no `label`.": {"labels": "sample,split,label\n0,test,"},
    "labels.csv, row 1: a sample of the split test has a `label`, and no bag.": {
        "labels": "sample,split,label,bag\n0,test,cat,x\n1,,,x",
        "bags": "bag,cat\nx,2",
    },
    "labels.csv, row 1: it is in bag x, and there is no bags.csv.": {"labels": "sample,bag\n0,x"},
    "labels.csv, row 1: it is in bag x, of which bags.csv has no row.": {
        "labels": "sample,bag\n0,x",
        "bags": "bag,cat\ny,0",
    },
    "bags.csv, row 1: the counts sum to 3, and 1 samples are in bag x.": {
        "labels": "sample,bag\n0,x",
        "bags": "bag,cat\nx,3",
    },
    "bags.csv, row 1: cat (=-1) must be a whole number": {"labels": "sample,bag\n0,x", "bags": "bag,cat,dog\nx,-1,2"},
    "bags.csv, row 2: bag x has a row already, row 1.": {"labels": "sample,bag\n0,x", "bags": "bag,cat\nx,1\nx,1"},
    "bags.csv, row 2: bag y has no sample": {"labels": "sample,bag\n0,x", "bags": "bag,cat\nx,1\ny,0"},
    "bags.csv: column cow is none of the classes": {"labels": "sample,bag\n0,x", "bags": "bag,cow\nx,1"},
    "bags.csv: column Cat is of no class, or of one that has a column.": {
        "labels": "sample,bag\n0,x",
        "bags": "bag,cat,Cat\nx,1,0",
    },
    "votes.csv: column tail is no function of the schema": {"votes": "sample,tail\n0,cat"},
    "votes.csv, row 1: `ears` (=cow) is none": {"votes": "sample,ears\n0,cow"},
    "votes.csv, row 1: a sample of the split test": {
        "labels": "sample,label,split\n0,cat,test",
        "votes": "sample,ears\n0,cat",
    },
}


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_a_defect_is_named_by_file_and_row(defect: str, tmp_path: Path) -> None:
    with pytest.raises(FolderError) as error:
        read_node_folder(write(tmp_path / "a", **DEFECTS[defect]), IMAGES)
    assert any(found.startswith(defect) for found in error.value.defects), error.value.defects


def test_all_defects_are_gathered_and_the_first_are_shown(tmp_path: Path) -> None:
    rows = [f"{n},cow" for n in range(8)] + [f"{n},cat" for n in range(100, 130)]
    with pytest.raises(FolderError, match="has 38 defects:") as error:
        read_node_folder(write(tmp_path / "a", labels="\n".join(["sample,label", *rows])), IMAGES)
    assert len(error.value.defects) == 38
    assert str(error.value).endswith("… and 18 more")


def test_defects_of_a_table_are_named_by_row(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", inputs="sample,age,job\nx,2,cook\nx,1e31,cook\n,old,cook")
    with pytest.raises(FolderError) as error:
        read_node_folder(folder, TABLE)
    assert [defect.split(": ")[0] for defect in error.value.defects] == [f"inputs.csv, row {n}" for n in (2, 3, 3, 2)]
    with pytest.raises(DataError, match=r"inputs.csv lacks job and has toil, which the schema has not"):
        read_node_folder(write(tmp_path / "b", inputs="age,toil\n2,cook"), TABLE)
    with pytest.raises(DataError, match="needs a column `sample`, by which labels.csv names its rows"):
        read_node_folder(write(tmp_path / "c", inputs="age,job\n2,cook", labels="sample,label\n0,cat"), TABLE)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels().astype(np.float32), "`x` is float32 of shape .* it must be uint8"),
        (pixels()[:0], "with an image at least"),
        (pixels()[:, :, :4], r"images are \[1, 4, 4\] .* and by the schema \[1, 4, 5\]"),
        (pixels().reshape(8, 20), "rows of numbers, no images"),
    ],
)
def test_arrays_that_are_no_images_of_the_schema_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_node_folder(write(tmp_path / "a", array), IMAGES)


def test_a_folder_without_inputs_or_with_two_kinds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        read_node_folder(tmp_path / "none", IMAGES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds nothing. Inputs are one of images/, inputs.npz and inputs.csv"):
        read_node_folder(tmp_path / "empty", IMAGES)
    folder = write(tmp_path / "two")
    (folder / "inputs.csv").write_text("age\n3\n")
    with pytest.raises(DataError, match="has inputs.npz and inputs.csv"):
        read_node_folder(folder, IMAGES)
    with pytest.raises(DataError, match="holds images, and by the schema the inputs are a table"):
        read_node_folder(write(tmp_path / "images"), TABLE)
    rows = "\n".join(f"{n},cat,test" for n in range(8))
    tests = write(tmp_path / "tests", labels=f"sample,label,split\n{rows}")
    with pytest.raises(DataError, match="all are of the split test"):
        read_node_folder(tests, IMAGES)


def test_a_test_folder_is_its_split_or_all_of_it(tmp_path: Path) -> None:
    some = write(tmp_path / "a", labels="sample,label,split\n1,cat,test\n2,dog,")
    assert read_test_folder(some, IMAGES).labels.tolist() == [0]
    images = pixels(2)
    whole = write(tmp_path / "b", images, labels="sample,label\n1,owl\n0,dog")
    found = read_test_folder(whole, IMAGES)
    assert found.labels.tolist() == [1, 2]
    assert torch.equal(found.images[:, 0], torch.from_numpy(images))
    with pytest.raises(FolderError, match="sample 1 of the split test has no `label`"):
        read_test_folder(write(tmp_path / "c", images, labels="sample,label\n0,owl"), IMAGES)
    with pytest.raises(DataError, match="holds no sample of the split test"):
        read_test_folder(write(tmp_path / "d", images, labels="sample,label,split\n0,owl,train"), IMAGES)
