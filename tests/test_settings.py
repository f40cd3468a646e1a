"""Runs from Python without YAML: typed keywords, callbacks, and what a strict type checker makes of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedlabel
from fedlabel.config import ConfigError, ExperimentConfig, load_config
from fedlabel.hardware import PACKAGE_ROOT
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.supervised import Supervised
from fedlabel.settings import Settings, as_layer
from tests.integration.tiny import assert_same_run

QUICK: Settings = {
    "num_clients": 3,
    "num_rounds": 2,
    "fraction_train": 0.6,
    "partition": "iid",
    "supervision": {"label_rate": 0.3},
    "training": {"local_steps": 2, "batch_size": 8},
    "evaluation": {"figures": False, "panel_samples": 0},
    "device": "cpu",
}


@dataclasses.dataclass(frozen=True)
class OwnMethod(Supervised):
    """A method of a user's own."""

    factor: float = 1.0


def config(**settings: Any) -> ExperimentConfig:
    return load_config([], [], as_layer(settings, Path("nowhere")))


def test_there_is_a_keyword_for_every_key() -> None:
    assert list(Settings.__annotations__) == [each.name for each in dataclasses.fields(ExperimentConfig)]


def test_keywords_say_what_yaml_says() -> None:
    found = config(method="fixmatch", num_clients=8, supervision={"label_rate": 0.2}, model="mlp", grid="ray")
    given = ["method.name=fixmatch", "num_clients=8", "supervision.label_rate=0.2", "model.name=mlp", "grid.kind=ray"]
    assert found == load_config([], given)


def test_a_section_may_be_its_dataclass() -> None:
    """All sections, as they are by default; and each sets all of its keys."""
    default = load_config([], [])
    sections = {each.name: getattr(default, each.name) for each in dataclasses.fields(default)}
    assert config(**sections) == default
    assert config(training=TrainingConfig(lr=0.3)).training == TrainingConfig(lr=0.3)
    assert config(method=FixMatch(confidence_threshold=0.7)).method == FixMatch(confidence_threshold=0.7)
    assert config(method=FedLabel()) == default


