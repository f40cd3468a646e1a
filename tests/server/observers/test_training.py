"""What clients measure of their training, and what a round costs."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, RecordDict

import fedlabel
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.fedmatch import FedMatch
from server.observers.training import SystemObserver, TrainingObserver
from server.state import ServerState
from tests.server.rounds import content, reply, round_of, schema_of, seen, tally_of

NOTHING: Any = None
"""The system's observer does not look at the experiment."""
FOUR_CLIENTS: Any = SimpleNamespace(config=SimpleNamespace(num_clients=4))
STATE = ServerState(4, {}, "")
CLAIMING = round_of(schema_of(FedMatch(variant="inter_client")))


def counted(passes: list[float], claimed: list[float] | None) -> RecordDict:
    body = content(passes=passes, **({"claimed_bytes": claimed} if claimed is not None else {}))
    body["metrics"]["num-examples"] = 1.0
    return body


def test_metrics_of_training_are_means_over_all_clients() -> None:
    """Sums 1 and 1 over 2 steps each, and 4 over 1: 6 / 5."""
    bodies = [content(), content(), content()]
    bodies[2]["sums"]["train/loss"], bodies[2]["metrics"]["train_loss"] = [4.0, 1.0], 4.0
    tally, _ = tally_of([reply(node, body) for node, body in zip((11, 12, 13), bodies, strict=True)])
    report = TrainingObserver(FOUR_CLIENTS).after_round(seen(tally), STATE)
    assert report.metrics == {
        "train/loss": pytest.approx(6 / 5),
        "train/lowest_10pct_client_loss": 1 / 2,
        "train/highest_10pct_client_loss": 4,
    }
    assert report.lists.keys() == {"train/client_loss"}
    np.testing.assert_array_equal(report.lists["train/client_loss"], [1 / 2, 1 / 2, 4, np.nan])


def test_passes_and_claimed_bytes_are_summed_over_clients() -> None:
    """Forward 10 + 20, backward 4 + 8; claimed up 100 + 1000, down 7 + 70; a failed client's do not count."""
    observer = SystemObserver(NOTHING)
    first = [
        reply(11, counted([10.0, 4.0], [100.0, 7.0])),
        reply(12, counted([20.0, 8.0], [1000.0, 70.0])),
        reply(13, Error(2, "no")),
    ]
    row = observer.after_round(seen(tally_of(first, CLAIMING)[0]), STATE).metrics
    assert row["train/forward_samples"] == 30
    assert row["train/backward_samples"] == 12
    assert row["comm/claimed_bytes_up"] == 1100
    assert row["comm/claimed_bytes_down"] == 77
    assert row["system/failed_clients"] == 1
    assert row["system/refused_replies"] == 0
    second = tally_of([reply(11, counted([1.0, 1.0], [5.0, 5.0])), reply(12, RecordDict({}))], CLAIMING)[0]
    row = observer.after_round(seen(second), STATE).metrics
    assert row["system/failed_clients"] == 2  # another one never answered
    assert row["system/refused_replies"] == 1
    assert (row["comm/bytes_up"], row["comm/bytes_down"]) == (second.bytes_up, second.bytes_down)


def test_without_a_claim_none_is_logged() -> None:
    tally, _ = tally_of([reply(11, counted([1.0, 1.0], None))])
    row = SystemObserver(NOTHING).after_round(seen(tally), STATE).metrics
    assert not {"comm/claimed_bytes_up", "comm/claimed_bytes_down"} & set(row)
    assert row["comm/bytes_up"] > 0


def test_seconds_are_those_since_the_round_began() -> None:
    tally, _ = tally_of([reply(11, content())])
    row = SystemObserver(NOTHING).after_round(seen(tally, started=time.perf_counter() - 100), STATE).metrics
    assert row["system/round_seconds"] == pytest.approx(100, abs=1)


TINY = (
    *("num_clients=3", "fraction_train=1", "num_rounds=2", "partition.kind=iid", "supervision.label_rate=0.3"),
    *("model.name=mlp", "training.local_steps=2", "training.batch_size=8", "training.lr=0.01", "device=cpu"),
)


@pytest.mark.parametrize(("stack", "stacked"), [("off", 0), ("3", 3)])
def test_clients_that_trained_in_a_stack_are_counted(tmp_path: Path, stack: str, stacked: int) -> None:
    options = ("method.name=supervised", "supervision.kind=full", "supervision.label_rate=null", f"grid.stack={stack}")
    result = fedlabel.run([], [*TINY, *options, "num_rounds=1"], name="x", out=tmp_path)
    assert result.metrics[0]["system/stacked_clients"] == stacked


def test_a_run_counts_passes_and_claims_as_worked_out(tmp_path: Path) -> None:
    """FedMatch, 3 clients, 2 steps of 8 labelled and 8 unlabelled samples, helpers in round 2.

    Forward and back: 3 * 2 * (8 in step A + 8 weak and 8 strong in step B) = 144; each of two helpers adds 8 a step,
    forward only: 144 + 3 * 2 * 2 * 8 = 240 in round 2. Claimed down: sigma and psi, of which nothing is 0 but the
    biases that start so; up: at most as much.
    """
    options = ("method.name=fedmatch", "method.helper_interval=2", "method.confidence_threshold=0")
    result = fedlabel.run([], [*TINY, *options, "evaluation.panel_samples=0"], name="x", out=tmp_path)
    first, second = result.metrics
    assert (first["train/forward_samples"], first["train/backward_samples"]) == (144, 144)
    assert (second["train/forward_samples"], second["train/backward_samples"]) == (240, 144)
    initial = Experiment(load_config([], [*TINY, *options])).initial_state
    sigma = sum(value.numel() for name, value in initial.items() if name.startswith("sigma."))
    psi = sum(int((value != 0).sum()) for name, value in initial.items() if name.startswith("psi."))
    assert 0 < psi <= sigma
    assert first["comm/claimed_bytes_down"] == 3 * 4 * (sigma + psi)
    assert 3 * 4 * (sigma + 2 * psi) < second["comm/claimed_bytes_down"] <= 3 * 4 * (sigma + 3 * sigma)
    for row in (first, second):
        assert 0 < row["comm/claimed_bytes_up"] <= 3 * 4 * 2 * sigma
    assert result.summary["comm/claimed_bytes_down"] == sum(row["comm/claimed_bytes_down"] for row in result.metrics)
    assert result.summary["train/forward_samples"] == 144 + 240
