"""Each message has one reply, whoever says to have sent it; one odd reply fails its client, and the round goes on."""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord, Error, RecordDict

from fedlabel.methods.ill import ILL
from fedlabel.methods.shared import state_to_lists
from tests.server.rounds import NODES, content, recipe_of, reply, round_of, schema_of, tally_of


def test_an_odd_reply_fails_its_client_alone() -> None:
    odd = content()
    odd["metrics"]["num-examples"] = 1e9
    tally, used = tally_of([reply(11, content()), reply(12, odd), reply(13, content())])
    assert used == [11, 13]
    assert tally.failures == [
        "Round 4, client 1: BadReply: `num-examples` (=1000000000.0) must lie in [0, 8], as what it holds allows"
    ]
    assert (tally.num_usable, tally.num_failed, tally.refused) == (2, 1, 1)
    assert tally.sums == {"train/loss": [2.0, 4.0]}
    assert set(tally.client_counts) == {0, 2}
    assert tally.bytes_up == 2 * sum(record.count_bytes() for record in content().values())


def test_errors_and_silence_are_counted_and_replies_of_flower_are_put_in_client_order() -> None:
    tally, used = tally_of([reply(13, content()), reply(11, content())])
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: NoAnswer: the client did not answer in time"]
    failed, _ = tally_of([reply(node, Error(2, "ValueError: no")) for node in NODES])
    assert (failed.num_usable, failed.num_failed, failed.refused) == (0, 3, 0)
    assert failed.failures[0] == "Round 4, client 0: ValueError: no"


def test_a_lost_node_is_known_by_the_message_it_did_not_answer() -> None:
    """Flower's SuperLink answers in its place, as node 1, which is none of the cohort's."""
    lost = reply(12, Error(5, "Error: Node Unavailable"))
    lost.metadata.__dict__["_src_node_id"] = 1
    tally, used = tally_of([reply(11, content()), lost, reply(13, content())])
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: Error: Node Unavailable"]


def test_a_forged_sender_is_refused_and_the_true_one_counts_once() -> None:
    forged = reply(12, content())
    forged.metadata.__dict__["_src_node_id"] = 11
    for replies in ([reply(11, content()), forged], [forged, reply(11, content())]):
        tally, used = tally_of(replies)
        assert used == [11]
        assert "Round 4, client 1: BadReply: it says that node 11 sent it, not node 12" in tally.failures
        assert tally.num_usable == 1


def test_a_second_reply_and_one_to_an_earlier_round_are_refused() -> None:
    old = reply(12, content())
    old.metadata.__dict__["_reply_to_message_id"] = "of round 3"
    tally, used = tally_of([reply(11, content()), reply(11, content()), old])
    assert used == [11]
    assert tally.failures == [
        "Round 4, client 0: BadReply: it answers a second time; the first answer counts",
        "Round 4, client 1: NoAnswer: the client did not answer in time",
        "Round 4, client 2: NoAnswer: the client did not answer in time",
        "Round 4, node 12: BadReply: it answers no message of this round",
    ]
    assert (tally.num_usable, tally.num_failed, tally.refused) == (1, 2, 2)


def test_a_reply_without_anything_is_refused() -> None:
    empty = reply(11, content())
    empty.__dict__["_content"] = None
    assert tally_of([empty])[0].failures[0] == "Round 4, client 0: BadReply: it is empty"


def test_what_clients_say_cannot_look_like_something_else() -> None:
    """No terminal code, no line that looks like another client's, no more than is kept of it."""
    reason = "ValueError: \x1b[2Jno [red]x[/red]\nTraceback\nRound 4, client 0: fine\n" + "x" * 10_000_000
    failure = tally_of([reply(12, Error(2, reason))])[0].failures[1]
    first, *more = failure.split("\n")
    assert first == r"Round 4, client 1: ValueError: \x1b[2Jno [red]x[/red]"
    assert more[:2] == ["    Traceback", "    Round 4, client 0: fine"]
    assert len(failure) < 11_000
    failure = tally_of([reply(12, Error(2, "y" * 5000))])[0].failures[1]
    assert len(failure) < 400


def test_statistics_are_summed_over_the_usable_replies() -> None:
    """1 + 2 + 3 in each of 9 cells; a client that counts 18 of its 10 samples is left out."""
    schema = round_of(schema_of(ILL()), recipe_of(ILL()).shared.start())

    def bring(value: float) -> RecordDict:
        body = content()
        body["metrics"]["num-examples"] = 1.0
        body["statistics"] = ConfigRecord(dict(state_to_lists({"counts": torch.full((1, 3, 3), value)})))
        return body

    tally, used = tally_of(
        [reply(node, bring(value)) for node, value in zip(NODES, (0.25, 2.0, 0.5), strict=True)], schema
    )
    assert used == [11, 13]
    (failure,) = tally.failures
    assert failure == "Round 4, client 1: BadReply: its statistic counts counts 18 samples, and it can have 10"
    total = tally.statistics(torch.device("cpu"))
    assert list(total) == ["counts"]
    assert total["counts"].dtype == torch.float32
    torch.testing.assert_close(total["counts"], torch.full((1, 3, 3), 0.75), rtol=0, atol=0)
    assert tally_of([], schema)[0].statistics(torch.device("cpu")) == {}
