"""Inference gives on a GPU what it gives on a CPU."""

import math

import pytest
import torch

from fedlabel.inference.belief import marginals
from fedlabel.inference.class_belief import class_marginals
from fedlabel.inference.label_model import VARIANTS, LabelModel
from tests.inference.test_belief import mixed_bags
from tests.inference.test_label_model import simulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def problem(n: int, size: int, classes: int) -> list[torch.Tensor]:
    """Evidence (n, classes), bags, their counts (bags, classes), edges and weights."""
    generator = torch.Generator().manual_seed(n + size)
    labels = torch.randint(classes, (n,), generator=generator)
    bag = torch.arange(n) // size
    counts = torch.zeros(int(bag.max()) + 1, classes, dtype=torch.int64).index_put_(
        (bag, labels), torch.ones(n, dtype=torch.int64), accumulate=True
    )
    edges = torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)
    weight = torch.rand(n - 1, generator=generator, dtype=torch.float64)
    return [torch.randn(n, classes, generator=generator, dtype=torch.float64), bag, counts, edges, weight]


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize(("factor", "lambda_bag"), [("cardinality", math.inf), ("cardinality", 0.5), ("pairwise", 0.1)])
def test_beliefs(size: int, factor: str, lambda_bag: float) -> None:
    evidence, bag, counts, edges, weight = problem(600, size, 2)
    arguments = [evidence[:, 1], bag, counts[:, 1], edges, weight]
    found = [
        marginals(*(each.to(device) for each in arguments), lambda_bag=lambda_bag, factor=factor, max_iterations=20)
        for device in ("cpu", "cuda")
    ]
    assert found[1].probability.is_cuda
    torch.testing.assert_close(found[1].probability.cpu(), found[0].probability, atol=1e-6, rtol=0)


def test_beliefs_of_bags_of_all_sizes() -> None:
    arguments = mixed_bags(0)
    found = [marginals(*(each.to(device) for each in arguments), max_iterations=5) for device in ("cpu", "cuda")]
    torch.testing.assert_close(found[1].probability.cpu(), found[0].probability, atol=1e-6, rtol=0)


def test_beliefs_are_the_same_to_the_bit_each_time() -> None:
    arguments = [each.cuda() for each in mixed_bags(0)]
    found = [marginals(*arguments, max_iterations=5).probability for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("size", [6, 60])
def test_beliefs_of_classes(size: int) -> None:
    arguments = problem(240, size, 3)
    found = [class_marginals(*(each.to(device) for each in arguments), max_iterations=20) for device in ("cpu", "cuda")]
    torch.testing.assert_close(found[1].probability.cpu(), found[0].probability, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_model(variant: str) -> None:
    votes, sets, _, _ = simulate(0, n=2000, k=30)
    models = [LabelModel(10, sets.to(device), variant).fit(votes, max_iterations=3) for device in ("cpu", "cuda")]
    assert models[1].tables.is_cuda
    torch.testing.assert_close(models[1].tables.cpu(), models[0].tables, atol=1e-6, rtol=0)
    torch.testing.assert_close(models[1].posterior(votes).cpu(), models[0].posterior(votes), atol=1e-5, rtol=0)
