from types import SimpleNamespace
from typing import Any

import pytest

from fedlabel.methods.recipe import Place, Stage
from server.server_app import _stages


def experiment(rounds: int, *lengths: int | None) -> Any:
    """An experiment whose stages take these numbers of rounds; None: the rest."""
    stages = tuple(Stage((), rounds=length, name="" if length else "rest") for length in lengths)

    def place(number: int) -> Place:
        for index, stage in enumerate(stages):
            if stage.rounds is None or number <= stage.rounds or index == len(stages) - 1:
                return Place(index, stage, number)
            number -= stage.rounds
        raise AssertionError(number)

    return SimpleNamespace(
        config=SimpleNamespace(num_rounds=rounds), recipe=SimpleNamespace(stages=stages, place=place)
    )


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (2, [("stage 1", 1, 2)]),
        (3, [("stage 1", 1, 3)]),
        (4, [("stage 1", 1, 3), ("stage 2", 4, 4)]),
        (10**12, [("stage 1", 1, 3), ("stage 2", 4, 5), ("rest", 6, 10**12)]),  # not round by round
    ],
)
def test_stages_are_listed_with_their_rounds(rounds: int, expected: list[tuple[str, int, int]]) -> None:
    found = _stages(experiment(rounds, 3, 2, None))
    assert [(each["name"], each["first"], each["last"]) for each in found] == expected
