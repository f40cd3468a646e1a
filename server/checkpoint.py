"""Checkpoints: one file per saved round, written atomically, with a digest that detects damage."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy

from fedlabel.config import ExperimentConfig, flatten, keys_without_effect, parse_config, to_yaml
from fedlabel.config_text import parse_yaml
from fedlabel.errors import naming
from fedlabel.experiment import Experiment
from fedlabel.record.files import write_atomic
from fedlabel.record.names import CONFIG_YAML
from server.checkpoint_schema import complaints
from server.state import ServerState

FORMAT = 3
"""Of the files; it goes up when what is written cannot be read by versions before, or the other way round."""
MAGIC = f"fedlabel-checkpoint-{FORMAT}\n".encode()


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another experiment."""


def save_checkpoint(folder: Path, checkpoint: ServerState, keep: int) -> Path:
    """Writes `round_NNNNNN.ckpt` into `folder` and removes all but the `keep` newest."""
    buffer = io.BytesIO()
    torch.save(_encode(vars(checkpoint.to(torch.device("cpu")))), buffer)
    payload = buffer.getbuffer()  # no copy: models of all clients may be in it
    path = folder / file_name(checkpoint.round_number)
    write_atomic(path, MAGIC + hashlib.sha256(payload).digest(), payload)
    with naming(folder):
        for old in _newest_first(folder)[keep:]:
            old.unlink()
    return path


def load_checkpoint(path: Path) -> ServerState:
    """Reads one checkpoint; executes no code from the file.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or another version wrote it.
    """
    with naming(path):
        content = path.read_bytes()
    other = _OTHER_FORMAT.match(content)
    if other is not None:
        raise _NotThisRun(
            f"Checkpoint {path} is of another version of fedlabel (its format is {int(other[1])}, this version's is "
            f"{FORMAT}): resume with the version that wrote it, or start a new run under another --name."
        )
    digest, payload = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"Checkpoint {path} is damaged ({len(content)} bytes, its digest does not match).")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of files that others wrote
            found = _decode(torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True))
    except Exception as error:  # torch's reader has many ways to fail, and its words are for those who wrote the file
        raise CheckpointError(f"Checkpoint {path} is damaged (its digest matches, but it cannot be read).") from error
    names = {each.name for each in fields(ServerState)}
    if not isinstance(found, dict) or found.keys() != names:
        raise CheckpointError(f"Checkpoint {path} is damaged (it does not hold what a checkpoint holds).")
    checkpoint = ServerState(**found)
    number = checkpoint.round_number
    if type(number) is not int or path.name != file_name(number) or type(checkpoint.config) is not str:
        raise CheckpointError(f"Checkpoint {path} is damaged (it is not of the round that its name says).")
    return checkpoint


def file_name(round_number: int) -> str:
    """Returns the name of a round's checkpoint."""
    return f"round_{round_number:06d}.ckpt"


def oldest_round(folder: Path) -> int:
    """Returns the earliest round that has a checkpoint; 0 if none has."""
    files = _newest_first(folder)
    return int(files[-1].stem.partition("_")[2]) if files else 0


def newest_checkpoint(folder: Path) -> ServerState | None:
    """Returns the newest checkpoint in `folder`, as it is; None if there is none.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    files = _newest_first(folder)
    return load_checkpoint(files[0]) if files else None


def latest_checkpoint(folder: Path, experiment: Experiment, strategy: Strategy) -> ServerState:
    """Returns the newest checkpoint in `folder`, checked against the state that the resuming run would create.

    A run that was killed before its first checkpoint starts at round 1 again, from the experiment's initial model.

    Args:
        folder: of the checkpoints, in the run's.
        experiment: of the resuming run.
        strategy: a fresh one.

    Raises:
        CheckpointError: there is no run, its newest checkpoint is damaged or of another run, or the configuration
            differs in a key that matters.
    """
    saved, config = folder.parent / CONFIG_YAML, experiment.config
    if not saved.is_file():
        raise CheckpointError(
            f"There is no run in {folder.parent}: nothing to resume. Leave out --resume, or check --name and --out."
        )
    with naming(saved):
        text = saved.read_text(errors="replace")
    wanted = to_yaml(config)
    differing = _differing(text, config, wanted)
    if differing is None:
        raise CheckpointError(f"{saved} is damaged. Put it back as it was, or start a new run under another --name.")
    if differing:
        raise CheckpointError(
            f"{folder.parent} was run with another configuration: {'; '.join(differing)}. Resume with the same keys "
            f"(only {', '.join(_changeable())} may change), or start a new run under another --name."
        )
    refused: list[CheckpointError] = []
    for path in _newest_first(folder):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.round_number > config.num_rounds:
                raise _NotThisRun(
                    f"`num_rounds` (={config.num_rounds}) is below the {checkpoint.round_number} rounds already done "
                    f"in {folder.parent}; raise it."
                )
            if _differing(checkpoint.config, config, wanted) != []:
                raise CheckpointError(f"Checkpoint {path} is of a run of another configuration.")
            complaint = next(complaints(checkpoint, experiment, strategy), None)
            if complaint is not None:
                raise CheckpointError(f"Checkpoint {path} is damaged, or of another run: {complaint}.")
        except _NotThisRun:
            raise
        except CheckpointError as error:
            refused.append(error)
            continue
        if refused:
            raise _with_cure(refused, path)
        return checkpoint
    if refused:
        raise _with_cure(refused, None)
    return ServerState(0, experiment.initial_state, text)


class _NotThisRun(CheckpointError):
    """The checkpoint is sound, but this run cannot go on from it, nor from an older one."""


def _with_cure(refused: list[CheckpointError], older: Path | None) -> CheckpointError:
    """Returns the first error with advice; older: the newest valid checkpoint."""
    them = "it" if len(refused) == 1 else f"it and what lies between ({len(refused) - 1}, no better)"
    if older is None:
        return CheckpointError(
            f"{refused[0]} No older one is sound: delete the files round_*.ckpt there to begin again at round 1, or "
            "start a new run under another --name."
        )
    return CheckpointError(
        f"{refused[0]} Delete {them} to resume from {older.name}, or start a new run under another --name."
    )


def _newest_first(folder: Path) -> list[Path]:
    files = {int(found[1]): path for path in folder.glob("round_*.ckpt") if (found := _NAME.fullmatch(path.name))}
    return [files[number] for number in sorted(files, reverse=True)]


_OTHER_FORMAT = re.compile(rb"fedlabel-checkpoint-(?!%d\n)(\d{1,9})\n" % FORMAT)
_NAME = re.compile(r"round_(\d{6,18})\.ckpt")


def _differing(text: str, config: ExperimentConfig, wanted_text: str) -> list[str] | None:
    """Returns the relevant keys in which a saved configuration differs from `config` (`wanted_text` as YAML); None if
    it cannot be read.
    """
    if text == wanted_text:  # to read it takes much longer
        return []
    try:
        method = parse_yaml(text, "The configuration")["method"]["name"]
        if method != config.method.name:  # before the other method, whatever module it is in, is imported
            return [f"method.name (saved {method}, now {config.method.name})"]
        saved, wanted = flatten(parse_config(text)), flatten(config)
    except (ValueError, TypeError, KeyError):
        return None
    return [
        f"{key} (saved {saved.get(key)}, now {wanted.get(key)})"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) and key not in _changeable()
    ]


def _changeable() -> list[str]:
    """Returns the keys that may differ on resume."""
    return ["num_rounds", *sorted(keys_without_effect())]


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
