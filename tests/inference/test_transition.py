"""The noise matrix: closed form and gradient form against worked numbers, autograd and a simulated annotator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlabel.inference.imprecise import SetLikelihood, label_log_likelihood, marginal_nll, posterior
from fedlabel.inference.transition import (
    diagonal_transition,
    expected_counts,
    expected_label_counts,
    expected_set_counts,
    from_counts,
    gradient_step,
    not_dominant,
    transition_error,
)

T = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])


def test_one_step_of_em_by_hand() -> None:
    """Three samples, two classes; counts, the new matrix and the log-likelihood, which must not fall."""
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1])
    before = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    information = label_log_likelihood(labels, before)
    q = posterior(p.log(), information)
    expected = torch.tensor([[0.975904, 0.024096], [0.529412, 0.470588], [0.157895, 0.842105]])
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)
    counts = expected_counts(q, labels)
    torch.testing.assert_close(counts, torch.tensor([[1.505315, 0.157895], [0.494685, 0.842105]]), atol=1e-6, rtol=0)
    after = from_counts(counts, torch.zeros(2, 2))
    torch.testing.assert_close(after, torch.tensor([[0.905066, 0.094934], [0.370054, 0.629946]]), atol=1e-6, rtol=0)
    likelihoods = [-marginal_nll(p.log(), label_log_likelihood(labels, m)).sum().item() for m in (before, after)]
    assert likelihoods == pytest.approx([-2.2327233, -2.0754124], abs=1e-6)


def test_samples_without_a_label_count_nothing() -> None:
    q = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert expected_counts(q, torch.tensor([-1, 1])).tolist() == [[0.0, 0.25], [0.0, 0.75]]


def test_rows_without_counts_follow_the_prior_or_are_uniform() -> None:
    counts = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    assert from_counts(counts, torch.zeros(2, 2)).tolist() == [[0.75, 0.25], [0.5, 0.5]]
    torch.testing.assert_close(from_counts(counts, torch.eye(2)), torch.tensor([[0.8, 0.2], [0.0, 1.0]]))


def test_gradient_step_is_what_autograd_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, generator=generator, requires_grad=True)
    scores = torch.randn(20, 3, generator=generator)
    labels = torch.randint(-1, 3, (20,), generator=generator)
    given = labels >= 0
    transition = logits.softmax(-1)
    loss = marginal_nll(scores[given], label_log_likelihood(labels[given], transition)).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    q = posterior(scores, label_log_likelihood(labels, transition.detach()))
    stepped = gradient_step(logits.detach(), expected_counts(q, labels), given.sum(), lr=0.5)
    torch.testing.assert_close(stepped, logits.detach() - 0.5 * gradient)
    nothing = gradient_step(logits.detach(), torch.zeros(3, 3), torch.tensor(0), lr=0.5)
    assert torch.equal(nothing, logits.detach())


@pytest.mark.parametrize("kind", ["product", "sum"])
def test_set_counts_give_the_gradient_of_the_set_likelihood(kind: str) -> None:
    """Both rules against autograd through log p(S | y); certain sets and sets of all classes count nothing."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 4, generator=generator, requires_grad=True)
    scores = torch.randn(30, 4, generator=generator)
    candidates = torch.rand(30, 4, generator=generator) < 0.5
    candidates[:, 0] |= ~candidates.any(1)
    candidates[:2] = True
    noisy = torch.arange(30) % 3 > 0
    likelihood = SetLikelihood(kind)
    transition = logits.softmax(-1)
    information = torch.where(noisy[:, None], likelihood.log(candidates, transition), torch.zeros(30, 4))
    (gradient,) = torch.autograd.grad(marginal_nll(scores, information).sum(), logits)
    q = posterior(scores, information.detach())
    counts = expected_set_counts(q, candidates, noisy, transition.detach(), likelihood)
    stepped = gradient_step(logits.detach(), counts, torch.tensor(1), lr=1.0)
    torch.testing.assert_close(logits.detach() - stepped, gradient, atol=1e-5, rtol=1e-5)


def test_generator_learns_only_from_sets_of_one() -> None:
    q = torch.full((2, 3), 1 / 3)
    candidates = torch.tensor([[True, True, False], [False, True, False]])
    counts = expected_set_counts(q, candidates, torch.tensor([True, True]), T, SetLikelihood("generator"))
    torch.testing.assert_close(counts, torch.tensor([[0, 1, 0]] * 3) / 3)


