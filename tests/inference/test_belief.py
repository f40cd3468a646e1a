"""Belief propagation against enumeration, and the acceptance checks of LLP-BP's specification."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.inference.belief import Beliefs, _large_stacks, bag_posterior, change, marginals
from fedlabel.inference.cardinality import class_posterior, exact_messages
from fedlabel.inference.class_belief import class_marginals
from fedlabel.inference.pairwise import ising, sum_product

NO_EDGES = torch.zeros(0, 2, dtype=torch.int64)
NO_WEIGHT = torch.zeros(0, dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_labels(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([0, 1], repeat=n)), dtype=torch.float64)


def enumerate_marginals(
    log_odds: Tensor,
    bag: Tensor,
    counts: Tensor,
    edges: Tensor,
    weight: Tensor,
    lambda_bag: float = math.inf,
    lambda_edge: float = 1.0,
) -> Tensor:
    """p(z_i = 1) from all 2^n labels; counts: (bags,) or (bags, 2)."""
    z = all_labels(len(log_odds))
    energy = z @ log_odds
    for b, count in enumerate(counts):
        least, most = (count, count) if count.dim() == 0 else count
        total = z[:, bag == b].sum(1)
        distance = (least - total).clamp_min(0) + (total - most).clamp_min(0)
        penalty = torch.where(distance > 0, math.inf, 0.0) if lambda_bag == math.inf else lambda_bag * distance**2
        energy = energy - penalty
    for (i, j), k in zip(edges.tolist(), weight.tolist(), strict=True):
        energy = energy - lambda_edge * k * (z[:, i] - z[:, j]) ** 2
    return energy.softmax(0) @ z


def loopy() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """12 labels, three bags of 4 with counts 1, 2, 3, 8 edges: bag, counts, edges, weights."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.combinations(torch.arange(12))
    edges = pairs[torch.randperm(len(pairs), generator=generator)[:8]]
    return (
        torch.arange(12) // 4,
        torch.tensor([1, 2, 3]),
        edges,
        torch.rand(8, generator=generator).double() * 0.8 + 0.2,
    )


