"""Runs small enough for tests, and what of them must not change between two ways to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedlabel
from fedlabel.record.json_files import read_metrics
from server.checkpoint import load_checkpoint
from server.simulation import RunResult

TINY = (
    "num_clients=5",
    "num_rounds=3",
    "fraction_train=0.6",
    "partition.kind=iid",
    "supervision.label_rate=0.3",
    "model.name=mlp",
    "training.local_steps=3",
    "training.batch_size=8",
    "method.confidence_threshold=0.1",  # so that both experts are used from the first round on
    "evaluation.panel_samples=0",
    "device=cpu",
)
"""Overrides of a run that takes a second or two."""


def run_tiny(out: Path, name: str, *overrides: str, resume: bool = False) -> RunResult:
    """Runs `TINY`, changed by `overrides`, in this process (and Ray's workers)."""
    return fedlabel.run(overrides=[*TINY, *overrides], name=name, out=out, resume=resume)


def comparable_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns all metrics of a run folder that may not depend on speed."""
    return [{key: value for key, value in row.items() if not key.startswith("system/")} for row in read_metrics(path)]


def final_weights(path: Path) -> dict[str, Tensor]:
    """Returns the global weights after the last round."""
    return load_checkpoint(sorted((path / "checkpoints").glob("round_*.ckpt"))[-1]).model


def assert_same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Bit by bit."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_run(first: Path, second: Path) -> None:
    """All metrics but timings equal, final weights bit by bit."""
    assert comparable_metrics(first) == comparable_metrics(second)
    assert_same_weights(final_weights(first), final_weights(second))
