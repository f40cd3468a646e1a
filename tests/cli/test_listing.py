"""What `fedlabel list` shows: everything that can be chosen, and every key with its default and meaning."""

from __future__ import annotations

import re

import pytest

from fedlabel.cli.listing import LABELS, PARTITIONS, SECTIONS, about, choices
from fedlabel.config import ConfigError, ExperimentConfig, load_config
from fedlabel.config_names import all_keys
from fedlabel.data.labels.supervision_config import KINDS as LABEL_KINDS
from fedlabel.data.partition import KINDS
from fedlabel.methods import METHODS
from server.strategy import strategy_names


def test_all_that_can_be_chosen_is_there_and_said_in_words() -> None:
    found = choices(strategy_names())
    assert set(found["method.name"]) == set(METHODS)
    assert set(KINDS) <= set(PARTITIONS)
    assert set(LABELS) == set(LABEL_KINDS)
    assert "mobilenet_v3_small" in found["model.name"]["torchvision:NAME"]
    assert "googlenet" not in found["model.name"]["torchvision:NAME"]
    for name in found["fedlabel run"]:
        load_config([name])  # as it would be typed
    assert "sweep/digits.yaml" in found["fedlabel sweep"]
    assert all(words for rows in found.values() for words in rows.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_source_and_every_key(name: str) -> None:
    lines = list(about(name, 100))
    assert lines[0].startswith(f"method.name={name}: ")
    assert max(map(len, lines)) <= 100
    shown = {found[1] for line in lines if (found := re.match(r"(method\.[\w.]+) \(", line))}
    keys = {key for key in all_keys(ExperimentConfig, METHODS[name]) if key.startswith("method.")}
    assert shown == keys - {"method.name"}


def test_defaults_are_the_methods_own_and_meanings_follow() -> None:
    lines = list(about("freematch", 200))
    place = lines.index("method.mask.kind (str), default freematch")  # a mask by itself is fixed
    assert lines[place + 1].startswith("    fixed | flexmatch | freematch | cbafed")
    assert "method.max_distance (float), default 2.0" in list(about("llp_bp", 200))
    assert list(about("fedlabel.methods.gce:GCE", 200))[-3:] == list(about("gce", 200))[-3:]


@pytest.mark.parametrize("name", [each for each in SECTIONS if each != "method"])
def test_a_section_is_shown_with_every_key(name: str) -> None:
    text = "\n".join(about(name, 80))
    for key in all_keys(ExperimentConfig, METHODS["supervised"]):
        if key.startswith(f"{name}."):
            assert f"\n{key} (" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fixmtch", "neither a method nor a section .* Did you mean fixmatch"),
        ("method", "other keys for every method: fedlabel list METHOD"),
        ("os:system", "must be a subclass"),
        ("adult", "neither a method nor a section but a value of data.name: data.name=adult."),
        ("torchvision:resnet18", "a value of model.name: model.name=torchvision:resnet18."),
        ("flwr_datasets:ShardPartitioner", "a value of partition.kind: "),
        ("FedAdam", "a value of strategy.name: strategy.name=FedAdam."),
        ("adamw", "a value of training.optimizer: "),
        ("flexmatch", "a value of method.mask.kind: "),
    ],
)
def test_what_is_not_there(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(about(name, 80, strategy_names()))