def test_a_tree_of_bags_and_edges_is_exact():
    """Check 8: two bags of 4 with counts 1 and 3 joined by one edge."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        log_odds = torch.randn(8, generator=generator, dtype=torch.float64)
        problem = (log_odds, torch.arange(8) // 4, torch.tensor([1, 3]), torch.tensor([[2, 5]]), numbers(0.7))
        beliefs = marginals(*problem, tolerance=1e-12)
        assert beliefs.converged
        torch.testing.assert_close(beliefs.probability, enumerate_marginals(*problem), rtol=0, atol=1e-9)


def test_chain_without_bags_is_exact():
    """Check 2: u = (.5, -.3, .2, 0, -1) with J = (1, .5, 2, .7) as differences that cost J / 2 each; a tree."""
    coupling = numbers(1, 0.5, 2, 0.7)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])
    nobody, none = torch.full((5,), -1), torch.zeros(0, dtype=torch.int64)
    beliefs = marginals(numbers(0.5, -0.3, 0.2, 0, -1), nobody, none, edges, coupling / 2, tolerance=1e-12)
    exact = enumerate_marginals(numbers(0.5, -0.3, 0.2, 0, -1), nobody, none, edges, coupling / 2)
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=1e-12)


def test_chain_with_labels_that_repel_by_the_worked_numbers():
    """Check 2: J = (1, -.5, 2, .7) gives (.721051, ...); two labels with u = (.5, -.3), J = 1 (.740550, .605237)."""

    def run(unary: Tensor, pairs: list[list[int]], coupling: Tensor) -> Tensor:
        found = sum_product(unary, torch.tensor(pairs), coupling, 0.0, 200, 1e-13, change)[0].sigmoid()
        z = all_labels(len(unary))
        energy = z @ unary + sum(c * z[:, i] * z[:, j] for (i, j), c in zip(pairs, coupling.tolist(), strict=True))
        torch.testing.assert_close(found, energy.softmax(0) @ z, rtol=0, atol=1e-12)
        return found

    chain = run(numbers(0.5, -0.3, 0.2, 0, -1), [[0, 1], [1, 2], [2, 3], [3, 4]], numbers(1, -0.5, 2, 0.7))
    assert chain.tolist() == pytest.approx([0.721051, 0.505302, 0.809878, 0.838497, 0.400264], abs=1e-6)
    assert run(numbers(0.5, -0.3), [[0, 1]], numbers(1)).tolist() == pytest.approx([0.740550, 0.605237], abs=1e-6)


def test_bags_without_weight_leave_the_graph_alone():
    """Check 9: lambda_bag = 0 is the same problem without bags, with evidence and edges."""
    bag, counts, edges, weight = loopy()
    log_odds = torch.randn(12, generator=torch.Generator().manual_seed(3)).double()
    without = marginals(log_odds, torch.full((12,), -1), counts[:0], edges, weight)
    assert (without.probability - log_odds.sigmoid()).abs().max() > 0.02
    for factor in ("cardinality", "pairwise"):
        found = marginals(log_odds, bag, counts, edges, weight, lambda_bag=0.0, factor=factor)
        torch.testing.assert_close(found.probability, without.probability, rtol=0, atol=1e-4)


def test_two_bags_of_two_and_an_edge():
    """Check 7: all .5; with +.8 on label 0 (.689974, .310026, .587790, .412210)."""
    bag, counts = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1])
    edge, weight = torch.tensor([[0, 2]]), numbers(1)
    even = marginals(numbers(0, 0, 0, 0), bag, counts, edge, weight)
    torch.testing.assert_close(even.probability, numbers(0.5, 0.5, 0.5, 0.5))
    pulled = marginals(numbers(0.8, 0, 0, 0), bag, counts, edge, weight, tolerance=1e-9)
    torch.testing.assert_close(pulled.probability, numbers(0.689974, 0.310026, 0.587790, 0.412210), rtol=0, atol=1e-6)


def test_bag_of_two_and_bags_of_equals():
    """Check 6: two labels, count 1, unaries (.4, -.3): sigmoid(.7) = .668188. Check 11: equal unaries give Y / k."""
    two = marginals(numbers(0.4, -0.3), torch.zeros(2, dtype=torch.int64), torch.tensor([1]), NO_EDGES, NO_WEIGHT)
    assert float(two.probability[0]) == pytest.approx(0.668188, abs=1e-6)
    for size in (3, 4, 8, 300):
        for unary in (-4.0, 0.0, 1.7):
            one_bag = torch.zeros(size, dtype=torch.int64)
            log_odds = torch.full((size,), unary, dtype=torch.float64)
            beliefs = marginals(log_odds, one_bag, torch.tensor([size // 3]), NO_EDGES, NO_WEIGHT)
            # Above 256 labels the others' sum is taken as Gaussian.
            torch.testing.assert_close(
                beliefs.probability,
                torch.full_like(log_odds, size // 3 / size),
                rtol=0,
                atol=1e-12 if size < 256 else 1e-3,
            )


SIX = {
    "log_odds": torch.zeros(6, dtype=torch.float64),
    "bag": torch.tensor([0, 0, 0, 1, 1, 1]),
    "bag_counts": torch.tensor([1, 2]),
    "edges": torch.tensor([[0, 3], [1, 4], [2, 5], [0, 1]]),
    "edge_weight": numbers(0.8, 0.5, 0.3, 0.2),
    "lambda_bag": 0.7,
    "lambda_edge": 0.4,
}


def test_the_pairwise_form_is_the_same_distribution():
    """Check 1: u, J and the constant -3.5 as the specification gives them, and over all 64 labels."""
    sizes = torch.tensor([3, 3])
    unary, pairs, coupling = ising(
        SIX["log_odds"], SIX["bag"], SIX["bag_counts"], sizes, SIX["edges"], 0.4 * SIX["edge_weight"], 0.7
    )
    torch.testing.assert_close(unary, numbers(0.30, 0.42, 0.58, 1.78, 1.90, 1.98))
    found = {tuple(pair): value for pair, value in zip(pairs.tolist(), coupling.tolist(), strict=True)}
    expected = {(0, 1): -1.24, (0, 2): -1.4, (1, 2): -1.4, (3, 4): -1.4, (3, 5): -1.4, (4, 5): -1.4}
    assert found == pytest.approx(expected | {(0, 3): 0.64, (1, 4): 0.40, (2, 5): 0.24})
    z = all_labels(6)
    energy = z @ unary + (coupling * z[:, pairs[:, 0]] * z[:, pairs[:, 1]]).sum(1)
    raw = -0.7 * ((z[:, :3].sum(1) - 1) ** 2 + (z[:, 3:].sum(1) - 2) ** 2)
    for (i, j), k in zip(SIX["edges"].tolist(), SIX["edge_weight"].tolist(), strict=True):
        raw = raw - 0.4 * k * (z[:, i] - z[:, j]) ** 2
    torch.testing.assert_close(raw - energy, torch.full((64,), -3.5, dtype=torch.float64))


def test_both_factors_on_the_worked_example():
    """Check 1: exact, pairwise and cardinality beliefs."""
    exact = enumerate_marginals(*SIX.values())
    torch.testing.assert_close(
        exact, numbers(0.414279, 0.407789, 0.410497, 0.580941, 0.587971, 0.593287), rtol=0, atol=1e-6
    )
    pairwise = marginals(**SIX, factor="pairwise", tolerance=1e-9)
    expected = numbers(0.418351, 0.412562, 0.415478, 0.576531, 0.582785, 0.587472)
    torch.testing.assert_close(pairwise.probability, expected, rtol=0, atol=1e-6)
    cardinality = marginals(**SIX, tolerance=1e-9)
    expected = numbers(0.415651, 0.409327, 0.408618, 0.581291, 0.588174, 0.593109)
    torch.testing.assert_close(cardinality.probability, expected, rtol=0, atol=1e-6)


def one_bag(size: int, count: int, lambda_bag: float, factor: str = "cardinality") -> Beliefs:
    zero = torch.zeros(size, dtype=torch.int64)
    log_odds = torch.zeros(size, dtype=torch.float64)
    return marginals(
        log_odds, zero, torch.tensor([count]), NO_EDGES, NO_WEIGHT, lambda_bag, factor=factor, tolerance=1e-9
    )


@pytest.mark.parametrize(
    ("size", "count", "lambda_bag", "exact", "pairwise"),
    [
        (4, 1, 0.1, 0.45687, 0.45690),
        (4, 1, 1, 0.32469, 0.35126),
        (4, 1, 4, 0.25555, 0.43197),
        (4, 1, 10, 0.25001, 0.49103),
        (8, 2, 0.1, 0.42704, 0.42726),
        (8, 2, 0.5, 0.33061, 0.34494),
        (8, 2, 1, 0.29779, 0.34446),
    ],
)
def test_one_bag_beside_plain_sum_product(size, count, lambda_bag, exact, pairwise):
    """Section 2's table, where PGMax gives the pairwise numbers; checks 9 and 10."""
    assert float(one_bag(size, count, lambda_bag).probability[0]) == pytest.approx(exact, abs=6e-6)
    loopy_beliefs = one_bag(size, count, lambda_bag, "pairwise")
    assert loopy_beliefs.converged
    assert float(loopy_beliefs.probability[0]) == pytest.approx(pairwise, abs=6e-6)


