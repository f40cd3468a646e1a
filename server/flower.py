"""Knowledge of Flower that is not in its public documentation (checked with flwr 1.41); see also `exchange.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # pylint: disable=no-name-in-module
from flwr.supercore.task_identity import TaskIdentity

from fedlabel.cohort import ClientResult
from fedlabel.learning.metrics import means
from fedlabel.methods.batch import State, StateDict

_MEMORY = "memory"
"""The record in a client's `context.state` (see `clients/client_app.py`)."""


def set_identity() -> None:
    """Makes messages possible in this process: `Message(...)` reads an identity that only Flower's processes have."""
    if TaskIdentity._task_id is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0


def pull_sooner() -> None:
    """Makes Flower's grid of real nodes wait 0.1 s, not 1 s, before it pulls on where a reply is still being sent."""
    from flwr.superlink.grid import http_grid  # here: with its servers it takes as long to import as torch

    http_grid.pull_objects = partial(http_grid.pull_objects, initial_backoff=0.1)


def as_record(model: StateDict) -> ArrayRecord:
    """Returns a model as a record, its arrays as numpy has them."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in model.items()})


def as_reply(result: ClientResult, double: bool = False) -> Message:
    """Returns the result of a simulated client as the reply that Flower's strategies expect of a node.

    They combine one model. double: give its weights in double precision.
    """
    ((state, weight),) = result.parts.values()
    if double:
        state = {name: value.cpu().double() for name, value in state.items()}
    content = RecordDict(
        {
            "arrays": as_record(state),
            "metrics": MetricRecord(
                {"num-examples": float(weight), "train_loss": means(result.sums).get("train/loss", 0.0)}
            ),
        }
    )
    set_identity()
    return Message(content, result.client + 1, "train")


def dump_memory(memory: State) -> bytes:
    """Returns what a client keeps as the bytes of a Flower record: so a checkpoint stays readable."""
    return recorddict_to_proto(RecordDict({_MEMORY: as_record(memory)})).SerializeToString()


def parse_memory(data: bytes) -> Mapping[str, np.ndarray] | None:
    """Returns the arrays in the result of `dump_memory`; None if it is none."""
    try:
        records = recorddict_from_proto(ProtoRecordDict.FromString(data))
        if set(records) != {_MEMORY}:
            return None
        return {name: array.numpy() for name, array in records.array_records[_MEMORY].items()}
    except Exception:  # Flower's and numpy's readers have many ways to fail
        return None
