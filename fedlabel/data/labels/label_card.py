"""The label card: how much of each kind of label a federation holds."""

from __future__ import annotations

from typing import NamedTuple

from fedlabel.data.labels.supervision import Supervision


class LabelCard(NamedTuple):
    """Counts of samples by their kind of label; they add up over clients, and no label is in them."""

    samples: int
    true: int
    """One certain class."""
    noisy: int
    """One class that may be wrong."""
    sets: int
    """Several candidates, the truth among them; not all classes."""
    noisy_sets: int
    """Several candidates that the truth may be outside of; not all classes."""
    annotated: int
    """A label of at least one annotator."""
    annotators: int
    """The most that a sample has."""
    bags: int
    """Bags of published class counts."""
    asked: int
    """Samples that labelling functions were asked about."""
    votes: tuple[tuple[int, ...], ...]
    """(functions, classes): votes of each labelling function for each class."""
    noisy_counts: bool = False
    """Whether the counts of some bags have noise on them (`supervision.count_epsilon`). No record tells: who knows the
    configuration fills it in."""

    @property
    def functions(self) -> int:
        """How many labelling functions there are."""
        return len(self.votes)


def label_card(supervision: Supervision) -> LabelCard:
    """Counts the labels in a supervision record: a client's, or the federation's."""
    number, classes = supervision.candidates.sum(1), supervision.candidates.shape[1]
    single, several = number == 1, (number > 1) & (number < classes)
    noisy, votes = supervision.noisy, supervision.votes
    return LabelCard(
        samples=len(number),
        true=int((single & ~noisy).sum()),
        noisy=int((single & noisy).sum()),
        sets=int((several & ~noisy).sum()),
        noisy_sets=int((several & noisy).sum()),
        annotated=int((supervision.annotations >= 0).any(1).sum()),
        annotators=supervision.annotations.shape[1],
        bags=len(supervision.bag_counts),
        asked=int(supervision.voted_on.sum()),
        votes=tuple(tuple(int((of_one == label).sum()) for label in range(classes)) for of_one in votes.unbind(1)),
    )
