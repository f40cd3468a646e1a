"""Labels whose number is known, against enumeration; numbers from LLP-BP's specification, checks 3 to 5."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlabel.inference.cardinality import (
    CERTAIN,
    bag_posterior,
    class_posterior,
    count_log_likelihood,
    exact_messages,
    gaussian_messages,
    tilt,
)

THREE = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64).logit()


def enumerate_bag(theta: Tensor, log_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals and log of the summed weight; log_factor: (k + 1,)."""
    z = torch.tensor(list(itertools.product([0, 1], repeat=len(theta))), dtype=torch.float64)
    energy = z @ theta + log_factor[z.sum(1).long()]
    return energy.softmax(0) @ z, energy.logsumexp(0)


@pytest.mark.parametrize(
    ("count", "posterior", "likelihood"),
    [
        (0, [0, 0, 0], 0.032),
        (1, [0.837209, 0.139535, 0.023256], 0.344),
        (2, [0.976744, 0.860465, 0.162791], 0.516),
        (3, [1, 1, 1], 0.108),
    ],
)
def test_worked_bag_of_three(count, posterior, likelihood):
    """Check 3: p = (.9, .6, .2)."""
    assert bag_posterior(THREE, count).tolist() == pytest.approx(posterior, abs=1e-6)
    assert float(count_log_likelihood(THREE, count).exp()) == pytest.approx(likelihood, abs=1e-12)


def test_worked_bag_of_four():
    """Check 3: p = (.7, .2, .5, .9), count 2, Z = .425; and -log Z of the bag of three."""
    four = torch.tensor([0.7, 0.2, 0.5, 0.9], dtype=torch.float64).logit()
    assert bag_posterior(four, 2).tolist() == pytest.approx([0.675294, 0.087059, 0.327059, 0.910588], abs=1e-6)
    assert float(count_log_likelihood(four, 2).exp()) == pytest.approx(0.425)
    assert float(count_log_likelihood(THREE, 1)) == pytest.approx(-1.0671136)
    assert float(count_log_likelihood(THREE, 2)) == pytest.approx(-0.6616485)


