"""Reading the JSON files of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlabel.record.json_files import read_summary


def test_read_summary(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text('{"eval/accuracy": {"last": 1, "best": 1, "mean_last_tenth": 1}, "seconds": 2}')
    assert read_summary(tmp_path)["seconds"] == 2
    file.write_text('{"eval/accuracy": {"last": 1, "best": 1, "mean_last_10": 1}}')
    with pytest.raises(ValueError, match=r"an earlier version.* the last ten evaluations.*away and run it again\."):
        read_summary(tmp_path)
    for damaged in ("{", "[]", "3", '{"a": '):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"summary.json is damaged .*run it again"):
            read_summary(tmp_path)
