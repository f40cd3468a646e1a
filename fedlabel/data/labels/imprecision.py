"""Generates imprecise labels: candidate sets, noisy labels, both; pure functions of true labels and a random generator.

Sources: uniform candidates (Feng et al., NeurIPS 2020), instance-dependent candidates (Xu et al., "Instance-Dependent
Partial Label Learning", NeurIPS 2021), symmetric and asymmetric noise (Patrini et al., CVPR 2017), candidates that may
miss the truth (Chen et al., "Imprecise Label Learning", NeurIPS 2024).

Symmetric noise draws from all classes, the true one among them: at a rate of .4 and 10 classes .36 of the labels are
wrong and .64 are right, not .6.

What differs: similar candidates, instance-dependent candidates and instance-dependent noise all come from one small
network that is trained on the true labels of the samples that get supervision. Instance-dependent noise is
our own, not the part-dependent noise of Xia et al. (NeurIPS 2020): it goes to the samples that the network finds hard,
exactly as many as asked for, and their labels to wrong classes that it finds probable. As to candidates, Xu et al. let
class j in with probability p_j / (the largest p of a wrong class), so the likeliest wrong class always; here p is
scaled so that sets have the size that `partial_ratio` asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedlabel.data.labels.label_files import read_label_file
from fedlabel.data.labels.supervision_config import LabelKind
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.datasets import Dataset
from fedlabel.seeding import derive_seed, torch_generator

HIDDEN, EPOCHS, STEPS, BATCH = 64, 3, 150, 128
"""The small network: its hidden layer, and how it is trained (Adam, learning rate .001): for so many epochs, and where
these are fewer steps (few samples, of which it would have learnt nothing), for so many steps at least."""
_LARGEST_EXPONENT = 700.0
"""Beyond it e^x is no float64."""
MNIST_PAIRS = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
ASYMMETRIC = {
    "cifar10": {9: 1, 2: 0, 3: 5, 5: 3, 4: 7},  # truck, bird, cat, dog, deer
    "mnist": MNIST_PAIRS,
    "digits": MNIST_PAIRS,
    "fashion_mnist": {
        0: 6,
        2: 4,
        5: 7,
        3: 0,
    },  # T-shirt -> Shirt, Pullover -> Coat, Sandal -> Sneaker, Dress -> T-shirt
}
"""Data set -> class -> the class it is mistaken for; the others are never. CIFAR-100 has its own rule."""


@dataclass(frozen=True, eq=False)
class LabelSources:
    """Inputs of label generators besides true labels: class similarity from a small network, and labels from files."""

    dataset: Dataset
    root: Path
    """`data.root`, the folder of label files; the folder that holds it if it is a file itself (npz)."""
    seed: int
    supervised: np.ndarray
    """(m,) int64, the samples of the training split that have a true label and get supervision: no other label is
    used."""

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(n, classes) float64, the class probabilities that the small network predicts for each sample of the training
        split.

        Trained on one thread and rounded to 1e-4, so that every process of a run has the same.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._train().numpy().round(4)
        finally:
            torch.set_num_threads(threads)

    def _train(self) -> torch.Tensor:
        split, classes = self.dataset.train, self.dataset.num_classes
        x = split.images.flatten(1).float() / 255
        x = (x - x.mean()) / x.std().clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "supervision", "network"))
            network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
        supervised = torch.from_numpy(self.supervised)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        generator = torch_generator(self.seed, "supervision", "network", "order")
        batches = -(-len(supervised) // BATCH)
        for _ in range(max(EPOCHS, -(-STEPS // batches)) if batches else 0):
            for rows in supervised[torch.randperm(len(supervised), generator=generator)].split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x[rows]), split.labels[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            return network(x).double().softmax(1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """(classes, classes) float64: the mean of `probabilities` over the supervised samples of each true class."""
        labels = self.dataset.train.labels.numpy()[self.supervised]
        means = np.zeros((self.dataset.num_classes, self.dataset.num_classes))
        np.add.at(means, labels, self.probabilities[self.supervised])
        return means / np.maximum(np.bincount(labels, minlength=len(means)), 1)[:, None]

    def flips(self) -> np.ndarray:
        """Returns (classes,) int64, the class that each class flips to in asymmetric noise; itself if it does not flip.

        Raises:
            ValueError: nobody says what it would be for this data set.
        """
        name, classes = self.dataset.name, self.dataset.num_classes
        target = np.arange(classes)
        if name == "cifar100":  # one pair in each block of five consecutive classes is swapped
            rng = np.random.default_rng(derive_seed(self.seed, "supervision", "pairs"))
            for start in range(0, classes, 5):
                first, second = start + rng.choice(5, 2, replace=False)
                target[first], target[second] = second, first
            return target
        if name not in ASYMMETRIC:
            raise ValueError(
                f"`supervision.noise` (=asymmetric) is not known for data set {name}, only for "
                f"{', '.join([*ASYMMETRIC, 'cifar100'])}; take supervision.noise=pair_flip or instance."
            )
        for label, mistaken in ASYMMETRIC[name].items():
            target[label] = mistaken
        return target

    def file_labels(self, part: LabelKind) -> np.ndarray:
        """Returns (n, annotators) int64 labels of the training split from a file, -1 = none.

        Raises:
            DataError: see `label_files.read_label_file`; or a single annotator is to vote.
        """
        assert part.labels_file is not None
        path = (self.root.parent if self.root.is_file() else self.root) / part.labels_file
        given = read_label_file(path, part.labels_keys, self.dataset)
        if part.vote and given.shape[1] < 2:
            raise DataError(f"`supervision.vote` (=True) needs several annotators, and {path} has one: leave it out.")
        return given


def draw_candidates(
    truth: np.ndarray,
    rows: np.ndarray,
    num_classes: int,
    part: LabelKind,
    sources: LabelSources,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns (m, classes) bool candidate sets that contain the true class.

    Args:
        truth: (m,) true labels.
        rows: (m,) their samples in the training split.
        num_classes: how many classes.
        part: `candidates` and `partial_ratio`.
        sources: asked for candidates=similar and instance.
        rng: draws.
    """
    assert part.partial_ratio is not None
    if part.candidates == "uniform":
        probability = np.full((len(truth), num_classes), part.partial_ratio)
    elif part.candidates == "similar":
        probability = scale_to_mean(sources.confusion, np.arange(num_classes), part.partial_ratio)[truth]
    else:
        probability = scale_to_mean(sources.probabilities[rows], truth, part.partial_ratio)
    drawn = rng.random((len(truth), num_classes)) < probability
    drawn[np.arange(len(truth)), truth] = True
    return drawn


