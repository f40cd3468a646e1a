"""A method whose clients all raise from round 2 on; named on the command line as `tests....:BrokenFromRound2`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task


def broken(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    raise ArithmeticError("broken from round 2 on")


@dataclass(frozen=True)
class BrokenFromRound2(Method):
    name: str = "tests.integration.broken_method:BrokenFromRound2"

    def recipe(self, task: Task) -> Recipe:
        stages = (Stage((Phase("train", labels_loss),), rounds=1), Stage((Phase("train", broken),)))
        return Recipe(stages, uses=LabelKinds.TRUE)
