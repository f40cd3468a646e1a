"""Posteriors and likelihoods of imprecise labels, against worked numbers and enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedlabel.inference.imprecise import (
    SetLikelihood,
    candidates_log_likelihood,
    label_log_likelihood,
    log_likelihood,
    marginal_nll,
    posterior,
)

T = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
P = torch.tensor([[0.5, 0.3, 0.2]])


def sets(*rows: str) -> Tensor:
    """sets("110") is {0, 1} of three classes."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def unnamed(values: Tensor) -> Tensor:
    """A row normalised."""
    return values / values.sum(-1, keepdim=True)


def test_posterior_of_a_candidate_set_and_its_gradient() -> None:
    """p = (.5, .3, .2), S = {0, 1}: q = (5/8, 3/8, 0); -log .8 = .2231436; gradient p - q = (-.125, -.075, .2)."""
    logits = P.log().requires_grad_()
    information = candidates_log_likelihood(sets("110"))
    torch.testing.assert_close(posterior(logits.detach(), information), torch.tensor([[0.625, 0.375, 0.0]]))
    loss = marginal_nll(logits, information)
    assert loss.item() == pytest.approx(0.2231436, abs=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.125, -0.075, 0.2]]), atol=1e-6, rtol=0)


def test_posterior_of_a_noisy_label() -> None:
    """p T = (.48, .32, .2); label 1: q = (.05, .21, .06) / .32; -log .32 = 1.1394343."""
    information = label_log_likelihood(torch.tensor([1]), T)
    torch.testing.assert_close(posterior(P.log(), information), torch.tensor([[0.15625, 0.65625, 0.1875]]))
    assert marginal_nll(P.log(), information).item() == pytest.approx(1.1394343, abs=1e-6)


