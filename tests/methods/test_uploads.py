"""What a client sends of its phases."""

from __future__ import annotations

import pytest
import torch

from fedlabel.methods.uploads import ModelPart, PhaseResult, send_sum, send_unweighted, sum_updates

START = {"w": torch.tensor(1.0), "var": torch.tensor(10.0), "n": torch.tensor(0)}
FIRST = {"w": torch.tensor(2.0), "var": torch.tensor(12.0), "n": torch.tensor(3)}
SECOND = {"w": torch.tensor(4.0), "var": torch.tensor(16.0), "n": torch.tensor(5)}
TRAINED = frozenset({"w"})


def test_sum_updates_averages_buffers_and_keeps_a_lone_state_exact() -> None:
    """w = 1, states 2 and 4 -> 2 + 3 = 5; buffer 10 -> mean of 12 and 16 = 14; counter from the last."""
    assert sum_updates(START, [FIRST, SECOND], TRAINED) == {"w": 5.0, "var": 14.0, "n": 5}
    assert sum_updates(START, [FIRST], TRAINED) == FIRST
    assert sum_updates(START, [], TRAINED) == START


def test_phases_side_by_side_add_up_and_the_weight_is_the_clients() -> None:
    results = [PhaseResult("a", FIRST, 8), PhaseResult("b", SECOND, 4)]
    assert send_sum(START, results, TRAINED, 12.0) == {"model": ModelPart({"w": 5.0, "var": 14.0, "n": 5}, 12.0)}
    assert send_sum(START, [], TRAINED, 0.0) == {"model": ModelPart(START, 0.0)}


def test_a_phase_that_goes_on_from_another_contains_its_update() -> None:
    """a: 1 -> 2; b from a's end: 2 -> 4; c from the start: 1 -> 2. Sum: 1 + 3 + 1 = 5."""
    results = [PhaseResult("a", FIRST, 8), PhaseResult("b", SECOND, 4, start="a"), PhaseResult("c", FIRST, 1)]
    assert send_sum(START, results, TRAINED, 1.0)["model"].state["w"] == 5
    assert send_sum(START, results[:2], TRAINED, 1.0)["model"].state == SECOND


def test_two_phases_that_go_on_from_one_are_refused() -> None:
    results = [PhaseResult("a", FIRST, 8), *(PhaseResult(name, SECOND, 4, start="a") for name in "bc")]
    with pytest.raises(AssertionError, match="two phases go on from one"):
        send_sum(START, results, TRAINED, 1.0)


@pytest.mark.parametrize(("weight", "sent"), [(12.0, 1.0), (0.5, 1.0), (0.0, 0.0)])
def test_unweighted_clients_count_once_if_they_trained(weight: float, sent: float) -> None:
    results = [PhaseResult("a", FIRST, 8), PhaseResult("b", SECOND, 4)]
    part = send_unweighted(START, results, TRAINED, weight)["model"]
    assert part == ModelPart(send_sum(START, results, TRAINED, weight)["model"].state, sent)
