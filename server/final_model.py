"""The model that a finished run on this machine ended with."""

from __future__ import annotations

from pathlib import Path

from fedlabel.config import parse_config
from fedlabel.errors import RunError, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.methods.batch import Model
from fedlabel.record.names import CHECKPOINTS, CONFIG_YAML
from server.checkpoint import latest_checkpoint
from server.strategy import build_strategy


def final_model(path: Path) -> tuple[Experiment, Model]:
    """Returns the experiment of a run and its last global model, images -> logits, as the method evaluates it.

    Args:
        path: the run's folder.

    Raises:
        ValueError: there is no such run, or its checkpoint is damaged.
        RunError: the run is not finished.
    """
    with naming(path / CONFIG_YAML):
        config = parse_config((path / CONFIG_YAML).read_text())
    experiment = open_experiment((path / CONFIG_YAML).read_text())
    state = latest_checkpoint(path / CHECKPOINTS, experiment, build_strategy(config.strategy))
    state = state.to(experiment.device)
    if state.round_number < config.num_rounds:
        raise RunError(f"{path} has done {state.round_number} of {config.num_rounds} rounds: resume it first.")
    model = experiment.predictor(state.round_number, state.models, state.shared)
    assert model is not None, "the last stage of every method has a model"
    return experiment, model
