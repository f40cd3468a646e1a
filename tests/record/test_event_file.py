"""Pictures are read back from event files: the latest ones, of files that a kill cut short, and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedlabel.record.event_file import EventFile, read_pictures, wait_for_later_name


def picture(width: int) -> Figure:
    return Figure(figsize=(width, 1), dpi=10)


def written(folder: Path, purge: int | None = None, **rounds: int) -> EventFile:
    """An event file with a picture for each tag, of as many inches' width as its round."""
    wait_for_later_name(folder)
    file = EventFile(folder, purge)
    for tag, number in rounds.items():
        file.add_scalar("eval/accuracy", 0.5, number)
        file.add_figure(tag.rstrip("_"), picture(number), number)
    file.close()
    return file


def test_the_latest_picture_of_each_tag(tmp_path: Path) -> None:
    assert read_pictures(tmp_path) == {}
    written(tmp_path, a=1, b=2, a_=3)
    found = read_pictures(tmp_path)
    assert {tag: (each.step, each.width, each.height) for tag, each in found.items()} == {
        "a": (3, 30, 10),
        "b": (2, 20, 10),
    }
    assert found["a"].png.startswith(b"\x89PNG")


def test_what_a_resumed_run_does_again_does_not_count(tmp_path: Path) -> None:
    written(tmp_path, a=2, b=4)
    written(tmp_path, purge=4, a=1)
    assert {tag: each.step for tag, each in read_pictures(tmp_path).items()} == {"a": 1}


@pytest.mark.parametrize("damage", ["cut", "long", "nonsense"])
def test_a_damaged_end_is_left_out(tmp_path: Path, damage: str) -> None:
    file = written(tmp_path, a=1)
    size = file.path.stat().st_size
    again = EventFile(tmp_path)
    again.add_figure("b", picture(2), 2)
    again.close()
    record = again.path.read_bytes()
    end = {
        "cut": record[:-5],
        "long": b"\xff" * 12 + record,
        "nonsense": (4).to_bytes(8, "little") + b"\0" * 4 + b"\xff" * 4 + b"\0" * 4 + record,
    }[damage]
    again.path.unlink()
    file.path.write_bytes(file.path.read_bytes() + end)
    assert file.path.stat().st_size > size
    assert list(read_pictures(tmp_path)) == ["a"]