def test_a_method_of_ones_own_is_found_by_its_class() -> None:
    found = config(method=OwnMethod(factor=2.0)).method
    assert found == OwnMethod(name="tests.test_settings:OwnMethod", factor=2.0)
    assert config(method=OwnMethod).method == OwnMethod(name="tests.test_settings:OwnMethod")
    assert config(method=FixMatch).method == FixMatch()
    with pytest.raises(ConfigError, match=r"`method.name` \(=torch.nn.modules.linear:Linear\) must be a subclass"):
        config(method=nn.Linear)

    @dataclasses.dataclass(frozen=True)
    class Inner(Supervised):
        pass

    with pytest.raises(ConfigError, match="is a class inside of a function, which cannot be found by its name"):
        config(method=Inner())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_client": 3}, "`num_client` .*num_clients"),
        ({"training": {"learning_rate": 1}}, "training.lr"),
        ({"method": "fixmach"}, "Did you mean fixmatch"),
        ({"data": 3}, r"`data` \(=int\) must be the name of a data set, keys, or what a function of fedlabel.datasets"),
        ({"model": 3}, r"`model` \(=int\) must be a torch.nn.Module"),
        ({"num_clients": "many"}, "num_clients"),
    ],
)
def test_what_cannot_be_is_an_error_as_in_yaml(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_keywords_win_over_files_and_overrides_over_keywords(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("num_clients: 7\nnum_rounds: 1\nseed: 1\n")
    settings: Settings = {**QUICK, "num_clients": 4, "seed": 2}
    result = fedlabel.run(tmp_path / "a.yaml", ["seed=3"], name="x", out=tmp_path, **settings)
    assert (result.config.num_clients, result.config.num_rounds, result.config.seed) == (4, 2, 3)


def test_a_run_with_a_module_is_resumed_with_the_same_one(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    whole = fedlabel.run(name="whole", out=tmp_path, **QUICK, model=net())
    rounds: list[int] = []

    def stop(row: dict[str, Any]) -> bool:
        rounds.append(row["round"])
        assert row["eval/accuracy"] >= 0
        return False

    part = fedlabel.run(name="part", out=tmp_path, **QUICK, model=net(), on_round=stop)
    assert rounds == [1]
    assert part.summary == {}
    assert len(part.metrics) == 1
    assert part.model.network[1].weight.shape == (10, 64)  # type: ignore[index, union-attr]
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"was run with another configuration: model.name \(saved python:Sequential#"):
        fedlabel.run(name="part", out=tmp_path, resume=True, **QUICK, model=other)
    rest = fedlabel.run(name="part", out=tmp_path, resume=True, model=net())
    assert_same_run(rest.path, whole.path)
    assert fedlabel.load_run(rest.path, model=net()).model is not None


WIDTH = 4


def test_each_run_trains_the_function_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of one source text that close over different values, or read a global variable."""

    def maker(width: int) -> Any:
        return lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

    def by_global(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.Linear(WIDTH, num_classes))

    for name in ("closure", "global"):  # one after the other: only the last experiment is kept
        for place, width in enumerate((4, 64)):
            monkeypatch.setitem(globals(), "WIDTH", width)
            model = maker(width) if name == "closure" else by_global
            result = fedlabel.run(name=f"{name}{place}", out=tmp_path, **{**QUICK, "num_rounds": 1}, model=model)
            assert result.model.network[1].out_features == width  # type: ignore[index, union-attr]
    monkeypatch.setitem(globals(), "WIDTH", 4)
    with pytest.raises(ValueError, match="1.weight of shape 64x64 and float32, not 4x64"):
        fedlabel.run(overrides=["num_rounds=2"], name="global1", out=tmp_path, resume=True, model=by_global)


def test_what_a_callback_raises_ends_the_run_as_it_is(tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        raise KeyError(row["round"])

    with pytest.raises(KeyError, match="1"):
        fedlabel.run(name="x", out=tmp_path, **QUICK, on_round=stop)
    assert len(fedlabel.load_run(tmp_path / "x").metrics) == 1
    last: list[int] = []
    result = fedlabel.run(name="x", out=tmp_path, resume=True, on_round=lambda row: last.append(row["round"]) or False)
    assert last == [2]  # False after the last round changes nothing
    assert result.summary["rounds"] == 2


SCRIPT = """
import fedlabel
from fedlabel import datasets
from torch import nn


def build(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))


def show(row: dict[str, float]) -> None:
    print(row["round"])


data = datasets.from_table({"a": [1.0, 2.0], "y": ["n", "p"]}, label="y")
result = fedlabel.run(method="fixmatch", num_clients=20, data=data, model=build, training={"lr": 0.1}, on_round=show)
accuracy: float = result.predict([[1.0]]).probabilities.max()
classes: tuple[str, ...] = fedlabel.load_run(result.path).classes
module: nn.Module = result.model
"""


@pytest.mark.slow
def test_a_script_passes_a_strict_type_checker(tmp_path: Path) -> None:
    """So the package must be typed (py.typed); and a wrong keyword must be an error, the only one."""
    (tmp_path / "good.py").write_text(SCRIPT)
    (tmp_path / "bad.py").write_text(SCRIPT.replace("num_clients=20", "num_client=20"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "good.py", "bad.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGE_ROOT), "PATH": "", "MYPYPATH": str(PACKAGE_ROOT)},
        timeout=280,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert errors[0].startswith("bad.py:")
    assert 'Unexpected keyword argument "num_client"' in errors[0]


def test_the_marker_of_types_is_there() -> None:
    """Hatch puts every file of a package into the wheel."""
    assert (PACKAGE_ROOT / "fedlabel" / "py.typed").is_file()
    assert sorted(fedlabel.__all__) == sorted({*fedlabel.__all__})
    for name in fedlabel.__all__:
        assert getattr(fedlabel, name) is not None
    with pytest.raises(AttributeError, match="has no attribute nothing"):
        _ = fedlabel.nothing
