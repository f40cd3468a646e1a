"""Tasks that tests ask methods for a recipe for."""

from __future__ import annotations

from typing import Any

from fedlabel.data.labels.label_card import LabelCard
from fedlabel.methods.recipe import Task


def task(num_classes: int = 3, num_rounds: int = 100, **labels: Any) -> Task:
    """Returns a task with samples of every kind of label; labels: further fields of the card."""
    card = LabelCard(100, 50, 10, 10, 10, 10, 2, 10, 0, ())
    return Task(num_classes, num_rounds, card._replace(**labels))
