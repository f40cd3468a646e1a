"""What a round leaves in the run folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import server.report
import torch
from fedlabel.methods.steps import StateDict
from flwr.app import Error, RecordDict
from server.functions import FunctionWatch
from server.noise import NoiseWatch
from server.report import log_round, summary

import fedlabel
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.learning.client import ClientUpdate
from fedlabel.methods.fedmatch import FedMatch
from tests.server.rounds import content, reply, round_of, schema_of, tally_of

# What a round logs.


class Folder:
    """Takes what would go into a run folder."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_round(self, round_number: int, metrics: dict[str, float], **_: Any) -> None:
        self.rows.append({"round": round_number, **metrics})

    def read_metrics(self) -> list[dict[str, float]]:
        return self.rows


EXPERIMENT: Any = SimpleNamespace(
    config=SimpleNamespace(
        num_clients=3,
        num_rounds=9,
        seed=5,
        method=SimpleNamespace(name="m", metrics=(), noise_matrix=lambda shared: None),
        data=SimpleNamespace(name="d"),
        supervision=SimpleNamespace(parts=[]),
        evaluation=SimpleNamespace(split="test", select=None, figures=True),
    ),
    device=torch.device("cpu"),
)

NO_WATCH: Any = (NoiseWatch(EXPERIMENT), FunctionWatch(EXPERIMENT, None))  # type: ignore[arg-type]


CLAIMING = round_of(schema_of(FedMatch(variant="inter_client")))


def counted(passes: list[float], claimed: list[float] | None) -> RecordDict:
    body = content(passes=passes, **({"claimed_bytes": claimed} if claimed is not None else {}))
    body["metrics"]["num-examples"] = 1.0
    return body


def test_passes_and_claimed_bytes_are_summed_over_clients_and_rounds() -> None:
    """Forward 10 + 20, backward 4 + 8; claimed up 100 + 1000, down 7 + 70; a failed client's do not count."""
    folder: Any = Folder()
    first = [
        reply(11, counted([10.0, 4.0], [100.0, 7.0])),
        reply(12, counted([20.0, 8.0], [1000.0, 70.0])),
        reply(13, Error(2, "no")),
    ]
    rows = [log_round(folder, EXPERIMENT, tally_of(first, CLAIMING)[0], None, None, {}, NO_WATCH, 0.0)]
    assert rows[0]["train/forward_samples"] == 30
    assert rows[0]["train/backward_samples"] == 12
    assert rows[0]["comm/claimed_bytes_up"] == 1100
    assert rows[0]["comm/claimed_bytes_down"] == 77
    assert rows[0]["system/failed_clients"] == 1
    assert rows[0]["system/refused_replies"] == 0
    second = tally_of([reply(11, counted([1.0, 1.0], [5.0, 5.0])), reply(12, RecordDict({}))], CLAIMING)[0]
    rows.append(log_round(folder, EXPERIMENT, second, None, None, {}, NO_WATCH, 0.0))
    assert rows[1]["system/failed_clients"] == 2  # another one never answered
    assert rows[1]["system/refused_replies"] == 1
    total = summary(folder.read_metrics(), EXPERIMENT, "0123abc")
    assert total["commit"] == "0123abc"
    assert (total["train/forward_samples"], total["train/backward_samples"]) == (31, 13)
    assert (total["comm/claimed_bytes_up"], total["comm/claimed_bytes_down"]) == (1105, 82)
    assert total["comm/bytes_up"] == sum(row["comm/bytes_up"] for row in rows)


def test_without_a_claim_none_is_logged() -> None:
    folder: Any = Folder()
    tally, _ = tally_of([reply(11, counted([1.0, 1.0], None))])
    row = log_round(folder, EXPERIMENT, tally, None, None, {}, NO_WATCH, 0.0)
    assert "comm/claimed_bytes_up" not in row
    assert "comm/claimed_bytes_up" not in summary(folder.read_metrics(), EXPERIMENT, "0123abc")
    assert row["comm/bytes_up"] > 0


# Runs.

TINY = (
    *("num_clients=3", "fraction_train=1", "num_rounds=2", "partition.kind=iid", "supervision.label_rate=0.3"),
    *("model.name=mlp", "training.local_steps=2", "training.batch_size=8", "training.lr=0.01", "device=cpu"),
)


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


@pytest.mark.parametrize("method", ["fedtrinet", "fedmatch", "freematch"])
def test_the_panel_shows_what_the_client_drew(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's copy of the client trains with the same memory, helpers and shared state: same draws and labels.

    Trained as in its first round (nothing kept, shared or lent) it would show something else.
    """
    options = {
        "fedtrinet": ["method.warmup_rounds=1", "method.quality_start=0.2", "method.quality_end=0.2"],
        "fedmatch": ["method.helper_interval=2", "method.confidence_threshold=0.1"],
        "freematch": [],
    }[method]
    calls: list[tuple[int, int, ClientUpdate]] = []
    panels: list[dict[str, Any]] = []
    train = Experiment.train

    def watching(self: Experiment, client: int, state: StateDict, round_number: int, *others: Any) -> ClientUpdate:
        update = train(self, client, state, round_number, *others)
        calls.append((client, round_number, update))
        if round_number == 2 and not forgetful:
            forgetful.append(train(self, client, state, round_number, self.config.method.initial_shared(10)))
        return update

    forgetful: list[ClientUpdate] = []
    monkeypatch.setattr(Experiment, "train", watching)
    monkeypatch.setattr(server.report, "pseudo_label_panel", lambda **shown: panels.append(shown))
    fedlabel.run([], [*TINY, f"method.name={method}", *options], name="x", out=tmp_path)
    *_, (client, round_number, again) = calls
    (once,) = (update for c, r, update in calls[:-1] if (c, r) == (client, round_number))
    assert round_number == 2
    assert again.pseudo is not None
    assert once.pseudo is not None
    assert torch.equal(again.pseudo_index, once.pseudo_index)
    for ours, theirs in zip(again.pseudo, once.pseudo, strict=True):
        assert torch.equal(ours, theirs)
    assert forgetful[0].pseudo is not None
    assert not all(torch.equal(a, b) for a, b in zip(forgetful[0].pseudo, once.pseudo, strict=True))
    (shown,) = panels
    assert shown["confidences"] == once.pseudo.confidence[:16].tolist()
    assert shown["kept"] == once.pseudo.keep[:16].tolist()
    assert shown["pseudo_names"] == [str(label) for label in once.pseudo.label[:16].tolist()]
    assert len(shown["images"]) == 16
