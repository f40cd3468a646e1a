"""Votes of an operator's own labelling functions on a node's samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlabel.data.nodes.folder import read_node_folder
from fedlabel.data.nodes.votes import write_votes
from fedlabel.data.sets.config import DataError
from tests.data.nodes.folders import CLASSES, IMAGES, TABLE, pixels, write

EARS = "def ears(image):\n    return 'owl' if image[0, 0, 0] > 127 else None\n"
WINGS = "def wings(image):\n    return image.nothing\n"
JOBS = "def ears(row):\n    return {'cook': 1, 'nurse': 'owl'}.get(row['job'])\n"
AGES = "def wings(row):\n    return 'cat' if row['age'] != row['age'] else 'dog' if row['age'] > 2.5 else None\n"


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_functions_see_images_as_in_a_simulation(tmp_path: Path) -> None:
    """Of the training samples alone; one that fails abstains, and is reported."""
    folder = write(tmp_path / "a", labels="sample,label,split\n6,dog,test\n0,cat,")
    reports = write_votes(folder, written(tmp_path / "f.py", EARS + WINGS), CLASSES)
    data = read_node_folder(folder, IMAGES)
    train = [0, 1, 2, 3, 4, 5, 7]
    expected = [2 if pixels()[row][0, 0] > 127 else -1 for row in train]
    assert set(expected) == {-1, 2}
    assert data.record.votes.tolist() == [[vote, -1] for vote in expected]
    assert [(report.asked, report.failed) for report in reports] == [(7, 0), (7, 7)]


def test_functions_see_rows_with_numbers_and_texts(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", inputs="sample,age,job\nx,2,cook\ny,,nurse\nz,3,")
    write_votes(folder, written(tmp_path / "f.py", JOBS + AGES), CLASSES)
    assert (folder / "votes.csv").read_text() == "sample,ears,wings\nx,dog,\ny,owl,cat\nz,,dog\n"
    schema = replace(TABLE, functions=("ears", "wings"))
    assert read_node_folder(folder, schema).record.votes.tolist() == [[1, -1], [2, 0], [-1, 1]]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    file = written(tmp_path / "f.py", JOBS)
    nameless = write(tmp_path / "a", inputs="age,job\n2,cook\n3,nurse")
    with pytest.raises(DataError, match="needs a column `sample`, by which votes.csv names its rows"):
        write_votes(nameless, file, CLASSES)
    done = write(tmp_path / "b", votes="sample,ears\n0,cat")
    with pytest.raises(DataError, match="exists: move it away"):
        write_votes(done, file, CLASSES)
    twice = written(tmp_path / "g.py", f"{JOBS}labeling_functions = [ears, ears]\n")
    with pytest.raises(DataError, match="two functions of the name ears"):
        write_votes(write(tmp_path / "c"), twice, CLASSES)
    with pytest.raises(ValueError, match=r"`MODULE` \(=nowhere_at_all\) cannot be imported"):
        write_votes(write(tmp_path / "d"), "nowhere_at_all", CLASSES)