@pytest.mark.parametrize("lambda_bag", [4, 10])
def test_plain_sum_product_that_oscillates_is_reported(lambda_bag):
    """Check 10: PGMax oscillates at bag 8, lambda_b = 10; ours says that it did not converge, after all iterations."""
    beliefs = one_bag(8, 2, lambda_bag, "pairwise")
    assert not beliefs.converged
    assert beliefs.iterations == 200
    assert beliefs.residual > 1
    exact = one_bag(8, 2, lambda_bag)
    assert exact.converged
    assert float(exact.probability[0]) == pytest.approx({4: 0.25377, 10: 0.25001}[lambda_bag], abs=6e-6)


def test_limits_of_the_weights():
    """Check 9: lambda_bag = 0: bags say nothing; lambda_edge = 0: neighbours say nothing."""
    generator = torch.Generator().manual_seed(2)
    log_odds = torch.randn(12, generator=generator, dtype=torch.float64)
    bag, counts, edges, weight = loopy()
    free = marginals(log_odds, bag, counts, edges, weight, lambda_bag=0, lambda_edge=0)
    torch.testing.assert_close(free.probability, log_odds.sigmoid())
    apart = marginals(log_odds, bag, counts, edges, weight, lambda_edge=0)
    alone = torch.cat([bag_posterior(log_odds[4 * b : 4 * b + 4], b + 1) for b in range(3)])
    torch.testing.assert_close(apart.probability, alone, rtol=0, atol=1e-4)
    nothing = marginals(torch.zeros(12, dtype=torch.float64), bag, counts, edges, weight, lambda_bag=0)
    torch.testing.assert_close(nothing.probability, torch.full((12,), 0.5, dtype=torch.float64))


def test_damping_does_not_move_the_fixed_point():
    """Check 11: 12 labels, three bags of 4, 8 moderate edges; beliefs sum to the counts."""
    bag, counts, edges, weight = loopy()
    results = [
        marginals(
            torch.zeros(12, dtype=torch.float64),
            bag,
            counts,
            edges,
            weight,
            lambda_edge=0.5,
            damping=damping,
            tolerance=1e-12,
            max_iterations=1000,
        )
        for damping in (0.0, 0.5, 0.8)
    ]
    assert all(beliefs.converged for beliefs in results)
    assert results[0].iterations < results[1].iterations < results[2].iterations
    for beliefs in results[1:]:
        torch.testing.assert_close(beliefs.probability, results[0].probability, rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0].probability.view(3, 4).sum(1), counts.double(), rtol=0, atol=1e-9)