def test_worked_messages():
    """Check 4: hard, and soft with lambda_bag = .5."""
    one = torch.tensor([1])
    assert exact_messages(THREE[None], one, one)[0].tolist() == pytest.approx(
        [-0.559616, -2.224624, -2.351375], abs=1e-6
    )
    soft = exact_messages(THREE[None], one, one, 0.5)[0]
    assert soft.tolist() == pytest.approx([-0.201610, -0.484127, -0.741105], abs=1e-6)
    assert (THREE + soft).sigmoid().tolist() == pytest.approx([0.880336, 0.480345, 0.106462], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("size", [1, 2, 5, 9, 12])
def test_every_factor_equals_enumeration(size, scale):
    """Check 5, also where the labels are all but certain and the count is against them."""
    generator = torch.Generator().manual_seed(size)
    theta = scale * torch.randn(size, generator=generator, dtype=torch.float64)
    sums = torch.arange(size + 1).double()
    for count in range(size + 1):
        exact, log_weight = enumerate_bag(theta, torch.where(sums == count, 0.0, -math.inf).double())
        torch.testing.assert_close(bag_posterior(theta, count), exact, rtol=0, atol=1e-12)
        log_likelihood = log_weight + logsigmoid(-theta).sum()
        torch.testing.assert_close(count_log_likelihood(theta, count), log_likelihood, rtol=1e-11, atol=1e-12)
    for least, most, lambda_bag in [
        (1, size, math.inf),
        (0, size // 2, math.inf),
        (size // 2, size // 2, 0.7),
        (1, 1, 3),
    ]:
        distance = (least - sums).clamp_min(0) + (sums - most).clamp_min(0)
        log_factor = -lambda_bag * distance**2 if lambda_bag < math.inf else torch.where(distance > 0, -math.inf, 0.0)
        exact, _ = enumerate_bag(theta, log_factor.double())
        message = exact_messages(theta[None], torch.tensor([least]), torch.tensor([most]), lambda_bag)[0]
        torch.testing.assert_close((theta + message).sigmoid(), exact, rtol=0, atol=1e-12)


def test_symmetries():
    """Check 5: permuted bags have permuted answers; counting zeros gives one minus it; it sums to the count."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(11, generator=generator, dtype=torch.float64)
    posterior = bag_posterior(theta, 4)
    order = torch.randperm(11, generator=generator)
    torch.testing.assert_close(bag_posterior(theta[order], 4), posterior[order])
    torch.testing.assert_close(bag_posterior(-theta, 7), 1 - posterior)
    assert float(posterior.sum()) == pytest.approx(4)


def test_bags_together_equal_bags_apart():
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    counts = torch.tensor([[1, 2, 3], [0, 5, 4]])
    together, likelihood = bag_posterior(theta, counts), count_log_likelihood(theta, counts)
    assert likelihood.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(together[i, j], bag_posterior(theta[i, j], int(counts[i, j])))
        torch.testing.assert_close(likelihood[i, j], count_log_likelihood(theta[i, j], int(counts[i, j])))


def test_gradient_of_the_likelihood_is_posterior_minus_prior():
    """Also under vmap."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    counts = torch.tensor([0, 2, 6])

    def likelihood(values: Tensor, count: Tensor) -> Tensor:
        return count_log_likelihood(values, count)

    gradient = torch.func.vmap(torch.func.grad(likelihood))(theta, counts)
    expected = bag_posterior(theta, counts) - theta.sigmoid()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


SHAPES = ("flat", "normal", "wide", "two", "mixed", "outlier")


def log_odds(shape: str, size: int, seed: int = 0) -> Tensor:
    """(size,) within +-30, from all alike to all but certain."""
    z = torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + size), dtype=torch.float64)
    return {
        "flat": torch.full_like(z, -1.0),
        "normal": z,
        "wide": (5 * z).clamp(-30, 30),
        "two": torch.where(z > 0.5, 30.0, -30.0).double(),
        "mixed": z + torch.where(z > 0.8, 4.0, -6.0),
        "outlier": torch.cat([z.new_tensor([30.0]), torch.full_like(z[1:], -30.0)]),
    }[shape]


def counts_from_the_tails(theta: Tensor) -> Tensor:
    """0, 1, .24 e, e -+ 2.5 s, k - 1, k: e the expected count of log-odds (k,), s its standard deviation."""
    p, k = theta.sigmoid(), len(theta)
    e, s = float(p.sum()), float((p * (1 - p)).sum().sqrt())
    counts = {round(min(max(count, 0), k)) for count in (0, 1, 0.24 * e, e - 2.5 * s, e + 2.5 * s, k - 1, k)}
    return torch.tensor(sorted(counts))


def count_log_probabilities(theta: Tensor) -> np.ndarray:
    """log p(count) for 0..k of log-odds (k,): one label after the other, in the log domain of float64."""
    row = np.full(len(theta) + 1, -np.inf)
    row[0] = 0
    for one, zero in zip(logsigmoid(theta).tolist(), logsigmoid(-theta).tolist(), strict=True):
        row = np.logaddexp(row + zero, np.concatenate([[-np.inf], row[:-1] + one]))
    return row


def test_worked_likelihood_of_a_bag_of_a_thousand():
    """A count of 120 where 492 are expected: -383.316; a tilt that loses its root gives -375.04."""
    theta = log_odds("normal", 1000, seed=5)
    assert count_log_probabilities(theta)[120] == pytest.approx(-383.3162, abs=1e-3)
    assert float(count_log_likelihood(theta, 120)) == pytest.approx(-383.3162, abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "seeds"), [(257, 4), (512, 3), (1000, 1), (3000, 1)])
def test_likelihood_of_a_large_bag_is_near_the_exact_one(size, seeds, shape):
    """The Gaussian's error is at most .2 and .2 over the variance of the count after the tilt; .13 was measured."""
    for seed in range(seeds):
        theta = log_odds(shape, size, seed)
        counts = counts_from_the_tails(theta)
        found = count_log_likelihood(theta.expand(len(counts), -1), counts)
        exact = torch.from_numpy(count_log_probabilities(theta)[counts])
        t = tilt(theta.expand(len(counts), -1), counts.double(), counts.double(), tolerance=1e-6)
        p = (theta + t[:, None]).sigmoid()
        error = (found - exact) * (p * (1 - p)).sum(1).clamp_min(1)
        assert float(error.abs().max()) < 0.2, (counts, found, exact)
        single = count_log_likelihood(theta.float().expand(len(counts), -1), counts)
        torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [257, 512])
