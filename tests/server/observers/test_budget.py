"""Drawing keeps to its share of a run's time."""

from __future__ import annotations

from server.observers.budget import BEFORE, FIRST_GUESS, SHARE, DrawingBudget


def test_figures_before_the_last_round_wait_until_there_is_time_for_them_and_for_the_last() -> None:
    budget, needed = DrawingBudget(began=100.0), (BEFORE + 2 * FIRST_GUESS) / SHARE
    assert not budget.allows(100.0)
    assert not budget.allows(100.0 + 0.99 * needed)
    assert budget.allows(100.0 + 1.01 * needed)


def test_the_next_set_is_thought_to_take_as_long_as_the_longest_so_far() -> None:
    """Observing takes 0.5 s; the first set 1 s beside it, the second 2 s."""
    budget = DrawingBudget(began=0.0)
    budget.add(0.5, drawn=False)
    budget.add(0.9, drawn=False)  # the machine was busy
    budget.add(1.5, drawn=True)
    assert not budget.allows((BEFORE + 1 + 2 * 1 - 0.01) / SHARE)
    assert budget.allows((BEFORE + 1 + 2 * 1 + 0.01) / SHARE)
    budget.add(2.5, drawn=True)
    assert not budget.allows((BEFORE + 3 + 2 * 2 - 0.01) / SHARE)
    assert budget.allows((BEFORE + 3 + 2 * 2 + 0.01) / SHARE)


def test_of_all_time_no_more_than_the_share_goes_to_figures() -> None:
    """Rounds of 1 s, figures of 0.8 s in each tenth if there is time, and in the last."""
    budget, now, drawn = DrawingBudget(began=0.0), 0.0, 1
    for number in range(1, 1000):
        draws = number % 10 == 0 and budget.allows(now)
        drawn += draws
        now += 1.0 + 0.8 * draws
        budget.add(0.1 + 0.8 * draws, draws)
    assert 20 < drawn < 40
    assert BEFORE + 0.8 * drawn <= SHARE * now