def random_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """At most 12 labels in bags of random size (some in none), a random graph with cycles, some labels certain."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    n = draw(3, 12)
    bag = torch.randint(-1, 3, (n,), generator=generator)
    bag = bag.unique(return_inverse=True)[1] - int((bag == -1).any())
    log_odds = torch.randn(n, generator=generator, dtype=torch.float64)
    truth = torch.rand(n, generator=generator) < 0.4
    certain = torch.rand(n, generator=generator) < 0.1
    log_odds = torch.where(certain, torch.where(truth, math.inf, -math.inf).double(), log_odds)
    counts = torch.tensor([int(truth[bag == b].sum()) for b in range(int(bag.max()) + 1)], dtype=torch.int64)
    pairs = torch.combinations(torch.arange(n))
    edges = pairs[torch.randperm(len(pairs), generator=generator)[: draw(1, n)]]
    weight = torch.rand(len(edges), generator=generator).double()
    return log_odds, bag, counts, edges, weight, [math.inf, 2.0, 0.3][seed % 3]


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_of_at_most_twelve_labels_are_near_enumeration(seed):
    """Loopy graphs are not exact: errors of a few hundredths are the specification's own for such couplings."""
    log_odds, bag, counts, edges, weight, lambda_bag = random_problem(seed)
    beliefs = marginals(log_odds, bag, counts, edges, weight, lambda_bag, lambda_edge=0.2)
    assert beliefs.converged
    finite = log_odds.clamp(-200, 200)
    exact = enumerate_marginals(finite, bag, counts, edges, weight, lambda_bag, 0.2)
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=0.04)
    assert bool((beliefs.probability[log_odds == math.inf] == 1).all())
    assert bool((beliefs.probability[log_odds == -math.inf] == 0).all())


def test_forests_of_bags_are_exact_whatever_is_known_of_the_count():
    """At least one, intervals, hard and soft counts, bags of different sizes, a label in no bag; joined to a tree."""
    generator = torch.Generator().manual_seed(3)
    bag = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, -1])
    edges, weight = torch.tensor([[0, 3], [4, 8], [9, 1]]), numbers(0.7, 0.4, 1.3)
    for counts in ([[1, 3], [0, 1], [2, 3]], [[2, 2], [1, 2], [1, 4]], [[0, 0], [2, 2], [3, 4]]):
        for lambda_bag in (math.inf, 0.6):
            log_odds = 2 * torch.randn(10, generator=generator, dtype=torch.float64)
            problem = (log_odds, bag, torch.tensor(counts), edges, weight, lambda_bag, 0.8)
            beliefs = marginals(*problem, tolerance=1e-12)
            torch.testing.assert_close(beliefs.probability, enumerate_marginals(*problem), rtol=0, atol=1e-9)


def test_homogeneous_bags_give_labels():
    beliefs = marginals(
        numbers(3, -1, 0.2, 5), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]), torch.tensor([[0, 2]]), numbers(20)
    )
    assert beliefs.probability.tolist() == [0, 0, 1, 1]


def test_certainty_reaches_neighbours_and_bag():
    """Bag of 3 with count 1, label 0 certain: the others are 0, and so is the neighbour of label 1 but for exp(-2)."""
    beliefs = marginals(
        numbers(math.inf, 0, 0, 0), torch.tensor([0, 0, 0, -1]), torch.tensor([1]), torch.tensor([[1, 3]]), numbers(2)
    )
    assert beliefs.probability[:3].tolist() == pytest.approx([1, 0, 0], abs=1e-12)
    assert float(beliefs.probability[3]) == pytest.approx(math.exp(-2) / (1 + math.exp(-2)), abs=1e-4)


def test_large_bags_are_gaussian_and_near_the_exact_answer():
    generator = torch.Generator().manual_seed(4)
    log_odds = torch.randn(600, generator=generator, dtype=torch.float64)
    bag = torch.cat([torch.zeros(300), torch.ones(300)]).long()
    beliefs = marginals(log_odds, bag, torch.tensor([100, 200]), NO_EDGES, NO_WEIGHT)
    exact = torch.cat([bag_posterior(log_odds[:300], 100), bag_posterior(log_odds[300:], 200)])
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=1e-3)
    nearly_known = torch.where(log_odds > 0, 30.0, -30.0).double()
    count = int((log_odds[:300] > 0).sum())
    beliefs = marginals(nearly_known[:300], bag[:300], torch.tensor([count + 1]), NO_EDGES, NO_WEIGHT)
    exact = bag_posterior(nearly_known[:300], count + 1)
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=1e-12)


def test_float32_is_kept_and_near_float64():
    bag, counts, edges, weight = loopy()
    double = marginals(torch.zeros(12, dtype=torch.float64), bag, counts, edges, weight, lambda_edge=0.5)
    single = marginals(torch.zeros(12), bag, counts, edges, weight.float(), lambda_edge=0.5)
    assert single.probability.dtype == torch.float32
    torch.testing.assert_close(single.probability.double(), double.probability, rtol=0, atol=1e-4)


