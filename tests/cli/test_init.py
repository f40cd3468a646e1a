"""`fedlabel init`: the project that it writes runs, and nothing is overwritten."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from fedlabel.cli.init import ORDER
from tests.cli.test_main import assert_refused, call


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new project, which is the working directory, as the command itself sees it."""
    result = call("init", str(tmp_path / "mine"))
    assert result.exit_code == 0, result.output
    assert f"cd {tmp_path / 'mine'} && fedlabel run config.yaml" in result.output
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    monkeypatch.delitem(sys.modules, "method", raising=False)
    return tmp_path / "mine"


def test_the_files_are_those_that_are_promised(project: Path) -> None:
    assert sorted(path.name for path in project.iterdir()) == sorted(ORDER)
    readme = (project / "README.md").read_text()
    assert set(re.findall(r"^\| `([\w.]+)`", readme, re.M)) == {*ORDER} - {"README.md"}


def test_every_command_of_its_readme_runs(project: Path) -> None:
    """Its own method, the labels alone, the labelling functions and the comparison; two rounds each."""
    (block,) = re.findall(r"```bash\n(.*?)```", (project / "README.md").read_text(), re.S)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["run", "run", "run", "compare"]
    short = ["num_rounds=2", "device=cpu", "evaluation.figures=false"]
    for number, command in enumerate(commands):
        fewer = ["method.label_model_rounds=1"] if "votes.yaml" in command else []
        more = [*short, *fewer, "--name", str(number)] if command[0] == "run" else []
        result = call(*command, *more)
        assert result.exit_code == 0, result.output
    summaries = [json.loads((project / "runs" / str(number) / "summary.json").read_text()) for number in range(3)]
    assert [summary["method"] for summary in summaries] == ["method:SelfTraining", "supervised", "dp_ssl"]
    assert summaries[0]["eval/accuracy"]["last"] > 0.6  # chance: .5
    assert summaries[2]["pseudo/coverage"]["last"] > 0.5  # the functions voted on most samples
    assert (project / "comparison").is_dir()


def test_a_wrong_hyper_parameter_of_the_own_method_is_named(project: Path) -> None:
    assert_refused(call("run", "config.yaml", "method.threshold=2"), "`method.threshold` (=2)", "[0, 1]")
    assert not (project / "runs").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "method.py").write_text("mine")
    assert_refused(call("init", str(tmp_path)), str(tmp_path), "method.py already", "a new or an empty folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["method.py", "notes.txt"]
    (tmp_path / "method.py").unlink()
    assert call("init", str(tmp_path)).exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(call("init", str(tmp_path / "file")), str(tmp_path / "file"), "take another path")
