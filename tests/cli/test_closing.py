"""What a run says at its end: the table, the labelled-only bound, and commands that work."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

import fedlabel
from fedlabel.cli.closing import bound_command, find_bound
from fedlabel.config import ExperimentConfig, load_config, to_yaml
from fedlabel.methods.supervised import Supervised
from tests.cli.test_main import call

SMALL = ["num_clients=3", "num_rounds=2", "model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=1"]
QUICK = [*SMALL, "device=cpu", "evaluation.figures=false", "evaluation.panel_samples=0"]


def ran(out: Path, name: str, *overrides: str) -> str:
    result = call("run", *QUICK, *overrides, "--out", str(out), "--name", name)
    assert result.exit_code == 0, result.output
    return result.output


def commands(output: str) -> list[list[str]]:
    """The commands that are proposed, as arguments of `fedlabel`."""
    return [shlex.split(line)[1:] for line in re.findall(r"^    (fedlabel .*)$", output, re.M)]


def given(command: list[str]) -> ExperimentConfig:
    items = [item for item in command[1 : command.index("--out")] if item]
    return load_config([item for item in items if "=" not in item], [item for item in items if "=" in item])


def test_from_a_first_run_by_its_own_commands_to_the_answer(tmp_path: Path) -> None:
    """The proposed labelled-only run is what the next run of the method is held against."""
    first = ran(tmp_path, "a", "method.lambda_0=0.5")
    bound, watch, report, tensorboard, resume = commands(first)
    assert watch == ["watch", str(tmp_path / "a")]
    assert tensorboard == ["tensorboard", str(tmp_path)]
    assert resume == ["run", "num_rounds=4", "--resume", "--name", "a", "--out", str(tmp_path)]
    assert report == ["report", str(tmp_path / "a")]
    for command in ([*bound, "--name", "alone"], watch, report):
        assert call(*command).exit_code == 0
    accuracy = load_summary(tmp_path / "alone")
    again = ran(tmp_path, "b", "method.lambda_0=0.25")
    assert f"Labels alone: {accuracy:.4f} ({tmp_path / 'alone'})" in again
    points = 100 * (load_summary(tmp_path / "b") - accuracy)
    assert ("as good as" if abs(points) < 0.05 else f"{abs(points):.1f} points") in again
    compare = commands(again)[0]
    assert compare == ["compare", str(tmp_path / "b"), str(tmp_path / "alone")]
    assert call(*compare, "--out", str(tmp_path / "compared")).exit_code == 0
    other = ran(tmp_path, "c", "method.lambda_0=0.25", "training.lr=0.2")  # another setting
    assert "Is it better than training on the labels alone?" in other
    assert call(*resume).exit_code == 0


def load_summary(path: Path) -> float:
    from fedlabel.record.json_files import read_summary

    return float(read_summary(path)["eval/accuracy"]["mean_last_tenth"])


def test_what_is_no_bound_is_passed_over(tmp_path: Path) -> None:
    for name, more in {"oracle": ["method.oracle_labels=true"], "seed": ["seed=5"], "damaged": []}.items():
        fedlabel.run(overrides=[*QUICK, "method.name=supervised", *more], name=name, out=tmp_path)
    config = load_config(overrides=QUICK)
    (tmp_path / "mine").mkdir()
    own = tmp_path / "mine" / "partition.json"
    own.write_text((tmp_path / "damaged" / "partition.json").read_text())
    found = find_bound(tmp_path / "mine", config)
    assert found is not None
    assert found.path == tmp_path / "damaged"
    (tmp_path / "damaged" / "summary.json").write_text("{")
    (tmp_path / "no run").mkdir()
    assert find_bound(tmp_path / "mine", config) is None
    own.write_text((tmp_path / "seed" / "partition.json").read_text())
    assert find_bound(tmp_path / "mine", dataclasses.replace(config, seed=5)) is not None


def test_other_data_under_the_same_keys_are_no_bound(tmp_path: Path) -> None:
    fedlabel.run(overrides=[*QUICK, "method.name=supervised"], name="labels", out=tmp_path)
    config = load_config(overrides=QUICK)
    own = tmp_path / "mine" / "partition.json"
    own.parent.mkdir()
    saved = json.loads((tmp_path / "labels" / "partition.json").read_text())
    own.write_text(json.dumps(saved))
    assert find_bound(own.parent, config) is not None
    own.write_text(json.dumps({**saved, "data": dict.fromkeys(saved["data"], "other")}))
    assert find_bound(own.parent, config) is None


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (["method.name=supervised"], "the labels alone: the lower bound"),
        (["method.name=supervised", "method.oracle_labels=true"], "all labels: an upper bound"),
        (
            ["method.name=dllp", "supervision.kind=bags", "supervision.bag_size=8"],
            "No sample has a label of its own, so there is no labelled-only run",
        ),
    ],
)
def test_where_there_is_nothing_to_compare_it_says_so(method: list[str], text: str, tmp_path: Path) -> None:
    output = ran(tmp_path, "a", *method)
    assert text in output
    assert "This tells" not in output


@pytest.mark.parametrize("fields", ["", ", threshold: 0.5"])
def test_the_command_for_the_bound_gives_the_same_but_for_the_method(fields: str, tmp_path: Path) -> None:
    """Also where the file has fields of the method, which another one lacks: all keys are given then."""
    file, weights = tmp_path / "config.yaml", "supervision.mix=[{share: 1.0, kind: noisy, noise_rate: 0.4}]"
    file.write_text(f"method: {{name: fixmatch{fields.replace('threshold', 'confidence_threshold')}}}\nseed: 3\n")
    overrides = [*QUICK, weights, "data.root=some where", "method.lambda_u=0.5"]
    config = load_config([file], overrides)
    wanted = dataclasses.replace(config, method=Supervised())
    for items in ([str(file), *overrides], []):  # [] after --resume
        command = shlex.split(bound_command(config, items, tmp_path))[1:]
        assert to_yaml(given(command)) == to_yaml(wanted)
        assert (str(file) in command) is (bool(items) and not fields)


def test_the_table_has_results_and_cost(tmp_path: Path) -> None:
    output = ran(tmp_path, "a")
    for name in ("accuracy", "accuracy of the worst client", "coverage of pseudo-labels", "seconds in rounds"):
        assert f"│ {name} " in output
    assert "│ MB from clients" in output
    assert "\x1b" not in output
    assert "\r" not in output