def test_labels_count_for_their_annotators_matrix_or_for_the_only_one() -> None:
    """A noisy label 1 with q = (.9, .1) and annotators' labels (0, none); then labels (1, 0) with q = (.2, .8)."""
    q = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    candidates, noisy = torch.tensor([[False, True], [True, True]]), torch.tensor([True, False])
    annotations = torch.tensor([[0, -1], [1, 0]])
    start = diagonal_transition(2, 0.3)
    first, second = torch.tensor([[0.9, 0.9 + 0.2], [0.1, 0.1 + 0.8]]), torch.tensor([[0.2, 0.0], [0.8, 0.0]])
    both = expected_label_counts(q, candidates, noisy, annotations, start.expand(2, 2, 2), SetLikelihood())
    torch.testing.assert_close(both, torch.stack([first, second]))
    one = expected_label_counts(q, candidates, noisy, annotations, start[None], SetLikelihood())
    torch.testing.assert_close(one, (first + second)[None])


def test_shape_of_the_start_and_what_is_said_of_a_matrix() -> None:
    start = diagonal_transition(4, 0.3)
    torch.testing.assert_close(start.sum(1), torch.ones(4))
    torch.testing.assert_close(start.diagonal(), torch.full((4,), 0.7))
    assert float(start[0, 1]) == pytest.approx(0.1)
    assert not_dominant(T) == []
    assert not_dominant(T[[1, 0, 2]]) == [0, 1]
    assert transition_error(T, T + torch.tensor([0.3, 0.0, 0.0])) == pytest.approx((0.3, 0.1))


def gaussians(seed: int, means: Tensor, n: int = 3000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    points = means[labels] + torch.randn(n, 2, generator=generator)
    return torch.cat([points, torch.ones(n, 1)], 1).double(), labels


def fit(x: Tensor, targets: Tensor, weight: Tensor, steps: int) -> Tensor:
    """Softmax regression by gradient descent from `weight`, with soft targets."""
    for _ in range(steps):
        weight = weight - 1.0 * x.T @ ((x @ weight).softmax(1) - targets) / len(x)
    return weight


def test_em_learns_the_matrix_and_the_likelihood_never_falls() -> None:
    """Three Gaussians and a harsh annotator (class 0 mostly labelled 1): over five seeds EM is far above training on
    the labels as they are, near what the known matrix gives, and finds the matrix to .05."""
    means = torch.tensor([[0.0, 2.0], [1.75, -1.0], [-1.75, -1.0]])
    truth = torch.tensor([[0.55, 0.45, 0.0], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    naive, known, learnt, errors = [], [], [], []
    for seed in range(5):
        x, y = gaussians(seed, means)
        test_x, test_y = gaussians(100 + seed, means)
        noisy = torch.multinomial(truth[y], 1, generator=torch.Generator().manual_seed(seed))[:, 0]

        def accuracy(weight: Tensor, x: Tensor = test_x, y: Tensor = test_y) -> float:
            return float(((x @ weight).argmax(1) == y).double().mean())

        def train(transition: Tensor, learn: bool, x: Tensor = x, noisy: Tensor = noisy) -> tuple[Tensor, Tensor]:
            weight, before = torch.zeros(3, 3).double(), -torch.inf
            for iteration in range(200):
                information = label_log_likelihood(noisy, transition)
                likelihood = -marginal_nll(x @ weight, information).sum().item()
                assert likelihood > before - 1e-9
                before = likelihood
                q = posterior(x @ weight, information)
                weight = fit(x, q, weight, 5)
                if learn and iteration >= 20:  # not at once: the matrix would take on the untrained model's errors
                    q = posterior(x @ weight, information)
                    transition = from_counts(expected_counts(q, noisy), torch.zeros_like(transition))
            return weight, transition

        hot = torch.nn.functional.one_hot(noisy, 3).double()
        naive.append(accuracy(fit(x, hot, torch.zeros(3, 3).double(), 1000)))
        known.append(accuracy(train(truth.double(), learn=False)[0]))
        weight, found = train(diagonal_transition(3, 0.3).double(), learn=True)
        learnt.append(accuracy(weight))
        errors.append(transition_error(found, truth.double())[0])
    assert sum(learnt) / 5 > sum(naive) / 5 + 0.10
    assert abs(sum(learnt) - sum(known)) / 5 < 0.01
    assert max(errors) < 0.05