def enumerate_classes(
    log_probs: Tensor, bag: Tensor, counts: Tensor, edges: Tensor, weight: Tensor, lambda_edge: float
) -> Tensor:
    n, classes = log_probs.shape
    labels = torch.tensor(list(itertools.product(range(classes), repeat=n)))
    z = torch.nn.functional.one_hot(labels, classes).double()
    energy = (z * log_probs).sum((1, 2))
    for b, count in enumerate(counts):
        energy = energy.masked_fill((z[:, bag == b].sum(1) != count).any(1), -math.inf)
    for (i, j), k in zip(edges.tolist(), weight.tolist(), strict=True):
        energy = energy - lambda_edge * k * ((z[:, i] - z[:, j]) ** 2).sum(1)
    return torch.einsum("l,lnc->nc", energy.softmax(0), z)


def test_several_classes_on_a_tree_are_exact():
    generator = torch.Generator().manual_seed(5)
    log_probs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    bag = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    counts = torch.tensor([[1, 1, 1], [2, 0, 1]])
    edges, weight = torch.tensor([[0, 3], [6, 2]]), numbers(0.9, 0.4)
    beliefs = class_marginals(log_probs, bag, counts, edges, weight, tolerance=1e-12)
    exact = enumerate_classes(log_probs, bag, counts, edges, weight, 1.0)
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=1e-9)


def test_two_classes_are_the_binary_case():
    bag, counts, edges, weight = loopy()
    generator = torch.Generator().manual_seed(6)
    log_odds = torch.randn(12, generator=generator, dtype=torch.float64)
    binary = marginals(log_odds, bag, counts, edges, weight, lambda_edge=0.6, tolerance=1e-10)
    both = class_marginals(
        torch.stack([torch.zeros_like(log_odds), log_odds], 1),
        bag,
        torch.stack([4 - counts, counts], 1),
        edges,
        weight,
        lambda_edge=0.3,
        tolerance=1e-10,
    )
    torch.testing.assert_close(both.probability[:, 1], binary.probability, rtol=0, atol=1e-8)


