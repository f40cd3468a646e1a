"""Stratified splits, drawn as scikit-learn draws them but without its import, which takes as long as that of torch."""

from __future__ import annotations

import numpy as np


def split_stratified(labels: np.ndarray, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of training and test set, (train,) and (test,) int64: every class gives the same share of both.

    Equal to `sklearn.model_selection.train_test_split(np.arange(n), test_size=test_fraction, random_state=seed,
    stratify=labels)` (scikit-learn 1.9, `StratifiedShuffleSplit`), also in the order of the rows.

    Args:
        labels: (n,) integers.
        test_fraction: of the rows, in (0, 1), rounded up; either set has at least as many rows as there are classes.
        seed: of the draw.
    """
    draw = np.random.RandomState(seed)
    classes, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(sizes)[:-1])
    test_size = int(np.ceil(test_fraction * len(labels)))
    for_train = _shares(sizes, len(labels) - test_size, draw)
    for_test = _shares(sizes - for_train, test_size, draw)
    train, test = [], []
    for index in range(len(classes)):
        rows = members[index][draw.permutation(sizes[index])]
        train.append(rows[: for_train[index]])
        test.append(rows[for_train[index] : for_train[index] + for_test[index]])
    return draw.permutation(np.concatenate(train)), draw.permutation(np.concatenate(test))


def _shares(sizes: np.ndarray, count: int, draw: np.random.RandomState) -> np.ndarray:
    """Returns how many of `count` rows each class gives, by size; ties between equal remainders are drawn."""
    exact = sizes / sizes.sum() * count
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(count - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing <= 0:
            break
        tied = np.flatnonzero(remainders == remainder)
        chosen = draw.choice(tied, size=min(len(tied), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares.astype(np.int64)
