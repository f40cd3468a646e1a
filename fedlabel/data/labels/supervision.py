"""The supervision record: the labels available to a client, and how they are generated from true labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labels.bags import Bags, draw_bags
from fedlabel.data.labels.imprecision import LabelSources, draw_candidates, draw_noisy_labels, swap_truth
from fedlabel.data.labels.labeling_functions import NOT_ASKED, Cast, cast_votes, load_functions
from fedlabel.data.labels.supervision_config import LabelKind
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.datasets import Dataset
from fedlabel.seeding import numpy_generator

KIND_NAMES = (
    "nothing",
    "label",
    "candidates",
    "noisy label",
    "noisy candidates",
    "annotators",
    "candidates and labels",
    "bag",
    "votes",
)
"""What `Supervision.kind` numbers."""


@dataclass(frozen=True, eq=False)
class Supervision:
    """The supervision record: the labels available for n samples."""

    candidates: Tensor
    """(n, classes) bool: one True = a label, all True = no label, several = a candidate set."""
    noisy: Tensor
    """(n,) bool. False: the candidates contain the true class; True: they were drawn through the noise matrix T."""
    annotations: Tensor
    """(n, annotators) int64: noisy labels in addition to the candidates, -1 = none."""
    bag: Tensor
    """(n,) int64, the bag of each sample, -1 = none."""
    bag_counts: Tensor
    """(bags, classes) int64, number of samples of each class in each bag; a row sums to the bag's size."""
    votes: Tensor
    """(n, functions) int64, votes of written labelling functions, -1 = abstain; -2 = not applied to this sample."""
    weight: Tensor | None = None
    """(n,) float in (0, 1], how often a sample's label is drawn in training, relative to others; None: all alike."""

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.candidates.shape), self.candidates.dtype
        if dtype != torch.bool or len(shape) != 2:
            raise ValueError(f"`candidates` ({dtype} of shape {shape}) must be bool of shape (n, classes).")
        impossible = (~self.candidates.any(1)).nonzero()
        if len(impossible):
            raise ValueError(
                f"`candidates` of sample {int(impossible[0])} are all False: no class is possible. "
                "At least one must be True; all True means no label."
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
        votes = self.votes
        if votes.dtype != torch.int64 or votes.dim() != 2 or len(votes) != shape[0]:
            raise ValueError(
                f"`votes` ({votes.dtype} of shape {tuple(votes.shape)}) must be int64 of shape ({shape[0]}, functions)."
            )
        if self.weight is not None and self.weight.shape != shape[:1]:
            raise ValueError(f"`weight` (of shape {tuple(self.weight.shape)}) must be of shape ({shape[0]},).")
        self._check_bags()

    def _check_bags(self) -> None:
        n, classes = self.candidates.shape
        bag, counts = self.bag, self.bag_counts
        if bag.dtype != torch.int64 or bag.shape != (n,):
            raise ValueError(
                f"`bag` ({bag.dtype} of shape {tuple(bag.shape)}) must be int64 of shape ({n},): each sample is in one "
                "bag, or in none (-1)."
            )
        if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[1] != classes:
            raise ValueError(
                f"`bag_counts` ({counts.dtype} of shape {tuple(counts.shape)}) must be int64 of shape "
                f"(bags, {classes})."
            )
        wrong = ((bag < -1) | (bag >= len(counts))).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"The bag of sample {first} (={int(bag[first])}) must lie in [0, {len(counts) - 1}], or be -1 for none."
            )
        sizes = torch.bincount(bag[bag >= 0], minlength=len(counts))
        wrong = ((counts < 0).any(1) | (counts.sum(1) != sizes) | (sizes == 0)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"The counts of bag {first} (={counts[first].tolist()}) must be non-negative and sum to the number of "
                f"its samples, {int(sizes[first])}, which must be at least 1."
            )

    @classmethod
    def certain(cls, candidates: Tensor) -> Supervision:
        """Returns a record of (n, classes) bool candidates that contain the true class, without other labels."""
        n, device = len(candidates), candidates.device
        nobody = torch.zeros(n, 0, dtype=torch.int64, device=device)
        return cls.without_bags(candidates, torch.zeros(n, dtype=torch.bool, device=device), nobody)

    @classmethod
    def without_bags(cls, candidates: Tensor, noisy: Tensor, annotations: Tensor) -> Supervision:
        """Returns a record of samples without bags; for the arguments see the fields."""
        alone = torch.full(candidates.shape[:1], -1, device=candidates.device)
        none = alone[:0].view(0, 1)
        return cls(
            candidates, noisy, annotations, alone, none.expand(0, candidates.shape[-1]), alone[:, None].expand(-1, 0)
        )

    @property
    def labeled(self) -> Tensor:
        """(n,) bool: exactly one candidate, so the sample has a label (which may be wrong if it is noisy)."""
        return self.candidates.sum(1) == 1

    @property
    def label(self) -> Tensor:
        """(n,) int64, the class of the single candidate, else -1."""
        return torch.where(self.labeled, self.candidates.int().argmax(1), -1)

    @property
    def has_supervision(self) -> Tensor:
        """(n,) bool: the sample itself has a label, a candidate set or an annotation; bags and votes do not count."""
        return ~self.candidates.all(1) | (self.annotations >= 0).any(1)

    @property
    def voted_on(self) -> Tensor:
        """(n,) bool: labelling functions were applied to the sample."""
        return (self.votes > NOT_ASKED).any(1)

    @property
    def kind(self) -> Tensor:
        """(n,) int64, an index into `KIND_NAMES`."""
        annotated = (self.annotations >= 0).any(1)
        limited = ~self.candidates.all(1)
        kind = torch.where(self.labeled, 1, 2) + 2 * self.noisy.long()
        aside = torch.where(self.bag >= 0, 7, torch.where(self.voted_on, 8, 0))
        kind = torch.where(limited, kind, aside)
        return torch.where(annotated, torch.where(limited, 6, 5), kind)

    def rows(self, index: Tensor) -> Supervision:
        """Returns the record of the samples `index`, (m,) int64 or (n,) bool; bags are renumbered, in their order.

        Raises:
            ValueError: some, but not all samples of a bag are taken: its counts would no longer hold.
        """
        bag = self.bag[index]
        if not len(self.bag_counts):
            return self._mapped(lambda name, values: values if name == "bag_counts" else values[index])
        kept, place = bag[bag >= 0].unique(return_inverse=True)
        bag = bag.masked_scatter(bag >= 0, place)
        return Supervision(
            self.candidates[index],
            self.noisy[index],
            self.annotations[index],
            bag,
            self.bag_counts[kept],
            self.votes[index],
            None if self.weight is None else self.weight[index],
        )

    def to(self, device: torch.device) -> Supervision:
        """Returns the record on `device`."""
        return self if self.candidates.device == device else self._mapped(lambda name, values: values.to(device))

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> Supervision:
        """Returns a record made from this one by a change of each field that needs no new check."""
        record = object.__new__(Supervision)
        for field in fields(self):
            values = getattr(self, field.name)
            object.__setattr__(record, field.name, None if values is None else change(field.name, values))
        return record


