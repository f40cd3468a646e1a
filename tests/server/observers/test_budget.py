"""Drawing keeps to its share of a run's time."""

from __future__ import annotations

from server.observers.budget import FIRST_GUESS, SHARE, DrawingBudget


def test_figures_before_the_last_round_wait_until_there_is_time_for_them() -> None:
    budget = DrawingBudget(began=100.0)
    assert not budget.allows(100.0)
    assert not budget.allows(100.0 + 0.99 * FIRST_GUESS / SHARE)
    assert budget.allows(100.0 + 1.01 * FIRST_GUESS / SHARE)


def test_the_next_set_is_thought_to_take_as_long_as_the_longest_so_far() -> None:
    """Observing takes 0.5 s; the first set 1 s beside it, the second 2 s: 3 s are spent and 2 more expected."""
    budget = DrawingBudget(began=0.0)
    budget.add(0.5, drawn=False)
    budget.add(1.5, drawn=True)
    assert not budget.allows(1.99 / SHARE)
    assert budget.allows(2.01 / SHARE)
    budget.add(2.5, drawn=True)
    assert not budget.allows(4.99 / SHARE)
    assert budget.allows(5.01 / SHARE)
