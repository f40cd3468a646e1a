"""How clients train: what is refused."""

from __future__ import annotations

import pytest

from fedlabel.learning.training_config import TrainingConfig


def test_training_config_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"`training.lr` \(=0\) must be a positive number"):
        TrainingConfig(lr=0)
    with pytest.raises(ValueError, match="exactly one must be set"):
        TrainingConfig(local_steps=5, local_epochs=1)
    with pytest.raises(ValueError, match="exactly one must be set"):
        TrainingConfig(local_steps=None)
    for fields, message in (
        ({"batch_size": 0}, r"`training.batch_size` \(=0\) must be at least 1"),
        ({"unlabeled_ratio": 0}, r"`training.unlabeled_ratio` \(=0\) must be at least 1"),
        ({"server_batch_size": 0}, r"`training.server_batch_size` \(=0\) must be at least 1"),
        ({"local_steps": -1}, r"`training.local_steps` \(=-1\) must be at least 0"),
        ({"server_steps": -1}, r"`training.server_steps` \(=-1\) must be at least 0"),
        ({"momentum": 1.0}, r"`training.momentum` \(=1.0\) must lie in \[0, 1\)"),
        ({"nesterov": True}, r"`training.nesterov` \(=True\) needs `training.momentum` \(=0\) above 0"),
        ({"optimizer": "adam"}, r"`training.optimizer` \(=adam\) must be one of sgd, adamw"),
        (
            {"optimizer": "adamw", "momentum": 0.9},
            r"`training.momentum` \(=0.9\) must be 0 .* training.optimizer=adamw",
        ),
        ({"optimizer": "adamw", "nesterov": True}, r"`training.nesterov` \(=True\) false for training.optimizer=adamw"),
        ({"weight_decay": -0.1}, r"`training.weight_decay` \(=-0.1\) must be a finite number of at least 0"),
        ({"prox_mu": float("inf")}, r"`training.prox_mu` \(=inf\) must be a finite number of at least 0"),
        ({"max_grad_norm": 0.0}, r"`training.max_grad_norm` \(=0.0\) must be a positive number"),
        ({"weight_by": "loss"}, r"`training.weight_by` \(=loss\) must be one of processed, size, uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**fields)