def reveal_labels(labels: np.ndarray | Tensor, mask: np.ndarray | Tensor, num_classes: int) -> Supervision:
    """Returns a record with the true labels under `mask`, and no other supervision.

    Args:
        labels: (n,) integers; never looked at where `mask` is False.
        mask: (n,) bool, samples whose label is revealed.
        num_classes: how many classes.

    Returns:
        The record: one candidate where `mask` is True, all classes elsewhere.

    Raises:
        ValueError: a label under `mask` is not in [0, num_classes).
    """
    rows = torch.as_tensor(mask).nonzero().squeeze(1)
    revealed = _checked(torch.as_tensor(labels), rows, num_classes)
    candidates = torch.ones(len(mask), num_classes, dtype=torch.bool)
    candidates[rows] = revealed[:, None] == torch.arange(num_classes)
    return Supervision.certain(candidates)


def build_supervision(
    labels: np.ndarray,
    kinds: np.ndarray,
    parts: Sequence[LabelKind],
    num_classes: int,
    sources: LabelSources,
    seed: int,
    holders: Sequence[np.ndarray] = (),
    published: Bags | None = None,
) -> Supervision:
    """Builds the supervision record of all samples of a federation, without the votes of functions, see
    `ask_functions`.

    Args:
        labels: (n,) true labels; not read where `kinds` is -1.
        kinds: (n,) int64, a place in `parts`, or -1 without a label.
        parts: the kinds of label.
        num_classes: how many classes.
        sources: which classes look alike, and the labels of files.
        seed: the experiment's seed.
        holders: per client the rows of its samples; a bag lies within one client.
        published: over all samples, the bags of the kind of label whose counts are from a file.

    Raises:
        ValueError: a label that is needed is not in [0, num_classes), or what a part asks for is impossible.
    """
    n = len(labels)
    candidates = torch.ones(n, num_classes, dtype=torch.bool)
    noisy = torch.zeros(n, dtype=torch.bool)
    annotated = []
    bag, counts = torch.full((n,), -1), [torch.zeros(0, num_classes, dtype=torch.int64)]
    for place, part in enumerate(parts):
        rows = np.flatnonzero(kinds == place)
        index = torch.from_numpy(rows)
        if part.module is not None:  # see `ask_functions`
            continue
        if part.bags_file is not None:
            assert published is not None
            bags = _whole_bags(published, index)
            bag[index] = torch.where(bags.bag >= 0, bags.bag + sum(map(len, counts)), -1)
            counts.append(bags.counts)
            continue
        truth = _checked(torch.from_numpy(np.asarray(labels)), index, num_classes).numpy()
        if part.kind == "bags":
            held = Ragged.of(holders)
            own = held.where(kinds[held.rows] == place)
            feature = None if part.bag_feature is None else sources.dataset.feature(part.bag_feature, "train")
            bags = draw_bags(labels, own, num_classes, part, feature, seed, place)
            bag[index] = torch.where(bags.bag[index] >= 0, bags.bag[index] + sum(map(len, counts)), -1)
            counts.append(bags.counts)
            continue
        rng = numpy_generator(seed, "supervision", "imprecision", place)
        if not part.has_candidates and not part.has_noisy_labels:
            candidates[index] = torch.from_numpy(truth[:, None] == np.arange(num_classes))
            continue
        if part.has_candidates:
            drawn = draw_candidates(truth, rows, num_classes, part, sources, rng)
            if part.kind == "partial" and part.noise_rate > 0:
                drawn = swap_truth(drawn, truth, part.noise_rate, rng)
                noisy[index] = True
            candidates[index] = torch.from_numpy(drawn)
        if part.has_noisy_labels:
            given = draw_noisy_labels(truth, rows, num_classes, part, sources, rng)
            if part.kind == "noisy" and given.shape[1] == 1:
                has_label = given[:, 0] >= 0
                candidates[index[has_label]] = torch.from_numpy(given[has_label, 0, None] == np.arange(num_classes))
                noisy[index[has_label]] = True
            else:
                annotated.append((index, torch.from_numpy(given)))
    annotations = torch.full((n, sum(given.shape[1] for _, given in annotated)), -1)
    first = 0
    for index, labels_given in annotated:  # each part has annotators of its own
        annotations[index, first : first + labels_given.shape[1]] = labels_given
        first += labels_given.shape[1]
    return Supervision(candidates, noisy, annotations, bag, torch.cat(counts), torch.zeros(n, 0, dtype=torch.int64))


