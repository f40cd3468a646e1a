"""The rounds of a run: which step follows which, and what goes from one to the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlabel.methods.recipe import LabelKinds, Recipe, Stage
from server.rounds import run_rounds
from server.state import ServerState


class Steps:
    """A server whose steps count up one number: the model's, and in tens the shared state's."""

    def __init__(self, num_rounds: int, silent: tuple[int, ...] = ()) -> None:
        self.config = SimpleNamespace(num_rounds=num_rounds)
        self.recipe = Recipe((Stage((), averaging=0.5),), LabelKinds.TRUE)
        self.silent = silent
        """Rounds in which no reply has a weight."""
        self.done: list[tuple[Any, ...]] = []

    def begin_stage(self, state: ServerState, number: int) -> ServerState:
        self.done.append(("begin_stage", number, state.round_number))
        return state

    def invite(self, state: ServerState, number: int) -> tuple[list[int], Any]:
        self.done.append(("invite", number, value(state.model)))
        return [3, 5], number

    def collect(self, cohort: list[int], invitation: Any, state: ServerState) -> tuple[str, Any]:
        number = invitation
        self.done.append(("collect", number, cohort))
        return f"tally {number}", None if number in self.silent else weights(value(state.model) + 1)

    def fine_tune(self, model: Any, number: int) -> Any:
        self.done.append(("fine_tune", number, value(model)))
        return weights(value(model) + 0.25)

    def update_shared(self, shared: Any, tally: str, number: int) -> Any:
        self.done.append(("update_shared", number, tally, dict(shared)))
        return {"s": number}

    def observe(self, state: ServerState, tally: str, started: float) -> dict[str, float]:
        assert started > 0
        self.done.append(("observe", state.round_number, tally, value(state.model), dict(state.shared)))
        return {"accuracy": float(state.round_number)}

    def save(self, state: ServerState, metrics: dict[str, float]) -> None:
        self.done.append(("save", state.round_number, value(state.model), metrics))


def weights(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(number)}


def value(model: dict[str, torch.Tensor]) -> float:
    return float(model["w"])


def test_steps_of_a_round_in_their_order() -> None:
    """0 -> aggregated 1 -> fine-tuned 1.25, which is what is observed and saved; then the same from there."""
    server: Any = Steps(2)
    last = run_rounds(server, ServerState(0, weights(0), ""))
    assert server.done == [
        ("begin_stage", 1, 0),
        ("invite", 1, 0),
        ("collect", 1, [3, 5]),
        ("fine_tune", 1, 1),
        ("update_shared", 1, "tally 1", {}),
        ("observe", 1, "tally 1", 1.25, {"s": 1}),
        ("save", 1, 1.25, {"accuracy": 1.0}),
        ("begin_stage", 2, 1),
        ("invite", 2, 1.25),
        ("collect", 2, [3, 5]),
        ("fine_tune", 2, 2.25),
        ("update_shared", 2, "tally 2", {"s": 1}),
        ("observe", 2, "tally 2", 2.5, {"s": 2}),
        ("save", 2, 2.5, {"accuracy": 2.0}),
    ]
    assert (last.round_number, value(last.model), value(last.average)) == (2, 2.5, (1.25 + 2.5) / 2)


def test_a_round_that_nobody_moved_keeps_the_model_for_the_servers_own_training() -> None:
    server: Any = Steps(2, silent=(2,))
    last = run_rounds(server, ServerState(0, weights(0), ""))
    assert ("fine_tune", 2, 1.25) in server.done
    assert (value(last.model), value(last.average)) == (1.5, 1.25)  # no client moved it: the average stays


@pytest.mark.parametrize(("done", "numbers"), [(0, [1, 2, 3]), (2, [3]), (3, [])])
def test_only_the_rounds_that_are_left_are_run(done: int, numbers: list[int]) -> None:
    server: Any = Steps(3)
    start = ServerState(done, weights(0), "")
    last = run_rounds(server, start)
    assert [step[1] for step in server.done if step[0] == "save"] == numbers
    assert last.round_number == 3
    assert (last is start) == (not numbers)
