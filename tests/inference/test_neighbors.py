"""The graph of neighbours; check 13 of LLP-BP's specification."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from fedlabel.inference.neighbors import neighbor_graph


def points(n: int = 60, d: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def slow_edges(x: Tensor, k: int, max_distance: float) -> set[tuple[int, int]]:
    """Straight from the definition."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    edges = set()
    for i in range(len(x)):
        others = sorted((float(distance[i, j]), j) for j in range(len(x)) if j != i)[:k]
        edges |= {(min(i, j), max(i, j)) for d, j in others if d < max_distance}
    return edges


@pytest.mark.parametrize("max_distance", [2.0, 0.4])
def test_graph_equals_the_definition(max_distance: float) -> None:
    x = points()
    graph = neighbor_graph(x, 4, max_distance, length_scale=1.7)
    edges = [tuple(edge) for edge in graph.edges.tolist()]
    assert len(edges) == len(set(edges))
    assert set(edges) == slow_edges(x, 4, max_distance)
    lengths = (x[graph.edges[:, 0]] - x[graph.edges[:, 1]]).norm(dim=1)
    torch.testing.assert_close(graph.weight, (-lengths / 1.7).exp())


def test_every_sample_has_a_neighbour_and_none_is_its_own() -> None:
    graph = neighbor_graph(points(), 3)
    assert (graph.edges[:, 0] < graph.edges[:, 1]).all()
    assert (torch.bincount(graph.edges.flatten(), minlength=60) >= 3).all()


def test_direction_chooses_and_distance_weighs() -> None:
    """K of (0, 0) and (3, 4) is exp(-5) = .0067379; rows stretched by positive numbers keep their neighbours."""
    two = neighbor_graph(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 1, length_scale=1.0)
    assert two.edges.tolist() == [[0, 1]]
    assert float(two.weight) == pytest.approx(0.0067379, rel=1e-5)
    x = points()
    stretched = x * (0.5 + torch.rand(60, 1, generator=torch.Generator().manual_seed(1)))
    plain, other = neighbor_graph(x), neighbor_graph(stretched)
    assert torch.equal(plain.edges, other.edges)
    assert not torch.allclose(plain.weight, other.weight)


def test_length_scale_is_the_median_length() -> None:
    weight = neighbor_graph(points()).weight
    assert float(weight.median()) == pytest.approx(math.exp(-1), rel=0.02)


def test_opposite_and_huge_samples_are_joined() -> None:
    """max_distance=2 joins all; lengths beyond single precision are no trouble."""
    assert neighbor_graph(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).edges.tolist() == [[0, 1]]
    graph = neighbor_graph(torch.tensor([[1e20, 0.0], [1e20, 1e19], [0.0, 1e20]]), 1)
    assert graph.edges.tolist() == [[0, 1], [1, 2]]
    assert graph.weight.isfinite().all()


def test_equal_samples_are_joined_with_weight_one() -> None:
    graph = neighbor_graph(torch.ones(4, 3), 2)
    assert torch.equal(graph.weight, torch.ones(len(graph.edges)))
    assert (torch.bincount(graph.edges.flatten(), minlength=4) >= 2).all()


@pytest.mark.parametrize(("n", "k", "edges"), [(1, 5, 0), (3, 5, 3), (10, 0, 0), (0, 5, 0)])
def test_few_samples_or_neighbours(n: int, k: int, edges: int) -> None:
    graph = neighbor_graph(points(n), k)
    assert graph.edges.shape == (edges, 2)
    assert graph.weight.shape == (edges,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "annoy"}, r"`backend` \(=annoy\) must be one of sklearn, faiss"),
        ({"num_neighbors": -1}, r"`num_neighbors` \(=-1\)"),
        ({"length_scale": 0.0}, r"`length_scale` \(=0.0\)"),
        ({"features": torch.tensor([[0.0, math.nan], [1, 2]])}, "finite numbers"),
        ({"features": torch.ones(3)}, r"`features` \(of shape \(3,\)\)"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbor_graph(**({"features": points(5)} | changes))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("faiss") is not None, reason="faiss is installed")
def test_a_missing_backend_is_named() -> None:
    with pytest.raises(ValueError, match="needs the package faiss-cpu"):
        neighbor_graph(points(5), backend="faiss")


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed (pip install .[faiss])")
def test_faiss_finds_the_same_neighbours() -> None:
    plain, fast = neighbor_graph(points(500)), neighbor_graph(points(500), backend="faiss")
    assert torch.equal(plain.edges, fast.edges)
