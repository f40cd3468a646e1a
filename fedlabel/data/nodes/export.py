"""Writes a simulated federation as folders of real nodes: what each client has, and nothing that it does not know.

A folder is made of the client's inputs and its supervision record alone; true labels are read of the test set only.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.federation import Federation
from fedlabel.data.labels.labeling_functions import NOT_ASKED
from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.nodes.files import (
    ANNOTATOR,
    ARRAYS,
    BAG,
    BAGS,
    CANDIDATES,
    EPSILON,
    LABEL,
    LABELS,
    NOISY_CANDIDATES,
    NOISY_LABEL,
    OWN,
    SAMPLE,
    SPLIT,
    TABLE,
    TEST,
    VOTES,
)
from fedlabel.data.nodes.schema import CATEGORY, NUMBER, SEPARATOR, Column, Schema, parse_schema
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.datasets import Dataset
from fedlabel.data.sets.tables import Table, fitted_columns
from fedlabel.errors import make_folder, naming
from fedlabel.names import counted
from fedlabel.shown import shown

SCHEMA_YAML, TEST_FOLDER = "schema.yaml", "test"


def client_folder(client: int) -> str:
    """Returns the name of a client's folder."""
    return f"client-{client:03d}"


def federation_schema(federation: Federation, label_epsilon: float | None = None) -> Schema:
    """Returns the schema of a simulated federation, with the normalisation of its own training set; label_epsilon: see
    `Schema`.
    """
    record = federation.record
    schema = replace(
        dataset_schema(federation.dataset),
        annotators=tuple(f"annotator {place + 1}" for place in range(record.annotations.shape[1])),
        functions=tuple(report.name for report in federation.functions),
        label_epsilon=label_epsilon,
    )
    return parse_schema(schema.text, "The schema of this federation")  # its checks are those of every schema


def dataset_schema(dataset: Dataset) -> Schema:
    """Returns classes, inputs and normalisation of a data set, whether or not nodes' files could hold such names."""
    columns: tuple[Column, ...] = ()
    if dataset.tables:
        table = dataset.tables["train"]
        fitted = fitted_columns(table)
        numeric = table.numbers.shape[1]
        numbers = zip(table.names, fitted.missing.tolist(), fitted.mean.tolist(), fitted.std.tolist(), strict=False)
        texts = zip(table.names[numeric:], fitted.categories, strict=True)
        columns = (
            *(Column(name, NUMBER, *values) for name, *values in numbers),
            *(Column(name, CATEGORY, categories=found) for name, found in texts),
        )
    return Schema(
        classes=dataset.class_names,
        shape=dataset.input_shape,
        mean=() if columns else dataset.mean,
        std=() if columns else dataset.std,
        allow_flip=dataset.allow_flip,
        columns=columns,
    )


def export_federation(
    federation: Federation,
    train: Tensor,
    test: Tensor,
    path: Path,
    held_out: bool,
    count_epsilon: float | None = None,
    label_epsilon: float | None = None,
) -> Schema:
    """Writes a folder for each client, the schema, and the server's test set, and returns the schema.

    Args:
        federation: simulated, all labels at the clients.
        train: the images of the training split as clients have them; not used for tables.
        test: likewise of the evaluation split.
        path: a new or empty folder.
        held_out: whether each client gets its share of the evaluation split as held-out samples, and the server none.
        count_epsilon: privacy budget of the counts of bags; None: they have no noise.
        label_epsilon: see `Schema`.

    Raises:
        ValueError: the server holds labels, a name cannot be written, or there is something in the folder.
        FileError: the system does not let us write.
    """
    if len(federation.server_rows):
        raise ValueError(
            f"The server holds {counted(len(federation.server_rows), 'labelled sample')}, for which a deployment has "
            "no place: take supervision.labels_at=clients."
        )
    if federation.dataset.tabular and not federation.dataset.tables:
        raise DataError(
            f"A node's folder holds images or a table, and {federation.dataset.name} are arrays of another meaning: "
            "only a simulation can use them."
        )
    schema = federation_schema(federation, label_epsilon)
    make_folder(path)
    with naming(path):
        if any(path.iterdir()):
            raise ValueError(f"`--export` (={path}): the folder is not empty. Give a new one.")
    names, labels = schema.classes, federation.dataset.test.labels
    tables = federation.dataset.tables
    for client, rows in enumerate(federation.parts):
        own = torch.from_numpy(rows)
        tested = torch.from_numpy(federation.test_parts[client] if held_out else rows[:0])
        inputs = [(train, "train", own), (test, "test", tested)]
        folder = path / client_folder(client)
        _write_inputs(folder, inputs, tables)
        _write_labels(folder, federation.record.rows(own), schema, labels[tested].tolist(), count_epsilon)
    if not held_out:
        everything = torch.arange(len(labels))
        _write_inputs(path / TEST_FOLDER, [(test, "test", everything)], tables)
        found = [[place, names[label], TEST] for place, label in enumerate(labels.tolist())]
        write_csv(path / TEST_FOLDER / LABELS, [SAMPLE, LABEL, SPLIT], found)
    with naming(path):
        (path / SCHEMA_YAML).write_text(schema.text, encoding="utf-8")
    return schema


