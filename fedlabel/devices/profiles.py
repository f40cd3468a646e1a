"""Profiles of devices: presets, and how a population of them is drawn.

Speeds are of the run's network: a preset assumes a small convolutional one on images of 32 x 32 pixels. For another
network give `forward` in `devices.population`; what matters most is how the devices differ. A backward pass is taken
to cost twice a forward pass, the usual rule (e.g. Kaplan et al., 2020, https://arxiv.org/abs/2001.08361, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedlabel.seeding import numpy_generator


class Profile(NamedTuple):
    """What a device can do."""

    forward: float
    """Samples per second of one forward pass."""
    backward: float
    """Samples per second of one backward pass, in addition to its forward pass."""
    down: float
    """Bytes per second that it receives."""
    up: float
    """Bytes per second that it sends."""
    memory: float
    """Bytes that training may use."""
    available: float
    """Share of the time that it is available, in (0, 1]."""


PRESETS: Mapping[str, Profile] = MappingProxyType(
    {
        # On a mobile network, about its median of 50 Mbit/s down and 10 up. It trains on a few CPU cores, in what an
        # app may use of 6 to 8 GB, and only when idle and charging, which is the night (Bonawitz et al., MLSys 2019).
        "phone": Profile(300, 150, 6.25e6, 1.25e6, 1.5e9, 0.3),
        # At home, 100 Mbit/s down and 20 up; four to eight cores; half of 8 GB; on for half of the day.
        "laptop": Profile(1500, 750, 12.5e6, 2.5e6, 4e9, 0.5),
        # A small computer with an embedded GPU, e.g. in a shop, 100 Mbit/s both ways; restarts, and busy at times.
        "edge_box": Profile(4000, 2000, 12.5e6, 12.5e6, 6e9, 0.95),
        # One GPU of a data centre's kind, 1 Gbit/s both ways, always on.
        "hospital_server": Profile(40_000, 20_000, 125e6, 125e6, 32e9, 1.0),
    }
)
"""Plausible magnitudes, not measurements of any one device."""


def shares_of(shares: Sequence[float], count: int) -> np.ndarray:
    """Returns (count,) int64, the part of each of `count` devices, part by part: each part has its share of them, to
    within one device; shares: of each part, summing to 1.
    """
    ends = np.rint(np.cumsum(shares) * count).astype(np.int64)
    ends[-1] = count
    return np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0))


def lognormal_factors(sigma: float, count: int, seed: int) -> np.ndarray:
    """Returns (count,) factors of median 1 whose logarithm has the standard deviation `sigma`."""
    return np.exp(sigma * numpy_generator(seed, "devices", "factors").standard_normal(count))


def zipf_factors(exponent: float, count: int, seed: int) -> np.ndarray:
    """Returns (count,) factors, r^-exponent for r = 1 .. count in random order: the fastest has 1."""
    ranks = numpy_generator(seed, "devices", "factors").permutation(count) + 1.0
    return ranks**-exponent


def assign(speed: np.ndarray, rarity: np.ndarray | None, correlation: float, seed: int) -> np.ndarray:
    """Returns (n,) int64, the device of each client, a permutation.

    The ranks of slowness and rarity have a Gaussian copula. Its parameter is 2 sin(pi / 6 * correlation), with which
    `correlation` is the expected rank correlation (Spearman's) where there are no ties (Kruskal, JASA 1958).

    Args:
        speed: (n,) of the devices; equally fast ones are interchangeable.
        rarity: (n,) of the clients; equal ones are ranked at random. None: correlation must be 0.
        correlation: in [-1, 1]. 1: the slowest device goes to the client of most rarity, and so on, exactly.
        seed: the experiment's.
    """
    count, rng = len(speed), numpy_generator(seed, "devices", "assignment")
    if correlation == 0:
        return rng.permutation(count)
    assert rarity is not None
    slowest_first = _sorted(speed, rng)
    # Sorted draws are a sample of the normal distribution, too: no need of its quantiles.
    score = np.empty(count)
    score[_sorted(rarity, rng)] = np.sort(rng.standard_normal(count))
    r = correlation if abs(correlation) == 1 else 2 * math.sin(math.pi / 6 * correlation)
    latent = r * score + math.sqrt(1 - r * r) * rng.standard_normal(count)
    device = np.empty(count, dtype=np.int64)
    device[np.argsort(-latent, kind="stable")] = slowest_first
    return device


def _sorted(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the order of rising values, equal ones in random order."""
    shuffled = rng.permutation(len(values))
    return shuffled[np.argsort(values[shuffled], kind="stable")]
