"""The noise matrix T[y, j] = p(noisy label j | true label y), and its estimation.

Closed form (Dawid and Skene, 1979): expected counts N[y, j] = sum_i q_i(y) [label_i = j] add up over samples and
clients, and T is N with rows normalised, so a federation of all clients learns what one pool of their data would.
Gradient form (Chen et al., "Imprecise Label Learning", NeurIPS 2024): T = softmax of free logits by rows, moved against
the gradient of the forward-corrected likelihood, which those counts also give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlabel.inference.imprecise import SMALLEST, SetLikelihood


def diagonal_transition(num_classes: int, noise_rate: float) -> Tensor:
    """Returns T (classes, classes) with 1 - noise_rate on the diagonal, the rest spread evenly over each row."""
    identity = torch.eye(num_classes)
    return (1 - noise_rate) * identity + noise_rate * (1 - identity) / (num_classes - 1)


def expected_counts(posterior: Tensor, labels: Tensor) -> Tensor:
    """Returns N (classes, classes), N[y, j] = sum of q_i(y) over the samples with noisy label j.

    Args:
        posterior: q (n, classes).
        labels: (n,) int64, -1 = none.
    """
    classes = torch.arange(posterior.shape[-1], device=labels.device)
    return posterior.T @ (labels[:, None] == classes).to(posterior.dtype)


def expected_set_counts(
    posterior: Tensor, candidates: Tensor, noisy: Tensor, transition: Tensor, sets: SetLikelihood
) -> Tensor:
    """Returns the expected counts (classes, classes) of noisy candidate sets.

    product: each candidate counts as a label; sum: the candidates share one, by T; generator: a set says nothing of T.
    Sets of one candidate count as a label, sets of all classes not at all.

    Args:
        posterior: q (n, classes).
        candidates: (n, classes) bool.
        noisy: (n,) bool; others count nothing.
        transition: T of the E step.
        sets: which likelihood.
    """
    size = candidates.sum(-1)
    used = noisy & (size < candidates.shape[-1])
    if sets.kind == "generator":
        used = used & (size == 1)
    chosen = (candidates & used[:, None]).to(posterior.dtype)
    if sets.kind != "sum":
        return posterior.T @ chosen
    # The share of candidate j in sample i, if the class is y, is T[y, j] / sum over candidates of T[y, .].
    inverse = posterior / (chosen @ transition.T).clamp_min(SMALLEST) * used[:, None]
    return transition * (inverse.T @ chosen)


def expected_label_counts(
    posterior: Tensor,
    candidates: Tensor,
    noisy: Tensor,
    annotations: Tensor,
    transitions: Tensor,
    sets: SetLikelihood,
) -> Tensor:
    """Returns the expected counts of all noisy sets and labels, (matrices, classes, classes).

    Args:
        posterior: q (n, classes).
        candidates: (n, classes) bool; those that are noisy count for the first matrix.
        noisy: (n,) bool.
        annotations: (n, annotators) int64, -1 = none.
        transitions: (1, classes, classes), shared by all, or one per annotator.
        sets: the likelihood of noisy sets.
    """
    several = len(transitions) > 1
    first = expected_set_counts(posterior, candidates, noisy, transitions[0], sets)
    counts = [first, *(torch.zeros_like(first) for _ in range(len(transitions) - 1))]
    for annotator, labels in enumerate(annotations.unbind(-1)):
        place = annotator if several else 0
        counts[place] = counts[place] + expected_counts(posterior, labels)
    return torch.stack(counts)


def from_counts(counts: Tensor, prior: Tensor) -> Tensor:
    """Returns T from expected counts: (counts + prior) with rows normalised; a row without counts and prior is uniform.

    Args:
        counts: (..., classes, classes).
        prior: Dirichlet pseudo-counts of the same shape, at least 0.
    """
    total = counts + prior
    rows = total.sum(-1, keepdim=True)
    return torch.where(rows > 0, total / rows.clamp_min(SMALLEST), torch.full_like(total, 1 / total.shape[-1]))


def gradient_step(logits: Tensor, counts: Tensor, samples: Tensor, lr: float) -> Tensor:
    """Returns the logits of T after one step of gradient descent on the mean of -log sum_y p(y) T[y, label].

    The gradient by the logits is (row sum of N * T - N) / samples, for expected counts N under the current T.

    Args:
        logits: (..., classes, classes).
        counts: N of the same shape.
        samples: () how many samples N is from; 0 moves nothing.
        lr: learning rate.
    """
    gradient = counts.sum(-1, keepdim=True) * logits.softmax(-1) - counts
    return logits - lr * gradient / samples.clamp_min(1)


def not_dominant(transition: Tensor) -> list[int]:
    """Returns the classes whose diagonal entry is not the largest of their row of T (classes, classes).

    T is learnt up to a permutation of the classes; only a dominant diagonal says that it is the right one.
    """
    return (transition.argmax(-1) != torch.arange(len(transition), device=transition.device)).nonzero()[:, 0].tolist()


def transition_error(transition: Tensor, truth: Tensor) -> tuple[float, float]:
    """Returns (largest, mean) absolute difference of two matrices (classes, classes)."""
    difference = (transition - truth).abs()
    return float(difference.max()), float(difference.mean())
