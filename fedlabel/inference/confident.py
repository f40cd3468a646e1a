"""Confident learning: which labels are probably wrong, from out-of-sample predictions; all numbers sum over clients.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021). A sample
with given label i counts in C[i, j] if j is the most probable of the classes whose probability reaches their threshold
t_j, the mean probability of class j over the samples labelled j. C, calibrated to the numbers of given labels, is an
estimate of the joint distribution of given and true labels.

Federated, in three exchanges, each of sums over clients; the server never sees a sample, label or prediction:

1. `self_confidence` of every client -> t.
2. `confident_counts` of every client -> C -> the joint Q.
3. Only for `prune_by_class` and `prune_by_noise_rate`, which remove as many samples as Q says, the worst first: how
   many samples reach a cut (`class_counts`, `pair_counts`), until each cut leaves the right number (`cuts_for`).

Clients then decide alone. So every rule gives what it would give on the union of the data: exactly for
`off_diagonal`, and for the other two where no two samples tie at a cut (tied samples are all suspects; a sort takes
some of them).

What differs from cleanlab 2.9: where several classes reach their thresholds it takes the most probable class of all,
the paper (equation 1), and this code, the most probable of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlabel.inference.sums import add_at

SLACK = 1e-6
"""A probability reaches a threshold up to this: of samples with equal probabilities all reach their mean, whatever the
last bit of a sum."""
NEVER = 2.0
"""Threshold of a class that is nobody's label: above every probability."""
MAX_EXCHANGES = 60
"""Of `cuts_for`: an interval of length 2 is then below 2e-18."""

RULES = ("confident", "prune_by_class", "prune_by_noise_rate", "both")
"""Which samples are suspects. confident: those off the diagonal of C. prune_by_class: of each class as many as Q has
off its diagonal, those least probably of it. prune_by_noise_rate: of each pair of classes as many as Q has, by their
margins. both: those of both prunings."""


