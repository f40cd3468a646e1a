"""Compares a client's round with the hidden labels of its samples: only in a simulation, after training."""

from __future__ import annotations

from torch import Tensor

from fedlabel.data.labels.labeling_functions import NOT_ASKED
from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientUpdate
from fedlabel.learning.metrics import Counts, function_counts, pseudo_label_counts


def against_truth(update: ClientUpdate, supervision: Supervision, truth: Tensor) -> tuple[Counts, Counts]:
    """Counts how often a method's beliefs are true: sums over all draws of a round, per true class.

    Args:
        update: of the round.
        supervision: the client's, on the CPU.
        truth: (n,) int64, the true labels of its samples, on the CPU; -1 where the data have none.

    Returns:
        Metrics, as `ClientUpdate.sums` has them: graph/homophily, neighbours of the same class, and all. Counts: see
        `pseudo_label_counts`.
    """
    sums: Counts = {}
    counts: Counts = {}
    if update.pseudo is not None:
        rows = update.pseudo_index
        classes = supervision.candidates.shape[1]
        counts = pseudo_label_counts(update.pseudo, truth[rows], classes, supervision.kind[rows])
    if update.pairs is not None:
        pairs = truth.cpu()[update.pairs.cpu()]
        first, second = pairs[(pairs >= 0).all(1)].unbind(1)
        sums["graph/homophily"] = [float((first == second).sum()), float(len(first))]
    return sums, counts


def votes_against_truth(update: ClientUpdate, supervision: Supervision, truth: Tensor) -> Counts:
    """Counts votes of labelling functions on samples without a label, see `function_counts`; {}: there are none.

    Args:
        update: of the round.
        supervision: the client's.
        truth: (n,) int64, -1 where a label is unknown: with all of them -1 the votes are counted, and none is right.
    """
    if update.votes is None:
        return {}
    votes, sets = (values.cpu() for values in update.votes)
    free = ~supervision.labeled.cpu() & (votes > NOT_ASKED).any(1)
    return function_counts(votes[free], sets, truth.cpu()[free])
