"""Checkpoints: one file per saved round, written atomically, with a digest that tells a damaged file."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlabel.config import ExperimentConfig, flatten, parse_config
from fedlabel.tracking import write_atomic

MAGIC = b"fedlabel-checkpoint-1\n"
CHANGEABLE = (
    "num_rounds",
    "grid.kind",
    "grid.num_workers",
    "grid.timeout",
    "grid.connect_timeout",
    "strategy.min_replies",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.figures",
    "evaluation.panel_samples",
    "data.root",
    "data.download",
)
"""Keys that may differ on resume: they do not change what a round computes."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another experiment."""


@dataclass
class Checkpoint:
    """All that a round depends on beside the configuration."""

    round_number: int
    """The last completed round."""
    model: dict[str, Tensor]
    """Global weights."""
    config: str
    """Resolved configuration, YAML."""
    strategy: dict[str, Any] = field(default_factory=dict)
    """See `strategy.strategy_state`."""
    client_states: dict[int, bytes] = field(default_factory=dict)
    """Client -> what it keeps between rounds, serialised; only non-empty ones, only where this process keeps them."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """See `Method.initial_shared`."""
    helpers: dict[str, Any] = field(default_factory=dict)
    """See `HelperPool.dump`."""
    previous: dict[str, Tensor] = field(default_factory=dict)
    """What the model was at the end of the stage before (see `Method.starts_stage`); empty in the first."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """See `Method.averaging`."""
    votes: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """See `FunctionWatch.dump`."""
    selected: dict[str, Tensor] = field(default_factory=dict)
    """The stage's best weights so far (see `evaluation.select`); empty where nothing was scored."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `round_NNNNNN.ckpt` into `folder` and removes all but the `keep` newest."""
    buffer = io.BytesIO()
    torch.save(_encode(vars(checkpoint)), buffer)
    payload = buffer.getbuffer()  # no copy: models of all clients may be in it
    path = folder / f"round_{checkpoint.round_number:06d}.ckpt"
    write_atomic(path, MAGIC + hashlib.sha256(payload).digest(), payload)
    for old in sorted(folder.glob("round_*.ckpt"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint.

    Raises:
        CheckpointError: the file is not a checkpoint, or is damaged.
    """
    content = path.read_bytes()
    digest, payload = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(
            f"Checkpoint {path} is damaged ({len(content)} bytes, its digest does not match). Delete it to resume from "
            "the checkpoint before it, or start again under another --name."
        )
    return Checkpoint(**_decode(torch.load(io.BytesIO(payload), weights_only=True)))


def latest_checkpoint(folder: Path, config: ExperimentConfig, initial_model: dict[str, Tensor]) -> Checkpoint:
    """Returns the newest checkpoint in `folder`, checked against the configuration of the resuming run.

    A run that was killed before its first checkpoint starts at round 1 again, from `initial_model`.

    Raises:
        CheckpointError: there is no run, its newest checkpoint is damaged, or the configuration differs in a key that
            matters.
    """
    files = sorted(folder.glob("round_*.ckpt"))
    saved_config = folder.parent / "config.yaml"
    if files:
        checkpoint = load_checkpoint(files[-1])
    elif saved_config.is_file():
        checkpoint = Checkpoint(0, initial_model, saved_config.read_text())
    else:
        raise CheckpointError(
            f"There is no run in {folder.parent}: nothing to resume. Leave out --resume, or check --name and --out."
        )
    saved, wanted = flatten(parse_config(checkpoint.config)), flatten(config)
    differing = [
        f"{key} (saved {saved.get(key)}, now {wanted.get(key)})"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) and key not in CHANGEABLE
    ]
    if differing:
        raise CheckpointError(
            f"{folder.parent} was run with another configuration: {'; '.join(differing)}. Resume with the same keys "
            f"(only {', '.join(CHANGEABLE)} may change), or start a new run under another --name."
        )
    if config.num_rounds < checkpoint.round_number:
        raise CheckpointError(
            f"`num_rounds` (={config.num_rounds}) is below the {checkpoint.round_number} rounds already done in "
            f"{folder.parent}; raise it."
        )
    return checkpoint


def _encode(value: Any) -> Any:
    """Replaces numpy arrays by tensors, so that the file loads without unpickling code."""
    if isinstance(value, np.ndarray):
        return {"ndarray": torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"ndarray"}:
            return value["ndarray"].numpy()
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
