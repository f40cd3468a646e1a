"""What a user reads whose loss asks for what its phase does not have, or returns something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedlabel.learning.client import LocalRound, Trainer, train_clients
from fedlabel.methods.batch import LossFunction
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import BySample, LabelKinds, Phase, Recipe, Stage
from tests.learning.clients import BOTH, CONFIG, TRANSFORM, client
from tests.methods.tables import net

LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "view": (
        lambda student, teachers, batch: student(batch.labeled.views["strong"]),
        r'The loss of phase `train` reads views\["strong"\], and the phase draws the views of labelled samples: weak; '
        r"of unlabelled samples: weak; of samples to mix with: none. Add it there: "
        r"Phase\(..., BySample\(labeled=\('weak', 'strong'\)\)\).",
    ),
    "teacher": (
        lambda student, teachers, batch: teachers["global"](batch.labeled.views["weak"]),
        r"""reads teachers\["global"\], and its teachers are none: add it, Phase\(..., teachers=\('global',\)\).""",
    ),
    "tensor": (
        lambda student, teachers, batch: student(batch.labeled.views["weak"]).sum(),
        "The loss of phase `train` returned Tensor; it must return a fedlabel.methods.batch.Step",
    ),
}


def take_steps(loss: LossFunction, clients: int, draw: BySample = BOTH) -> None:
    recipe = Recipe((Stage((Phase("train", loss, draw),)),), uses=LabelKinds.TRUE)
    rounds = [LocalRound(client()[0], seed, {}, {}) for seed in range(clients)]
    train_clients(recipe, Trainer(net(), net(), TRANSFORM, CONFIG), net().state_dict(), rounds, 1)


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("mistake", LOSSES)
def test_mistakes_of_a_loss_are_said_in_words_of_its_phase(mistake: str, clients: int) -> None:
    loss, message = LOSSES[mistake]
    with pytest.raises(ValueError, match=message):
        take_steps(loss, clients)


def test_other_errors_of_a_loss_stay_as_they_are() -> None:
    def of_another_table(student: object, teachers: object, batch: object) -> Any:
        return {}["rate"]

    with pytest.raises(KeyError, match="rate"):
        take_steps(of_another_table, 1)
    take_steps(labels_loss, 2)
