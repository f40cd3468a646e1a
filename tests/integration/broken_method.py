"""A method whose clients all raise from round 2 on; named on the command line as `tests....:BrokenFromRound2`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlabel.methods.base import Method, Phase
from fedlabel.methods.steps import Batch, Model, Step, cross_entropy_on_labels


@dataclass(frozen=True)
class BrokenFromRound2(Method):
    name: str = "tests.integration.broken_method:BrokenFromRound2"

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        if round_number > 1:
            raise ArithmeticError("broken from round 2 on")
        return (Phase("train", self.loss, labeled=("weak",)),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        return cross_entropy_on_labels(student, batch.labeled)
