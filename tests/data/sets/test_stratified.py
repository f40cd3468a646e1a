"""Stratified splits: those of scikit-learn, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from fedlabel.data.sets.stratified import split_stratified


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("classes", "fraction"), [(10, 0.2), (2, 0.5), (3, 0.07), (7, 0.9)])
def test_the_split_is_that_of_scikit_learn(classes: int, fraction: float, seed: int) -> None:
    """Small and equal classes among them, so that remainders tie."""
    sizes = np.random.default_rng(seed).integers(20, 60, classes)
    sizes[:2] = 30
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes) * 3, sizes))
    expected = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    for found, rows in zip(split_stratified(labels, fraction, seed), expected, strict=True):
        assert np.array_equal(found, rows)
        assert found.dtype == np.int64
