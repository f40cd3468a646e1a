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
    """(n,) bool over the training split: whose label its client knows."""
    test_parts: list[np.ndarray]
    """Per client: rows of the evaluation split, with the client's class mix, (m_k,) int64."""

    def supervision(self, client: int) -> Supervision:
        """Returns what `client` knows of the labels of its samples; hidden labels are not read."""
        rows = self.parts[client]
        return supervise(self.dataset.train.labels[rows], self.labeled[rows], self.dataset.num_classes)

    def hidden_labels(self, client: int) -> torch.Tensor:
        """Returns (n_k,) true labels. For the evaluator only: nothing that trains may call this."""
        return self.dataset.train.labels[self.parts[client]]

    def to_json(self) -> str:
        """Returns the index lists of every client, the label counts and a hash over all, as JSON."""
        clients = [
            {
                "labeled": rows[self.labeled[rows]].tolist(),
                "unlabeled": rows[~self.labeled[rows]].tolist(),
                "evaluation": test_rows.tolist(),
            }
            for rows, test_rows in zip(self.parts, self.test_parts, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(clients).encode()).hexdigest()
        return json.dumps({"sha256": digest, "dataset": self.dataset.name, "clients": clients})

    def histograms(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns labelled and unlabelled samples per client and class, two (clients, classes) int64 arrays."""
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
        all_labels: give every client all its labels, whatever `supervision` says (the upper bound).
        seed: the experiment's seed.

    Raises:
        ValueError: the data are missing or damaged, or the partition or the labels asked for are impossible.
    """
    dataset = load_dataset(data, seed)
    labels = dataset.train.labels.numpy()
    parts = partition(labels, num_clients, dataset.num_classes, partition_config, seed)
    if all_labels:
        mask = np.ones(len(labels), dtype=bool)
    else:
        mask = labeled_mask(labels, parts, dataset.num_classes, supervision, seed)
        if not mask.any():
            raise ValueError(
                f"`supervision` ({supervision}) leaves no label at any of `num_clients` (={num_clients}) clients of "
                f"{min(map(len, parts))} to {max(map(len, parts))} samples; raise supervision.label_rate, or set "
                "supervision.labels_per_client, labels_per_class or labels_total."
            )
    split = dataset.validation if evaluation_split == "validation" else dataset.test
    if len(split.labels) == 0:
        raise ValueError(
            f"`evaluation.split` (={evaluation_split}) is empty for data set {dataset.name}; for validation set "
            f"data.validation_fraction (={data.validation_fraction}) above 0."
        )
    rng = numpy_generator(seed, "evaluation_parts")
    test_parts = split_like(labels, parts, split.labels.numpy(), dataset.num_classes, rng)
    return Federation(dataset, parts, mask, test_parts)
