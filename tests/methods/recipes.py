"""Tasks that tests ask methods for a recipe for, and networks that the recipes train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedlabel.data.labels.label_card import LabelCard
from fedlabel.methods import METHODS
from fedlabel.methods.recipe import Method, Recipe, Task
from fedlabel.models.nets import Mlp


def task(num_classes: int = 3, num_rounds: int = 100, **labels: Any) -> Task:
    """Returns a task with samples of every kind of label; labels: further fields of the card."""
    card = LabelCard(100, 50, 10, 10, 10, 10, 2, 10, 0, ())
    return Task(num_classes, num_rounds, card._replace(**labels))


# Of every entry of METHODS.

LATE = 1000
"""A round in the last stage of every method."""


def classes_of(name: str) -> int:
    """Returns for how many classes a method is tried: four, of a method for two classes two."""
    return 2 if name == "top_count" else 4


def make(name: str) -> Method:
    """Returns the method with defaults, and a threshold low enough that untrained teachers pass it."""
    fields = METHODS[name].__dataclass_fields__
    return METHODS[name](**({"confidence_threshold": 0.0} if "confidence_threshold" in fields else {}))


def recipe_of(name: str) -> Recipe:
    """Returns the recipe of `make` for `classes_of` classes."""
    return make(name).recipe(task(classes_of(name)))


def make_student(name: str, seed: int = 0) -> nn.Module:
    """Returns the network that a method trains, of a small one for images (1, 6, 6)."""
    network, classes = recipe_of(name).network, classes_of(name)

    def build(place: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(100 * place + seed)
            if network.embeds:
                return Mlp((1, 6, 6), classes, (8,))
            return nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
            )

    return network.wrap(build, seed)
