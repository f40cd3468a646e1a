"""One odd reply fails its client; it neither stops the run nor touches the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

import fedlabel
import server.report
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.base import state_to_lists
from fedlabel.methods.steps import StateDict
from fedlabel.training import ClientUpdate
from server.functions import FunctionWatch
from server.grids import InProcessGrid
from server.noise import NoiseWatch
from server.report import RoundTally, log_round, summary

InProcessGrid(None, 1)  # type: ignore[arg-type]  # sets the identity that server messages need


def content() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.ones(3, np.float32)), "b": Array(np.zeros((), np.float32))}),
            "metrics": MetricRecord({"num-examples": 2.0, "train_loss": 0.5}),
            "sums": ConfigRecord({"train/loss": [1.0, 2.0]}),
            "counts": ConfigRecord({"passes": [4.0, 2.0], "drawn": [1.0, 2.0, 3.0]}),
        }
    )


def tally_of(replies: list[Message]) -> tuple[RoundTally, list[int]]:
    sent = [Message(content(), node, "train") for node in (11, 12, 13)]
    tally = RoundTally(4, {11: 0, 12: 1, 13: 2}, sent)
    used = [reply.metadata.src_node_id for reply in tally.usable(iter(replies))]
    tally.finish()
    return tally, used


def reply(node: int, body: RecordDict | Error) -> Message:
    order = Message(content(), node, "train")
    order.metadata.__dict__["_message_id"] = "1"
    return Message(body, reply_to=order)


def change(what: str, key: str, value: object) -> Callable[[RecordDict], None]:
    def apply(body: RecordDict) -> None:
        body[what][key] = value  # type: ignore[assignment]

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda body: body.pop("arrays"), "lacks the record"),
        (lambda body: body.pop("metrics"), "lacks the record"),
        (lambda body: body["metrics"].pop("num-examples"), "lack `num-examples`"),
        (lambda body: body["arrays"].pop("b"), "lacks, or has beside the global model's arrays, b"),
        (change("arrays", "extra", Array(np.zeros(1))), "arrays, extra"),
        (change("arrays", "w", Array(np.ones(1, np.float32))), r"w of its model has shape \(1,\), not \(3,\)"),
        (change("arrays", "w", Array(np.array([1, np.nan, 1], np.float32))), "NotFinite: w of its model"),
        (change("arrays", "w", Array("float32", (3,), "numpy.ndarray", b"rubbish")), "w of its model cannot be read"),
        (change("metrics", "num-examples", float("nan")), r"`num-examples` \(=nan\) must be a finite number"),
        (change("metrics", "num-examples", -1.0), r"`num-examples` \(=-1.0\)"),
        (change("sums", "train/loss", [float("inf"), 1.0]), "its metrics hold NaN"),
        (change("sums", "train/loss", [1.0]), "its metric train/loss has 1 numbers, not 2"),
        (change("counts", "passes", [1.0]), "its metric passes has 1 numbers, not 2"),
        (change("counts", "claimed_bytes", [1.0, 2.0, 3.0]), "its metric claimed_bytes has 3 numbers, not 2"),
        (change("counts", "drawn", [1.0]), "its metric drawn has 1 numbers, not 3"),  # as those before it had
    ],
)
def test_odd_reply_fails_its_client_alone(spoil: Callable[[RecordDict], None], reason: str) -> None:
    odd = content()
    spoil(odd)
    tally, used = tally_of([reply(11, content()), reply(12, odd), reply(13, content())])
    assert used == [11, 13]
    assert len(tally.failures) == 1
    assert tally.failures[0].startswith("Round 4, client 1: ")
    assert re.search(reason, tally.failures[0]), tally.failures[0]
    assert tally.sums == {"train/loss": [2.0, 4.0]}
    assert set(tally.client_counts) == {0, 2}
    assert not tally.all_failed


def test_errors_and_silence_are_counted_and_replies_of_flower_are_put_in_client_order() -> None:
    sent = [Message(content(), node, "train") for node in (11, 12, 13)]
    tally = RoundTally(4, {11: 0, 12: 1, 13: 2}, sent)
    used = [r.metadata.src_node_id for r in tally.usable([reply(13, content()), reply(11, content())])]
    tally.finish()
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: NoAnswer: the client did not answer in time"]
    failed, _ = tally_of([reply(node, Error(2, "ValueError: no")) for node in (11, 12, 13)])
    assert failed.all_failed
    assert failed.failures[0] == "Round 4, client 0: ValueError: no"


def test_released_merge_replies_need_both_parts() -> None:
    body = content()
    arrays = {f"{part}/{name}": array for part in ("a", "b") for name, array in body["arrays"].items()}
    both = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 1.0, "weight/a": 1.0, "weight/b": 0.5}),
        }
    )
    assert tally_of([reply(11, both)])[1] == [11]
    del both["arrays"]["b/w"]
    assert tally_of([reply(11, both)])[1] == []


# Statistics: what the clients' memories add up to (`Method.statistics`).

TEMPLATE = {"scalar": torch.tensor(1.0), "classes": torch.zeros(3), "table": torch.zeros(2, 3)}


def bring(*values: float) -> RecordDict:
    """A reply whose statistics are filled with the values."""
    body = content()
    filled = {
        name: torch.full_like(example, value) for (name, example), value in zip(TEMPLATE.items(), values, strict=True)
    }
    body["statistics"] = ConfigRecord(dict(state_to_lists(filled)))
    return body


def statistics_of(replies: list[Message]) -> tuple[RoundTally, dict[str, torch.Tensor]]:
    sent = [Message(content(), node, "train") for node in (11, 12, 13)]
    tally = RoundTally(4, {11: 0, 12: 1, 13: 2}, sent, TEMPLATE)
    list(tally.usable(iter(replies)))
    return tally, tally.statistics(torch.device("cpu"))


def test_statistics_are_summed_over_the_usable_replies() -> None:
    """1 + 10 + 100, 2 + 20 + 200, 3 + 30 + 300, in the shapes they came in; what nobody asked for is left out."""
    third = bring(100, 200, 300)
    third["statistics"]["other"] = [1.0, 1.0, 5.0]  # type: ignore[assignment]
    tally, total = statistics_of([reply(11, bring(1, 2, 3)), reply(12, bring(10, 20, 30)), reply(13, third)])
    assert not tally.failures
    assert list(total) == list(TEMPLATE)
    for (name, example), value in zip(TEMPLATE.items(), (111, 222, 333), strict=True):
        assert torch.equal(total[name], torch.full_like(example, value)), name


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("scalar", None, r"its statistic scalar is missing or has another shape than \[\]"),
        ("classes", None, r"its statistic classes is missing or has another shape than \[3.0\]"),
        ("classes", [1.0, 4.0, 0.0, 0.0, 0.0, 0.0], "its statistic classes is missing or has another shape"),
        ("classes", [1.0, 3.0, 0.0, 0.0], "its statistic classes is missing or has another shape"),
        ("table", [2.0, 3.0, 2.0, *[0.0] * 6], r"its statistic table .* another shape than \[2.0, 3.0\]"),
        ("scalar", [0.0, float("nan")], "NotFinite: its metrics hold NaN or infinity"),
    ],
)
def test_odd_statistic_fails_its_client_alone(name: str, value: list[float] | None, reason: str) -> None:
    odd = bring(10, 20, 30)
    if value is None:
        del odd["statistics"][name]
    else:
        odd["statistics"][name] = value  # type: ignore[assignment]
    tally, total = statistics_of([reply(11, bring(1, 2, 3)), reply(12, odd), reply(13, bring(100, 200, 300))])
    (failure,) = tally.failures
    assert re.search(rf"^Round 4, client 1: .*{reason}", failure), failure
    assert [float(value.max()) for value in total.values()] == [101, 202, 303]
    assert [float(value.min()) for value in total.values()] == [101, 202, 303]
    nothing, none = statistics_of([reply(11, content())])
    assert len(nothing.failures) == 1
    assert none == {}


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
        method=SimpleNamespace(name="m", noise_matrix=lambda shared: None),
        data=SimpleNamespace(name="d"),
        supervision=SimpleNamespace(parts=[]),
        evaluation=SimpleNamespace(split="test", select=None, figures=True),
    ),
    device=torch.device("cpu"),
)

NO_WATCH: Any = (NoiseWatch(EXPERIMENT), FunctionWatch(EXPERIMENT, None))  # type: ignore[arg-type]


def counted(passes: list[float], claimed: list[float] | None) -> RecordDict:
    body = content()
    body["counts"] = ConfigRecord({"passes": passes, **({"claimed_bytes": claimed} if claimed is not None else {})})  # type: ignore[dict-item]
    return body


def test_passes_and_claimed_bytes_are_summed_over_clients_and_rounds() -> None:
    """Forward 10 + 20, backward 4 + 8; claimed up 100 + 1000, down 7 + 70; a failed client's do not count."""
    folder: Any = Folder()
    first = [reply(11, counted([10, 4], [100, 7])), reply(12, counted([20, 8], [1000, 70])), reply(13, Error(2, "no"))]
    rows = [log_round(folder, EXPERIMENT, tally_of(first)[0], None, None, {}, NO_WATCH, 0.0)]
    assert rows[0]["train/forward_samples"] == 30
    assert rows[0]["train/backward_samples"] == 12
    assert rows[0]["comm/claimed_bytes_up"] == 1100
    assert rows[0]["comm/claimed_bytes_down"] == 77
    assert rows[0]["system/failed_clients"] == 1
    rows.append(
        log_round(folder, EXPERIMENT, tally_of([reply(11, counted([1, 1], [5, 5]))])[0], None, None, {}, NO_WATCH, 0.0)
    )
    total = summary(folder, EXPERIMENT, "0123abc")
    assert total["commit"] == "0123abc"
    assert (total["train/forward_samples"], total["train/backward_samples"]) == (31, 13)
    assert (total["comm/claimed_bytes_up"], total["comm/claimed_bytes_down"]) == (1105, 82)
    assert total["comm/bytes_up"] == sum(row["comm/bytes_up"] for row in rows)


def test_without_a_claim_none_is_logged() -> None:
    folder: Any = Folder()
    row = log_round(folder, EXPERIMENT, tally_of([reply(11, counted([1, 1], None))])[0], None, None, {}, NO_WATCH, 0.0)
    assert "comm/claimed_bytes_up" not in row
    assert "comm/claimed_bytes_up" not in summary(folder, EXPERIMENT, "0123abc")
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
