"""Hand-made batches for method tests: models in these tests are tables, the images are only counted."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlabel.methods.batch import Batch, Part, State

VIEWS = ("clean", "weak", "strong")


def certain_part(views: dict[str, Tensor], candidates: Tensor, targets: dict[str, Tensor]) -> Part:
    """A part of samples whose candidates hold the truth and of which nothing else is known."""
    n = len(candidates)
    nobody = torch.full((n, 0), -1)
    size = torch.tensor(float(n))
    return Part(views, candidates, targets, torch.zeros(n, dtype=torch.bool), nobody, torch.arange(n), size)


def make_part(n: int, classes: int, labels: Tensor | None = None, targets: dict[str, Tensor] | None = None) -> Part:
    """n samples whose images hold their position; labels (n,) make them labelled."""
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    candidates = torch.ones(n, classes, dtype=torch.bool)
    if labels is not None:
        candidates = labels[:, None] == torch.arange(classes)
    return certain_part(dict.fromkeys(VIEWS, images), candidates, targets or {})


def make_batch(
    classes: int,
    labels: Tensor | None = None,
    unlabeled: int = 0,
    targets: dict[str, Tensor] | None = None,
    memory: State | None = None,
) -> Batch:
    """A batch of len(labels) labelled and `unlabeled` unlabelled samples."""
    given = torch.zeros(0, dtype=torch.long) if labels is None else labels
    return Batch(
        labeled=make_part(len(given), classes, given),
        unlabeled=make_part(unlabeled, classes, targets=targets),
        mix=make_part(0, classes),
        mixing=torch.tensor(1.0),
        memory=memory or {},
    )
