"""Where a round lies in a recipe, and what a recipe leaves at the default."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedlabel.methods.batch import Model
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import (
    FINE_TUNING,
    BySample,
    LabelKinds,
    Method,
    Phase,
    Recipe,
    Stage,
    Start,
    Update,
    global_model,
)
from tests.methods.recipes import task


def phase(name: str) -> Phase:
    return Phase(name, labels_loss)


def by_round(round_in_stage: int) -> tuple[Phase, ...]:
    return (phase(f"late {round_in_stage}"),)


def recipe(*stages: Stage) -> Recipe:
    return Recipe(stages, uses=LabelKinds.TRUE)


STAGES = recipe(
    Stage((phase("warm-up"),), rounds=2),
    Stage((phase("never"),), rounds=0, start=Start.FRESH),
    Stage((phase("fresh"),), rounds=3, start=Start.FRESH),
    Stage(by_round, start=lambda previous, fresh: previous),
)


def test_place_counts_the_rounds_of_each_stage() -> None:
    """Two rounds, none, three and the rest; round 0, before the first, lies where round 1 does."""
    places = [STAGES.place(number) for number in range(8)]
    assert [place.number for place in places] == [0, 0, 0, 2, 2, 2, 3, 3]
    assert [place.round_in_stage for place in places] == [1, 1, 2, 1, 2, 3, 1, 2]
    assert all(place.stage is STAGES.stages[place.number] for place in places)


def test_phases_are_those_of_the_stage_or_of_the_round_in_it() -> None:
    names = [[one.name for one in STAGES.phases(number)] for number in (1, 2, 3, 5, 6, 7)]
    assert names == [["warm-up"], ["warm-up"], ["fresh"], ["fresh"], ["late 1"], ["late 2"]]


def test_stages_with_weights_of_their_own_begin_once_but_for_the_first() -> None:
    assert [number for number in range(1, 10) if STAGES.begins(number)] == [3, 6]
    fresh, goes_on = Stage((), rounds=1, start=Start.FRESH), Stage(())
    assert not any(recipe(fresh, goes_on).begins(number) for number in range(1, 4))


def test_a_last_stage_has_no_end() -> None:
    assert recipe(Stage((), rounds=1), Stage((), rounds=1)).place(50).round_in_stage == 49


def test_a_recipe_needs_a_stage() -> None:
    with pytest.raises(ValueError, match="`stages` is empty"):
        recipe().place(1)


def test_updates_are_the_loss_and_what_follows_it() -> None:
    def head(names: object) -> list[str]:
        return []

    then = Update(labels_loss)
    one = Phase("train", labels_loss, trains=head, then=(then,))
    assert one.updates == (Update(labels_loss, head), then)


def test_by_default_labels_are_drawn_and_the_global_model_is_evaluated() -> None:
    assert phase("train").draw == BySample(labeled=("weak",), unlabeled=(), mix=())
    assert recipe().server_phases == (FINE_TUNING,)
    models: Mapping[str, Model] = {"model": lambda x: x, "average": lambda x: x}
    assert global_model(models, {}) is models["model"]
    shared: dict[str, Tensor] = {"x": torch.ones(())}
    assert recipe().inspect(shared) == {}
    memory = recipe().memory
    assert memory.start(torch.ones(2, 3)) == memory.keep(shared, ()) == memory.models({}, shared) == {}
    assert memory.like(shared, {}) is shared


def test_a_method_must_give_a_recipe() -> None:
    with pytest.raises(NotImplementedError, match="Method must define `recipe`"):
        Method().recipe(task())
