"""Checkpoints: what goes in comes out, damage and other experiments are named, old files go."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.config import ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.errors import FileError
from fedlabel.experiment import open_experiment
from server.checkpoint import (
    MAGIC,
    CheckpointError,
    _encode,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from server.flower import dump_memory
from server.state import ServerState
from server.strategy import build_strategy, strategy_names
from tests.integration.tiny import run_tiny


def checkpoint(round_number: int = 3, config: ExperimentConfig | None = None) -> ServerState:
    return ServerState(
        round_number,
        {"weight": torch.tensor([[1.5, float("-0.0")]]), "counter": torch.tensor(7)},
        to_yaml(config or load_config()),
        {"eta": 0.1, "m_t": {"list": [np.array([1.0, 2.0], dtype=np.float32), np.array(3.0)]}, "none": None},
        {0: b"\x00state\xff", 12: b"other"},
        {"threshold": torch.tensor(0.125), "class_share": torch.tensor([0.25, 0.75])},
        {
            "models": {3: {"psi.w": np.array([[1.5, -0.0]], dtype=np.float32)}, 11: {"psi.n": np.array(7)}},
            "outputs": {3: {"output": np.array([0.1, 0.9])}},
        },
        observers={"functions": {2: {"function_samples": [3.0, 1.5]}}},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = checkpoint()
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=1))
    assert loaded.round_number == 3
    assert loaded.config == saved.config
    assert list(loaded.model) == ["weight", "counter"]
    for name, value in saved.model.items():
        assert loaded.model[name].dtype == value.dtype
        assert loaded.model[name].numpy().tobytes() == value.numpy().tobytes()
    assert loaded.strategy["eta"] == 0.1
    assert loaded.strategy["none"] is None
    for ours, theirs in zip(loaded.strategy["m_t"]["list"], saved.strategy["m_t"]["list"], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.clients == saved.clients
    assert loaded.observers == saved.observers
    assert list(loaded.shared) == ["threshold", "class_share"]
    assert all(torch.equal(value, saved.shared[name]) for name, value in loaded.shared.items())
    assert list(loaded.helpers) == ["models", "outputs"]
    for what, clients in saved.helpers.items():
        assert list(loaded.helpers[what]) == list(clients)
        for client, arrays in clients.items():
            assert list(loaded.helpers[what][client]) == list(arrays)
            for name, array in arrays.items():
                other = loaded.helpers[what][client][name]
                assert (other.dtype, other.shape, other.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_a_checkpoint_without_memory_loads_without(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, ServerState(1, {}, ""), keep=1))
    assert (loaded.strategy, loaded.clients, loaded.shared, loaded.helpers, loaded.observers) == ({}, {}, {}, {}, {})


def test_the_newest_are_kept_and_nothing_else_lies_there(tmp_path: Path) -> None:
    for round_number in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path, checkpoint(round_number), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round_000009.ckpt",
        "round_000010.ckpt",
        "round_000011.ckpt",
    ]


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=1)

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(FileError, match=r"round_000002.ckpt cannot be written or read: No space left.*make room there"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.ckpt"]
    assert load_checkpoint(tmp_path / "round_000001.ckpt").round_number == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other file"])
def test_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=1)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-1], "bit": bytes(flipped), "empty": b"", "other file": b"PK\x03\x04"}[damage])
    with pytest.raises(CheckpointError, match=rf"^Checkpoint {path} is damaged \(\d+ bytes, its digest does not match"):
        load_checkpoint(path)


def test_a_checkpoint_of_an_older_version_is_refused_as_what_it_is(run: Path) -> None:
    """Not as damaged: to delete it, as is advised then, would throw away a run that its own version can go on with."""
    content = file(run, 3).read_bytes()
    assert content.startswith(b"fedlabel-checkpoint-3\n")
    file(run, 3).write_bytes(content.replace(b"checkpoint-3", b"checkpoint-2", 1))
    said = (
        rf"^Checkpoint {file(run, 3)} is of another version of fedlabel \(its format is 2, this version's is 3\): "
        "resume with the version that wrote it, or start a new run under another --name.$"
    )
    for read in (lambda: load_checkpoint(file(run, 3)), lambda: opened(run)):
        with pytest.raises(CheckpointError, match=said):
            read()


class Touching:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["whole", "inside", "plain pickle"])
def test_nothing_in_a_file_is_run(where: str, tmp_path: Path) -> None:
    path, touching = save_checkpoint(tmp_path, checkpoint(), keep=1), Touching(tmp_path / "touched")
    buffer = io.BytesIO()
    if where == "plain pickle":
        buffer.write(pickle.dumps(touching))
    else:
        torch.save(touching if where == "whole" else {"round_number": 3, "model": touching}, buffer)
    path.write_bytes(MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"is damaged \(its digest matches, but it cannot be read\)\.$"):
        load_checkpoint(path)
    assert not (tmp_path / "touched").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three rounds, with a checkpoint of each."""
    return run_tiny(tmp_path_factory.mktemp("runs"), "x", *SMALL).path


