"""Closed forms put together, and what bounds the statistics of a client."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlabel.methods.batch import State
from fedlabel.methods.shared import (
    SLACK,
    Limits,
    Shared,
    check_counts,
    check_flags,
    check_shares,
    nothing_shared,
    state_from_lists,
    state_to_lists,
    together,
)

LIMITS = Limits(samples=10, annotators=2, steps=3, examples=12)


class Sum(Shared):
    """Adds the statistic of its name up, keeps a second state for the server alone, and allows up to `samples`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self) -> State:
        return {self.name: torch.zeros(()), f"{self.name}_rounds": torch.zeros(())}

    def statistics(self, memory: State) -> State:
        return {f"{self.name}_sum": memory[self.name] + 1}

    def update(self, shared: State, total: State) -> State:
        if not total:
            return shared
        rounds = f"{self.name}_rounds"
        return {**shared, self.name: shared[self.name] + total[f"{self.name}_sum"], rounds: shared[rounds] + 1}

    def broadcast(self, shared: State) -> State:
        return {self.name: shared[self.name]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        check_counts(self.name, statistics[f"{self.name}_sum"], limits.samples)

    def check(self, shared: State) -> None:
        if shared[self.name] > 100:
            raise ValueError(f"{self.name} is too large")


BOTH = together(Sum("a"), Sum("b"))


def test_nothing_is_shared_by_default() -> None:
    assert nothing_shared.start() == nothing_shared.statistics({"x": torch.ones(())}) == {}
    state = {"x": torch.ones(())}
    assert nothing_shared.update(state, {}) is state
    assert nothing_shared.broadcast(state) is state


def test_closed_forms_together_do_what_each_does_alone() -> None:
    start = BOTH.start()
    assert start == {"a": 0, "a_rounds": 0, "b": 0, "b_rounds": 0}
    assert BOTH.statistics({"a": torch.tensor(2.0), "b": torch.tensor(5.0)}) == {"a_sum": 3, "b_sum": 6}
    total = {"a_sum": torch.tensor(3.0), "b_sum": torch.tensor(6.0)}
    updated = BOTH.update(start, total)
    assert updated == {"a": 3, "a_rounds": 1, "b": 6, "b_rounds": 1}
    assert BOTH.update(updated, total) == {"a": 6, "a_rounds": 2, "b": 12, "b_rounds": 2}
    assert BOTH.broadcast(updated) == {"a": 3, "b": 6}  # and not what each keeps for the server
    assert BOTH.update(updated, {}) == updated
    assert start == {"a": 0, "a_rounds": 0, "b": 0, "b_rounds": 0}


def test_one_closed_form_is_itself() -> None:
    alone = Sum("a")
    assert together(alone) is alone


@pytest.mark.parametrize("wrong", ["a", "b"])
def test_the_checks_of_each_are_made(wrong: str) -> None:
    good = {"a_sum": torch.tensor(10.0), "b_sum": torch.tensor(10.0)}
    BOTH.check_statistics(good, BOTH.start(), LIMITS)
    with pytest.raises(ValueError, match=f"its statistic {wrong} counts 11 samples, and it can have 10"):
        BOTH.check_statistics({**good, f"{wrong}_sum": torch.tensor(11.0)}, BOTH.start(), LIMITS)
    BOTH.check(BOTH.start())
    with pytest.raises(ValueError, match=f"{wrong} is too large"):
        BOTH.check({**BOTH.start(), wrong: torch.tensor(101.0)})


def test_a_state_travels_as_lists_with_its_shape() -> None:
    state = {"matrix": torch.tensor([[1.0, 2.0, 3.0]]), "number": torch.tensor(4.0), "none": torch.zeros(0, 2)}
    lists = state_to_lists(state)
    assert lists == {"matrix": [2, 1, 3, 1, 2, 3], "number": [0, 4], "none": [2, 0, 2]}
    back = state_from_lists(lists, torch.device("cpu"))
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("check", "good", "wrong", "message"),
    [
        (lambda v: check_counts("n", v, 6), [1.0, 5.0], [-1.0, 5.0], r"statistic n has a count below 0 \(=-1\)"),
        (lambda v: check_counts("n", v, 6), [6.0 * (1 + SLACK / 2)], [6.0 * (1 + 2 * SLACK)], "counts 6.012 samples"),
        (lambda v: check_flags("f", v), [0.0, 1.0], [0.0, 0.5], "statistic f must hold only 0 and 1"),
        (lambda v: check_shares("p", v, torch.ones(())), [0.25, 0.75], [0.25, 0.7], "p must be probabilities"),
        (lambda v: check_shares("p", v, torch.ones(())), [1.0, 0.0], [1.5, -0.5], "p must be probabilities"),
        (lambda v: check_shares("p", v, torch.zeros(())), [0.0, 0.0], [0.5, 0.5], "p must be probabilities"),
    ],
)
def test_bounds(check: Callable[[torch.Tensor], None], good: list[float], wrong: list[float], message: str) -> None:
    check(torch.tensor(good, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        check(torch.tensor(wrong, dtype=torch.float64))


class _Named(Shared):
    """State and statistic of given names."""

    def __init__(self, state: str, statistic: str) -> None:
        self.state, self.statistic = state, statistic

    def start(self) -> State:
        return {self.state: torch.zeros(())}

    def statistics(self, memory: State) -> State:
        return {self.statistic: torch.ones(())}


def test_closed_forms_with_a_name_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match="a state called a"):
        together(_Named("a", "s"), _Named("a", "t"))
    with pytest.raises(ValueError, match="a statistic called s"):
        together(_Named("a", "s"), _Named("b", "s")).statistics({})
    assert together(_Named("a", "s"), _Named("b", "t")).statistics({}).keys() == {"s", "t"}