def test_gradient_of_a_large_bag_is_near_the_exact_one(size, shape):
    """Against central differences of the exact likelihood, and under vmap."""
    theta = log_odds(shape, size)
    counts = counts_from_the_tails(theta)
    many = theta.expand(len(counts), -1)
    gradient = torch.func.vmap(torch.func.grad(lambda values, count: count_log_likelihood(values, count)))(many, counts)
    for place in (0, size // 2, size - 1):
        step = torch.zeros_like(theta)
        step[place] = 1e-4
        difference = count_log_probabilities(theta + step) - count_log_probabilities(theta - step)
        exact = torch.from_numpy(difference[counts]) / 2e-4
        torch.testing.assert_close(gradient[:, place], exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("absent", [0, 295])
def test_absent_labels_change_nothing(absent: int) -> None:
    """Also where the rest of the row makes it wide, whose likelihood is then not exact: within 2 %."""
    theta = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.3], dtype=torch.float64)
    padded = torch.cat([theta, torch.full((absent,), -math.inf, dtype=torch.float64)]).requires_grad_()
    for count in range(6):
        value = count_log_likelihood(padded, count)
        assert float(value.detach()) == pytest.approx(
            float(count_log_likelihood(theta, count)), abs=0.06 if absent else 1e-12
        )
        (gradient,) = torch.autograd.grad(value, padded)
        assert gradient[5:].abs().sum() == 0
        posterior = bag_posterior(theta, count)
        torch.testing.assert_close(gradient[:5], posterior - theta.sigmoid(), rtol=0, atol=0.07 if absent else 1e-12)


def test_likelihood_of_a_large_bag_is_at_most_one() -> None:
    """300 labels that are all but certain of the right count: log p near 0, and no reward for being surer."""
    for sure in (2.0, 8.0, 20.0, 60.0):
        theta = torch.where(torch.arange(300) < 100, sure, -sure).double()
        value = float(count_log_likelihood(theta, 100))
        assert value <= 0
        assert value > -0.2 or sure < 8


@pytest.mark.parametrize(("size", "error"), [(64, 0.006), (256, 0.001), (1024, 0.0002)])
def test_gaussian_messages_approach_the_exact_ones(size, error):
    """Check 15, and far from the mode, too: the count is four standard deviations off."""
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(20, size, generator=generator, dtype=torch.float64)
    p = theta.sigmoid()
    counts = (p.sum(1) + 4 * (p * (1 - p)).sum(1).sqrt()).round().long()
    for lambda_bag in (math.inf, 1.0):
        exact = (theta + exact_messages(theta, counts, counts, lambda_bag)).sigmoid()
        near = (theta + gaussian_messages(theta, counts, lambda_bag)).sigmoid()
        torch.testing.assert_close(near, exact, rtol=0, atol=error)
        assert float((near - exact).abs().max()) > 0


def test_messages_in_float32_keep_their_precision_far_in_the_tail():
    """100 labels that are 1 with p = .0067 each, of which 90 are 1: a probability of 1e-180."""
    theta = torch.full((1, 100), -5.0) + torch.linspace(-1, 1, 100)
    count = torch.tensor([90])
    single, double = exact_messages(theta, count, count), exact_messages(theta.double(), count, count)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


def test_tilt_meets_the_count():
    theta = torch.tensor([[3.0, 2.0, -1.0], [-math.inf, 5.0, -4.0], [40.0, 40.0, 40.0]], dtype=torch.float64)
    count = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    t = tilt(theta, count, count)
    torch.testing.assert_close((theta + t[:, None]).sigmoid().sum(1), count, rtol=0, atol=1e-3)
    inside = tilt(theta, 0 * count, 3 * count)
    assert inside.tolist() == [0, 0, 0]


