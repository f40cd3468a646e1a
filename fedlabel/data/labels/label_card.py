"""The label card: the amount of each kind of label in a federation."""

from __future__ import annotations

from typing import NamedTuple

from fedlabel.data.labels.supervision import Supervision


class LabelCard(NamedTuple):
    """Numbers of samples by kind of label; they can be summed over clients, and contain no labels."""

    samples: int
    true: int
    """Samples with one certain class."""
    noisy: int
    """Samples with one class that may be wrong."""
    sets: int
    """Samples with several candidates that contain the true class; not all classes."""
    noisy_sets: int
    """Samples with several candidates that may miss the true class; not all classes."""
    annotated: int
    """Samples labelled by at least one annotator."""
    annotators: int
    """The largest number of annotators of a sample."""
    bags: int
    """Bags of published class counts."""
    asked: int
    """Samples that labelling functions were applied to."""
    votes: tuple[tuple[int, ...], ...]
    """(functions, classes): votes of each labelling function for each class."""
    noisy_counts: bool = False
    """Whether the counts of some bags have noise (`supervision.count_epsilon`). A supervision record does not contain
    it; `Experiment` sets it from the configuration."""
    label_epsilon: float | None = None
    """`supervision.label_epsilon`, if all noisy labels are randomised responses with this one; set likewise."""

    @property
    def functions(self) -> int:
        """The number of labelling functions."""
        return len(self.votes)


def label_card(supervision: Supervision) -> LabelCard:
    """Counts the labels in the supervision record of a client or of the federation."""
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
