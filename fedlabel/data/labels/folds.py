"""Folds of the clients' labels: a fold is withheld from training, so that its predictions are out of sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.ragged import Ragged
from fedlabel.seeding import numpy_generator


def fold_of_samples(label: np.ndarray, parts: Ragged, folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each client's samples with a label, (n,) int64, -1 for others.

    The labels of a client are spread evenly over the folds, those of one class, too; a client's first fold goes by its
    number, so that clients with fewer labels than folds do not all use the same ones.

    Args:
        label: (n,) integers, -1 = none.
        parts: per client the rows of its samples.
        folds: how many.
        seed: the experiment's.
    """
    held = parts.where(label[parts.rows] >= 0)
    owner = held.part_of_row
    chance = numpy_generator(seed, "folds").random(len(label))[held.rows]
    order = np.lexsort((chance, label[held.rows], owner))
    place = np.arange(len(order)) - held.offsets[owner]  # rows lie client by client before and after the sort
    fold = np.full(len(label), -1)
    fold[held.rows[order]] = (place + owner) % folds
    return fold


def without_labels(record: Supervision, mask: np.ndarray) -> Supervision:
    """Returns the record without the labels, candidate sets and annotations of the samples under `mask`, (n,) bool:
    they are then samples of which nothing is known. Bags and votes stay.
    """
    hidden = torch.from_numpy(mask)
    return replace(
        record,
        candidates=record.candidates | hidden[:, None],
        noisy=record.noisy & ~hidden,
        annotations=torch.where(hidden[:, None], -1, record.annotations),
    )
