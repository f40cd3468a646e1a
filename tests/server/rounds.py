"""A round of three clients with a model of a few numbers: what is sent, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import State
from fedlabel.methods.dp_ssl import DPSSL
from fedlabel.methods.recipe import Method, Recipe
from fedlabel.methods.supervised import Supervised
from server.grids.in_process import InProcessGrid
from server.observers import Round
from server.replies import ReplySchema, RoundSchema
from server.tally import RoundTally
from tests.methods.recipes import task

InProcessGrid(None, 1)  # type: ignore[arg-type]  # sets the identity that server messages need

CLASSES, SAMPLES = 3, 10
NODES = {11: 0, 12: 1, 13: 2}
"""Node id -> client."""
MODEL = {"w": torch.ones(3), "b": torch.zeros(()), "n": torch.tensor(5)}
TRAINING = TrainingConfig(local_steps=2, batch_size=4)
"""So that a method of one labelled phase uses 2 * 4 samples at most."""
PSEUDO = {
    **{"drawn": [4.0, 2.0, 2.0], "kept": [3.0, 2.0, 0.0], "correct": [3.0, 1.0, 0.0]},
    **{"drawn_by_expert": [6.0, 2.0], "kept_by_expert": [4.0, 1.0], "correct_by_expert": [3.0, 1.0]},
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


def schema_of(method: Method | None = None, **options: Any) -> ReplySchema:
    recipe = recipe_of(method or Supervised())
    return ReplySchema(MODEL, recipe, TRAINING, [SAMPLES] * 3, CLASSES, frozenset("wb"), **options)


def round_of(schema: ReplySchema | None = None, shared: State | None = None) -> RoundSchema:
    return (schema or schema_of()).of_round(4, shared or {}, [order(node) for node in NODES])


def tally_of(replies: Sequence[Message], schema: RoundSchema | None = None) -> tuple[RoundTally, list[int]]:
    """Returns the finished tally and the nodes whose replies it handed on."""
    tally = RoundTally(schema or round_of(), NODES, [order(node) for node in NODES])
    used = [found.metadata.src_node_id for found in tally.usable(iter(replies))]
    tally.finish()
    return tally, used


def seen(tally: RoundTally, number: int = 4, started: float = 0.0, is_evaluated: bool = False) -> Round:
    """Returns the round as observers see it; clients keep nothing in this process."""
    return Round(number, tally, None, started, is_evaluated)
