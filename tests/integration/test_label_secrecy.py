"""Hidden labels never reach training: whatever they are set to, the final weights are the same bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlabel.data.federation
import fedlabel.experiment
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.sets.datasets import Split
from fedlabel.methods import METHODS
from fedlabel.methods.recipe import ByBag, Phase
from fedlabel.record.json_files import read_metrics
from tests.integration.tiny import TINY, assert_same_weights, final_weights, run_tiny
from tests.methods.recipes import task


@pytest.fixture(autouse=True)
def fresh_experiments() -> Iterator[None]:
    """No experiment with poisoned labels is left for others, and none with true labels is found here."""
    fedlabel.experiment.open_experiment.cache_clear()
    yield
    fedlabel.experiment.open_experiment.cache_clear()


PASSING = {
    "supervised": [],
    "freematch": [],
    "fedlabel": [override for override in TINY if override.startswith("method.")],
    "fedtrinet": ["method.warmup_rounds=1", "method.quality_start=0.2", "method.quality_end=0.2", "method.ramp_end=1"],
    "dp_ssl": [
        *("num_rounds=4", "method.functions_rounds=2", "method.assignment_rounds=1", "method.label_model_rounds=1"),
        *("method.num_functions=10", "method.confidence_threshold=0.2"),
    ],
    "forward": ["num_rounds=3", "method.warmup_rounds=2"],
    "fedmatch": ["method.confidence_threshold=0.15", "training.lr=0.01", "method.helper_interval=2"],
}
"""Method -> what makes it trust its few rounds' pseudo-labels; the others: a low threshold."""


def phases(method: str, round_number: int) -> tuple[Phase, ...]:
    return METHODS[method]().recipe(task(2)).phases(round_number)


def method_overrides(method: str) -> list[str]:
    if any(isinstance(phase.draw, ByBag) for phase in phases(method, 1)):
        bags = ["supervision.kind=bags", "supervision.label_rate=null", "supervision.bag_size=5"]
        two = ["data.positive_classes=[1,3,5]"] if method == "top_count" else []
        two += ["method.stage_rounds=1", "method.evidence=current"] if method == "llp_bp" else []
        return [*bags, *two, f"method.name={method}"]
    threshold = "confidence_threshold" in METHODS[method].__dataclass_fields__
    lowered = ["method.confidence_threshold=0.2"] if threshold else []
    return [*PASSING.get(method, lowered), f"method.name={method}"]


def draws_unlabeled(method: str) -> bool:
    """Whether a method uses samples without any supervision, in some phase after all warm-ups."""
    draws = [phase.draw for phase in phases(method, 1000)]
    return any(draw.singles if isinstance(draw, ByBag) else draw.unlabeled for draw in draws)


def run_method(out: Path, name: str, method: str) -> Path:
    fedlabel.experiment.open_experiment.cache_clear()
    shared = [override for override in TINY if not override.startswith("method.")]
    return fedlabel.run(overrides=[*shared, *method_overrides(method)], name=name, out=out).path


@pytest.mark.parametrize("method", sorted(METHODS))
def test_labels_poisoned_in_the_evaluators_hands(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = run_method(tmp_path, "normal", method)
    kept = [row["pseudo/coverage"] for row in read_metrics(normal) if "pseudo/coverage" in row]
    assert sum(kept) > 0 or not draws_unlabeled(method)  # else nothing could leak
    asked = []

    def poisoned(self: Federation, client: int) -> torch.Tensor:
        asked.append(client)
        return torch.full((len(self.parts[client]),), -1)

    monkeypatch.setattr(Federation, "hidden_labels", poisoned)
    path = run_method(tmp_path, "poisoned", method)
    assert_same_weights(final_weights(path), final_weights(normal))
    if any("pseudo/accuracy" in row for row in read_metrics(normal)):
        assert asked
        assert not any("pseudo/accuracy" in row for row in read_metrics(path))  # nobody knows it now


@pytest.mark.parametrize("method", sorted(METHODS))
def test_labels_poisoned_in_the_data(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = run_method(tmp_path, "normal", method)
    poisoned_rows = []

    def poisoned(*arguments: Any) -> Federation:
        federation = build_federation(*arguments)
        train = federation.dataset.train
        hidden = torch.from_numpy(~federation.labeled)
        labels = torch.where(hidden, (train.labels + 1) % federation.dataset.num_classes, train.labels)
        poisoned_rows.append(int((labels != train.labels).sum()))
        return replace(federation, dataset=replace(federation.dataset, train=Split(train.images, labels)))

    monkeypatch.setattr(fedlabel.experiment, "build_federation", poisoned)
    path = run_method(tmp_path, "poisoned", method)
    assert poisoned_rows[0] > 500
    assert_same_weights(final_weights(path), final_weights(normal))


def test_the_comparison_sees_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the known labels poisoned instead, the weights do differ."""
    normal = run_tiny(tmp_path, "normal").path

    def poisoned(*arguments: Any) -> Federation:
        federation = build_federation(*arguments)
        return replace(
            federation, record=replace(federation.record, candidates=federation.record.candidates.roll(1, 1))
        )

    fedlabel.experiment.open_experiment.cache_clear()
    monkeypatch.setattr(fedlabel.experiment, "build_federation", poisoned)
    path = run_tiny(tmp_path, "leak").path
    with pytest.raises(AssertionError):
        assert_same_weights(final_weights(path), final_weights(normal))


@pytest.mark.parametrize("method", ["dp_ssl", "fedlabel", "fixmatch", "ill", "supervised"])
def test_labels_that_the_data_lack(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nobody has the other labels, or they are hidden, makes no difference to a model."""
    normal = run_method(tmp_path, "normal", method)
    federation = fedlabel.experiment.open_experiment((normal / "config.yaml").read_text()).federation
    train = federation.dataset.train
    there = torch.from_numpy(federation.labeled)
    assert 0 < int((~there).sum()) < len(there)
    lacking = replace(federation.dataset, train=Split(train.images, torch.where(there, train.labels, -1)))
    build_federation.cache_clear()
    monkeypatch.setattr(fedlabel.data.federation, "load_dataset", lambda *_: lacking)
    fedlabel.experiment.open_experiment.cache_clear()
    overrides = [each for each in TINY if not each.startswith(("method.", "supervision."))]
    told = [*overrides, *method_overrides(method), "supervision.kind=full"]
    path = fedlabel.run(overrides=told, name="lacking", out=tmp_path).path
    build_federation.cache_clear()
    assert_same_weights(final_weights(path), final_weights(normal))
    assert not any("pseudo/accuracy" in row for row in read_metrics(path))
    assert json.loads((path / "supervision.json").read_text())["without_label"] == int((~there).sum())
