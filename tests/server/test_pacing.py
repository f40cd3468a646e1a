"""Rounds on the simulated clock, worked by hand.

Client 0 computes 20 forward passes at 20 a second and 10 backward at 10: 2 s; with half a second each to receive and to
send its reply arrives after 3 s. Client 1 takes 4 + 1 = 5 s, client 2 takes 10 + 1 = 11 s.
"""

from __future__ import annotations

import numpy as np
import pytest

from server.pacing import Arrival, tier_of, wait_for_all, wait_for_first, wait_until
from tests.server.pacing import DOWN, UP, Played, devices, pacing


def seconds_of(played: Played) -> float:
    return played.tally.pace["virtual_seconds"]


def test_synchronous_rounds_last_as_long_as_the_slowest() -> None:
    paced = pacing()
    first, second = Played(paced, 1), Played(paced, 2)
    assert (first.kept, seconds_of(first)) == ([0, 1, 2], 11)
    assert (second.kept, seconds_of(second)) == ([0, 1, 2], 22)
    assert first.tally.pace["slow_half_share"] == pytest.approx(1 / 3)  # client 2 is slower than the median, client 1
    assert not paced.needs_models  # sums are folded where clients ran


def test_a_deadline_leaves_out_who_is_late_and_ends_early_when_all_are_there() -> None:
    paced = pacing("pacing.kind=deadline", "pacing.deadline=6")
    first, second = Played(paced, 1), Played(paced, 2)
    assert (first.kept, seconds_of(first)) == ([0, 1], 6)
    assert (second.kept, seconds_of(second)) == ([0, 1], 12)
    assert first.tally.pace["late_clients"] == 1
    assert first.tally.num_failed == 0
    assert first.tally.bytes_up == 3 * UP  # the late one has sent, too
    generous = Played(pacing("pacing.kind=deadline", "pacing.deadline=20"), 1)
    assert (generous.kept, seconds_of(generous)) == ([0, 1, 2], 11)
    exact = Played(pacing("pacing.kind=deadline", "pacing.deadline=11"), 1)
    assert exact.kept == [0, 1, 2]


def test_partial_work_brings_slow_clients_in_time() -> None:
    """Client 2 has 6 - 1 = 5 s to compute. At first a pass each of 10 draws is expected: 10/4 + 10/2 = 7.5 s, so it
    takes two thirds, and is late: 6.67 + 1 s. Then 3 clients have shown (1 + 60) / (1 + 30) forward passes per draw and
    (1 + 30) / (1 + 30) backward: (19.68/4 + 10/2 = 9.92 s), so it takes 5 / 9.92 = .504, and is late by .04 s.
    """
    paced = pacing("pacing.kind=deadline", "pacing.deadline=6", "pacing.partial_work=true")
    first, second = Played(paced, 1), Played(paced, 2)
    assert first.work == pytest.approx({2: 5 / 7.5})
    assert (first.kept, seconds_of(first)) == ([0, 1], 6)
    assert second.work == pytest.approx({2: 5 / (10 * 61 / 31 / 4 + 5)})
    assert first.tally.pace["work_share"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    third = [Played(paced, number) for number in range(3, 8)][-1]
    assert third.work[2] == pytest.approx(0.5, abs=1e-2)


def test_over_selection_keeps_the_first() -> None:
    paced = pacing("pacing.kind=over_selection", "pacing.over_selection=1.5", fraction=0.67)
    first, second = Played(paced, 1), Played(paced, 2)
    assert first.trained == [[0, 1, 2]]  # a cohort of two, and one more
    assert (first.kept, seconds_of(first)) == ([0, 1], 5)
    assert (second.kept, seconds_of(second)) == ([0, 1], 10)


def test_tiers_train_clients_of_one_speed() -> None:
    paced = pacing("pacing.kind=tiers", "pacing.tiers=3", fraction=0.34)
    rounds = [Played(paced, number) for number in range(1, 30)]
    assert {tuple(each.kept) for each in rounds} == {(0,), (1,), (2,)}
    lasted = {0: 3.0, 1: 5.0, 2: 11.0}
    assert seconds_of(rounds[-1]) == sum(lasted[each.kept[0]] for each in rounds)


def test_who_drops_out_before_training_is_not_sent_the_model() -> None:
    paced = pacing(machines=devices(dropout=(1.0, 0, 0)))
    played = Played(paced, 1)
    assert (played.kept, played.trained, seconds_of(played)) == ([], [[]], 0)
    assert (played.tally.bytes_down, played.tally.num_failed, played.tally.num_excused) == (0, 0, 3)


def test_who_drops_out_during_training_has_received_the_model() -> None:
    played = Played(pacing(machines=devices(dropout=(0, 1.0, 0))), 1)
    assert (played.kept, played.trained, played.tally.bytes_down) == ([], [[]], 3 * DOWN)
    assert played.tally.pace["dropped_clients"] == 3


def test_a_reply_that_is_lost_was_trained() -> None:
    paced = pacing(machines=devices(dropout=(0, 0, 1.0)))
    assert paced.needs_models
    played = Played(paced, 1)
    assert (played.kept, played.trained) == ([], [[0, 1, 2]])


def test_a_client_that_fails_is_no_dropout() -> None:
    played = Played(pacing("pacing.kind=deadline", "pacing.deadline=6"), 1, fails=[0])
    assert (played.kept, played.tally.num_failed, played.tally.pace["dropped_clients"]) == ([1], 1, 0)


def test_pacing_goes_on_from_its_saved_state() -> None:
    options = ("pacing.kind=deadline", "pacing.deadline=6", "pacing.partial_work=true", "sampling.kind=oort")
    paced = pacing(*options)
    Played(paced, 1)
    again = pacing(*options, saved=paced.dump())
    assert (again.seconds, again.history) == (paced.seconds, paced.history)
    first, second = Played(paced, 2), Played(again, 2)
    assert (first.kept, first.work, seconds_of(first)) == (second.kept, second.work, seconds_of(second))


def test_replies_at_the_same_time_go_by_client() -> None:
    same = [Arrival(2, 1.0), Arrival(0, 1.0), Arrival(1, 1.0)]
    assert wait_for_first(same, 2).clients == {0, 1}
    assert wait_until(same, 1.0).clients == {0, 1, 2}
    assert wait_for_all([]).seconds == 0
    assert wait_for_first([Arrival(0, float("inf"))], 1) == (frozenset(), 0.0)


def test_tiers_are_nearly_equal_parts_of_all() -> None:
    order = np.array([4, 2, 0, 1, 3])
    parts = [tier_of(order, tier, 2).tolist() for tier in range(2)]
    assert parts == [[4, 2, 0], [1, 3]]
