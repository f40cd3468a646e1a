"""Predicted seconds of clients, by hand."""

from __future__ import annotations

from server.grids.costs import CostModel


def test_seconds_are_samples_times_seconds_per_sample() -> None:
    """Clients draw 9, 19 and 39 samples and count for one more; round 2 draws twice as many.

    Before anything is measured a sample counts as a second. Then client 1 took 25 s for 20 samples and client 0 5 s for
    10: by 30 s for 30 samples the third, which never trained, takes 40 s. Measured together, 0 and 1 take 1 s a sample.
    """
    costs = CostModel(lambda client, number: number * (10 * 2**client) - 1)
    assert [costs.predict([client], 1) for client in (0, 1, 2)] == [10, 20, 40]
    costs.measured([1], 1, 25.0)
    costs.measured([0], 1, 5.0)
    assert costs.predict([0], 1) == 5
    assert costs.predict([1], 1) == 25
    assert costs.predict([2], 1) == 40
    assert costs.predict([0, 1], 2) == 60
    costs.measured([0, 1], 1, 30.0)
    assert costs.predict([0], 1) == 10
    assert costs.predict([2], 1) == 40


def test_a_client_without_samples_costs_something() -> None:
    costs = CostModel(lambda client, number: 0)
    costs.measured([0, 1], 1, 1.0)
    assert costs.predict([0], 1) == 0.5
