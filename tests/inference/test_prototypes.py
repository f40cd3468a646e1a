"""Prototypes of a federation, and the labels that contradict them."""

from __future__ import annotations

import math

import pytest
import torch

from fedlabel.inference.prototypes import (
    embedding_sums,
    nearest_differs,
    nearest_other,
    prototypes_of,
    similarities,
    similarity_margin,
)


def test_by_hand() -> None:
    """Class 0 along the first axis, class 1 between the two (3-4-5); lengths do not matter. Class 2 is nobody's."""
    embeddings = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 9.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    prototypes = prototypes_of(embedding_sums(embeddings, labels, 3))
    root = math.sqrt(0.5)
    assert torch.allclose(prototypes[:2], torch.tensor([[1, 0], [root, root]], dtype=torch.float64))
    assert bool(prototypes[2].isnan().all())
    found = similarities(embeddings, prototypes)
    assert torch.allclose(found[3], torch.tensor([1, root, -1], dtype=torch.float64))
    assert nearest_differs(found, labels).tolist() == [False, False, False, True]
    assert nearest_other(found, labels).tolist() == [1, 1, 0, 0]
    assert similarity_margin(found, labels)[3].item() == pytest.approx(0.5 + (root - 1) / 4)


def test_a_federation_has_the_prototypes_of_the_union_of_its_data() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(500, 8, generator=generator), torch.randint(4, (500,), generator=generator)
    central = prototypes_of(embedding_sums(embeddings, labels, 4))
    sums = [
        embedding_sums(embeddings[rows], labels[rows], 4)
        for rows in (slice(0, 0), slice(0, 3), slice(3, 200), slice(200, 500))
    ]
    assert (prototypes_of(torch.stack(sums).sum(0)) - central).abs().max() < 1e-12
    units = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    slow = torch.stack([units[labels == label].mean(0) for label in range(4)])
    assert (central - slow / slow.norm(dim=1, keepdim=True)).abs().max() < 1e-12