def test_one_factor_per_class_is_near_the_joint_one(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    log_probs = torch.randn(32, 3, generator=generator, dtype=torch.float64).log_softmax(1)
    bag, counts = torch.arange(32) // 16, torch.tensor([[4, 7, 5], [6, 5, 5]])
    joint = class_marginals(log_probs, bag, counts, NO_EDGES, NO_WEIGHT)
    torch.testing.assert_close(joint.probability.view(2, 16, 3), class_posterior(log_probs.view(2, 16, 3), counts))
    monkeypatch.setattr("fedlabel.inference.class_belief.CLASS_STATES", 1)
    apart = class_marginals(log_probs, bag, counts, NO_EDGES, NO_WEIGHT, tolerance=1e-6)
    assert apart.converged
    assert 1e-4 < float((apart.probability - joint.probability).abs().max()) < 0.05
    torch.testing.assert_close(apart.probability.view(2, 16, 3).sum(1), counts.double(), rtol=0, atol=1e-4)


def line(**changes: object) -> Beliefs:
    """Four labels in two bags of two with one edge, changed."""
    arguments: dict[str, object] = {
        "log_odds": numbers(0, 1, 0, -1),
        "bag": torch.tensor([0, 0, 1, 1]),
        "bag_counts": torch.tensor([1, 1]),
        "edges": torch.tensor([[0, 2]]),
        "edge_weight": numbers(1),
    }
    return marginals(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_counts": torch.tensor([1, 3])}, r"count of bag 1 \(=3\) must be an integer in \[0, 2\]"),
        ({"bag_counts": torch.tensor([-1, 1])}, r"count of bag 0 \(=-1\)"),
        ({"bag_counts": torch.tensor([1, 0.5])}, r"count of bag 1 \(=0.5\)"),
        ({"bag_counts": torch.tensor([1, math.nan])}, r"count of bag 1 \(=nan\)"),
        ({"bag_counts": torch.tensor([1, 1, 0])}, "Bag 2 is empty"),
        ({"bag_counts": torch.tensor([1])}, r"bag of sample 2 \(=1\) must lie in \[0, 0\]"),
        ({"bag_counts": torch.tensor([[1, 2], [2, 1]])}, r"least count of bag 1 \(=2\) is above the most \(=1\)"),
        ({"bag_counts": torch.tensor([[1, 2, 2], [0, 1, 2]])}, r"`bag_counts` \(of shape \(2, 3\)\)"),
        ({"bag": torch.tensor([0, 0, 1, -2])}, r"bag of sample 3 \(=-2\)"),
        ({"bag": torch.tensor([0.0, 0, 1, 1])}, "`bag` .torch.float32"),
        ({"bag": torch.tensor([[0, -1], [0, 1], [1, -1], [1, -1]])}, "each sample is in one bag, or in none"),
        (
            {"log_odds": numbers(math.inf, math.inf, 0, 0)},
            "Bag 0 contradicts itself: 2 of its 2 samples are certainly 1",
        ),
        ({"log_odds": numbers(0, 0, -math.inf, -math.inf)}, "Bag 1 contradicts itself: 0 .* and 2 certainly 0"),
        ({"log_odds": numbers(0, 0, math.nan, 0)}, "not NaN"),
        ({"edges": torch.tensor([[1, 1]])}, r"Edge 0 \(=\[1, 1\]\) must join two different samples"),
        ({"edges": torch.tensor([[0, 4]])}, r"Edge 0 \(=\[0, 4\]\)"),
        ({"edge_weight": numbers(-1)}, "`edge_weight`"),
        ({"edge_weight": numbers(1, 1)}, "`edge_weight`"),
        ({"factor": "pair"}, r"`factor` \(=pair\) must be one of cardinality, pairwise"),
        ({"factor": "pairwise"}, r"`lambda_bag` \(=inf\).*finite with factor=pairwise"),
        ({"factor": "pairwise", "lambda_bag": 1, "bag_counts": torch.tensor([[0, 1], [1, 1]])}, "one count per bag"),
        ({"lambda_bag": -1}, r"`lambda_bag` \(=-1\)"),
        ({"lambda_edge": math.inf}, r"`lambda_edge` \(=inf\)"),
        ({"damping": 1}, r"`damping` \(=1\)"),
        ({"max_iterations": 0}, r"`max_iterations` \(=0\)"),
        ({"tolerance": 0}, r"`tolerance` \(=0\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        line(**changes)


def test_evidence_beyond_the_cut_is_weighed_by_its_differences() -> None:
    """Log-odds of 60 and 55 and one count: sigmoid(5); with an edge that hardly counts the same."""
    sure = {"log_odds": numbers(60, 55, -200, -190), "tolerance": 1e-8}
    for edges, weight in ((NO_EDGES, NO_WEIGHT), (torch.tensor([[0, 2]]), numbers(1e-9))):
        beliefs = line(**sure, edges=edges, edge_weight=weight)
        assert beliefs.converged
        assert beliefs.probability.tolist() == pytest.approx([0.993307, 0.006693, 0.000045, 0.999955], abs=1e-6)


def test_a_nearly_certain_large_bag_keeps_its_count() -> None:
    """300 labels of which 12 are open: not Gaussian, so exact."""
    log_odds = torch.full((300,), -40.0, dtype=torch.float64)
    log_odds[:12] = torch.linspace(-1, 1, 12)
    zero = torch.zeros(300, dtype=torch.int64)
    beliefs = marginals(log_odds, zero, torch.tensor([6]), NO_EDGES, NO_WEIGHT)
    torch.testing.assert_close(beliefs.probability, bag_posterior(log_odds, 6), rtol=0, atol=1e-12)


def test_bags_of_up_to_256_are_exact_whoever_is_stacked_with_them() -> None:
    generator = torch.Generator().manual_seed(8)
    log_odds = torch.randn(530, generator=generator, dtype=torch.float64)
    bag = torch.cat([torch.zeros(250), torch.ones(280)]).long()
    beliefs = marginals(log_odds, bag, torch.tensor([100, 100]), NO_EDGES, NO_WEIGHT)
    torch.testing.assert_close(beliefs.probability[:250], bag_posterior(log_odds[:250], 100), rtol=0, atol=1e-12)


def mixed_bags(seed: int) -> list[Tensor]:
    """Evidence, bags of 1 to 700 labels, their counts, edges and weights; 2,000 labels, a few in no bag."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1, 5, 20, 100, 250, 257, 500, 700, 100])
    bag = torch.cat([torch.arange(9).repeat_interleave(sizes), torch.full((67,), -1)])
    bag = bag[torch.randperm(2000, generator=generator)]
    labels = (torch.rand(2000, generator=generator) < 0.4) & (bag >= 0)
    log_odds = torch.randn(2000, generator=generator, dtype=torch.float64)
    log_odds = torch.where((bag == 6) | (bag == 7), torch.where(labels, 40.0, -40.0).double(), log_odds)  # not Gaussian
    edges = torch.stack([torch.arange(1999), torch.arange(1, 2000)], 1)
    return [log_odds, bag, torch.bincount(bag[labels], minlength=9), edges, torch.rand(1999, generator=generator)]


@pytest.mark.parametrize("lambda_bag", [math.inf, 0.3, 0.0])
@pytest.mark.parametrize("cells", [1 << 27, 20_000])
def test_large_blocks_give_the_same(monkeypatch, lambda_bag, cells):
    """As on a GPU, in one stack of small bags and one of large ones, or in several."""
    problem = mixed_bags(0)
    expected = marginals(*problem, lambda_bag=lambda_bag, max_iterations=5)
    stacks = []
    monkeypatch.setattr("fedlabel.inference.belief.LARGE_CELLS", cells)
    for module in ("belief", "cardinality"):
        monkeypatch.setattr(f"fedlabel.inference.{module}.wants_large_blocks", lambda values: True)
    monkeypatch.setattr(
        "fedlabel.inference.belief.exact_messages",
        lambda theta, *rest: stacks.append(theta.shape) or exact_messages(theta, *rest),
    )
    found = marginals(*problem, lambda_bag=lambda_bag, max_iterations=5)
    torch.testing.assert_close(found.probability, expected.probability, rtol=0, atol=1e-9)
    if lambda_bag == math.inf:
        assert len(set(stacks)) == 2 if cells > 1_000_000 else len(set(stacks)) > 2


def test_large_stacks_hold_all_bags_within_their_limit(monkeypatch):
    monkeypatch.setattr("fedlabel.inference.belief.LARGE_CELLS", 100_000)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 400, (300,), generator=generator).sort().values.tolist()
    widths = [size // 2 + 1 for size in sizes]
    stacks = list(_large_stacks(torch.arange(300), sizes, widths))
    assert torch.equal(torch.cat(stacks), torch.arange(300))
    for stack in stacks:
        first, last = sizes[int(stack[0])], sizes[int(stack[-1])]
        assert (first <= 256) == (last <= 256)
        assert len(stack) == 1 or len(stack) * last * (widths[int(stack[-1])] if last <= 256 else 16) <= 100_000
    assert len(stacks) < 130


def test_what_would_not_fit_into_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("fedlabel.inference.cardinality.MOST_CELLS", 7)
    with pytest.raises(ValueError, match="need more than 7 numbers"):
        line()


def test_soft_counts_may_be_missed_by_what_is_certain():
    beliefs = line(log_odds=numbers(math.inf, math.inf, 0, 0), lambda_bag=2.0)
    assert beliefs.probability[:2].tolist() == [1, 1]


def test_pairs_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr("fedlabel.inference.belief.MOST_PAIRS", 1)
    with pytest.raises(ValueError, match="here 2, and takes at most 1"):
        line(factor="pairwise", lambda_bag=1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], r"counts of bag 1 \(=\[1, 1, 1\]\) must sum to its size, 2"),
        ([[3, -1, 0], [1, 1, 0]], r"count of bag 0 \(=3\)"),
        ([[0, 2, 0], [1, 1, 0]], "Bag 0 contradicts itself"),
        ([[1, 1], [1, 1]], r"`bag_counts` \(of shape \(2, 2\)\) must be of shape \(bags, 3\)"),
    ],
)
def test_bad_counts_of_classes_are_named(counts, message):
    log_probs = torch.zeros(4, 3, dtype=torch.float64)
    log_probs[0, 1:] = -math.inf
    with pytest.raises(ValueError, match=message):
        class_marginals(log_probs, torch.tensor([0, 0, 1, 1]), torch.tensor(counts), NO_EDGES, NO_WEIGHT)


@pytest.mark.parametrize(
    ("limited", "counts"),
    [
        ({0: [3, 4]}, [1, 1, 1, 0, 0]),
        ({0: [0, 1], 1: [0, 1], 2: [0, 1]}, [1, 1, 1, 1, 0]),
    ],
)
def test_sets_of_classes_that_contradict_counts_together_are_named(limited, counts):
    """No class is left, or three samples share two."""
    n = sum(counts)
    log_probs = torch.zeros(n, 5, dtype=torch.float64)
    for sample, classes in limited.items():
        log_probs[sample] = -math.inf
        log_probs[sample, classes] = 0
    with pytest.raises(ValueError, match="Bag 0 contradicts itself"):
        class_marginals(log_probs, torch.zeros(n, dtype=torch.int64), torch.tensor([counts]), NO_EDGES, NO_WEIGHT)


def test_soft_counts_of_several_classes_are_near_enumeration():
    """One factor per class, loopy even in one bag; the penalty is over all classes."""
    generator = torch.Generator().manual_seed(9)
    log_probs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    counts, bag = torch.tensor([[2, 2, 1]]), torch.zeros(5, dtype=torch.int64)
    z = torch.nn.functional.one_hot(torch.tensor(list(itertools.product(range(3), repeat=5))), 3).double()
    energy = (z * log_probs).sum((1, 2)) - 0.1 * (z.sum(1) - counts[0]).square().sum(1)
    exact = torch.einsum("l,lnc->nc", energy.softmax(0), z)
    beliefs = class_marginals(log_probs, bag, counts, NO_EDGES, NO_WEIGHT, lambda_bag=0.1)
    assert beliefs.converged
    torch.testing.assert_close(beliefs.probability, exact, rtol=0, atol=0.01)
    free = class_marginals(log_probs, bag, counts, NO_EDGES, NO_WEIGHT, lambda_bag=0.0)
    torch.testing.assert_close(free.probability, log_probs.softmax(1))
    assert float((exact - free.probability).abs().max()) > 0.03


def test_impossible_rows_are_named():
    log_probs = torch.zeros(2, 3)
    log_probs[1] = -math.inf
    with pytest.raises(ValueError, match="with a possible class in every row"):
        class_marginals(log_probs, torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 1, 0]]), NO_EDGES, NO_WEIGHT)


@pytest.mark.parametrize("lambda_bag", [-1.0, math.nan])
def test_bad_weight_of_counts_of_classes_is_named(lambda_bag: float) -> None:
    bag, counts = torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="`lambda_bag`"):
        class_marginals(torch.zeros(2, 3), bag, counts, NO_EDGES, NO_WEIGHT, lambda_bag=lambda_bag)


def test_infinite_evidence_for_a_class_is_named() -> None:
    log_probs = torch.zeros(2, 3)
    log_probs[1, 1] = math.inf
    with pytest.raises(ValueError, match="not NaN or inf"):
        class_marginals(log_probs, torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 1, 0]]), NO_EDGES, NO_WEIGHT)


def test_arrays_and_lists_will_do() -> None:
    arguments = [0.5, -1.0, 2.0, 0.0], [0, 0, 0, -1], [1], [[0, 3], [1, 2]], [1.0, 0.5]
    of_tensors = marginals(*map(torch.tensor, arguments))
    assert torch.equal(marginals(*arguments).probability, of_tensors.probability)  # type: ignore[arg-type]
    of_arrays = marginals(*map(np.array, arguments))
    assert torch.allclose(of_arrays.probability.float(), of_tensors.probability, atol=1e-4)
    alone = marginals([0.5, -1.0, 2.0], [0, 0, 0], [1], [], [])  # type: ignore[arg-type]
    torch.testing.assert_close(alone.probability, bag_posterior(torch.tensor([0.5, -1.0, 2.0]), 1))


def test_messages_that_cancel_everywhere_are_not_taken_for_rest() -> None:
    """Trees, so exact: beliefs stand still for a while at the middle, whose two neighbours pull to either side."""
    x = [torch.zeros(9).double(), torch.tensor([0] * 4 + [1] * 4 + [-1]), torch.tensor([1, 3])]
    edges, weight = torch.tensor([[0, 8], [8, 4]]), torch.tensor([0.7, 0.7]).double()
    found = marginals(*x, edges, weight)
    assert found.converged
    torch.testing.assert_close(found.probability, enumerate_marginals(*x, edges, weight), atol=1e-5, rtol=0)
    assert float(found.probability[0]) > 0.27  # 1/4 without the edge
    alone = [torch.tensor([1.0, 0, -1]).double(), torch.full((3,), -1), torch.zeros(0, dtype=torch.int64)]
    chain, ones = torch.tensor([[0, 1], [1, 2]]), torch.ones(2).double()
    for factor in ("cardinality", "pairwise"):
        beliefs = marginals(*alone, chain, ones, lambda_bag=1.0, factor=factor)
        assert beliefs.probability.tolist() == pytest.approx([0.690439, 0.5, 0.309561], abs=1e-4)
    log_probs = torch.stack([torch.zeros(3).double(), alone[0]], 1)
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    classes = class_marginals(log_probs, alone[1], nothing, chain, ones, lambda_edge=0.5)
    assert classes.probability[:, 1].tolist() == pytest.approx([0.690439, 0.5, 0.309561], abs=1e-4)


def test_strong_evidence_on_classes_keeps_counts() -> None:
    """Of four samples that are all but certain of class 1 one is in it: the one that is surest beside class 0."""
    log_probs = torch.tensor([[0.0, 90, -200], [0, 80, -200], [0, 70, -200], [0, 60, -200]]).double()
    bag, counts = torch.zeros(4, dtype=torch.int64), torch.tensor([[3, 1, 0]])
    nothing = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0).double()
    found = class_marginals(log_probs, bag, counts, *nothing)
    two = bag_posterior(log_probs[:, 1] - log_probs[:, 0], torch.tensor(1))
    torch.testing.assert_close(found.probability[:, 1], two, atol=1e-9, rtol=0)
    assert found.probability[:, 1].tolist() == pytest.approx([0.99995, 5e-5, 2e-9, 1e-13], abs=1e-5)
    certain = torch.tensor([[0.0, -math.inf, -math.inf], [0, -60, -200]]).double()
    left = class_marginals(certain, bag[:2], torch.tensor([[1, 1, 0]]), *nothing)
    assert left.probability.tolist() == [[1, 0, 0], [pytest.approx(0, abs=1e-9), pytest.approx(1), 0]]