@pytest.mark.parametrize("lambda_bag", [math.inf, 1e4, 100, 1, 0.01, 1e-4])
@pytest.mark.parametrize("size", [5, 257, 2048])
def test_tilt_meets_every_target_of_a_stack(size, lambda_bag):
    """Bags of every shape, some of their labels certain, and counts from the tails, all at once: none is given up."""
    rows, targets = [], []
    for seed in range(4):
        for shape in SHAPES:
            theta = log_odds(shape, size, seed)
            if seed % 2:
                share = torch.rand(size, generator=torch.Generator().manual_seed(seed))
                theta = torch.where(share < 0.2, CERTAIN, torch.where(share > 0.7, -CERTAIN, theta))
            counts = counts_from_the_tails(theta)
            if lambda_bag == math.inf:
                counts = counts.clamp(int((theta == CERTAIN).sum()), size - int((theta == -CERTAIN).sum()))
            rows += [theta] * len(counts)
            targets += counts.tolist()
    theta, target = torch.stack(rows), torch.tensor(targets).double()
    for start in (None, torch.full_like(target, 3.0)):
        t = tilt(theta, target, target, lambda_bag, start)
        met = (theta + t[:, None]).sigmoid().sum(1) + t / (2 * lambda_bag)
        torch.testing.assert_close(met, target, rtol=0, atol=1.001e-3)


def test_joint_posterior_of_three_classes():
    """The specification of ILL, section 9: counts (1, 1, 1), and against enumeration for two bags at once."""
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    posterior = class_posterior(probability.log(), torch.tensor([1, 1, 1]))
    expected = [[0.798658, 0.147651, 0.053691], [0.14094, 0.738255, 0.120805], [0.060403, 0.114094, 0.825503]]
    torch.testing.assert_close(posterior, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(4)
    log_probs = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    log_probs[0, 0, 1] = -math.inf
    counts = torch.tensor([[2, 2, 1], [5, 0, 0]])
    labels = torch.tensor(list(itertools.product(range(3), repeat=5)))
    z = torch.nn.functional.one_hot(labels, 3).double()
    for bag in range(2):
        allowed = (z.sum(1) == counts[bag]).all(1)
        energy = (z[allowed] * log_probs[bag].clamp_min(-1e9)).sum((1, 2))
        exact = torch.einsum("l,lnc->nc", energy.softmax(0), z[allowed])
        torch.testing.assert_close(class_posterior(log_probs, counts)[bag], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("log_odds", "count", "message"),
    [
        (THREE, 4, r"count of bag 0 \(=4\) must be an integer in \[0, 3\]"),
        (THREE, -1, r"count of bag 0 \(=-1\)"),
        (torch.tensor([math.inf, math.inf, 0]), 1, "Bag 0 contradicts itself: 2 of its 3 samples are certainly 1"),
        (torch.tensor([-math.inf, 0, 0]), 3, "Bag 0 contradicts itself"),
    ],
)
def test_impossible_counts_are_named(log_odds, count, message):
    with pytest.raises(ValueError, match=message):
        bag_posterior(log_odds, count)


def test_certain_labels_stay_certain():
    posterior = bag_posterior(torch.tensor([math.inf, 0.0, 0.0, -math.inf]), 2)
    assert posterior.tolist() == pytest.approx([1, 0.5, 0.5, 0])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 1, 2], r"counts of bag 0 \(=\[1, 1, 2\]\) must be non-negative and sum to its number of samples, 3"),
        ([4, -1, 0], r"counts of bag 0 \(=\[4, -1, 0\]\)"),
        ([3, 0, 0], "Bag 0 contradicts itself"),
    ],
)
def test_impossible_counts_of_classes_are_named(counts, message):
    log_probs = torch.zeros(3, 3)
    log_probs[0, 0] = -math.inf
    with pytest.raises(ValueError, match=message):
        class_posterior(log_probs, torch.tensor(counts))


def test_too_many_count_vectors_are_refused():
    counts = torch.full((9,), 4)
    with pytest.raises(ValueError, match="up to 1953125 vectors below them, more than 100000: take `class_marginals`"):
        class_posterior(torch.zeros(36, 9), counts)
