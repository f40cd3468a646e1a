"""A simulated federation: a data set, its partition over clients, and the labels available to each client."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlabel.data.labels.bag_files import as_counted, bags_of_column, published_bags
from fedlabel.data.labels.bags import Bags, draw_bags
from fedlabel.data.labels.folds import fold_of_samples, without_labels
from fedlabel.data.labels.hand_out import HandOut
from fedlabel.data.labels.imprecision import LabelSources
from fedlabel.data.labels.label_card import LabelCard, label_card
from fedlabel.data.labels.labeling_functions import FunctionReport
from fedlabel.data.labels.supervision import KIND_NAMES, Supervision, ask_functions, build_supervision, reveal_labels
from fedlabel.data.labels.supervision_config import SupervisionConfig
from fedlabel.data.labels.suspects import revised
from fedlabel.data.own_columns import own_column, own_rows, with_columns_aside
from fedlabel.data.partition import (
    COLUMN,
    LabeledPartitionConfig,
    PartitionConfig,
    column_owners,
    split_like,
)
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.class_names import find_classes
from fedlabel.data.sets.config import DataConfig, DataError, data_root
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.data.sets.fingerprint import fingerprint
from fedlabel.data.skew import SkewConfig
from fedlabel.names import client_label
from fedlabel.seeding import derive_seed, numpy_generator

LISTED_CLIENTS = 10_000
"""Clients whose samples are listed in `partition.json`, each with its own; of more, those of `shown_clients` are."""
SHOWN_CLIENTS = 1_000
"""Clients that figures, and lists with a number per client, show at most, see `shown_clients`."""
MAX_WARNINGS = 10
"""Labelling functions that are warned of one by one; the table has all."""


def shown_clients(num_clients: int) -> np.ndarray:
    """Returns (m,) int64, the clients that figures and lists show: all, or `SHOWN_CLIENTS` evenly spaced ones."""
    shown = min(num_clients, SHOWN_CLIENTS)
    return np.arange(shown) * num_clients // shown


@dataclass(frozen=True, eq=False)
class Federation:
    """A simulated federation; every process builds the same one from the same configuration."""

    dataset: Dataset
    parts: Ragged
    """Per client: sorted rows of the training split, (n_k,) int64."""
    record: Supervision
    """The supervision record of the training split: of each sample the labels available to its holder (a client or the
    server)."""
    test_parts: Ragged
    """Per client: rows of the evaluation split, with the client's class mix, (m_k,) int64."""
    in_sets: np.ndarray
    """(n,) bool over the training split: samples whose kind of label is a candidate set, of one class or of all classes
    included."""
    server_rows: np.ndarray
    """Sorted rows of the training split that the server holds, all of them labelled, (n_s,) int64; usually empty."""
    test_bags: Bags | None
    """Bags over the evaluation split, made as the clients' bags (in a mix: as its first part with bags) within the
    clients' shares, with noise on their counts if the clients' bags have it; None if clients have no bags."""
    functions: tuple[FunctionReport, ...] = ()
    """One report per labelling function, over all clients; empty if there are none."""
    names: tuple[str, ...] = ()
    """Names of the clients, if a column assigns samples to clients; else empty."""

    @cached_property
    def labeled(self) -> np.ndarray:
        """(n,) bool over the training split: samples with supervision of their own, see
        `Supervision.has_supervision`.
        """
        return self.record.has_supervision.numpy()

    @property
    def card(self) -> LabelCard:
        """The label card of all clients and the server."""
        return label_card(self.record)

    def client_labels(self, clients: np.ndarray) -> list[str]:
        """Returns what figures call these clients, (m,) integers; empty if clients have no names."""
        return [client_label(client, self.names[client]) for client in clients.tolist()] if self.names else []

    @property
    def function_names(self) -> tuple[str, ...]:
        """Names of labelling functions whose votes were read, not cast here; empty if there are none."""
        return ()

    def supervision(self, client: int) -> Supervision:
        """Returns the supervision record of `client`'s samples."""
        return self.record.rows(torch.from_numpy(self.parts[client]))

    def server_supervision(self) -> Supervision:
        """Returns the supervision record of the server's samples, which are all labelled."""
        return self.record.rows(torch.from_numpy(self.server_rows))

    def hidden_labels(self, client: int) -> torch.Tensor:
        """Returns (n_k,) true labels, -1 if the data have none. For the evaluator only: training code must not call
        this.
        """
        return self.dataset.train.labels[self.parts[client]]

    @property
    def _is_listed(self) -> bool:
        return len(self.parts) <= LISTED_CLIENTS

    def to_json(self, further: Mapping[str, str] | None = None) -> str:
        """Returns the index lists of every client and of the server, and hashes of them and of the data, as JSON.

        Of more than `LISTED_CLIENTS` only those of `shown_clients`, with their numbers, and a summary of all. Of a
        table whose test set is split off by `data.test_fraction` also `test_rows`: the rows of its file that are for
        testing, 0 being the first row of data.

        Args:
            further: hashes of other files of the run, by name.
        """
        found: dict[str, object] = {
            "sha256": self.sha256,
            "data": {**self.data_hashes, **(further or {})},
            "dataset": self.dataset.name,
        }
        if self.dataset.test_rows is not None:
            found["test_rows"] = self.dataset.test_rows.tolist()
        if self._is_listed:
            return json.dumps(found | self._holders(np.arange(len(self.parts))))
        shown = shown_clients(len(self.parts))
        listed = self._holders(shown)
        for client, lists in zip(shown.tolist(), listed["clients"], strict=True):
            lists["client"] = client
        sizes = {
            "samples": self.parts.lengths,
            "labeled": self.parts.sums(self.labeled[self.parts.rows]),
            "evaluation": self.test_parts.lengths,
        }
        summary = {
            name: {"smallest": int(each.min()), "mean": float(each.mean()), "largest": int(each.max())}
            for name, each in sizes.items()
        }
        note = (
            f"Index lists of {len(shown):,} of {len(self.parts):,} clients, evenly spaced; above "
            f"{LISTED_CLIENTS:,} clients not all are written. The configuration (config.yaml) with the same data makes "
            "all again: fedlabel.experiment.open_experiment(text).federation.parts[client]. sha256 is of all."
        )
        return json.dumps({**found, "num_clients": len(self.parts), "note": note, "per_client": summary, **listed})

    def _holders(self, clients: np.ndarray) -> dict[str, Any]:
        found = []
        for client in clients.tolist():
            rows = self.parts[client]
            lists: dict[str, Any] = {
                "labeled": rows[self.labeled[rows]].tolist(),
                "unlabeled": rows[~self.labeled[rows]].tolist(),
                "evaluation": self.test_parts[client].tolist(),
            }
            found.append({**lists, "name": self.names[client]} if self.names else lists)
        return {"clients": found, "server": self.server_rows.tolist()}

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """Hashes of the inputs and of the labels, see `fingerprint`."""
        return fingerprint(self.dataset)

    @cached_property
    def sha256(self) -> str:
        """A hash of each client's sample indices and the supervision record."""
        found = hashlib.sha256()
        if self._is_listed:
            found.update(json.dumps(self._holders(np.arange(len(self.parts)))).encode())
        else:  # the text of a million clients would take longer than all else that is done before a run
            for held in (self.parts, self.test_parts):
                found.update(held.offsets.tobytes())
                found.update(held.rows.tobytes())
            found.update(self.server_rows.tobytes())
            found.update(json.dumps(self.names).encode())
        record: tuple[torch.Tensor, ...] = (self.record.candidates, self.record.noisy, self.record.annotations)
        if len(self.record.bag_counts):
            record = (*record, self.record.bag, self.record.bag_counts)
        if self.record.votes.shape[1]:
            record = (*record, self.record.votes)
        if self.record.weight is not None:
            record = (*record, self.record.weight)
        for values in record:
            found.update(values.contiguous().numpy().tobytes())
        return found.hexdigest()

    @cached_property
    def num_without_label(self) -> int:
        """Number of training samples, of clients and server, without a label in the data: their true class is
        unknown.
        """
        held = np.concatenate([self.parts.rows, self.server_rows])
        return int((self.dataset.train.labels[torch.from_numpy(held)] < 0).sum())

    @property
    def true_classes(self) -> tuple[str, ...]:
        """The columns of `histograms`: the names of the classes and, if some samples have no label in the data,
        "unknown".
        """
        return (*self.dataset.class_names, *(["unknown"] if self.num_without_label else []))

    def histograms(self, clients: np.ndarray | None = None) -> np.ndarray:
        """Returns samples by kind of label, client and true class, (len(KIND_NAMES), clients, columns) int64; for the
        columns see `true_classes`.

        What the server holds is not in it.

        Args:
            clients: of which clients, (m,) integers; None: of all.
        """
        held = self.parts if clients is None else self.parts.take(clients)
        kind, columns = self.record.kind.numpy()[held.rows], len(self.true_classes)
        place = (kind * len(held) + held.part_of_row) * columns + self._columns[held.rows]
        shape = len(KIND_NAMES), len(held), columns
        return np.bincount(place, minlength=math.prod(shape)).reshape(shape)

    def class_counts(self, mask: np.ndarray) -> np.ndarray:
        """Returns samples under `mask`, (n,) bool, by client and true class, (clients, columns) int64."""
        held, columns = self.parts.where(mask[self.parts.rows]), len(self.true_classes)
        place = held.part_of_row * columns + self._columns[held.rows]
        return np.bincount(place, minlength=len(held) * columns).reshape(-1, columns)

    def rare_classes(self, names: Sequence[str] = ()) -> list[int]:
        """Returns the numbers of the rare classes, for the simulation of devices and the evaluation.

        Args:
            names: of them; empty: the half of the classes (rounded down) of which clients hold the fewest samples,
                among equal ones the first.

        Raises:
            ValueError: they are not the data set's classes, or all of them.
        """
        truth, known = self.dataset.train.labels.numpy()[self.parts.rows], self.dataset.class_names
        if names:
            return find_classes("devices.rare_classes", names, known, "no class to be frequent")
        counts = np.bincount(truth[truth >= 0], minlength=len(known))
        return [int(each) for each in np.argsort(counts, kind="stable")[: len(known) // 2]]

    def rarity(self, rare_classes: Sequence[str] = ()) -> np.ndarray:
        """Returns (clients,) float64, the share of each client's samples whose true class is rare; 0 without samples.
        For the simulation of devices only: training code must not call this. For the argument and errors see
        `rare_classes`.
        """
        truth = self.dataset.train.labels.numpy()[self.parts.rows]
        rare = self.rare_classes(rare_classes)
        return self.parts.sums(np.isin(truth, rare)) / np.maximum(self.parts.lengths, 1)

    @property
    def _columns(self) -> np.ndarray:
        """(n,) int64, of each sample its place in `true_classes`."""
        labels = self.dataset.train.labels.numpy()
        return np.where(labels < 0, len(self.true_classes) - 1, labels)

    def kinds(self, clients: np.ndarray | None = None) -> np.ndarray:
        """Returns the number of samples per client and kind of label, (clients, len(KIND_NAMES)) int64.

        Args:
            clients: of which clients, (m,) integers; None: of all.
        """
        held = self.parts if clients is None else self.parts.take(clients)
        place = held.part_of_row * len(KIND_NAMES) + self.record.kind.numpy()[held.rows]
        return np.bincount(place, minlength=len(held) * len(KIND_NAMES)).reshape(-1, len(KIND_NAMES))

    def _kinds(self) -> dict[str, Any]:
        """Returns the audit of the kinds of label: of each client or, of more than `LISTED_CLIENTS`, of those that are
        shown, and of all together.
        """
        names = list(KIND_NAMES)
        if self._is_listed:
            return {"names": names, "clients": self.kinds().tolist()}
        shown = shown_clients(len(self.parts))
        total = np.bincount(self.record.kind.numpy()[self.parts.rows], minlength=len(names))
        return {
            "names": names,
            "clients": self.kinds(shown).tolist(),
            "shown_clients": shown.tolist(),
            "total": total.tolist(),
        }

    def _class_counts(self) -> dict[str, Any]:
        """Returns samples by client and true class, with and without supervision, of the shown clients."""
        shown = shown_clients(len(self.parts))
        histograms = self.histograms(shown)
        return {
            "classes": list(self.true_classes),
            "clients": shown.tolist(),
            "with_supervision": histograms[1:].sum(0).tolist(),
            "without": histograms[0].tolist(),
        }

    def audit(self) -> dict[str, Any]:
        """Returns the content of `supervision.json`, which compares the supervision record with the true labels: for
        the evaluator only.

        The names of the classes; how many samples have no label in the data; of the shown clients how many samples of
        each true class have supervision and how many have none; per client (of more than `LISTED_CLIENTS`: per shown
        one, and in total) how many samples of each kind (a set of one class counts as a
        label, one of all as nothing), how many candidates the sets have and how many hold the truth, of bags how many
        there are of each size, of how many the true counts are known and how many of these have wrong ones, and of
        noisy labels the matrix of counts (true class, label); of several annotators that of each, too; and what came of
        asking each labelling function.
        """
        record, truth, sets = self.record, self.dataset.train.labels, torch.from_numpy(self.in_sets)
        rows = torch.from_numpy(np.sort(np.concatenate([self.parts.rows, self.server_rows])))
        if len(rows) < len(truth):
            record, truth, sets = record.rows(rows), truth[rows], sets[rows]
        size = record.candidates[sets].sum(1)  # a set is made of a true label, so there is one
        holds = record.candidates[sets].gather(1, truth[sets][:, None])
        counts = self.noise_counts()[0]
        annotators = record.annotations.shape[1]
        each = {"annotators": self.noise_counts(annotators).tolist()} if annotators > 1 else {}
        return {
            "classes": list(self.dataset.class_names),
            "without_label": self.num_without_label,
            "kinds": self._kinds(),
            "class_counts": self._class_counts(),
            "candidate_sets": {
                "sizes": torch.bincount(size, minlength=self.dataset.num_classes + 1).tolist(),
                "hold_the_truth": int(holds.sum()),
            },
            "bags": self._bags(record, truth),
            "noisy_labels": {"counts": counts.tolist(), "wrong": int(counts.sum() - np.trace(counts)), **each},
            "labeling_functions": [
                {key: value for key, value in asdict(report).items() if key != "seconds"} for report in self.functions
            ],
        }

    def _bags(self, record: Supervision, truth: torch.Tensor) -> dict[str, Any]:
        """Returns the audit of bags: how many have each size, how many have known true counts, and how many of these
        have wrong counts.
        """
        inside, classes = (record.bag >= 0) & (truth >= 0), self.dataset.num_classes
        sizes = record.bag_counts.sum(1)
        true = torch.bincount(record.bag[inside] * classes + truth[inside], minlength=len(sizes) * classes)
        true = true.view(-1, classes)
        has_counts = true.sum(1) == sizes
        wrong = has_counts & (true != record.bag_counts).any(1)
        return {
            "sizes": torch.bincount(sizes).tolist(),
            "true_counts_known": int(has_counts.sum()),
            "wrong_counts": int(wrong.sum()),
        }

    def warnings(self) -> list[str]:
        """Returns warnings to show before a run: samples without a label in the data, labelling functions that fail."""
        failing = [warning for report in self.functions if (warning := report.warning())]
        return self._label_warnings() + failing[:MAX_WARNINGS]

    def _label_warnings(self) -> list[str]:
        held = len(self.parts.rows) + len(self.server_rows)
        used = int((self.record.labeled & ~self.record.noisy).sum())
        if not self.num_without_label or not 0 < used < held - self.num_without_label:
            return []
        return [
            f"{self.num_without_label:,} of {held:,} training samples have no label in the data. Of the "
            f"{held - self.num_without_label:,} labels that there are, "
            f"supervision uses {used:,} and hides the others; supervision.kind=full uses all."
        ]

    def audit_json(self) -> str:
        """Returns the audit and the federation's hash as JSON, in one line."""
        return json.dumps({**self.audit(), "partition_sha256": self.sha256}) + "\n"

    @property
    def has_noisy_sets(self) -> bool:
        """Whether some sets of several candidates may miss the truth; these have no single true noise matrix."""
        return bool((self.record.noisy & ~self.record.labeled).any())

    def noise_counts(self, annotators: int = 1) -> np.ndarray:
        """Returns noisy labels by true class, (annotators, classes, classes) int64, of the samples with a true label.
        For the evaluator only.

        Args:
            annotators: 1 counts all labels together, more those of each annotator.
        """
        classes, truth = self.dataset.num_classes, self.dataset.train.labels
        counts = torch.zeros(annotators, classes, classes, dtype=torch.int64)
        label = torch.where(self.record.noisy, self.record.label, -1)
        for place, given in [(0, label), *enumerate(self.record.annotations.unbind(1))]:
            has_both = (given >= 0) & (truth >= 0)
            pairs = torch.bincount(truth[has_both] * classes + given[has_both], minlength=classes**2)
            counts[place if annotators > 1 else 0] += pairs.view(classes, classes)
        return counts.numpy()


@lru_cache(maxsize=2)
def build_federation(
    data: DataConfig,
    partition_config: PartitionConfig,
    labeled_partition: LabeledPartitionConfig | None,
    supervision: SupervisionConfig,
    skew: SkewConfig,
    num_clients: int,
    evaluation_split: str,
    all_labels: bool,
    seed: int,
) -> Federation:
    """Loads the data, partitions them over clients and builds the supervision record.

    Args:
        data: which data set.
        partition_config: how it is split over clients.
        labeled_partition: how the labelled samples are split if not together with the others.
        supervision: who knows which labels.
        skew: long tails and classes without labels. The shift of features is `shift_features`, not done here.
        num_clients: number of clients.
        evaluation_split: "test" or "validation", the split that clients are evaluated on.
        all_labels: give every client all labels that the data have of its samples, whatever `supervision` and `skew`
            say (the upper bound). The samples are those of a run without it; for labels_at=server the server's are the
            clients', too.
        seed: the experiment's seed.

    Raises:
        ValueError: the data are missing or damaged, or the partition or the labels asked for are impossible.
    """
    dataset, own = _load(data, partition_config, labeled_partition, supervision, seed)
    labels, classes = dataset.train.labels.numpy(), dataset.num_classes
    if all_labels and supervision.folds is not None:
        raise ValueError(
            f"`supervision.folds` (={supervision.folds}) withhold labels, and method.oracle_labels gives all of them "
            "to the clients: leave one of the two out."
        )
    if num_clients > len(labels):
        raise ValueError(
            f"`num_clients` (={num_clients}) must not exceed the number of training samples (={len(labels)})."
        )
    hidden = skew.hidden_classes(dataset.class_names)
    published = published_bags(dataset, data, supervision, own.get("supervision.bag_column"))
    owners, names = {}, {}
    for config in (partition_config, labeled_partition):
        if config is not None and config.kind == COLUMN:
            owners[config.key], names[config.key] = column_owners(own[f"{config.key}.column"], num_clients, config)
    recipe = HandOut(
        labels,
        classes,
        num_clients,
        partition_config,
        labeled_partition,
        supervision,
        skew,
        hidden,
        all_labels,
        seed,
        owners,
        published,
    )
    parts, kinds, server_rows = recipe.labels_first() if recipe.chosen_over_all else recipe.labels_last()
    functions: tuple[FunctionReport, ...] = ()
    if all_labels:
        held = np.isin(np.arange(len(labels)), np.concatenate([parts.rows, server_rows]))
        record = reveal_labels(labels, held & (labels >= 0), classes)
    else:
        sources = LabelSources(dataset, data_root(data), seed, np.flatnonzero((kinds >= 0) & (labels >= 0)))
        record = build_supervision(labels, kinds, supervision.parts, classes, sources, seed, parts, published)
        cast = ask_functions(kinds, supervision.parts, dataset, parts)
        if cast is not None:
            record, functions = replace(record, votes=torch.from_numpy(cast.votes)), cast.reports
        record = _revised(record, parts, supervision, dataset.class_names, seed)
    if not (record.has_supervision | record.voted_on).any() and len(record.bag_counts) == 0:
        raise ValueError(
            f"`supervision` leaves no label at any of `num_clients` (={num_clients}) clients of "
            f"{parts.lengths.min()} to {parts.lengths.max()} samples or at the server; raise supervision.label_rate, "
            "or set supervision.labels_per_client, labels_per_class or labels_total; where labels are imprecise, see "
            "that not every set has all classes (supervision.partial_ratio below 1) and not every label of "
            "supervision.labels_file is -1."
        )
    split = dataset.validation if evaluation_split == "validation" else dataset.test
    if len(split.labels) == 0:
        raise ValueError(
            f"`evaluation.split` (={evaluation_split}) is empty for data set {dataset.name}; for validation set "
            f"data.validation_fraction (={data.validation_fraction}) above 0, of training samples that have a label."
        )
    rng = numpy_generator(seed, "evaluation_parts")
    client_names = tuple(names.get(partition_config.key, ()))
    own_test = own_rows(dataset, data, partition_config, client_names, evaluation_split)
    if own_test is not None:
        test_parts = own_test
    else:
        test_parts = split_like(as_counted(labels, published), parts, split.labels.numpy(), classes, rng)
    with_sets = [place for place, part in enumerate(supervision.parts) if part.has_candidates and not all_labels]
    test_bags = None
    for part in supervision.parts:
        if part.bags_file is not None:
            test_bags = bags_of_column(dataset, data, part, evaluation_split)
        elif part.kind == "bags" and test_bags is None:
            scope = derive_seed(seed, "evaluation")
            feature = None if part.bag_feature is None else dataset.feature(part.bag_feature, evaluation_split)
            test_bags = draw_bags(split.labels.numpy(), test_parts, classes, part, feature, scope)
    in_sets = np.isin(kinds, with_sets)
    return Federation(dataset, parts, record, test_parts, in_sets, server_rows, test_bags, functions, client_names)


def _revised(
    record: Supervision, parts: Ragged, supervision: SupervisionConfig, class_names: Sequence[str], seed: int
) -> Supervision:
    """Returns the record after an audit, and without the labels of the fold that is withheld."""
    if supervision.audit is not None:
        action, weight = supervision.audit_action, supervision.audit_weight
        record = revised(record, parts, Path(supervision.audit), action, class_names, weight)
    if supervision.folds is None:
        return record
    fold = fold_of_samples(record.label.numpy(), parts, supervision.folds, seed)
    return without_labels(record, fold == supervision.withheld_fold)


def count_owners(
    data: DataConfig,
    partition_config: PartitionConfig,
    labeled_partition: LabeledPartitionConfig | None,
    supervision: SupervisionConfig,
    seed: int,
) -> int:
    """Returns how many clients own training samples by `partition.column`, without those of the test and validation
    set. For arguments and errors see `build_federation`.
    """
    _, own = _load(data, partition_config, labeled_partition, supervision, seed)
    return len(set(own[f"{partition_config.key}.column"].tolist()))


def _load(
    data: DataConfig,
    partition_config: PartitionConfig,
    labeled_partition: LabeledPartitionConfig | None,
    supervision: SupervisionConfig,
    seed: int,
) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Loads the data; returns also the columns that the configuration uses otherwise than as features: key -> (n,)
    texts of the training split.
    """
    wanted = {
        f"{config.key}.column": config.column
        for config in (partition_config, labeled_partition)
        if config is not None and config.column is not None
    }
    for part in supervision.parts:
        if part.bag_column is not None:
            wanted["supervision.bag_column"] = part.bag_column
    try:
        dataset = load_dataset(with_columns_aside(data, wanted), seed)
    except DataError as error:
        for key, name in wanted.items():  # the user has not named it there
            if name not in data.aside_columns and str(error).startswith("`data.aside_columns`") and name in str(error):
                raise DataError(str(error).replace("data.aside_columns", key, 1)) from error
        raise
    own = {}
    for key, name in wanted.items():
        values = own_column(dataset, data, key, name)
        assert values is not None, "the training split has all its columns"
        own[key] = values
    return dataset, own