SMALL = ("checkpoint.keep=3", "evaluation.figures=false", "strategy.name=FedAvgM", "strategy.args.server_momentum=0.5")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "x")


def opened(run: Path, *overrides: str) -> ServerState:
    config = load_config([run / "config.yaml"], overrides)
    return latest_checkpoint(run / "checkpoints", open_experiment(to_yaml(config)), build_strategy(config.strategy))


def file(run: Path, round_number: int) -> Path:
    return run / "checkpoints" / f"round_{round_number:06d}.ckpt"


def rewrite(path: Path, **changes: Any) -> None:
    """Changes fields of a checkpoint to anything, signed as it should be."""
    buffer = io.BytesIO()
    torch.save(_encode({**vars(load_checkpoint(path)), **changes}), buffer)
    path.write_bytes(MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def test_the_newest_of_a_run_is_taken(run: Path) -> None:
    assert opened(run).round_number == 3
    file(run, 3).unlink()
    (run / "checkpoints" / "round_x.ckpt").touch()
    assert opened(run).round_number == 2


def test_the_next_older_sound_checkpoint_is_named(run: Path) -> None:
    file(run, 3).write_bytes(b"")
    cure = "Delete it to resume from round_000002.ckpt, or start a new run under another --name."
    with pytest.raises(CheckpointError, match=rf"{file(run, 3)} is damaged .*match\)\. {cure}$"):
        opened(run)
    file(run, 2).write_bytes(file(run, 1).read_bytes())
    cure = r"Delete it and what lies between \(1, no better\) to resume from round_000001.ckpt"
    with pytest.raises(CheckpointError, match=rf"{file(run, 3)} is damaged .*match\)\. {cure}"):
        opened(run)
    file(run, 1).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No older one is sound: delete the files round_\*.ckpt there to begin"):
        opened(run)
    for number in (1, 2, 3):
        file(run, number).unlink()
    assert opened(run).round_number == 0


def test_what_cannot_be_of_this_run_is_refused(run: Path) -> None:
    """One thing after the other in the newest checkpoint; test_fuzzing.py tries many more."""
    sound = load_checkpoint(file(run, 3))
    name, weight = next(iter(sound.model.items()))
    nan = weight.clone()
    nan.view(-1)[0] = float("nan")
    rest = {key: value for key, value in sound.model.items() if key != name}
    momentum = sound.strategy["momentum_vector"]["list"]
    changes = {
        f"`model` has missing or unexpected entries: {name}": {"model": rest},
        f"`model` has {name} of shape .* and float64, not .* and float32": {
            "model": {**sound.model, name: weight.double()}
        },
        f"`model` holds NaN or infinity in {name}": {"model": {**sound.model, name: nan}},
        f"`model` has no plain tensor as {name}": {"model": {**sound.model, name: [1.0]}},
        "`previous` does not fit the stage of round 3": {"previous": sound.model},
        "`shared` has missing or unexpected entries: threshold": {"shared": {"threshold": torch.tensor(0.5)}},
        r"`strategy`: server_learning_rate \(=2.0\) is not what the configuration says": {
            "strategy": {**sound.strategy, "server_learning_rate": 2.0}
        },
        "`strategy` has missing or unexpected entries: momentum_vector": {
            "strategy": {key: value for key, value in sound.strategy.items() if key != "momentum_vector"}
        },
        f"`strategy`: momentum_vector is no list of {len(momentum)} arrays": {
            "strategy": {**sound.strategy, "momentum_vector": {"list": momentum[1:]}}
        },
        "`clients: client 0` cannot be read": {"clients": {0: b"text"}},
        "`clients: client 0` has unexpected entries: x": {"clients": {0: state_of(x=np.zeros(3))}},
        "`clients` names client 5, and there are 5": {"clients": {5: state_of(x=np.zeros(3))}},
        "`helpers` has missing or unexpected entries: models": {"helpers": {"models": {}}},
        "`observers` holds what no observer remembers": {"observers": {"noise": {}}},
        "`votes: client 1` has missing or unexpected entries: function_counts": {"observers": {"functions": {1: {}}}},
    }
    for message, change in changes.items():
        rewrite(file(run, 3), **change)
        with pytest.raises(
            CheckpointError, match=f"round_000003.ckpt is damaged, or of another run: .*{message}"
        ) as caught:
            opened(run)
        assert "\n" not in str(caught.value)
        save_checkpoint(run / "checkpoints", sound, keep=9)
    assert opened(run).round_number == 3


def state_of(**arrays: np.ndarray) -> bytes:
    return dump_memory({name: torch.from_numpy(value) for name, value in arrays.items()})


@pytest.mark.parametrize("name", strategy_names())
def test_what_any_strategy_remembers_is_accepted(name: str, tmp_path: Path) -> None:
    arguments = {"QFedAvg": {"client_learning_rate": 0.03}, "FedTrimmedAvg": {"beta": 0.4}}.get(name, {})
    args = [f"strategy.args.{key}={value}" for key, value in arguments.items()]
    quick = ("evaluation.figures=false", "num_rounds=2", "training.local_steps=1")
    run = run_tiny(tmp_path, "x", *quick, f"strategy.name={name}", *args).path
    assert opened(run).round_number == 2


def test_nothing_to_resume_is_said(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    config = parse_config(text)
    with pytest.raises(CheckpointError, match="There is no run in .*nothing to resume.*--name"):
        latest_checkpoint(run / "checkpoints", open_experiment(text), build_strategy(config.strategy))


def test_another_configuration_is_refused_with_the_keys_that_differ(run: Path) -> None:
    changed = ["training.lr=0.5", "method.lambda_0=0.25", "grid.kind=ray", "num_rounds=90"]
    with pytest.raises(CheckpointError, match="was run with another configuration") as caught:
        opened(run, *changed)
    message = str(caught.value)
    default = load_config()
    assert f"training.lr (saved {default.training.lr}, now 0.5)" in message
    assert f"method.lambda_0 (saved {default.method.lambda_0}, now 0.25)" in message
    assert "now 90" not in message
    assert "now ray" not in message


def test_a_checkpoint_of_another_run_is_told_from_another_configuration(run: Path) -> None:
    config = load_config([run / "config.yaml"], ["training.lr=0.5"])
    rewrite(file(run, 3), config=to_yaml(config))
    with pytest.raises(
        CheckpointError, match=r"round_000003.ckpt is of a run of another configuration\. Delete it to res"
    ):
        opened(run)


def test_the_method_of_a_foreign_checkpoint_is_not_imported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another method's module is code that the file would choose."""
    text = load_checkpoint(file(run, 3)).config.replace("name: fedlabel", "name: no_such_module:Method")
    rewrite(file(run, 3), config=text)
    monkeypatch.setattr("fedlabel.importing.importlib.import_module", lambda name: pytest.fail(f"imports {name}"))
    with pytest.raises(CheckpointError, match="is of a run of another configuration"):
        opened(run)


def test_what_does_not_change_a_round_may_change(run: Path) -> None:
    changed = ["num_rounds=100", "grid.kind=ray", "grid.num_workers=7", "checkpoint.every=5", "data.root=elsewhere"]
    assert opened(run, *changed).round_number == 3


def test_fewer_rounds_than_done_are_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`num_rounds` \(=2\) is below the 3 rounds already done"):
        opened(run, "num_rounds=2")