def _write_inputs(folder: Path, parts: Sequence[tuple[Tensor, str, Tensor]], tables: Mapping[str, Table]) -> None:
    """Writes inputs; parts: images, the split's name and its rows."""
    make_folder(folder)
    if not tables:
        with naming(folder):
            np.savez(folder / ARRAYS, x=torch.cat([images[rows].cpu() for images, _, rows in parts]).numpy())
        return
    names = tables["train"].names
    if taken := [name for name in names if name in {*OWN, BAG, SPLIT, SAMPLE} or name.startswith(ANNOTATOR)]:
        raise DataError(f"The column {shown(taken[0])} has the name of a column of labels in {TABLE}: rename it.")
    cells: list[list[object]] = []
    for _, split, rows in parts:
        for row in rows.tolist():
            values = tables[split].row(row).values()
            cells.append([len(cells), *("" if value != value else value for value in values)])
    write_csv(folder / TABLE, [SAMPLE, *names], cells)


def _write_labels(folder: Path, record: Supervision, schema: Schema, tested: list[int], epsilon: float | None) -> None:
    """Writes the labels of a client; tested: classes of its held-out samples, which come after the others."""
    names, size = schema.classes, len(record.candidates)
    annotators = [f"{ANNOTATOR}{name}" for name in schema.annotators]
    header = [SAMPLE, *OWN, BAG, *annotators, SPLIT]
    rows: list[list[object]] = []
    numbers, noisy = record.candidates.sum(1).tolist(), record.noisy.tolist()
    for sample in range(size):
        cells = dict.fromkeys(header, "")
        if numbers[sample] < len(names) or noisy[sample]:
            single = numbers[sample] == 1
            kind = (NOISY_LABEL if single else NOISY_CANDIDATES) if noisy[sample] else LABEL if single else CANDIDATES
            places = record.candidates[sample].nonzero().flatten().tolist()
            cells[kind] = SEPARATOR.join(names[place] for place in places)
        if (bag := int(record.bag[sample])) >= 0:
            cells[BAG] = str(bag + 1)
        for name, label in zip(annotators, record.annotations[sample].tolist(), strict=True):
            cells[name] = names[label] if label >= 0 else ""
        if any(cells.values()):
            rows.append(list({**cells, SAMPLE: sample}.values()))
    rows += [
        list({**dict.fromkeys(header, ""), SAMPLE: size + place, LABEL: names[label], SPLIT: TEST}.values())
        for place, label in enumerate(tested)
    ]
    filled = [place for place in range(len(header)) if any(row[place] != "" for row in rows)]
    if rows:
        write_csv(folder / LABELS, [header[place] for place in filled], [[row[p] for p in filled] for row in rows])
    if len(record.bag_counts):
        more = [] if epsilon is None else [epsilon]
        counts = [[place + 1, *row, *more] for place, row in enumerate(record.bag_counts.tolist())]
        write_csv(folder / BAGS, [BAG, *names, *([EPSILON] if more else [])], counts)
    asked = (record.votes > NOT_ASKED).any(1).nonzero().flatten().tolist()
    if asked:
        votes = [[sample, *(names[v] if v >= 0 else "" for v in record.votes[sample].tolist())] for sample in asked]
        write_csv(folder / VOTES, [SAMPLE, *schema.functions], votes)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table of a node's folder; rows: cells in the order of the header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with naming(path):
        path.write_text(text.getvalue(), encoding="utf-8")
