"""The summary of a run, from the rows of its rounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from server.summary import OF_THE_PROCESS, summary

EXPERIMENT: Any = SimpleNamespace(
    devices=None,
    config=SimpleNamespace(
        seed=5,
        privacy=SimpleNamespace(is_on=False),
        method=SimpleNamespace(name="m", metrics=()),
        data=SimpleNamespace(name="d"),
        evaluation=SimpleNamespace(split="test", select=None),
    ),
    device=torch.device("cpu"),
)


def row(number: int, forward: float, backward: float, **others: float) -> dict[str, float]:
    return {"round": number, "train/forward_samples": forward, "train/backward_samples": backward, **others}


def test_what_rounds_cost_is_added_up() -> None:
    claims = [{"comm/claimed_bytes_up": up, "comm/claimed_bytes_down": down} for up, down in ((1100, 77), (5, 5))]
    rows = [
        row(1, 30, 12, **claims[0], **{"comm/bytes_up": 300, "system/failed_clients": 1, "system/round_seconds": 0.5}),
        row(2, 1, 1, **claims[1], **{"comm/bytes_up": 100, "system/failed_clients": 2, "system/round_seconds": 0.25}),
    ]
    total = summary(rows, EXPERIMENT, "0123abc")
    assert total["commit"] == "0123abc"
    assert (total["train/forward_samples"], total["train/backward_samples"]) == (31, 13)
    assert (total["comm/claimed_bytes_up"], total["comm/claimed_bytes_down"]) == (1105, 82)
    assert (total["comm/bytes_up"], total["system/failed_clients"], total["seconds"]) == (400, 3, 0.75)
    assert (total["rounds"], total["seed"], total["method"], total["dataset"]) == (2, 5, "m", "d")


def test_without_a_claim_there_is_none() -> None:
    total = summary([row(1, 1, 1)], EXPERIMENT, "0123abc")
    assert not {"comm/claimed_bytes_up", "comm/claimed_bytes_down"} & set(total)


def test_what_is_left_is_the_same_for_another_process() -> None:
    rows = [row(1, 1, 1)]
    first, second = summary(rows, EXPERIMENT, "0123abc"), summary(rows, EXPERIMENT, "other")
    assert {key for key in first if first[key] != second[key]} == {"commit"} <= set(OF_THE_PROCESS)
    assert set(OF_THE_PROCESS) <= set(first)
