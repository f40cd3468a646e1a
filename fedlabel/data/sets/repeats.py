"""Finds duplicate images in a data set."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from torch import Tensor

from fedlabel.data.sets.loaders import Split

PIECE = 100_000
"""Images whose hashes are Python's objects at a time."""


def repeated_images(train: Split, test: Split, where: str) -> list[str]:
    """Returns notes on images that are equal in every pixel: in both sets, or with two labels."""
    group = _groups(np.concatenate([_keys(train.images), _keys(test.images)]))
    of_train, of_test = group[: len(train.labels)], group[len(train.labels) :]
    has_label = train.labels.numpy() >= 0
    labels, of_label = train.labels.numpy()[has_label], of_train[has_label]
    first = np.empty(len(group), dtype=np.int64)
    first[of_label[::-1]] = labels[::-1]  # of equal images the first one is written last
    contradicting = int((labels != first[of_label]).sum())
    in_train = np.zeros(len(group), dtype=bool)
    in_train[of_train] = True
    shared = int(in_train[of_test].sum())
    notes = []
    if shared:
        notes.append(
            f"{where}: {shared} of the {len(test.labels)} test images are training images, too; what is measured on "
            "them says nothing about new ones."
        )
    if contradicting:
        notes.append(
            f"{where}: {contradicting} of the {len(train.labels)} training images repeat one under another label."
        )
    return notes


def _keys(images: Tensor) -> np.ndarray:
    """Returns a hash of each image, (n, 2) uint64."""
    rows = images.flatten(1).numpy()
    pieces = [
        b"".join([blake2b(memoryview(row), digest_size=16).digest() for row in rows[start : start + PIECE]])
        for start in range(0, len(rows), PIECE)
    ]
    return np.frombuffer(b"".join(pieces), dtype=np.uint64).reshape(-1, 2)


def _groups(keys: np.ndarray) -> np.ndarray:
    """Returns (n,) int64, the same number for equal keys, (n, 2), and other numbers for others."""
    order = np.lexsort(keys.T)
    differs = (keys[order[1:]] != keys[order[:-1]]).any(1)
    group = np.empty(len(keys), dtype=np.int64)
    group[order] = np.concatenate([np.zeros(min(1, len(keys)), dtype=np.int64), np.cumsum(differs)])
    return group
