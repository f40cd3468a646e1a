"""Likelihoods of imprecise labels: one row of log-likelihoods per sample, and the resulting posterior.

Source: Chen et al., "Imprecise Label Learning: A Unified Framework for Learning with Various Imprecise Label
Configurations", NeurIPS 2024 (arXiv 2305.12715). Whatever is known of a sample becomes a row l in R^classes with
l_y = log p(information | y): a label is 0 at one class and -inf elsewhere, a candidate set 0 on the set, a noisy label
a column of log T, nothing zeros. Kinds of information that are independent given y add up, and the E step is
softmax(log p + l) for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlabel.checks import one_of, within

SET_LIKELIHOODS = ("product", "sum", "generator")
SMALLEST = 1e-12
"""Probabilities of the noise matrix are not taken to be smaller, so that no information is impossible because of it."""


def posterior(logits: Tensor, log_likelihood: Tensor) -> Tensor:
    """Returns q(y) = p(y | x) p(information | y) / normaliser, the E step.

    Args:
        logits: (n, classes) of p(y | x); -inf where that is 0.
        log_likelihood: (n, classes) log p(information | y); -inf where impossible.

    Returns:
        (n, classes), rows sum to 1.

    Raises:
        ValueError: a row of `log_likelihood`, or of its sum with the logits, is -inf everywhere, or an entry of either
            is NaN or +inf.
    """
    if logits.shape != log_likelihood.shape or logits.dim() != 2:
        raise ValueError(
            f"`logits` {tuple(logits.shape)} and `log_likelihood` {tuple(log_likelihood.shape)} must have one shape "
            "(n, classes)."
        )
    contradictory = (log_likelihood == -torch.inf).all(1).nonzero()
    if len(contradictory):
        raise ValueError(
            f"The supervision of sample {int(contradictory[0])} contradicts itself: its log-likelihood is -inf for "
            "every class. At least one class must be possible; look at its candidates and labels."
        )
    wrong = (~(logits < torch.inf) | ~(log_likelihood < torch.inf)).any(1).nonzero()
    if len(wrong):
        raise ValueError(
            f"The logits or the log-likelihood of sample {int(wrong[0])} hold NaN or +inf; numbers are needed. A model "
            "that gives such logits has diverged: lower training.lr."
        )
    impossible = (logits + log_likelihood == -torch.inf).all(1).nonzero()
    if len(impossible):
        raise ValueError(
            f"The model's prediction for sample {int(impossible[0])} is 0 for every class that is possible "
            "under its supervision."
        )
    return unchecked_posterior(logits, log_likelihood)


def unchecked_posterior(logits: Tensor, log_likelihood: Tensor) -> Tensor:
    """As `posterior`, for losses: without validation of the data, so that it works under `torch.func.vmap`."""
    return (logits.log_softmax(-1) + log_likelihood).softmax(-1)


def marginal_nll(logits: Tensor, log_likelihood: Tensor) -> Tensor:
    """Returns -log sum_y p(y | x) p(information | y) of each sample, (n,).

    Cross-entropy for a label, -log sum_{y in S} p(y | x) for a candidate set (Feng et al., "Provably Consistent
    Partial-Label Learning", NeurIPS 2020: CC), the forward-corrected likelihood for a noisy label (Patrini et al.,
    CVPR 2017), 0 where nothing is known. Its gradient by the logits is p - q.

    Args:
        logits: (n, classes), with gradient.
        log_likelihood: (n, classes), not all -inf in any row.
    """
    return -(logits.log_softmax(-1) + log_likelihood).logsumexp(-1)


def candidates_log_likelihood(candidates: Tensor) -> Tensor:
    """Returns 0 in the set and -inf outside, (n, classes) float, from (n, classes) bool: the set holds the truth."""
    return torch.where(candidates, 0.0, -torch.inf)


def label_log_likelihood(labels: Tensor, transition: Tensor) -> Tensor:
    """Returns log T[y, label] for every y, (n, classes); zeros for samples without a label.

    Args:
        labels: (n,) int64 noisy labels, -1 = none.
        transition: T (classes, classes), T[y, j] = p(noisy label j | true label y).
    """
    rows = transition.clamp_min(SMALLEST).log().T[labels.clamp_min(0)]
    return torch.where((labels >= 0)[:, None], rows, torch.zeros_like(rows))


@dataclass(frozen=True)
class SetLikelihood:
    """p(S | y) of a candidate set S that may miss the true class."""

    kind: str = "sum"
    """sum: S holds a noisy label, sum_{j in S} T[y, j]. product: each candidate is a noisy label of its own, prod_{j in
    S} T[y, j]; use a fixed T with it. generator: the process of `supervision.kind=partial` with noise, with the two
    parameters below and without T."""
    partial_ratio: float = 0.1
    """generator: the probability r in (0, 1) that a wrong label is a candidate."""
    noise_rate: float = 0.1
    """generator: the probability in (0, 1) that a class outside the set replaces the true class."""

    def __post_init__(self) -> None:
        one_of(self, "method.set_likelihood", kind=SET_LIKELIHOODS)
        within(self, "method.set_likelihood", 0, 1, "partial_ratio", "noise_rate", ends="()")

    def log(self, candidates: Tensor, transition: Tensor) -> Tensor:
        """Returns log p(S | y) for every y, (n, classes).

        A set of one candidate is a noisy label and one of all classes says nothing, whatever `kind`.

        Args:
            candidates: (n, classes) bool, at least one True in a row.
            transition: T (classes, classes), see `label_log_likelihood`.
        """
        chosen = candidates.to(transition.dtype)
        size = chosen.sum(-1, keepdim=True)
        one_or_product = chosen @ transition.clamp_min(SMALLEST).log().T
        if self.kind == "product":
            value = one_or_product
        elif self.kind == "sum":
            value = (chosen @ transition.T).clamp_min(SMALLEST).log()
        else:
            value = torch.where(size == 1, one_or_product, self.generator_log(candidates))
        return torch.where(size == candidates.shape[-1], torch.zeros_like(value), value)

    def generator_log(self, candidates: Tensor) -> Tensor:
        """Returns the log-likelihood of the generator for every set, also of one class or of all: (n, classes).

        With K classes and s = |S|: (1 - noise) r^(s-1) (1-r)^(K-s) for y in S and
        noise s r^(s-1) (1-r)^(K-s) / (K-s) for y outside; r^(K-1) for S of all classes, where nothing can be swapped.
        """
        classes = candidates.shape[-1]
        size = candidates.sum(-1, keepdim=True).double()
        r = torch.tensor(self.partial_ratio, dtype=torch.float64, device=candidates.device)
        noise = torch.tensor(self.noise_rate, dtype=torch.float64, device=candidates.device)
        drawn = (size - 1) * r.log() + (classes - size) * torch.log1p(-r)
        inside = drawn + torch.where(size == classes, torch.zeros_like(size), torch.log1p(-noise))
        outside = drawn + noise.log() + (size / (classes - size).clamp_min(1)).log()
        return torch.where(candidates, inside, outside).to(torch.get_default_dtype())


def log_likelihood(
    candidates: Tensor, noisy: Tensor, annotations: Tensor, transitions: Tensor, sets: SetLikelihood
) -> Tensor:
    """Returns log p(supervision of a sample | y), (n, classes).

    Args:
        candidates: (n, classes) bool, see `Supervision`.
        noisy: (n,) bool, the candidates may miss the truth.
        annotations: (n, annotators) int64, -1 = none.
        transitions: (1, classes, classes), shared by all, or one per annotator; noisy candidates go by the first.
        sets: the likelihood of noisy sets.

    Raises:
        ValueError: the matrices do not fit the classes or the annotators.
    """
    classes, annotators = candidates.shape[-1], annotations.shape[-1]
    if transitions.shape[1:] != (classes, classes) or len(transitions) not in (1, annotators):
        raise ValueError(
            f"`transitions` of shape {tuple(transitions.shape)} must be (matrices, classes, classes) for {classes} "
            f"classes: one matrix for all labels, or one for each of the {annotators} annotators of the data."
        )
    value = torch.where(noisy[:, None], sets.log(candidates, transitions[0]), candidates_log_likelihood(candidates))
    for annotator in range(annotations.shape[1]):
        transition = transitions[annotator if len(transitions) > 1 else 0]
        value = value + label_log_likelihood(annotations[:, annotator], transition)
    return value
