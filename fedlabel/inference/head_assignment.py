"""Heads of a network as labelling functions: the classes that each head learns, and its votes.

Source: Xu et al., "DP-SSL: Towards Robust Semi-supervised Learning with A Few Labeled Samples", NeurIPS 2021 (arXiv
2110.13740), whose heads get classes by multiple-choice learning: each class goes to those that have least loss on it.
How exactly is ours, as the paper's assignment could not be verified.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedlabel.inference.label_model import ABSTAIN

LEAST_PER_CLASS = 3
"""Heads that each class has at least in `random_classes`."""
LARGEST_LOSS = 100.0
"""-log p(y) of a sample in `class_losses`: less than the smallest float32 is no probability, and one client's model or
one bad sample must not decide on all heads."""
_DRAWS = 1000


def assign_classes(losses: np.ndarray, heads_per_class: int) -> np.ndarray:
    """Assigns every class to `heads_per_class` heads with the smallest total loss, in sets of nearly equal size.

    A head gets at most ceil(heads_per_class * C / K) + 1 classes, and at least one: left alone, some heads would win
    everything (the dead heads of multiple-choice learning). Solved exactly, as a transport problem.

    Args:
        losses: (K, C), mean loss of each head on each class.
        heads_per_class: rho, in [ceil(K / C), K].

    Returns:
        (K, C) bool.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: it takes a while to import

    heads, classes = losses.shape
    cell = np.arange(heads * classes)
    of_class = (cell % classes == np.arange(classes)[:, None]).astype(float)
    of_head = (cell // classes == np.arange(heads)[:, None]).astype(float)
    most = math.ceil(heads_per_class * classes / heads) + 1
    result = milp(
        losses.ravel(),
        integrality=np.ones(heads * classes),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(of_class, heads_per_class, heads_per_class), LinearConstraint(of_head, 1, most)],
    )
    assert result.x is not None, result.message
    sets: np.ndarray = result.x.reshape(heads, classes) > 0.5
    return sets


def classes_in_turn(heads: int, classes: int, heads_per_class: int) -> np.ndarray:
    """Returns (K, C) bool: round-robin assignment, until each class has `heads_per_class` heads."""
    sets = np.zeros((heads, classes), dtype=bool)
    sets[np.arange(classes * heads_per_class) % heads, np.arange(classes).repeat(heads_per_class)] = True
    return sets


def random_classes(heads: int, classes: int, least: int, most: int, seed: int) -> np.ndarray:
    """Returns (K, C) bool: sets of random sizes from least to most, drawn until each class is in `LEAST_PER_CLASS`.

    Raises:
        ValueError: so many draws do not give that.
    """
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        order = rng.random((heads, classes)).argsort(1).argsort(1)
        sets: np.ndarray = order < rng.integers(least, most + 1, heads)[:, None]
        if (sets.sum(0) >= LEAST_PER_CLASS).all():
            return sets
    raise ValueError(
        f"`method.num_functions` (={heads}) with sets of `method.least_classes` (={least}) to `method.most_classes` "
        f"(={most}) of {classes} classes: in {_DRAWS} draws some class was always in fewer than {LEAST_PER_CLASS} of "
        "them. Take more functions, or larger sets."
    )


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of each head's -log p(y) over the samples of each class, (K, C), and the numbers of samples,
    (C,). The loss of a sample is capped at `LARGEST_LOSS`.

    Args:
        logits: (n, K, C + 1), the last is "abstain".
        labels: (n,) int64, -1 where the class is unknown.
    """
    classes = logits.shape[-1] - 1
    of_class = (labels[:, None] == torch.arange(classes, device=labels.device)).float()  # all 0 for -1
    nll = -logits.log_softmax(-1)[..., :classes].clamp_min(-LARGEST_LOSS)
    return torch.einsum("nkc,nc->kc", nll, of_class), of_class.sum(0)


def votes_of(logits: Tensor, sets: Tensor, threshold: float = 0.0) -> Tensor:
    """Returns (n, K) int64, each head's most probable class of its set, or `ABSTAIN`.

    Args:
        logits: (n, K, C + 1), the last is "abstain".
        sets: (K, C) bool.
        threshold: a head whose largest probability is below it abstains.
    """
    confidence, vote = restricted(logits, sets).softmax(-1).max(-1)
    return torch.where((vote < sets.shape[1]) & (confidence >= threshold), vote, ABSTAIN)


def restricted(logits: Tensor, sets: Tensor) -> Tensor:
    """Returns logits (n, K, C + 1) with -inf for the classes that are not in the head's set (K, C)."""
    return logits.masked_fill(~torch.cat([sets, torch.ones_like(sets[:, :1])], 1), -math.inf)
