"""A round of three clients with a model of a few numbers: what is sent, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedlabel.cohort import Invitation
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import State
from fedlabel.methods.dp_ssl import DPSSL
from fedlabel.methods.recipe import Method, Recipe
from fedlabel.methods.supervised import Supervised
from server.flower import set_identity
from server.grids.flower import read_blocks
from server.observers import Round
from server.replies import ReplyReader
from server.schema import ResultSchema, RoundSchema
from server.tally import RoundTally
from server.traffic import ResultBytes
from tests.methods.recipes import task

set_identity()

CLASSES, SAMPLES = 3, 10
NODES = {11: 0, 12: 1, 13: 2}
"""Node id -> client."""
MODEL = {"w": torch.ones(3), "b": torch.zeros(()), "n": torch.tensor(5)}
TRAINING = TrainingConfig(local_steps=2, batch_size=4)
"""So that a method of one labelled phase uses 2 * 4 samples at most."""
PSEUDO = {
    **{"drawn": [4.0, 2.0, 2.0], "kept": [3.0, 2.0, 0.0], "correct": [3.0, 1.0, 0.0]},
    **{"drawn_by_expert": [6.0, 2.0], "kept_by_expert": [4.0, 1.0], "correct_by_expert": [3.0, 1.0]},
    "confidence_by_expert": [3.2, 0.8],
    **{"kept_by_both": [3.0, 0.0, 1.0, 1.0, 0.0, 0.0], "correct_by_both": [3.0, 0.0, 0.0, 1.0, 0.0, 0.0]},
    **{"drawn_by_kind": [8.0, *[0.0] * 8], "correct_by_kind": [5.0, *[0.0] * 8]},
    **{"bins_count": [8.0, *[0.0] * 14], "bins_confidence": [4.5, *[0.0] * 14], "bins_correct": [5.0, *[0.0] * 14]},
    **{"kept_bins_count": [5.0, *[0.0] * 14], "kept_bins_confidence": [4.0, *[0.0] * 14]},
    "kept_bins_correct": [4.0, *[0.0] * 14],
}
"""8 pseudo-labels of which 5 are kept and 4 of these right, see `metrics.pseudo_label_counts`."""
VOTES = {
    "function_votes": [3.0, 1.0, 0.0, 0.0, 2.0, 0.0],
    "function_counts": [1.0, 1.0, 3.0, 4.0, 1.0, 1.0, 2.0, 2.0],
    "function_samples": [9.0, 5.0, 9.0, 4.0, 4.5],
}
"""Of two functions, see `metrics.function_counts`."""


def arrays() -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value.numpy())) for name, value in MODEL.items()})


def content(**counts: list[float]) -> RecordDict:
    """What an honest client sends."""
    return RecordDict(
        {
            "arrays": arrays(),
            "metrics": MetricRecord({"num-examples": 8.0, "train_loss": 0.5}),
            "sums": ConfigRecord({"train/loss": [1.0, 2.0]}),
            "counts": ConfigRecord({"passes": [4.0, 2.0], **counts}),
            "statistics": ConfigRecord({}),
        }
    )


def order(node: int) -> Message:
    """A message as a grid has sent it."""
    message = Message(RecordDict({"arrays": arrays()}), node, "train")
    message.metadata.__dict__["_message_id"] = f"to {node}"
    return message


def reply(node: int, body: RecordDict | Error) -> Message:
    return Message(body, reply_to=order(node))


def recipe_of(method: Method) -> Recipe:
    """Returns its recipe for a task with labels of all kinds; with written functions if that is what it goes by."""
    written = isinstance(method, DPSSL) and not method.grown
    return method.recipe(task(CLASSES, votes=((1, 1, 1),) * method.num_functions if written else ()))


def schema_of(method: Method | None = None, **options: Any) -> ResultSchema:
    recipe = recipe_of(method or Supervised())
    return ResultSchema(MODEL, recipe, TRAINING, lambda client: SAMPLES, CLASSES, frozenset("wb"), **options)


INVITATION = Invitation(4, MODEL, {}, {})


def round_of(schema: ResultSchema | None = None, shared: State | None = None) -> RoundSchema:
    return (schema or schema_of()).of_round(INVITATION, shared or {})


def reader_of(schema: ResultSchema | None = None, shared: State | None = None) -> ReplyReader:
    return ReplyReader(round_of(schema, shared))


def tally_of(
    replies: Sequence[Message], schema: RoundSchema | None = None, sent: Sequence[Message] = ()
) -> tuple[RoundTally, list[int]]:
    """Returns the tally of a round and the nodes whose replies were used; sent: its messages."""
    limits = schema or round_of()
    tally = RoundTally(INVITATION, list(NODES.values()), ResultBytes(limits.schema))
    messages = dict(zip(NODES.values(), sent or [order(node) for node in NODES], strict=True))
    blocks = read_blocks([[client] for client in messages], messages, replies, ReplyReader(limits), fold=True)
    used = [result.client for block in tally.watch(blocks) for result in block.results]
    return tally, [node for node, client in NODES.items() if client in used]


def seen(tally: RoundTally, number: int = 4, started: float = 0.0, is_evaluated: bool = False) -> Round:
    """Returns the round as observers see it; clients keep nothing in this process."""
    return Round(number, tally, None, started, is_evaluated)
