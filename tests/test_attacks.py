"""Attacks of simulated clients: what they change, who attacks, and what the server makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlabel
from fedlabel.attacks import AttackConfig, attacked, attackers, flipped
from fedlabel.config import ConfigError, load_config
from fedlabel.data.labels.supervision import Supervision
from fedlabel.experiment import Experiment
from fedlabel.methods.uploads import ModelPart
from server.grids.in_process import InProcessGrid
from server.server_app import run_federation
from tests.integration.tiny import TINY, run_tiny

START = {"w": torch.tensor([1.0, 1.0]), "n": torch.tensor(3)}
PARTS = {"model": ModelPart({"w": torch.tensor([1.5, 0.0]), "n": torch.tensor(4)}, 7.0)}
COUNTS = {"counts": torch.tensor([[1.0, 2.0, 3.0]]), "rounds": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kind": "sign_flip"}, [0.5, 2.0]),
        ({"kind": "sign_flip", "scale": 3.0}, [-0.5, 4.0]),
        ({"kind": "scaled"}, [6.0, -9.0]),
        ({"kind": "label_flip"}, [1.5, 0.0]),  # is in the labels
        ({"kind": "false_counts"}, [1.5, 0.0]),
    ],
)
def test_attacks_on_the_update_by_hand(keys: dict[str, Any], expected: list[float]) -> None:
    """The update is (.5, -1). What is not trained stays, and so does the weight."""
    parts, statistics = attacked(AttackConfig(share=0.5, **keys), PARTS, COUNTS, START, {"w"})
    assert parts["model"].state["w"].tolist() == expected
    assert int(parts["model"].state["n"]) == 4
    assert parts["model"].weight == 7.0
    if keys["kind"] != "false_counts":
        assert statistics is COUNTS


def test_nan_and_false_counts_by_hand() -> None:
    parts, _ = attacked(AttackConfig("nan", 0.5), PARTS, COUNTS, START, {"w"})
    assert parts["model"].state["w"].isnan().all()
    _, statistics = attacked(AttackConfig("false_counts", 0.5, scale=2.0), PARTS, COUNTS, START, {"w"})
    assert statistics["counts"].tolist() == [[6.0, 4.0, 2.0]]
    assert float(statistics["rounds"]) == 4.0


def test_labels_of_every_kind_are_flipped() -> None:
    record = Supervision(
        candidates=torch.tensor([[True, False, False], [True, True, False], [True, True, True]]),
        noisy=torch.tensor([True, False, False]),
        annotations=torch.tensor([[0], [-1], [2]]),
        bag=torch.tensor([0, 0, -1]),
        bag_counts=torch.tensor([[2, 0, 0]]),
        votes=torch.zeros(3, 0, dtype=torch.int64),
    )
    found = flipped(record)
    assert found.candidates.int().tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert found.noisy.tolist() == [True, False, False]
    assert found.annotations.tolist() == [[2], [-1], [0]]
    assert found.bag_counts.tolist() == [[0, 0, 2]]


def test_who_attacks_is_drawn_from_the_seed() -> None:
    config = AttackConfig("nan", 0.3)
    assert len(attackers(config, 10, 0)) == 3
    assert attackers(config, 10, 0) == attackers(config, 10, 0) != attackers(config, 10, 1)
    assert attackers(AttackConfig(), 10, 0) == frozenset()


def test_only_training_sees_flipped_labels() -> None:
    """The evaluator's records stay."""
    experiment = Experiment(load_config([], [*TINY, "attack.kind=label_flip", "attack.share=0.4"]))
    for client in range(5):
        sees, has = experiment.client_data(client).supervision, experiment.federation.supervision(client)
        assert torch.equal(
            sees.candidates, has.candidates.flip(1) if client in experiment.attackers else has.candidates
        )
    assert len(experiment.attackers) == 2


QUICK = ("fraction_train=1.0", "num_rounds=2", "evaluation.figures=false")


def test_attackers_that_send_nan_are_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = run_tiny(tmp_path, "x", *QUICK, "attack.kind=nan", "attack.share=0.4").metrics
    assert [row["system/refused_replies"] for row in rows] == [2, 2]
    assert all(math.isfinite(row["eval/loss"]) for row in rows)


def test_a_scaled_update_is_bounded_by_the_norm(tmp_path: Path) -> None:
    """Of 1000 times its length without a bound; with one, clipped or refused, the model moves as far as it may."""
    attack = ("attack.kind=scaled", "attack.share=0.4", "attack.scale=1000")
    bounds = ("strategy.clip_update_norm=0.1", "strategy.max_update_norm=10")
    losses = {
        bound: run_tiny(tmp_path, str(number), *QUICK, *attack, *bound).metrics[-1]["eval/loss"]
        for number, bound in enumerate([(), *((each,) for each in bounds)])
    }
    assert losses[()] > 100
    assert all(losses[(each,)] < 5 for each in bounds)


def ill_counts(tmp_path: Path, name: str, *overrides: str) -> dict[str, Any]:
    keys = (
        *("num_clients=5", "fraction_train=1.0", "num_rounds=1", "partition.kind=iid", "model.name=mlp", "device=cpu"),
        *("method.name=ill", "supervision.kind=noisy", "supervision.noise_rate=0.2", "method.noise.warmup_rounds=0"),
        *("training.local_steps=1", "training.batch_size=8", "evaluation.panel_samples=0", "evaluation.figures=false"),
    )
    return fedlabel.run(overrides=[*keys, *overrides], name=name, out=tmp_path).metrics[0]


def test_false_counts_beyond_what_a_client_holds_are_refused(tmp_path: Path) -> None:
    """Reversed counts are as many as its samples, and pass; ten times as many do not. The matrix is another one."""
    attack = ("attack.kind=false_counts", "attack.share=0.4")
    honest = ill_counts(tmp_path, "honest")
    reversed_counts = ill_counts(tmp_path, "reversed", *attack)
    tenfold = ill_counts(tmp_path, "tenfold", *attack, "attack.scale=10")
    assert honest["system/refused_replies"] == reversed_counts["system/refused_replies"] == 0
    assert tenfold["system/refused_replies"] == 2
    assert reversed_counts["transition/smallest_diagonal"] < honest["transition/smallest_diagonal"]
    assert "counts" in (tmp_path / "tenfold" / "failures.log").read_text()


class Real(InProcessGrid):
    """Clients that say that they are real."""

    simulated = False


def test_real_clients_are_not_told_to_attack(tmp_path: Path) -> None:
    config = load_config([], [*TINY, "attack.kind=nan", "attack.share=0.4"])
    with pytest.raises(ConfigError, match=r"`attack.kind` \(=nan\) makes simulated clients attack, and these are real"):
        run_federation(config, Real(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"kind": "nan"}, r"`attack.kind` \(=nan\) and `attack.share` \(=0\) belong together"),
        ({"share": 0.5}, "belong together"),
        ({"kind": "nan", "share": 0.5, "scale": 2.0}, r"`attack.scale` \(=2\) is for attack.kind=sign_flip, scaled"),
        ({"kind": "scaled", "share": 0.5, "scale": 0.0}, "must be a positive number"),
        ({"kind": "scaled", "share": 1.5}, r"must lie in \[0, 1\]"),
        ({"kind": "backdoor", "share": 0.5}, "must be one of none, label_flip"),
    ],
)
def test_impossible_attacks_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AttackConfig(**keys)


def test_two_bounds_on_the_norm_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        load_config([], ["strategy.max_update_norm=1", "strategy.clip_update_norm=1"])
