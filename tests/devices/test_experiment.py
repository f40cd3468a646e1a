"""The devices of a run: made when they are asked for, and of hidden labels only what the correlation needs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import fedlabel
from fedlabel.config import load_config
from fedlabel.data.federation import Federation
from fedlabel.experiment import Experiment

TINY = ["num_clients=20", "device=cpu", "model.name=mlp", "model.hidden_layers=[8]"]
PHONES = ["devices.kind=lognormal", "devices.population=[{profile: phone}]"]


def experiment(*overrides: str) -> Experiment:
    return Experiment(load_config([], [*TINY, *overrides]))


def test_there_are_none_by_default() -> None:
    assert experiment().devices is None


def test_slow_clients_hold_the_rare_classes() -> None:
    found = experiment(*PHONES, "devices.correlation=1", "devices.rare_classes=[8, 9]")
    assert found.devices is not None
    rarity, speed = found.federation.rarity(("8", "9")), found.devices.speed(np.arange(20))
    assert len(set(rarity.tolist())) > 10
    assert (np.diff(rarity[np.argsort(-speed)]) >= 0).all()


def test_hidden_labels_are_looked_at_for_a_correlation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Federation, "rarity", lambda self, rare: asked.append(rare) or np.zeros(20))
    free = experiment(*PHONES)
    assert free.devices is not None
    assert free.devices is free.devices
    assert asked == []
    bound = experiment(*PHONES, "devices.correlation=0.5")
    assert asked == []
    assert bound.devices is not None
    assert asked == [()]


def test_nobody_else_asks_for_rarity() -> None:
    root = Path(fedlabel.__file__).parent.parent
    files = [file for folder in ("fedlabel", "server", "clients") for file in (root / folder).rglob("*.py")]
    asking = [str(file.relative_to(root)) for file in files if re.search(r"\.rarity\(", file.read_text())]
    assert asking == ["fedlabel/experiment.py"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["devices.rare_classes=[12]"], r"`devices.rare_classes` \(=\[12\]\): 12 is none of the classes 0, 1"),
        (["devices.rare_classes=[0,1,2,3,4,5,6,7,8,9]"], "names all 10 classes, which leaves no class to be frequent"),
    ],
)
def test_classes_that_the_data_lack(overrides: list[str], words: str) -> None:
    found = experiment(*PHONES, "devices.correlation=0.5", *overrides)
    with pytest.raises(ValueError, match=words):
        _ = found.devices


def test_a_trace_that_is_missing() -> None:
    found = experiment("devices.kind=trace", "devices.trace=nowhere.csv")
    with pytest.raises(ValueError, match=r"`devices.trace` \(=nowhere.csv\) is no file"):
        _ = found.devices


@pytest.mark.parametrize("name", ["hospitals", "phones", "slow_rare", "two_days"])
def test_shipped_populations(name: str) -> None:
    config = load_config([f"devices/{name}.yaml"], TINY)
    found = Experiment(config).devices
    assert found is not None
    assert found.speed(np.arange(20)).min() > 0
