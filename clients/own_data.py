"""A node with data of its own: `--node-config 'data="FOLDER"'` and a run with data.name=nodes.

The folder's path is the node's alone: no message names it. What leaves the node of its data is in `Holding` and
`EvaluationSums`.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from clients.trust import Refusal
from fedlabel.config import parse_config
from fedlabel.data.nodes.federation import Holding, as_json, node_federation, parse_agreement
from fedlabel.data.nodes.files import FolderError
from fedlabel.data.nodes.folder import NodeData, read_node_folder
from fedlabel.data.nodes.schema import Schema, parse_schema
from fedlabel.data.sets.config import DataError
from fedlabel.errors import FileError, file_error
from fedlabel.experiment import Experiment
from fedlabel.learning.evaluation import EvaluationSums
from fedlabel.learning.metrics import CALIBRATION_BINS
from fedlabel.methods.batch import State, StateDict
from fedlabel.names import counted

logger = logging.getLogger("fedlabel")
DATA, CLIENT, SHARE = "data", "client", "share-evaluation"
"""Keys of `--node-config`: the folder; the client's number, if it is to have a certain one; whether the accuracy on its
own held-out samples may be shown."""
FOLDERS = 4
"""Folders that a process keeps in memory: nodes of a simulation are in one."""


def node_folder(context: Context) -> Path:
    """Returns the folder that the node was started with.

    Raises:
        Refusal: it was started without one.
    """
    if DATA not in context.node_config:
        raise Refusal(
            "The run is of nodes with data of their own (data.name=nodes), and this node was started without: give "
            """the SuperNode --node-config 'data="FOLDER"' (see docs/data.md)."""
        )
    return Path(str(context.node_config[DATA])).expanduser()


def refuse_folder(context: Context) -> None:
    """Raises a Refusal if the node was started with a folder, for a run that would not read it."""
    if DATA in context.node_config:
        raise Refusal(
            "This node was started with data of its own (`data` in --node-config), and the run takes the clients' "
            "samples from a named data set: run it with data.name=nodes, or start the node without `data`."
        )


def holding_record(context: Context, schema_text: str, least: int) -> ConfigRecord:
    """Returns what the node tells of its data.

    Args:
        context: of the message.
        schema_text: the server's schema.
        least: smaller counts are not told, see `Holding.coarse`.

    Raises:
        Refusal: its folder cannot be used.
    """
    schema = parse_schema(schema_text, "The server's schema")
    record = ConfigRecord({"holding": as_json(Holding.of(_folder(node_folder(context), schema)).coarse(least))})
    if CLIENT in context.node_config:
        record[CLIENT] = int(context.node_config[CLIENT])
    record[SHARE] = bool(context.node_config.get(SHARE, False))
    return record


def open_own(context: Context, record: ConfigRecord) -> tuple[Experiment, int]:
    """Returns the experiment of a message on the node's own data, and the node's client number in it."""
    client, folder = int(record["client"]), node_folder(context)  # type: ignore[arg-type]
    return _experiment(str(record["experiment"]), str(record["agreement"]), client, folder, _stamp(folder)), client


def evaluate_own(
    experiment: Experiment, round_number: int, models: dict[str, StateDict], shared: State, least: int = 1
) -> RecordDict:
    """Returns the sums of an evaluation on the samples that the node holds out.

    Args:
        experiment: on the node's data.
        round_number: the last that is done.
        models: as `Experiment.evaluate` takes them.
        shared: what the server shares.
        least: the fewest samples that sums may be made of.

    Raises:
        Refusal: it holds out fewer.
    """
    if 0 < len(experiment.evaluates_on.split.labels) < least:
        raise Refusal(f"the node holds out fewer samples than the {least} that sums may be made of (min_count)")
    classes, sums = experiment.federation.dataset.num_classes, None
    if len(experiment.evaluates_on.split.labels):
        evaluation = experiment.evaluate(round_number, models, shared)
        sums = None if evaluation is None else EvaluationSums.of(evaluation)
    if sums is None:
        nothing = np.zeros((classes, classes), dtype=np.int64)
        sums = EvaluationSums(nothing, 0.0, np.zeros((3, CALIBRATION_BINS)))
    values: dict[str, Any] = {
        "confusion": sums.confusion.ravel().tolist(),
        "loss": float(sums.loss),
        "calibration": sums.calibration.ravel().tolist(),
    }
    return RecordDict({"evaluation": ConfigRecord(values)})


def _folder(folder: Path, schema: Schema) -> NodeData:
    try:
        return _read(folder, schema, _stamp(folder))
    except (DataError, FileError) as error:  # paths and cells of a folder are not the server's affair
        logger.error("%s", error)
        found = (
            counted(len(error.defects), "defect") if isinstance(error, FolderError) else "a file that cannot be read"
        )
        raise Refusal(
            f"the node's folder has {found}, or does not fit the schema; its log says more, and so does `fedlabel data "
            "check` there"
        ) from None


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Returns sizes and times of a folder's files, so that a changed one is read again."""
    try:
        return tuple(
            (path.name, status.st_size, status.st_mtime_ns)
            for path in sorted(folder.iterdir())
            for status in [path.stat()]
        )
    except OSError as error:
        logger.error("%s", file_error(error, folder))
        raise Refusal("the node's folder (`data` in --node-config) cannot be read; its log says why") from None


@lru_cache(maxsize=FOLDERS)
def _read(folder: Path, schema: Schema, stamp: tuple[tuple[str, int, int], ...]) -> NodeData:
    return read_node_folder(folder, schema)


@lru_cache(maxsize=FOLDERS)
def _experiment(
    text: str, agreement_text: str, client: int, folder: Path, stamp: tuple[tuple[str, int, int], ...]
) -> Experiment:
    config, agreement = parse_config(text), parse_agreement(agreement_text)
    federation = node_federation(_folder(folder, agreement.schema), agreement, client, config.num_clients)
    return Experiment(config, federation)