def scale_to_mean(weights: np.ndarray, truth: np.ndarray, mean: float) -> np.ndarray:
    """Returns probabilities proportional to `weights` whose mean over the wrong classes is `mean` in every row.

    What would be above 1 is cut and given to the others.

    Args:
        weights: (m, classes), at least 0; a class of weight 0 gets a little, too.
        truth: (m,), the class of each row that is left out and gets 0.
        mean: in [0, 1].
    """
    places = np.arange(len(weights))
    wanted = np.maximum(weights.astype(np.float64), 1e-4)
    wanted[places, truth] = 0
    total = mean * (weights.shape[1] - 1)
    probability = np.zeros_like(wanted)
    for _ in range(weights.shape[1]):  # each pass cuts at least one more class, or nothing is left to give
        free = np.where(probability < 1, wanted, 0)
        left = total - probability.sum(1, keepdims=True)
        if left.max(initial=0.0) < 1e-12:
            break
        share = free / np.maximum(free.sum(1, keepdims=True), 1e-12)
        probability = np.minimum(probability + left * share, 1)
    return probability


def majority(given: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Returns (m, 1) the majority label of the annotators, ties broken at random; -1 if no annotator gave a label.

    Args:
        given: (m, annotators) labels, -1 = none.
        num_classes: how many classes.
        rng: breaks ties.
    """
    votes = (given[:, :, None] == np.arange(num_classes)).sum(1)
    chosen = (votes + rng.random(votes.shape)).argmax(1)  # less than a vote is added
    return np.where(votes.any(1), chosen, -1)[:, None]


def swap_truth(candidates: np.ndarray, truth: np.ndarray, noise_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Returns candidates in which, with probability `noise_rate`, a class outside the set replaces the true class.

    A set of all classes stays.

    Args:
        candidates: (m, classes) bool, with the truth.
        truth: (m,).
        noise_rate: in [0, 1].
        rng: draws.
    """
    swapped = candidates.copy()
    outside = np.where(candidates, -1.0, rng.random(candidates.shape))
    hit = np.flatnonzero((rng.random(len(truth)) < noise_rate) & ~candidates.all(1))
    swapped[hit, truth[hit]] = False
    swapped[hit, outside[hit].argmax(1)] = True
    return swapped


def response_error(epsilon: float, num_classes: int) -> float:
    """Returns the probability with which randomised response gives a wrong class, see `LabelKind.label_epsilon`."""
    return (num_classes - 1) / (math.exp(epsilon) + num_classes - 1) if epsilon < _LARGEST_EXPONENT else 0.0


def draw_noisy_labels(
    truth: np.ndarray,
    rows: np.ndarray,
    num_classes: int,
    part: LabelKind,
    sources: LabelSources,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns (m, annotators) int64 labels, -1 = none; arguments as for `draw_candidates`."""
    if part.noise == "file":
        given = sources.file_labels(part)[rows]
        return majority(given, num_classes, rng) if part.vote else given
    noisy = truth.copy()
    if part.noise == "symmetric":
        hit = rng.permutation(len(truth))[: round(part.noise_rate * len(truth))]
        noisy[hit] = rng.integers(num_classes, size=len(hit))
    elif part.noise == "randomized_response":
        assert part.label_epsilon is not None
        # Each label by itself: an exact number of wrong ones would tell of the last from the others.
        hit = np.flatnonzero(rng.random(len(truth)) < response_error(part.label_epsilon, num_classes))
        noisy[hit] = (truth[hit] + rng.integers(1, num_classes, size=len(hit))) % num_classes
    elif part.noise == "instance":
        weights = sources.probabilities[rows].copy() + 1e-4
        doubt = 1 - weights[np.arange(len(truth)), truth]
        count = round(part.noise_rate * len(truth))
        hit = np.argsort(rng.exponential(size=len(truth)) / np.maximum(doubt, 1e-4))[:count]  # weighted, no repetition
        weights[np.arange(len(truth)), truth] = 0
        borders = weights[hit].cumsum(1)
        noisy[hit] = (rng.random((len(hit), 1)) * borders[:, -1:] > borders).sum(1)
    else:
        target = (np.arange(num_classes) + 1) % num_classes if part.noise == "pair_flip" else sources.flips()
        for label in np.flatnonzero(target != np.arange(num_classes)):
            members = np.flatnonzero(truth == label)
            noisy[rng.permutation(members)[: round(part.noise_rate * len(members))]] = target[label]
    return noisy[:, None]
