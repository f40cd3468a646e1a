"""What clients know of the labels of their samples: the record, and how it is made from true labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.imprecision import Resemblance, draw_candidates, draw_noisy_labels, swap_truth
from fedlabel.data.supervision_config import LabelKind
from fedlabel.seeding import numpy_generator

KIND_NAMES = (
    "nothing",
    "label",
    "candidates",
    "noisy label",
    "noisy candidates",
    "annotators",
    "candidates and labels",
)
"""What `Supervision.kind` numbers."""


@dataclass(frozen=True, eq=False)
class Supervision:
    """What a client knows of the labels of its n samples."""

    candidates: Tensor
    """(n, classes) bool: one True = a label, all True = nothing known, several = a set."""
    noisy: Tensor
    """(n,) bool. False: the truth is among the candidates; True: they passed through the noise matrix T."""
    annotations: Tensor
    """(n, annotators) int64: noisy labels beside the candidates, -1 = none."""

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.candidates.shape), self.candidates.dtype
        if dtype != torch.bool or len(shape) != 2:
            raise ValueError(f"`candidates` ({dtype} of shape {shape}) must be bool of shape (n, classes).")
        impossible = (~self.candidates.any(1)).nonzero()
        if len(impossible):
            raise ValueError(
                f"`candidates` of sample {int(impossible[0])} are all False: no class is possible. "
                "At least one must be True; all True means that nothing is known."
            )
        if self.noisy.dtype != torch.bool or self.noisy.shape != shape[:1]:
            raise ValueError(
                f"`noisy` ({self.noisy.dtype} of shape {tuple(self.noisy.shape)}) must be bool of shape ({shape[0]},)."
            )
        given = self.annotations
        if given.dtype != torch.int64 or given.dim() != 2 or len(given) != shape[0]:
            raise ValueError(
                f"`annotations` ({given.dtype} of shape {tuple(given.shape)}) must be int64 of shape "
                f"({shape[0]}, annotators)."
            )
        wrong = ((given < -1) | (given >= shape[1])).nonzero()
        if len(wrong):
            sample, annotator = wrong[0].tolist()
            raise ValueError(
                f"The label of sample {sample} by annotator {annotator} (={int(given[sample, annotator])}) must lie in "
                f"[0, {shape[1] - 1}], or be -1 for none."
            )

    @classmethod
    def certain(cls, candidates: Tensor) -> Supervision:
        """Returns the record of (n, classes) bool candidates that hold the truth, and of nothing else."""
        nobody = torch.zeros(len(candidates), 0, dtype=torch.int64, device=candidates.device)
        return cls(candidates, torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device), nobody)

    @property
    def labeled(self) -> Tensor:
        """(n,) bool, one candidate is left: the class is known, or (where noisy) said to be."""
        return self.candidates.sum(1) == 1

    @property
    def label(self) -> Tensor:
        """(n,) int64, the class where one candidate is left, else -1."""
        return torch.where(self.labeled, self.candidates.int().argmax(1), -1)

    @property
    def informed(self) -> Tensor:
        """(n,) bool, something is known."""
        return ~self.candidates.all(1) | (self.annotations >= 0).any(1)

    @property
    def kind(self) -> Tensor:
        """(n,) int64, a place in `KIND_NAMES`."""
        annotated = (self.annotations >= 0).any(1)
        limited = ~self.candidates.all(1)
        kind = torch.where(self.labeled, 1, 2) + 2 * self.noisy.long()
        kind = torch.where(limited, kind, 0)
        return torch.where(annotated, torch.where(limited, 6, 5), kind)

    def rows(self, index: Tensor) -> Supervision:
        """Returns the record of the samples `index`, (m,) int64 or (n,) bool."""
        return Supervision(self.candidates[index], self.noisy[index], self.annotations[index])

    def to(self, device: torch.device) -> Supervision:
        """Returns the record on `device`."""
        return Supervision(self.candidates.to(device), self.noisy.to(device), self.annotations.to(device))


def supervise(labels: np.ndarray | Tensor, mask: np.ndarray | Tensor, num_classes: int) -> Supervision:
    """Reveals the labels under `mask`, and nothing else.

    Args:
        labels: (n,) integers; never looked at where `mask` is False.
        mask: (n,) bool, where the label is known.
        num_classes: how many classes.

    Returns:
        The record: one candidate where `mask` is True, all classes elsewhere.

    Raises:
        ValueError: a label under `mask` is not in [0, num_classes).
    """
    known = torch.as_tensor(mask).nonzero().squeeze(1)
    revealed = _checked(torch.as_tensor(labels), known, num_classes)
    candidates = torch.ones(len(mask), num_classes, dtype=torch.bool)
    candidates[known] = revealed[:, None] == torch.arange(num_classes)
    return Supervision.certain(candidates)


def impart(
    labels: np.ndarray,
    kinds: np.ndarray,
    parts: Sequence[LabelKind],
    num_classes: int,
    resemblance: Resemblance,
    seed: int,
) -> Supervision:
    """Makes the record of all samples of a federation.

    Args:
        labels: (n,) the truth; not looked at where nothing is known.
        kinds: (n,) int64, a place in `parts`, or -1 where nothing is known.
        parts: the kinds of label.
        num_classes: how many classes.
        resemblance: which classes look alike, and the labels of files.
        seed: the experiment's seed.

    Raises:
        ValueError: a label that is needed is not in [0, num_classes), or what a part asks for is impossible.
    """
    n = len(labels)
    candidates = torch.ones(n, num_classes, dtype=torch.bool)
    noisy = torch.zeros(n, dtype=torch.bool)
    annotated = []
    for place, part in enumerate(parts):
        rows = np.flatnonzero(kinds == place)
        index = torch.from_numpy(rows)
        truth = _checked(torch.from_numpy(np.asarray(labels)), index, num_classes).numpy()
        rng = numpy_generator(seed, "supervision", "imprecision", place)
        if not part.has_candidates and not part.has_noisy_labels:
            candidates[index] = torch.from_numpy(truth[:, None] == np.arange(num_classes))
            continue
        if part.has_candidates:
            drawn = draw_candidates(truth, rows, num_classes, part, resemblance, rng)
            if part.kind == "partial" and part.noise_rate > 0:
                drawn = swap_truth(drawn, truth, part.noise_rate, rng)
                noisy[index] = True
            candidates[index] = torch.from_numpy(drawn)
        if part.has_noisy_labels:
            given = draw_noisy_labels(truth, rows, num_classes, part, resemblance, rng)
            if part.kind == "noisy" and given.shape[1] == 1:
                told = given[:, 0] >= 0
                candidates[index[told]] = torch.from_numpy(given[told, 0, None] == np.arange(num_classes))
                noisy[index[told]] = True
            else:
                annotated.append((index, torch.from_numpy(given)))
    annotations = torch.full((n, sum(given.shape[1] for _, given in annotated)), -1)
    first = 0
    for index, labels_given in annotated:  # each part has annotators of its own
        annotations[index, first : first + labels_given.shape[1]] = labels_given
        first += labels_given.shape[1]
    return Supervision(candidates, noisy, annotations)


def _checked(labels: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """Returns the labels of `rows`, which must be classes."""
    revealed = labels[rows]
    wrong = ((revealed < 0) | (revealed >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"the label of sample {int(rows[first])} (={int(revealed[first])}) must lie in [0, {num_classes - 1}]."
        )
    return revealed
