"""The server's state: how it goes on from round to round, and what is kept out of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fedlabel.config import load_config
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State
from fedlabel.methods.recipe import LabelKinds, Recipe, Stage
from fedlabel.methods.shared import Shared
from server.state import ServerState, check_model, check_shared, moving_average


def of(value: float, count: int = 1) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value, 2 * value], dtype=torch.float32), "n": torch.tensor(count)}


AVERAGING = Recipe((Stage((), rounds=3), Stage((), averaging=0.75)), LabelKinds.TRUE)
"""From round 4 on."""


def test_a_round_moves_model_and_shared_state_and_nothing_else() -> None:
    state = ServerState(1, of(1), "text", {"eta": 0.1}, {0: b"kept"}, {"s": torch.tensor(1.0)}, previous=of(7))
    model, shared = of(3), {"s": torch.tensor(2.0)}
    after = state.next(model, shared, AVERAGING, moved=True)  # its stage has no average
    assert after == replace(state, round_number=2, model=model, shared=shared)
    assert state.round_number == 1


def test_the_average_of_the_stage_goes_on_where_clients_moved_the_model() -> None:
    """Decay .75: 4, then .75 * 4 + .25 * 8 = 5, then it stays, then .75 * 5 + .25 * 9 = 6."""
    state = ServerState(3, of(0), "")
    seen = []
    for model, moved in ((of(4, 1), True), (of(8, 2), True), (of(100, 3), False), (of(9, 4), True)):
        state = state.next(model, {}, AVERAGING, moved)
        seen.append({name: value.tolist() for name, value in state.average.items()})
    assert seen == [
        {"w": [4, 8], "n": 1},
        {"w": [5, 10], "n": 2},  # what counts is taken as it is
        {"w": [5, 10], "n": 2},
        {"w": [6, 12], "n": 4},
    ]
    assert ServerState(3, of(0), "").next(of(4), {}, AVERAGING, moved=False).average == {}


def test_a_stage_that_continues_and_averages_goes_on_with_the_average_of_the_stage_before() -> None:
    """Two stages in place of one change nothing; with another decay, .5, its first round makes .5 * 5 + .5 * 9 = 7."""
    for second, expected in ((0.75, 6.0), (0.5, 7.0)):
        recipe = Recipe((Stage((), rounds=2, averaging=0.75), Stage((), averaging=second)), LabelKinds.TRUE)
        state = ServerState(0, of(0), "")
        for model in (of(4), of(8), of(9)):
            state = state.next(model, {}, recipe, moved=True)
        assert float(state.average["w"][0]) == expected


@pytest.mark.parametrize("moved", [True, False])
def test_the_average_ends_with_its_stage_where_the_next_one_has_none(moved: bool) -> None:
    """Else a stage without average would be evaluated with one of weights from long ago, and hand it on."""
    recipe = Recipe((Stage((), rounds=1, averaging=0.75), Stage(())), LabelKinds.TRUE)
    averaged = ServerState(0, of(0), "").next(of(4), {}, recipe, moved=True)
    assert list(averaged.models) == ["model", "average"]
    assert list(averaged.next(of(8), {}, recipe, moved).models) == ["model"]


def test_a_moving_average_with_decay_0_is_none() -> None:
    assert moving_average(of(1), of(2), 0.0) == {}
    alone = moving_average({}, of(2), 0.9)
    assert all(torch.equal(alone[name], value) for name, value in of(2).items())


def test_models_are_those_that_there_are() -> None:
    assert list(ServerState(1, of(1), "").models) == ["model"]
    full = ServerState(1, of(1), "", previous=of(2), average=of(3))
    assert {name: float(state["w"][0]) for name, state in full.models.items()} == {
        "model": 1,
        "average": 3,
        "previous": 2,
    }


def test_all_tensors_go_to_a_device() -> None:
    state = ServerState(
        *(2, of(1), "text", {"eta": 0.1}, {0: b"kept"}, {"s": torch.ones(2)}),
        **{name: of(2) for name in ("previous", "average", "selected")},
        observers={"functions": {}},
    )
    moved, names = state.to(torch.device("meta")), ("model", "shared", "previous", "average", "selected")
    for name in names:
        assert getattr(moved, name).keys() == getattr(state, name).keys()
        assert {value.device.type for value in getattr(moved, name).values()} == {"meta"}
        assert {value.device.type for value in getattr(state, name).values()} == {"cpu"}
    assert replace(moved, **{name: getattr(state, name) for name in names}) == state


def test_a_model_that_gives_no_numbers_is_not_gone_on_from() -> None:
    small = ["num_clients=2", "data.train_samples=50", "model.name=cnn", "model.norm=batch", "device=cpu"]
    experiment = Experiment(load_config([], [*small, "method.name=supervised", "supervision.kind=full"]))
    model = {name: value.clone() for name, value in experiment.initial_state.items()}
    variances = experiment.running.variances
    check_model(model, variances, "Strategy X made", 3, "step")
    variance = min(variances)
    for value, reason in ((-1e-9, rf"a negative variance \({re.escape(variance)}\)"), (torch.nan, "NaN or infinity")):
        model[variance][0] = value
        with pytest.raises(RunError, match=f"Strategy X made a model with {reason} in round 3; the last checkpoint"):
            check_model(model, variances, "Strategy X made", 3, "step")


class Positive(Shared):
    def start(self) -> State:
        return {"s": torch.zeros(2)}

    def check(self, shared: State) -> None:
        if (shared["s"] < 0).any():
            raise ValueError("s is below 0")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "s holds NaN or infinity"), (float("inf"), "s holds NaN"), (-1.0, "s is below")],
)
def test_a_shared_state_that_clients_cannot_work_with_is_not_gone_on_from(value: float, reason: str) -> None:
    recipe = Recipe((Stage(()),), LabelKinds.TRUE, shared=Positive())
    check_shared("m", recipe, {"s": torch.tensor([1.0, 0.0])}, 3)
    with pytest.raises(RunError, match=rf"Method m made a shared state .* in round 3: {reason}.* The last checkpoint"):
        check_shared("m", recipe, {"s": torch.tensor([1.0, value])}, 3)


@pytest.mark.parametrize(
    ("shared", "name"),
    [({}, "s"), ({"s": torch.zeros(2), "more": torch.zeros(())}, "more"), ({"s": torch.zeros(3)}, "s")],
)
def test_a_shared_state_of_other_names_or_shapes_could_not_be_resumed(shared: State, name: str) -> None:
    recipe = Recipe((Stage(()),), LabelKinds.TRUE, shared=Positive())
    with pytest.raises(RunError, match=rf"changed the names, types or shapes .* in round 3 \({name}\)"):
        check_shared("m", recipe, shared, 3)
