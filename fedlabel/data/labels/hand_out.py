"""Distributes samples and labels to clients and server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlabel.data.labels.bags import Bags
from fedlabel.data.labels.label_amounts import kind_of_samples
from fedlabel.data.labels.supervision_config import SupervisionConfig
from fedlabel.data.partition import (
    COLUMN,
    MAX_DRAWS,
    LabeledPartitionConfig,
    PartitionConfig,
    partition,
    too_small,
)
from fedlabel.data.ragged import Ragged
from fedlabel.data.skew import SkewConfig, long_tails
from fedlabel.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class HandOut:
    """How samples and labels are distributed to clients and server; for the fields see `build_federation`."""

    labels: np.ndarray
    num_classes: int
    num_clients: int
    partition: PartitionConfig
    labeled_partition: LabeledPartitionConfig | None
    supervision: SupervisionConfig
    skew: SkewConfig
    hidden_classes: Sequence[int]
    """Numbers of `skew.unlabeled_only_classes`."""
    all_labels: bool
    seed: int
    owners: Mapping[str, np.ndarray]
    """Key of a partition by a column -> (n,) int64, the client of each sample."""
    published: Bags | None
    """Bags that must stay within one client."""

    @property
    def chosen_over_all(self) -> bool:
        """Whether the labelled samples are chosen over the whole training set, regardless of their client."""
        if self.supervision.mix:
            return False
        counted = self.supervision.labels_per_class is not None or self.supervision.labels_total is not None
        at = self.supervision.labels_at
        return at == "server" or self.labeled_partition is not None or (at == "clients" and counted)

    def labels_first(self) -> tuple[Ragged, np.ndarray, np.ndarray]:
        """Chooses labelled samples first, applies the long tails, and partitions the other samples.

        Returns:
            The clients' parts; (n,) int64, the kind of label (see `kind_of_samples`); the server's rows.
        """
        kinds, kept = self._choose(Ragged.of([np.arange(len(self.labels))]))
        kinds = np.where(kept, kinds, -1)
        labeled, unlabeled = np.flatnonzero(kinds >= 0), np.flatnonzero(kept & (kinds < 0))
        if self.labeled_partition is not None:
            labeled_parts = self._spread(labeled, self.labeled_partition, derive_seed(self.seed, "labeled_partition"))
            unlabeled_parts = self._spread(unlabeled, self.partition, self.seed, labeled_parts.lengths)
            n = len(self.labels)
            owner = np.maximum(labeled_parts.owner(n), unlabeled_parts.owner(n))  # each sample is in one of the two
            return Ragged.by_owner(owner, self.num_clients), kinds, labeled[:0]
        if self.supervision.labels_at == "server" and not self.all_labels:
            if len(unlabeled) == 0:
                raise ValueError(
                    f"`supervision.kind` (={self.supervision.kind}) and `supervision.label_rate` "
                    f"(={self.supervision.label_rate}) beside supervision.labels_at=server leave no sample to the "
                    "clients, since every training sample has a label: take supervision.kind=few_labels and a smaller "
                    "amount."
                )
            return self._spread(unlabeled, self.partition, self.seed), kinds, labeled
        return self._spread(np.flatnonzero(kept), self.partition, self.seed), kinds, labeled[:0]

    def labels_last(self) -> tuple[Ragged, np.ndarray, np.ndarray]:
        """Partitions all samples, chooses labels within each client, applies the long tails; redraws if a client has
        too few samples.

        The tails are exact over the federation; a client's share of labels is then no longer the one configured.

        Returns:
            As `labels_first`.
        """
        best = 0
        for draw in range(MAX_DRAWS):
            seed = self.seed if draw == 0 else derive_seed(self.seed, "partition_again", draw)
            parts = self._spread(np.arange(len(self.labels)), self.partition, seed)
            kinds, kept = self._choose(parts)
            parts = parts.where(kept[parts.rows])
            smallest = int(parts.lengths.min())
            if smallest >= self.partition.min_samples:
                return parts, np.where(kept, kinds, -1), np.arange(0)
            best = max(best, smallest)
        reason = too_small(int(kept.sum()), self.num_clients, self.partition, best, MAX_DRAWS)
        raise ValueError(f"{reason} Or take smaller skew.labeled_imbalance and skew.unlabeled_imbalance.")

    def _choose(self, parts: Ragged) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n,) int64, the kinds of label before the long tails, and (n,) bool, the samples kept by the long
        tails.
        """
        kinds = kind_of_samples(self.labels, parts, self.num_classes, self.supervision, self.seed, self.hidden_classes)
        return kinds, long_tails(self.labels, kinds >= 0, self.num_classes, self.skew, self.seed)

    def _spread(self, rows: np.ndarray, config: PartitionConfig, seed: int, held: np.ndarray | None = None) -> Ragged:
        """As `partition`, for the samples `rows`; published bags stay whole, so a client may get fewer samples than its
        share.
        """
        if config.kind == COLUMN:
            return self._by_column(rows, config, held)
        if self.published is None:
            drawn = partition(self.labels[rows], self.num_clients, self.num_classes, config, seed, held)
            return Ragged(rows[drawn.rows], drawn.offsets)
        bag, counts = self.published.bag.numpy()[rows], self.published.counts.numpy()
        # A bag is one thing to deal out, of its most frequent class; and so is every sample in none.
        things, unit = np.unique(np.where(bag >= 0, bag, len(counts) + np.arange(len(rows))), return_inverse=True)
        in_bag = things < len(counts)
        labels = np.empty(len(things), dtype=np.int64)
        labels[in_bag] = counts[things[in_bag]].argmax(1)
        labels[~in_bag] = self.labels[rows[things[~in_bag] - len(counts)]]
        whole = replace(config, min_samples=config.least_min_samples)
        drawn = partition(labels, self.num_clients, self.num_classes, whole, seed, held)
        dealt = Ragged.by_owner(drawn.owner(len(things))[unit], self.num_clients)
        return Ragged(rows[dealt.rows], dealt.offsets)

    def _by_column(self, rows: np.ndarray, config: PartitionConfig, held: np.ndarray | None = None) -> Ragged:
        owner = self.owners[config.key][rows]
        if self.published is not None:
            bag = self.published.bag.numpy()[rows]
            pairs = np.unique(np.stack([bag, owner], 1)[bag >= 0], axis=0)
            shared = int((np.bincount(pairs[:, 0]) > 1).sum()) if len(pairs) else 0
            if shared:
                raise ValueError(
                    f"`{config.key}.column` (={config.column}): {shared} bags of supervision.bags_file have samples of "
                    "several clients. Their counts are of whole bags, so each must lie in one."
                )
        parts = Ragged.by_owner(owner, self.num_clients)
        sizes = parts.lengths + (held if held is not None else 0)
        if sizes.min() < config.min_samples:
            raise ValueError(
                f"`{config.key}.min_samples` (={config.min_samples}): one of the clients that `{config.key}.column` "
                f"(={config.column}) makes has {sizes.min()} samples. Leave its rows out, or take a smaller "
                f"{config.key}.min_samples."
            )
        return Ragged(rows[parts.rows], parts.offsets)
