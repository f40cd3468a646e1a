"""Bags: groups of samples of one client whose label is the number of samples in each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labels.supervision_config import LabelKind
from fedlabel.data.ragged import Ragged
from fedlabel.data.streams import permute
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
    order, sizes = _shuffled(Ragged.of(holders), part, seed, place)
    if feature is not None:
        rank = np.unique(feature, return_inverse=True)[1]
        by_feature = np.lexsort((rank[order.rows], order.part_of_row))  # keeps the order of equal ones
        order = Ragged(order.rows[by_feature], order.offsets)
    bag = np.full(len(labels), -1)
    bag[order.rows] = np.repeat(np.arange(len(sizes.rows)), sizes.rows)
    inside = bag[order.rows] * num_classes + labels[order.rows]
    counts = np.bincount(inside, minlength=len(sizes.rows) * num_classes).reshape(-1, num_classes)
    if part.count_epsilon is not None:
        for client in np.flatnonzero(sizes.lengths).tolist():
            noise = numpy_generator(seed, "supervision", "count_noise", place, client)
            for row in range(sizes.offsets[client], sizes.offsets[client + 1]):
                counts[row] = noisy_counts(counts[row], part.count_epsilon, noise)
    return Bags(torch.from_numpy(bag), torch.from_numpy(counts))


def _shuffled(holders: Ragged, part: LabelKind, seed: int, place: int) -> tuple[Ragged, Ragged]:
    """Returns each client's rows in random order, and the sizes of its bags. For the arguments see `draw_bags`."""
    size, most = part.bag_size, part.bag_size_max
    assert size is not None
    if most is None:
        order = permute(holders, np.arange(len(holders)), seed, "supervision", "bags", place)
        samples, number = order.lengths, -(-order.lengths // size)
        sizes = Ragged.of_lengths(np.full(number.sum(), size), number)
        sizes.rows[sizes.offsets[1:][number > 0] - 1] -= (number * size - samples)[number > 0]
        return order, sizes
    rows, found = [], []
    for client, mine in enumerate(holders):
        rng = numpy_generator(seed, "supervision", "bags", place, client)
        rows.append(rng.permutation(mine))
        left, drawn = len(mine), []
        while left:
            drawn.append(min(left, int(rng.integers(size, most + 1))))
            left -= drawn[-1]
        found.append(np.array(drawn, dtype=np.int64))
    return Ragged.of(rows), Ragged.of(found)


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
