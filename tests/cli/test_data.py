"""`fedlabel data` and `fedlabel partition --export`, as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlabel.cli.main import app
from fedlabel.config import load_config
from fedlabel.data.nodes.schema import load_schema
from fedlabel.data.nodes.statistics import load_statistics
from tests.data.nodes.folders import write

SMALL = ["num_clients=2", "model.name=mlp", "device=cpu", "evaluation.figures=false"]


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def test_a_schema_is_made_of_statistics_and_a_folder_checked_by_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a", labels="sample,label\n0,cat\n1,dog")
    second = write(tmp_path / "b", labels="sample,candidates\n0,cat;owl")
    for folder in (first, second):
        assert "no row of it" in call("data", "statistics", folder, "--out", tmp_path / f"{folder.name}.json")
    schema = tmp_path / "schema.yaml"
    text = call("data", "schema", tmp_path / "a.json", tmp_path / "b.json", "--out", schema)
    assert "3 classes: cat, dog, owl." in text
    call("data", "schema", first, second, "--out", tmp_path / "folders.yaml", "--flip")
    found, expected = load_schema(schema), load_schema(tmp_path / "folders.yaml")
    assert (found.mean, found.std, found.classes) == (expected.mean, expected.std, expected.classes)
    assert (found.allow_flip, expected.allow_flip) == (False, True)
    text = call("data", "check", second, "--schema", schema)
    assert "8 training samples, no defects" in text
    assert "candidates" in text
    assert "8 training samples, no defects" in call("data", "check", first)  # by its own schema


def test_statistics_have_a_bound_for_small_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", labels="sample,label\n0,cat\n1,cat\n2,dog")
    call("data", "statistics", folder, "--out", tmp_path / "a.json", "--min-count", 2)
    assert load_statistics(tmp_path / "a.json").classes == ("cat",)


def test_an_operator_applies_labelling_functions(tmp_path: Path) -> None:
    folder, module = write(tmp_path / "a"), tmp_path / "ears.py"
    module.write_text("def ears(image):\n    return 'owl' if image.mean() > 127 else 'bat'\n")
    text = call("data", "votes", folder, module, "--classes", "cat,owl")
    assert "Labelling function `ears` answers" in text  # a bat is no class
    assert "votes.csv" in text
    assert "owl" in (folder / "votes.csv").read_text()
    for options in ([], ["--classes", "cat,owl", "--schema", tmp_path / "schema.yaml"]):
        assert "either --classes a,b,c or --schema" in call("data", "votes", folder, module, *options, status=2)


def test_a_folder_with_defects_ends_with_their_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", labels="sample,label\n0,cat\n1,dog\n9,cat\n1,dog")
    text = call("data", "check", folder, status=2)
    assert "has 2 defects" in text
    assert "labels.csv, row 3: there is no sample 9." in text
    assert "labels.csv, row 4: sample 1 has a row already, row 2." in text


@pytest.mark.parametrize("held_out", [False, True])
def test_a_simulated_federation_is_exported(held_out: bool, tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    options = ["--export", path, *(["--held-out"] if held_out else [])]
    assert "Folders of 2 nodes" in call("partition", *SMALL, "--out", tmp_path / "partition", *options)
    config = load_config([path / "config.yaml"])
    assert config.evaluation.at == ("nodes" if held_out else "server")
    assert config.data.test == (None if held_out else str(path / "test"))
    assert config.data.schema == str(path / "schema.yaml")
    assert (path / "test").is_dir() is not held_out
    for client in range(2):
        folder = path / f"client-00{client}"
        assert f"--node-config 'data=\"{folder}\" client={client}'" in (path / "README.md").read_text()
        text = call("data", "check", folder, "--schema", path / "schema.yaml")
        assert ("held out" in text) is held_out
    call("partition", *SMALL, "--out", tmp_path / "partition", *options, status=2)  # not twice


def test_held_out_without_export_and_validation_are_refused(tmp_path: Path) -> None:
    assert "`--held-out` is for --export" in call("partition", *SMALL, "--out", tmp_path / "p", "--held-out", status=2)
    more = ["evaluation.split=validation", "--out", tmp_path / "p", "--export", tmp_path / "nodes"]
    assert "must be test for --export" in call("partition", *SMALL, *more, status=2)
    assert not (tmp_path / "nodes").exists()