@pytest.mark.parametrize(
    ("information", "expected"),
    [
        (candidates_log_likelihood(sets("111")), P),
        (candidates_log_likelihood(sets("010")), torch.tensor([[0.0, 1.0, 0.0]])),
        (label_log_likelihood(torch.tensor([2]), torch.eye(3)), torch.tensor([[0.0, 0.0, 1.0]])),
        (label_log_likelihood(torch.tensor([2]), T[:1].expand(3, 3)), P),
        (label_log_likelihood(torch.tensor([-1]), T), P),
        (torch.zeros(1, 3), P),
    ],
    ids=["all candidates", "one candidate", "T is the identity", "T says nothing", "no label", "nothing"],
)
def test_limits(information: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(posterior(P.log(), information), expected)


def test_kinds_of_information_add_up_in_any_order_and_a_label_overrides() -> None:
    """S = {0, 1} and noisy label 1: .5 * .1 : .3 * .7 = 5 : 21; with the label 0 on top only class 0 is left."""
    record = {"noisy": torch.tensor([False]), "annotations": torch.tensor([[1]]), "transitions": T[None]}
    information = log_likelihood(sets("110"), **record, sets=SetLikelihood())
    torch.testing.assert_close(posterior(P.log(), information), torch.tensor([[5 / 26, 21 / 26, 0.0]]))
    parts = [candidates_log_likelihood(sets("110")), label_log_likelihood(torch.tensor([1]), T)]
    for order in itertools.permutations(parts):
        torch.testing.assert_close(sum(order), information)
    label = candidates_log_likelihood(sets("100"))
    torch.testing.assert_close(posterior(P.log(), information + label), torch.tensor([[1.0, 0.0, 0.0]]))


def test_annotators_share_a_matrix_or_have_their_own() -> None:
    """Labels 1 and 2 of one sample: weights .5 * T[0,1] * T'[0,2] and so on; a missing one (-1) says nothing."""
    other = torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    rest = {"candidates": sets("111", "111"), "noisy": torch.zeros(2, dtype=torch.bool), "sets": SetLikelihood()}
    labels = torch.tensor([[1, 2], [-1, 2]])
    own = log_likelihood(annotations=labels, transitions=torch.stack([T, other]), **rest)  # type: ignore[arg-type]
    q = posterior(P.log().expand(2, 3), own)
    torch.testing.assert_close(q[0], unnamed(P[0] * T[:, 1] * other[:, 2]))
    torch.testing.assert_close(q[1], unnamed(P[0] * other[:, 2]))
    shared = log_likelihood(annotations=labels, transitions=T[None], **rest)  # type: ignore[arg-type]
    torch.testing.assert_close(posterior(P.log().expand(2, 3), shared)[0], unnamed(P[0] * T[:, 1] * T[:, 2]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("product", [0.689655, 0.103448, 0.206897]),  # weights .08, .02, .06
        ("sum", [0.661765, 0.132353, 0.205882]),  # .9, .3, .7
        ("generator", [0.588235, 0.176471, 0.235294]),  # .072, .036, .072
    ],
)
def test_likelihoods_of_a_noisy_set(kind: str, expected: list[float]) -> None:
    """S = {0, 2} with T above; generator with noise .2 and r = .1; posterior weights p times those noted."""
    likelihood = SetLikelihood(kind, partial_ratio=0.1, noise_rate=0.2)
    q = posterior(P.log(), likelihood.log(sets("101"), T))
    torch.testing.assert_close(q, torch.tensor([expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["product", "sum", "generator"])
def test_noisy_set_of_one_is_a_noisy_label_and_of_all_says_nothing(kind: str) -> None:
    value = SetLikelihood(kind).log(sets("010", "111"), T)
    torch.testing.assert_close(value[0], T[:, 1].log())
    assert torch.equal(value[1], torch.zeros(3))


@pytest.mark.parametrize("classes", [3, 5])
def test_generator_likelihoods_of_all_sets_sum_to_one_for_every_class(classes: int) -> None:
    every = [row for row in itertools.product([False, True], repeat=classes) if any(row)]
    value = SetLikelihood("generator", 0.3, 0.2).generator_log(torch.tensor(every))
    torch.testing.assert_close(value.exp().sum(0), torch.ones(classes))


def test_zero_in_the_noise_matrix_makes_nothing_impossible() -> None:
    q = posterior(torch.zeros(1, 2), label_log_likelihood(torch.tensor([1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
    torch.testing.assert_close(q, torch.tensor([[0.5, 0.5]]))


def test_errors_name_the_sample() -> None:
    information = candidates_log_likelihood(sets("111", "000"))
    with pytest.raises(ValueError, match="sample 1 contradicts itself.*-inf for every class"):
        posterior(torch.zeros(2, 3), information)
    with pytest.raises(ValueError, match="of sample 0 hold NaN"):
        posterior(torch.full((1, 3), torch.nan), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"`logits` \(2, 3\) and `log_likelihood` \(1, 3\) must have one shape"):
        posterior(torch.zeros(2, 3), torch.zeros(1, 3))


def test_matrices_must_fit_classes_and_annotators() -> None:
    known = {"candidates": sets("111"), "noisy": torch.tensor([False]), "sets": SetLikelihood()}
    labels = torch.tensor([[1, 2, -1]])
    for shape, words in (((1, 2, 2), r"\(1, 2, 2\) must be .* for 3 classes"), ((2, 3, 3), "each of the 3 annotators")):
        with pytest.raises(ValueError, match=words):
            log_likelihood(annotations=labels, transitions=torch.ones(shape), **known)  # type: ignore[arg-type]


def test_bad_set_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind` \(=max\) must be one of product, sum, generator"):
        SetLikelihood("max")
    with pytest.raises(ValueError, match=r"partial_ratio` \(=0\) must lie in \(0, 1\)"):
        SetLikelihood(partial_ratio=0)


@pytest.mark.parametrize(
    ("logits", "known", "message"),
    [
        ([[0.0, -torch.inf]], [[-torch.inf, 0.0]], "prediction for sample 0 is 0 for every class that is possible"),
        ([[0.0, 0.0], [torch.inf, 0.0]], [[0.0, 0.0]] * 2, "sample 1 hold NaN or .inf; numbers are needed"),
        ([[0.0, 0.0]], [[torch.inf, 0.0]], "sample 0 hold NaN or .inf"),
    ],
)
def test_what_has_no_posterior_is_refused(logits: list[list[float]], known: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior(torch.tensor(logits), torch.tensor(known))
    assert posterior(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)).tolist() == [[1, 0]]
