"""What `fedlabel list` shows: everything that can be chosen, and every key with its default and meaning."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

from fedlabel.cli.listing import LABELS, PARTITIONS, SECTIONS, _laid_out, about, choices
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


def test_lists_steps_and_stages_of_a_docstring_stay_apart() -> None:
    fedlabel = list(about("fedlabel", 120))
    steps = fedlabel.index("One round of client k, from the received weights w:")
    written = (inspect.getdoc(sys.modules[METHODS["fedlabel"].__module__]) or "").splitlines()
    place = written.index(fedlabel[steps])
    assert fedlabel[steps : steps + 4] == written[place : place + 4]
    assert fedlabel[steps + 5] == "What differs, and why:"
    assert [line[:8] for line in fedlabel[steps + 6 :] if line.startswith("- ")][:2] == ["- KL(tea", "- The me"]
    dp_ssl = list(about("dp_ssl", 100))
    assert [line[2:15] for line in dp_ssl if re.match(r"  \w.*  ", line)] == [
        "functions    ",
        "label model  ",
        "end model    ",
    ]
    place = next(number for number, line in enumerate(dp_ssl) if line.startswith("  functions"))
    assert re.match(r" {15}\w", dp_ssl[place + 1])


@pytest.mark.parametrize(
    ("docstring", "width", "expected"),
    [
        ("One\ntwo three\n\nfour", 20, ["One two three", "", "four"]),
        ("One two three four five", 20, ["One two three four", "five"]),
        ("Steps:\n  a. one    (1)\n  b. two\nEnd.", 20, ["Steps:", "  a. one    (1)", "  b. two", "End."]),
        ("  a. one two     (1)", 20, ["  a. one two     (1)"]),
        (
            "  a. one two three four five     (1)",
            20,
            ["  a. one two three", "    four five (1)"],
        ),  # no room for the column
        ("- one two three\n  four five\n- six", 20, ["- one two three four", "  five", "- six"]),
        ("- one two three four five", 20, ["- one two three four", "  five"]),
        ("  name   one two\n         three", 20, ["  name   one two", "         three"]),
        ("  name   one two three", 20, ["  name   one two", "         three"]),
        ("well-known state-of-the-art", 20, ["well-known", "state-of-the-art"]),
    ],
)
def test_docstrings_are_laid_out(docstring: str, width: int, expected: list[str]) -> None:
    assert list(_laid_out(docstring, width)) == expected
    assert list(_laid_out(docstring, width + 4, "    ")) == [f"    {line}".rstrip() for line in expected]


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
