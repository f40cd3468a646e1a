"""Differences between clients besides the class mix: long tails, classes without labels, image shifts.

The long tail is exponential, as in Cui et al., CVPR 2019 (https://arxiv.org/abs/1901.05555), with a factor of its own
for labelled and for unlabelled samples, as in CReST (Wei et al., CVPR 2021, https://arxiv.org/abs/2102.09559). What
differs, and why: the profile starts from the largest class of what was drawn, not from a number to be given, and a
class that has less than its share by itself keeps what it has; so it works on data that are unequal to begin with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlabel.checks import finite, one_of, positive
from fedlabel.data.sets.class_names import find_classes
from fedlabel.seeding import numpy_generator, torch_generator

SHIFTS = ("rotation", "blur", "noise", "inversion")
FEATURE_SHIFTS = ("none", *SHIFTS, "mixed")
MAX_ROTATION = 45.0
"""Degrees to either side at strength 1."""
MAX_BLUR = 1.5 / 28
"""Standard deviation of the blur at strength 1, as a part of the shorter image side."""
MAX_NOISE = 40.0
"""Standard deviation of the noise at strength 1, in units of the 256 values."""


@dataclass(frozen=True)
class SkewConfig:
    """Long tails, classes without labels, and clients whose images are shifted."""

    labeled_imbalance: float = 1.0
    """Long tail of the labelled samples of the federation, at least 1; 1 = none. With n samples of the largest class,
    class c of C (in the order of their numbers) keeps n * labeled_imbalance^(-c / (C - 1)) at most, rounded half up
    (which may be 0). The others are drawn at random and belong to nobody."""
    unlabeled_imbalance: float = 1.0
    """The same for the unlabelled samples."""
    unlabeled_imbalance_reversed: bool = False
    """Whether the unlabelled tail is reversed: the last class is the largest."""
    unlabeled_only_classes: tuple[str, ...] = ()
    """Names of classes (or their numbers from 0, if they are not named by numbers) that have no labels at any client
    (except for the upper bound). Amounts of labels then refer to the samples of the other classes."""
    feature_shift: str = "none"
    """A fixed change of all images of a client, and of its share of the evaluation split: none; rotation by up to 45
    degrees to either side; blur (Gaussian, sd up to 1.5 / 28 of the shorter side); noise (Gaussian, sd up to 40 of 255,
    each image has its own, once and for all); inversion, for half of the clients; mixed, one of the four per client.
    Angles and sd are uniform over clients. What the server holds is not changed."""
    feature_shift_strength: float = 1.0
    """Multiplies these limits; without effect on inversion."""

    def __post_init__(self) -> None:
        # YAML gives a list, of numbers perhaps; configurations must be hashable.
        object.__setattr__(self, "unlabeled_only_classes", tuple(map(str, self.unlabeled_only_classes)))
        finite(self, "skew", "labeled_imbalance", "unlabeled_imbalance", least=1, hint="1 is no long tail")
        one_of(self, "skew", feature_shift=FEATURE_SHIFTS)
        positive(self, "skew", "feature_shift_strength", hint="for no shift set skew.feature_shift=none")

    @property
    def has_tails(self) -> bool:
        """Whether long tails remove samples."""
        return max(self.labeled_imbalance, self.unlabeled_imbalance) > 1

    def hidden_classes(self, class_names: Sequence[str]) -> list[int]:
        """Returns the numbers of `unlabeled_only_classes`.

        Raises:
            ValueError: they do not fit the data set's classes.
        """
        given = self.unlabeled_only_classes
        return find_classes("skew.unlabeled_only_classes", given, class_names, "no label to anyone") if given else []


# ----------------------------------------------------------------------------------------------------------- long tails


def tail_sizes(counts: np.ndarray, imbalance: float, reverse: bool = False) -> np.ndarray:
    """Returns the number of samples that each class keeps.

    Args:
        counts: (classes,) integers, how many samples it has; at least two classes.
        imbalance: the quotient of the first and the last class, at least 1.
        reverse: whether the last class is the largest.

    Returns:
        (classes,) int64: min(counts[c], max(counts) * imbalance^(-c / (classes - 1)) rounded half up).
    """
    rank = np.arange(len(counts))[:: -1 if reverse else 1] / (len(counts) - 1)
    return np.minimum(counts, np.floor(counts.max() * imbalance**-rank + 0.5).astype(np.int64))


def long_tails(labels: np.ndarray, labeled: np.ndarray, num_classes: int, config: SkewConfig, seed: int) -> np.ndarray:
    """Chooses the samples that remain after the long tails.

    Args:
        labels: (n,) integers in [0, num_classes), the truth; -1 where the data have none.
        labeled: (n,) bool, whose label is known.
        num_classes: how many classes, at least two.
        config: the two factors.
        seed: the experiment's seed. Each class of each of the two sets has a generator of its own.

    Returns:
        (n,) bool: the labelled and the unlabelled samples that `tail_sizes` lets stay.

    Raises:
        ValueError: samples whose class nobody knows are to be cut by their class.
    """
    for key, subset in (("labeled_imbalance", labeled), ("unlabeled_imbalance", ~labeled)):
        if getattr(config, key) > 1 and (lacking := int((labels[subset] < 0).sum())):
            raise ValueError(
                f"`skew.{key}` (={getattr(config, key):g}) cuts samples by their class, and {lacking} of these "
                f"{int(subset.sum())} have no label in the data: leave it out."
            )
    kept = np.ones(len(labels), dtype=bool)
    for name, subset, imbalance, reverse in (
        ("labeled", labeled, config.labeled_imbalance, False),
        ("unlabeled", ~labeled, config.unlabeled_imbalance, config.unlabeled_imbalance_reversed),
    ):
        counts = np.bincount(labels[subset & (labels >= 0)], minlength=num_classes)
        for label, excess in enumerate(counts - tail_sizes(counts, imbalance, reverse)):
            rows = np.flatnonzero(subset & (labels == label))
            kept[numpy_generator(seed, "long_tail", name, label).choice(rows, excess, replace=False)] = False
    return kept


# ------------------------------------------------------------------------------------------------------- feature shift


@dataclass(frozen=True)
class Shift:
    """The shift of all images of one client."""

    kind: str
    """One of `SHIFTS`, or none."""
    amount: float
    """rotation: degrees, counter-clockwise; blur: sd in pixels; noise: sd in units of the 256 values; else 0."""


def client_shift(client: int, side: int, config: SkewConfig, seed: int) -> Shift:
    """Returns the shift of the images of `client`, whose shorter side is `side` pixels; drawn from `seed`."""
    rng = numpy_generator(seed, "feature_shift", client)
    position = rng.random()  # first, so that a client keeps its place in every range
    kind = SHIFTS[rng.integers(len(SHIFTS))] if config.feature_shift == "mixed" else config.feature_shift
    match kind:
        case "rotation":
            return Shift(kind, (2 * position - 1) * MAX_ROTATION * config.feature_shift_strength)
        case "blur":
            return Shift(kind, position * MAX_BLUR * side * config.feature_shift_strength)
        case "noise":
            return Shift(kind, position * MAX_NOISE * config.feature_shift_strength)
        case "inversion" if config.feature_shift == "mixed" or position < 0.5:
            return Shift(kind, 0.0)
    return Shift("none", 0.0)


def shift_images(images: Tensor, shift: Shift, generator: torch.Generator) -> Tensor:
    """Returns shifted images.

    Args:
        images: (n, channels, height, width) uint8; not changed. May be empty.
        shift: what to do.
        generator: of the noise, on the device of `images`.

    Returns:
        As `images`. What a rotation uncovers is black.
    """
    match shift.kind:
        case "rotation":
            from torchvision.transforms.v2 import functional as F  # here: it takes as long to import as torch

            return F.rotate(images, shift.amount, interpolation=F.InterpolationMode.BILINEAR)
        case "blur":
            # Three sd to either side; the mirrored border must be smaller than the image.
            from torchvision.transforms.v2 import functional as F

            reach = min(math.ceil(3 * shift.amount), min(images.shape[-2:]) - 1)
            return F.gaussian_blur(images, [2 * reach + 1] * 2, [max(shift.amount, 1e-3)] * 2)
        case "noise":
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            return (images + shift.amount * noise).round().clamp(0, 255).to(torch.uint8)
        case "inversion":
            return 255 - images
    return images


def shift_features(images: Tensor, parts: Sequence[np.ndarray], config: SkewConfig, seed: int, split: str) -> Tensor:
    """Applies each client's shift to its images.

    Args:
        images: (n, channels, height, width) uint8; not changed.
        parts: per client its rows, disjoint. Other rows stay as they are.
        config: which shift, how strong.
        seed: the experiment's seed. What is done depends on the client; the noise on `split`, too.
        split: "train" or "evaluation".

    Returns:
        A changed copy; `images` itself without a shift.

    Raises:
        ValueError: a shift is asked for of rows of a table.
    """
    if config.feature_shift == "none":
        return images
    if images.is_floating_point():
        raise ValueError(f"`skew.feature_shift` (={config.feature_shift}) is for images; for tables it must be none.")
    shifted = images.clone()
    for client, rows in enumerate(parts):
        shift = client_shift(client, min(images.shape[-2:]), config, seed)
        generator = torch_generator(seed, "feature_shift", "noise", split, client, device=images.device)
        shifted[rows] = shift_images(images[rows], shift, generator)
    return shifted
