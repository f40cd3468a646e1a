"""Who holds what: a data set, its partition over clients and the labels each client may see."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fedlabel.data.datasets import DataConfig, Dataset, load_dataset
from fedlabel.data.partition import PartitionConfig, label_histogram, partition, split_like
from fedlabel.data.supervision import Supervision, SupervisionConfig, labeled_mask, supervise
from fedlabel.seeding import numpy_generator


@dataclass(frozen=True, eq=False)
class Federation:
    """A simulated federation; every process builds the same one from the same configuration."""

    dataset: Dataset
    parts: list[np.ndarray]
    """Per client: sorted rows of the training split, (n_k,) int64."""
    labeled: np.ndarray
    """(n,) bool over the training split: whose label its holder (a client or the server) knows."""
    test_parts: list[np.ndarray]
    """Per client: rows of the evaluation split, with the client's class mix, (m_k,) int64."""
    server_rows: np.ndarray
    """Sorted rows of the training split that the server holds, all of them labelled, (n_s,) int64; mostly none."""

    def supervision(self, client: int) -> Supervision:
        """Returns what `client` knows of the labels of its samples; hidden labels are not read."""
        return self._supervise(self.parts[client])

    def server_supervision(self) -> Supervision:
        """Returns what the server knows of the labels of its samples: all of them."""
        return self._supervise(self.server_rows)

    def _supervise(self, rows: np.ndarray) -> Supervision:
        return supervise(self.dataset.train.labels[rows], self.labeled[rows], self.dataset.num_classes)

    def hidden_labels(self, client: int) -> torch.Tensor:
        """Returns (n_k,) true labels. For the evaluator only: nothing that trains may call this."""
        return self.dataset.train.labels[self.parts[client]]

    def to_json(self) -> str:
        """Returns the index lists of every client and of the server and a hash over all, as JSON."""
        clients = [
            {
                "labeled": rows[self.labeled[rows]].tolist(),
                "unlabeled": rows[~self.labeled[rows]].tolist(),
                "evaluation": test_rows.tolist(),
            }
            for rows, test_rows in zip(self.parts, self.test_parts, strict=True)
        ]
        holders = {"clients": clients, "server": self.server_rows.tolist()}
        digest = hashlib.sha256(json.dumps(holders).encode()).hexdigest()
        return json.dumps({"sha256": digest, "dataset": self.dataset.name, **holders})

    def histograms(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns labelled and unlabelled samples per client and class, two (clients, classes) int64 arrays.

        What the server holds is in neither.
        """
        labels = self.dataset.train.labels.numpy()
        classes = self.dataset.num_classes
        labeled = label_histogram(labels, [rows[self.labeled[rows]] for rows in self.parts], classes)
        unlabeled = label_histogram(labels, [rows[~self.labeled[rows]] for rows in self.parts], classes)
        return labeled, unlabeled


@lru_cache(maxsize=2)
def build_federation(
    data: DataConfig,
    partition_config: PartitionConfig,
    supervision: SupervisionConfig,
    num_clients: int,
    evaluation_split: str,
    all_labels: bool,
    seed: int,
) -> Federation:
    """Loads the data and splits it.

    Args:
        data: which data set.
        partition_config: how it is split over clients.
        supervision: who knows which labels.
        num_clients: number of clients.
        evaluation_split: "test" or "validation", the split that clients are evaluated on.
        all_labels: give every client all its labels, whatever `supervision` says (the upper bound). For
            labels_at=server the server then holds nothing: its samples are the clients', too.
        seed: the experiment's seed.

    Raises:
        ValueError: the data are missing or damaged, or the partition or the labels asked for are impossible.
    """
    dataset = load_dataset(data, seed)
    labels, classes = dataset.train.labels.numpy(), dataset.num_classes
    server_rows = np.arange(0)
    if supervision.labels_at == "server" and not all_labels:
        mask = labeled_mask(labels, [np.arange(len(labels))], classes, supervision, seed)
        server_rows, others = np.flatnonzero(mask), np.flatnonzero(~mask)
        parts = [others[part] for part in partition(labels[others], num_clients, classes, partition_config, seed)]
    else:
        parts = partition(labels, num_clients, classes, partition_config, seed)
        mask = np.ones(len(labels), dtype=bool)
        if not all_labels:
            mask = labeled_mask(labels, parts, classes, supervision, seed)
    if not mask.any():
        raise ValueError(
            f"`supervision` ({supervision}) leaves no label at any of `num_clients` (={num_clients}) clients of "
            f"{min(map(len, parts))} to {max(map(len, parts))} samples or at the server; raise supervision.label_rate, "
            "or set supervision.labels_per_client, labels_per_class or labels_total."
        )
    split = dataset.validation if evaluation_split == "validation" else dataset.test
    if len(split.labels) == 0:
        raise ValueError(
            f"`evaluation.split` (={evaluation_split}) is empty for data set {dataset.name}; for validation set "
            f"data.validation_fraction (={data.validation_fraction}) above 0."
        )
    rng = numpy_generator(seed, "evaluation_parts")
    test_parts = split_like(labels, parts, split.labels.numpy(), classes, rng)
    return Federation(dataset, parts, mask, test_parts, server_rows)
