"""One odd reply fails its client; it neither stops the run nor touches the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from server.grids import InProcessGrid
from server.report import RoundTally

InProcessGrid(None, 1)  # type: ignore[arg-type]  # sets the identity that server messages need


def content() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.ones(3, np.float32)), "b": Array(np.zeros((), np.float32))}),
            "metrics": MetricRecord({"num-examples": 2.0, "train_loss": 0.5}),
            "sums": ConfigRecord({"train/loss": [1.0, 2.0]}),
            "counts": ConfigRecord({"passes": [4.0]}),
        }
    )


def tally_of(replies: list[Message]) -> tuple[RoundTally, list[int]]:
    sent = [Message(content(), node, "train") for node in (11, 12, 13)]
    tally = RoundTally(4, {11: 0, 12: 1, 13: 2}, sent)
    used = [reply.metadata.src_node_id for reply in tally.usable(iter(replies))]
    tally.finish()
    return tally, used


def reply(node: int, body: RecordDict | Error) -> Message:
    order = Message(content(), node, "train")
    order.metadata.__dict__["_message_id"] = "1"
    return Message(body, reply_to=order)


def change(what: str, key: str, value: object) -> Callable[[RecordDict], None]:
    def apply(body: RecordDict) -> None:
        body[what][key] = value  # type: ignore[assignment]

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda body: body.pop("arrays"), "lacks the record"),
        (lambda body: body.pop("metrics"), "lacks the record"),
        (lambda body: body["metrics"].pop("num-examples"), "lack `num-examples`"),
        (lambda body: body["arrays"].pop("b"), "lacks, or has beside the global model's arrays, b"),
        (change("arrays", "extra", Array(np.zeros(1))), "arrays, extra"),
        (change("arrays", "w", Array(np.ones(1, np.float32))), r"w of its model has shape \(1,\), not \(3,\)"),
        (change("arrays", "w", Array(np.array([1, np.nan, 1], np.float32))), "NotFinite: w of its model"),
        (change("arrays", "w", Array("float32", (3,), "numpy.ndarray", b"rubbish")), "w of its model cannot be read"),
        (change("metrics", "num-examples", float("nan")), r"`num-examples` \(=nan\) must be a finite number"),
        (change("metrics", "num-examples", -1.0), r"`num-examples` \(=-1.0\)"),
        (change("sums", "train/loss", [float("inf"), 1.0]), "its metrics hold NaN"),
    ],
)
def test_odd_reply_fails_its_client_alone(spoil: Callable[[RecordDict], None], reason: str) -> None:
    odd = content()
    spoil(odd)
    tally, used = tally_of([reply(11, content()), reply(12, odd), reply(13, content())])
    assert used == [11, 13]
    assert len(tally.failures) == 1
    assert tally.failures[0].startswith("Round 4, client 1: ")
    import re

    assert re.search(reason, tally.failures[0]), tally.failures[0]
    assert tally.sums == {"train/loss": [2.0, 4.0]}
    assert not tally.all_failed


def test_errors_and_silence_are_counted_and_replies_of_flower_are_put_in_client_order() -> None:
    sent = [Message(content(), node, "train") for node in (11, 12, 13)]
    tally = RoundTally(4, {11: 0, 12: 1, 13: 2}, sent)
    used = [r.metadata.src_node_id for r in tally.usable([reply(13, content()), reply(11, content())])]
    tally.finish()
    assert used == [11, 13]
    assert tally.failures == ["Round 4, client 1: NoAnswer: the client did not answer in time"]
    failed, _ = tally_of([reply(node, Error(2, "ValueError: no")) for node in (11, 12, 13)])
    assert failed.all_failed
    assert failed.failures[0] == "Round 4, client 0: ValueError: no"


def test_released_merge_replies_need_both_parts() -> None:
    body = content()
    arrays = {f"{part}/{name}": array for part in ("a", "b") for name, array in body["arrays"].items()}
    both = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 1.0, "weight/a": 1.0, "weight/b": 0.5}),
        }
    )
    assert tally_of([reply(11, both)])[1] == [11]
    del both["arrays"]["b/w"]
    assert tally_of([reply(11, both)])[1] == []
