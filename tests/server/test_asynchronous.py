"""FedBuff and FedAsync on the simulated clock, worked by hand; the clients are those of test_pacing.py."""

from __future__ import annotations

import pytest
import torch

from server.asynchronous import staleness_weight
from tests.server.pacing import MODEL, Played, devices, pacing


def test_weight_of_a_stale_reply() -> None:
    assert staleness_weight(0, 0.5) == 1
    assert staleness_weight(3, 0.5) == 0.5
    assert staleness_weight(3, 0) == 1


def test_fedbuff_by_hand() -> None:
    """All start at 0 and arrive at 3, 5 and 11. Clients 0 and 1 fill the buffer at 5; both start anew and arrive at 8
    and 10: update 2 at 10. They start again, for 13 and 15; client 2 arrives at 11 with the model of two updates ago,
    starts anew (22), and client 0 fills the buffer at 13.
    """
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=2")
    first = Played(paced, 1)
    assert (first.kept, first.seconds) == ([0, 1], 5)
    numbers = {"virtual_seconds": 5, "dropped_clients": 0, "clients_in_flight": 1, "staleness": 0}
    assert first.tally.pace == {**numbers, "slow_half_share": 0}
    second = Played(paced, 2, {**MODEL, "w": torch.full((2,), 100.0)})
    assert (second.kept, second.seconds, second.trained) == ([0, 1], 10, [[0, 1]])
    third = Played(paced, 3, {"w": torch.full((2,), 1000.0), "mean": torch.full((2,), 3.0), "count": torch.tensor(9)})
    assert (third.kept, third.seconds) == ([0, 2], 13)
    assert third.tally.pace["staleness"] == 1
    assert third.trained == [[0, 1], [2]]
    weight = 3**-0.5
    stale, fresh = third.results[2], third.results[0]
    torch.testing.assert_close(stale.parts["model"].state["w"], torch.full((2,), 1000 + weight * (2 + 10)))
    torch.testing.assert_close(stale.parts["model"].state["mean"], torch.full((2,), 3 + weight * (1 - 3)))
    torch.testing.assert_close(stale.statistics["s"], torch.tensor([weight], dtype=torch.float64))
    assert torch.equal(fresh.parts["model"].state["w"], torch.full((2,), 1000.0 + 30))
    assert torch.equal(fresh.statistics["s"], torch.ones(1))
    assert [played.tally.num_failed for played in (first, second, third)] == [0, 0, 0]


def test_server_rate_applies_a_share_of_the_mean_update() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.server_rate=0.25")
    moved = paced.moved(MODEL, {"w": torch.full((2,), 8.0), "mean": torch.ones(2), "count": torch.tensor(7)})
    assert moved["w"].tolist() == [2, 2]
    assert moved["count"] == 7


def test_fedasync_by_hand() -> None:
    """Client 0 arrives at 3, starts anew with model 1 and arrives at 6; client 1 arrives at 5 with the first model."""
    paced = pacing("pacing.kind=fedasync", "pacing.mixing=0.6")
    first = Played(paced, 1)
    assert (first.kept, first.seconds) == ([0], 3)
    assert paced.moved(MODEL, {**MODEL, "w": torch.ones(2)})["w"].tolist() == pytest.approx([0.6, 0.6])
    second = Played(paced, 2, {**MODEL, "w": torch.full((2,), 50.0)})
    assert (second.kept, second.seconds, second.tally.pace["staleness"]) == ([1], 5, 1)
    assert second.results[1].parts["model"].state["w"].tolist() == [11, 11]  # its model, not its update
    share = 0.6 * 2**-0.5
    moved = paced.moved({**MODEL, "w": torch.full((2,), 50.0)}, {**MODEL, "w": torch.full((2,), 11.0)})
    assert moved["w"].tolist() == pytest.approx([50 + share * (11 - 50)] * 2)


def test_without_delay_a_buffer_of_all_is_a_synchronous_round() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=3", machines=devices(free=True))
    for number in (1, 2, 3):
        played = Played(paced, number)
        assert (played.kept, played.trained, played.seconds) == ([0, 1, 2], [[0, 1, 2]], 0)
        assert played.tally.pace["staleness"] == 0


def test_one_client_is_never_stale() -> None:
    paced = pacing("pacing.kind=fedasync", fraction=0.1)
    rounds = [Played(paced, number) for number in range(1, 8)]
    assert all(played.tally.pace["staleness"] == 0 for played in rounds)
    lasted = {0: 3.0, 1: 5.0, 2: 11.0}
    assert rounds[-1].seconds == sum(lasted[played.kept[0]] for played in rounds)


def test_the_order_of_events_does_not_depend_on_who_is_trained_together() -> None:
    """Client 0 is so fast that it could train anew, and reply, before the others have."""
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=2", machines=devices((1e6, 10, 4)))
    first = Played(paced, 1)
    assert (first.kept, first.trained) == ([0, 1], [[0, 1, 2]])  # client 0 does not train twice from one model
    assert first.seconds == 5


def test_who_drops_out_gives_way_to_another() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=1", machines=devices(dropout=(0.4, 0.3, 0.0), seed=1))
    rounds = [Played(paced, number) for number in range(1, 30)]
    assert sum(played.tally.pace["dropped_clients"] for played in rounds) > 5
    assert sum(len(played.kept) for played in rounds) > 10
    assert all(played.tally.num_failed == 0 for played in rounds)
    assert [played.seconds for played in rounds] == sorted(played.seconds for played in rounds)


def test_without_anybody_left_a_buffer_is_used_as_it_is() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=3", machines=devices(dropout=(1.0, 0, 0)))
    played = Played(paced, 1)
    assert (played.kept, played.tally.num_excused, played.tally.bytes_down) == ([], 3, 0)


def test_a_client_that_fails_frees_its_place() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=2")
    first = Played(paced, 1, fails=[0])
    assert (first.kept, first.seconds, first.tally.num_failed) == ([1, 2], 11, 1)


def test_it_goes_on_from_its_saved_state_to_the_bit() -> None:
    options = ("pacing.kind=fedbuff", "pacing.buffer=2")
    paced = pacing(*options)
    Played(paced, 1)
    Played(paced, 2, {**MODEL, "w": torch.full((2,), 0.1)})
    again = pacing(*options, saved=paced.dump())
    model = {**MODEL, "w": torch.full((2,), 0.3)}
    for number in (3, 4):
        first, second = Played(paced, number, model), Played(again, number, model)
        assert (first.kept, first.seconds, first.tally.pace) == (second.kept, second.seconds, second.tally.pace)
        for client in first.kept:
            one, other = (each.results[client].parts["model"].state for each in (first, second))
            assert all(torch.equal(one[name], other[name]) for name in MODEL)


def test_a_new_stage_drops_what_is_on_its_way() -> None:
    paced = pacing("pacing.kind=fedbuff", "pacing.buffer=2")
    Played(paced, 1)
    paced.begin_stage()
    played = Played(paced, 2)
    assert played.trained == [[0, 1, 2]]