def self_confidence(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns for each class (sum of its probability over the samples with this label, their number), (classes, 2)
    float64; sums over clients.

    Args:
        probabilities: (n, classes), out of sample: of a model that was not trained on these labels.
        labels: (n,) int64, the given ones.
    """
    own = probabilities.double().gather(1, labels[:, None])
    total = own.new_zeros(probabilities.shape[1], 2)
    return add_at(total, labels, torch.cat([own, torch.ones_like(own)], 1))


def thresholds_of(total: Tensor) -> Tensor:
    """Returns t (classes,), the mean self-confidence of each class (equation 2), from summed `self_confidence`."""
    sums, counts = total.unbind(1)
    return torch.where(counts > 0, (sums / counts.clamp_min(1)).clamp_min(2 * SLACK), NEVER)


def confident_class(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """Returns (n,) int64, the most probable of the classes that reach their thresholds, -1 where none does."""
    probabilities = probabilities.double()
    reached = probabilities >= thresholds - SLACK
    best = torch.where(reached, probabilities, -1.0).argmax(1)
    return torch.where(reached.any(1), best, -1)


def confident_counts(probabilities: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Returns C (classes, classes) int64, row = given label, column = `confident_class`; sums over clients."""
    classes, found = probabilities.shape[1], confident_class(probabilities, thresholds)
    kept = found >= 0
    places = labels[kept] * classes + found[kept]
    return torch.bincount(places, minlength=classes**2).view(classes, classes)


def calibrated_joint(counts: Tensor, label_counts: Tensor) -> Tensor:
    """Returns Q (classes, classes) float64, the estimated joint distribution of given (row) and true label, which sums
    to 1 and has the given labels' shares as row sums (equation 3).

    Args:
        counts: C, summed over clients.
        label_counts: (classes,) the number of samples with each given label.
    """
    # At least one sample of each class is right: a row without confident samples would be 0 / 0.
    counts = counts.double() + torch.diag((1 - counts.diagonal()).clamp_min(0).double())
    joint = counts / counts.sum(1, keepdim=True) * label_counts.double()[:, None]
    return joint / joint.sum()


def noise_rates(joint: Tensor) -> Tensor:
    """Returns (classes,) p(given label differs | true class), from Q; NaN for a class that nothing is of."""
    return 1 - joint.diagonal() / joint.sum(0)


def off_diagonal(probabilities: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Returns (n,) bool, the samples that C counts off its diagonal and whose label is not the most probable class."""
    found = confident_class(probabilities, thresholds)
    return (found >= 0) & (found != labels) & differs(probabilities, labels)


def differs(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) bool, the samples whose given label is not the most probable class; no rule suspects others."""
    probabilities = probabilities.double()
    own = probabilities.gather(1, labels[:, None])
    return (probabilities.amax(1, keepdim=True) > own + SLACK)[:, 0]


def prune_counts(joint: Tensor, samples: int) -> Tensor:
    """Returns Q as numbers of samples, (classes, classes) int64; each row keeps its (rounded) sum."""
    exact = joint * samples
    rounded = exact.round()
    missing = (exact.sum(1).round() - rounded.sum(1)).long()
    order = (exact - rounded).argsort(1, descending=True)
    place = torch.arange(len(joint))
    add = (place < missing.clamp_min(0)[:, None]).long() - (place >= len(joint) + missing.clamp_max(0)[:, None]).long()
    return rounded.long().scatter_add(1, order, add)


def class_counts(probabilities: Tensor, labels: Tensor, cuts: Tensor) -> Tensor:
    """Returns (classes,) int64, how many samples of each given label have -p(given) of at least the class's cut; sums
    over clients.
    """
    over = (_doubt(probabilities, labels) >= cuts[labels]).long()
    return add_at(torch.zeros(len(cuts), dtype=torch.int64), labels, over)


def pair_counts(probabilities: Tensor, labels: Tensor, cuts: Tensor) -> Tensor:
    """Returns (classes, classes) int64, how many samples with given label i have p(j) - p(i) of at least cuts[i, j];
    sums over clients.
    """
    over = (_margins(probabilities, labels) >= cuts[labels]).long()
    return add_at(torch.zeros(cuts.shape, dtype=torch.int64), labels, over)


def prune_by_class(probabilities: Tensor, labels: Tensor, cuts: Tensor) -> Tensor:
    """Returns (n,) bool, the samples whose -p(given) reaches their class's cut, (classes,) from `cuts_for`."""
    return (_doubt(probabilities, labels) >= cuts[labels]) & differs(probabilities, labels)


def prune_by_noise_rate(probabilities: Tensor, labels: Tensor, cuts: Tensor) -> Tensor:
    """Returns (n,) bool, the samples whose p(j) - p(given) reaches the cut of a pair (given, j), (classes, classes)
    from `cuts_for`.
    """
    over = _margins(probabilities, labels) >= cuts[labels]
    return over.any(1) & differs(probabilities, labels)


def cuts_for(count_over: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Returns cuts that `wanted` values reach each, by bisection over values in [-1, 1].

    Stops as soon as the numbers are right: then the server has learnt a cut between two values, and no value. Where
    values tie so that no cut has exactly the number, the tied ones reach it, too.

    Args:
        count_over: cuts of the shape of `wanted` -> how many values reach each of them, summed over clients; one call
            is one exchange, and there are `MAX_EXCHANGES` at most.
        wanted: int64; 0: a cut that nothing reaches, as that of a class with itself.
    """
    low, high = torch.full(wanted.shape, -1.0, dtype=torch.float64), torch.full(wanted.shape, 1.0, dtype=torch.float64)
    low, done = torch.where(wanted > 0, low, NEVER), wanted <= 0
    for _ in range(MAX_EXCHANGES):
        middle = torch.where(done, low, (low + high) / 2)
        reach = count_over(middle)
        enough = done | (reach >= wanted)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        done = done | (reach == wanted)
        if bool(done.all()):
            break
    return low


def suggested_label(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) int64, the most probable class that is not the given label."""
    others = probabilities.double().scatter(1, labels[:, None], -1.0)
    return others.argmax(1)


def normalized_margin(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the quality of each label, (n,) float64 in [0, 1]: (p(given) - p(the best other class) + 1) / 2; below
    0.5 another class is more probable.
    """
    probabilities = probabilities.double()
    own = probabilities.gather(1, labels[:, None])
    best = probabilities.gather(1, suggested_label(probabilities, labels)[:, None])
    return ((own - best + 1) / 2)[:, 0]


def _doubt(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -probabilities.double().gather(1, labels[:, None])[:, 0]


def _margins(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns p(j) - p(given), (n, classes)."""
    probabilities = probabilities.double()
    return probabilities - probabilities.gather(1, labels[:, None])
