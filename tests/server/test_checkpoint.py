"""Checkpoints: what goes in comes out, damage and other experiments are named, old files go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.config import ExperimentConfig, load_config, to_yaml
from server.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint


def checkpoint(round_number: int = 3, config: ExperimentConfig | None = None) -> Checkpoint:
    return Checkpoint(
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
    assert loaded.client_states == saved.client_states
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
    loaded = load_checkpoint(save_checkpoint(tmp_path, Checkpoint(1, {}, ""), keep=1))
    assert (loaded.strategy, loaded.client_states, loaded.shared, loaded.helpers) == ({}, {}, {}, {})


def test_the_newest_are_kept_and_nothing_else_lies_there(tmp_path: Path) -> None:
    for round_number in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path, checkpoint(round_number), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round_000009.ckpt",
        "round_000010.ckpt",
        "round_000011.ckpt",
    ]
    assert latest_checkpoint(tmp_path, load_config(), {}).round_number == 11


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=1)

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.ckpt"]
    assert latest_checkpoint(tmp_path, load_config(), {}).round_number == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other file"])
def test_damaged_file_is_named_with_the_fix(damage: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=1)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-1], "bit": bytes(flipped), "empty": b"", "other file": b"PK\x03\x04"}[damage])
    with pytest.raises(CheckpointError, match=rf"{path} is damaged \(\d+ bytes.*Delete it"):
        latest_checkpoint(tmp_path, load_config(), {})


def test_damaged_newest_can_be_deleted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    newest = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    newest.write_bytes(b"")
    newest.unlink()
    assert latest_checkpoint(tmp_path, load_config(), {}).round_number == 1


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no run in .*nothing to resume.*--name"):
        latest_checkpoint(tmp_path, load_config(), {})


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), keep=1)
    changed = load_config([], ["training.lr=0.5", "method.lambda_0=0.25", "grid.kind=ray", "num_rounds=90"])
    with pytest.raises(CheckpointError, match="was run with another configuration") as caught:
        latest_checkpoint(tmp_path, changed, {})
    message = str(caught.value)
    default = load_config()
    assert f"training.lr (saved {default.training.lr}, now 0.5)" in message
    assert f"method.lambda_0 (saved {default.method.lambda_0}, now 0.25)" in message
    assert "(saved 40, now 90)" not in message
    assert "(saved in_process, now ray)" not in message


def test_another_method_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), keep=1)
    with pytest.raises(CheckpointError, match=r"method.name \(saved fedlabel, now supervised\)"):
        latest_checkpoint(tmp_path, load_config([], ["method.name=supervised"]), {})


def test_what_does_not_change_a_round_may_change(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    changed = ["num_rounds=100", "grid.kind=ray", "grid.num_workers=7", "checkpoint.every=5", "data.root=elsewhere"]
    assert latest_checkpoint(tmp_path, load_config([], [*changed, "grid.num_workers=3"]), {}).round_number == 3


def test_fewer_rounds_than_done_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    with pytest.raises(CheckpointError, match=r"`num_rounds` \(=2\) is below the 3 rounds already done"):
        latest_checkpoint(tmp_path, load_config([], ["num_rounds=2"]), {})
