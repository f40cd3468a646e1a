"""Bags: groups of samples of one client whose label is the number of samples in each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labels.supervision_config import LabelKind
from fedlabel.seeding import numpy_generator


class Bags(NamedTuple):
    """Membership and class counts of bags."""

    bag: Tensor
    """(n,) int64, the bag of each sample, -1 = none."""
    counts: Tensor
    """(bags, classes) int64."""


def draw_bags(
    labels: np.ndarray,
    holders: Sequence[np.ndarray],
    num_classes: int,
    part: LabelKind,
    feature: np.ndarray | None,
    seed: int,
    place: int = 0,
) -> Bags:
    """Puts samples into bags, client by client, and counts their classes.

    Args:
        labels: (n,) the truth.
        holders: per client the rows that are to be in bags.
        num_classes: how many classes.
        part: size and order of the bags, and the noise on their counts.
        feature: (n,) values, for bags of samples with neighbouring ones; None: bags are drawn at random.
        seed: the experiment's seed; every client draws numbers of its own.
        place: which part of the mix this is; each has numbers of its own, and noise of its own.

    Returns:
        The bags; the last one of a client may be smaller than asked for.
    """
    bag = np.full(len(labels), -1)
    counts: list[np.ndarray] = []
    for client, rows in enumerate(holders):
        rng = numpy_generator(seed, "supervision", "bags", place, client)
        noise = numpy_generator(seed, "supervision", "count_noise", place, client)
        order = rng.permutation(rows)
        if feature is not None:
            order = order[np.argsort(feature[order], kind="stable")]
        assert part.bag_size is not None
        start = 0
        while start < len(order):
            size = (
                part.bag_size if part.bag_size_max is None else int(rng.integers(part.bag_size, part.bag_size_max + 1))
            )
            members = order[start : start + size]
            bag[members] = len(counts)
            exact = np.bincount(labels[members], minlength=num_classes)
            counts.append(exact if part.count_epsilon is None else noisy_counts(exact, part.count_epsilon, noise))
            start += size
    return Bags(torch.from_numpy(bag), torch.from_numpy(np.array(counts, dtype=np.int64).reshape(-1, num_classes)))


def noisy_counts(counts: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Returns counts with discrete Laplace noise, brought back to non-negative integers of the same sum.

    One sample that changes its class changes two counts by one each (of two classes: the only free one by one), so
    noise with P(k) ~ exp(-epsilon |k| / 2) (exp(-epsilon |k|)) on each is epsilon-differentially private for a bag of
    public size (Ghosh et al., STOC 2009). What is done after that has no access to the true counts.

    A simulation of the mechanism: its noise is drawn from the experiment's seed, which everyone knows.

    Args:
        counts: (classes,) integers.
        epsilon: the privacy budget of a bag.
        rng: draws the noise.

    Returns:
        (classes,) int64.
    """
    size = int(counts.sum())

    def laplace(scale: float, number: int) -> np.ndarray:
        stop = -np.expm1(-1 / scale)
        return rng.geometric(stop, number) - rng.geometric(stop, number)

    if len(counts) == 2:
        one = int(np.clip(counts[1] + laplace(1 / epsilon, 1)[0], 0, size))
        return np.array([size - one, one])
    noised = np.clip(counts + laplace(2 / epsilon, len(counts)), 0, None).astype(float)
    if noised.sum() == 0:
        noised = np.ones(len(counts))
    share = noised * size / noised.sum()
    rounded = np.floor(share).astype(np.int64)
    rounded[np.argsort(rounded - share, kind="stable")[: size - rounded.sum()]] += 1  # largest remainder
    return rounded
