"""Observers of a completed round: they report metrics, figures and texts, and do not affect training.

Those of `TRUTH` compare with the hidden labels of the clients' samples: they exist only in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedlabel.experiment import Experiment
from server.observers.base import Observer, Report, Round
from server.observers.evaluation import EvaluationObserver
from server.observers.functions import FunctionObserver
from server.observers.noise import NoiseErrorObserver, NoiseObserver
from server.observers.panel import PanelObserver
from server.observers.privacy import PrivacyObserver
from server.observers.projector import ProjectorObserver
from server.observers.pseudo_labels import PseudoLabelObserver
from server.observers.training import SystemObserver, TrainingObserver

__all__ = ["EVERYWHERE", "TRUTH", "Observer", "Report", "Round", "observers_of"]

EVERYWHERE: dict[str, Callable[[Experiment], Observer]] = {
    "training": TrainingObserver,
    "noise": NoiseObserver,
    "functions": FunctionObserver,
    "evaluation": EvaluationObserver,
}
"""In every run."""
TRUTH: dict[str, Callable[[Experiment], Observer]] = {
    "pseudo_labels": PseudoLabelObserver,
    "noise": NoiseErrorObserver,
    "panel": PanelObserver,
    "projector": ProjectorObserver,
}
"""In a simulation only: they compute with hidden labels. One of a name above takes its place."""


def observers_of(experiment: Experiment, remembered: Mapping[str, Any], simulated: bool) -> dict[str, Observer]:
    """Returns a run's observers by name; remembered: the results of `Observer.dump` in a checkpoint."""
    made = {name: make(experiment) for name, make in {**EVERYWHERE, **(TRUTH if simulated else {})}.items()}
    if experiment.config.privacy.is_on:
        made["privacy"] = PrivacyObserver(experiment, simulated)
    for name, kept in remembered.items():
        if name in made:
            made[name].load(kept)
    return {**made, "system": SystemObserver(experiment)}  # last: it says how long the round took