def _whole_bags(published: Bags, rows: Tensor) -> Bags:
    """Returns the bags of some samples, renumbered.

    Raises:
        ValueError: other samples are in them, too.
    """
    bag = published.bag[rows]
    kept, place, sizes = bag[bag >= 0].unique(return_inverse=True, return_counts=True)
    counts = published.counts[kept]
    torn = int((counts.sum(1) != sizes).sum())
    if torn:
        raise ValueError(
            f"`supervision.bags_file`: of {torn} bags some samples, but not all, have gone elsewhere, so that their "
            "counts no longer hold: leave out skew.labeled_imbalance, skew.unlabeled_imbalance and data.train_samples, "
            "and see that every bag lies in one client."
        )
    return Bags(bag.masked_scatter(bag >= 0, place), counts)


def ask_functions(
    kinds: np.ndarray, parts: Sequence[LabelKind], dataset: Dataset, holders: Sequence[np.ndarray] = ()
) -> Cast | None:
    """Applies the labelling functions of the part of the mix that has them; None if no part does.

    Args:
        kinds: (n,) int64, a place in `parts`, or -1 without a label.
        parts: the kinds of label.
        dataset: has the samples.
        holders: per client the rows of its samples. One that has the functions also asks them of its samples of which
            something else is known.

    Raises:
        ValueError: there is no such module, no function ever votes, or one fails where that is to end the run.
    """
    for place, part in enumerate(parts):
        if part.module is None:
            continue
        held = Ragged.of(holders)
        have = np.flatnonzero(held.sums(kinds[held.rows] == place))
        own = held.take(have).rows
        asked = own[kinds[own] >= 0] if len(have) else np.flatnonzero(kinds == place)
        functions, samples = load_functions(part.module), (dataset.sample(int(row)) for row in asked)
        cast = cast_votes(functions, samples, dataset.class_names, stop=part.on_error == "stop")
        if len(asked) and not any(report.votes for report in cast.reports):
            warnings = [warning for report in cast.reports if (warning := report.warning())]
            raise ValueError(
                f"`supervision.module` (={part.module}): none of its {len(functions)} functions votes on any of "
                f"{len(asked)} samples. {' '.join(warnings[:3]) or 'All abstain everywhere.'}"
            )
        votes = np.full((len(kinds), len(functions)), NOT_ASKED)
        votes[asked] = cast.votes
        return cast._replace(votes=votes)
    return None


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
