"""Heads that vote, on the trunk of a network."""

from __future__ import annotations

import torch

from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.nets import Mlp


def build(heads: int) -> LabelingHeads:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LabelingHeads(Mlp((1, 2, 2), 3, (5,)), heads)


def test_heads_are_linear_in_the_embedding_and_the_rest_is_the_network() -> None:
    model, images = build(4), torch.randn(6, 1, 2, 2)
    embeddings = model(images, "embed")
    expected = (embeddings @ model.heads.weight.T + model.heads.bias).view(6, 4, 4)
    torch.testing.assert_close(model(images, "heads"), expected)
    torch.testing.assert_close(model(images), model.net(images))


def test_the_trunk_gets_the_mean_of_the_heads_gradients_and_each_head_its_own() -> None:
    """Of a loss summed over four heads, against the same heads one at a time."""
    model, images = build(4), torch.randn(6, 1, 2, 2)
    (model(images, "heads") ** 2).sum().backward()
    trunk, head = model.net.hidden.weight.grad, model.heads.weight.grad
    embeddings = model.net.embed(images)
    outputs = (embeddings @ model.heads.weight.T + model.heads.bias).view(6, 4, 4)
    alone = [
        torch.autograd.grad((outputs[:, k] ** 2).sum(), model.net.hidden.weight, retain_graph=True) for k in range(4)
    ]
    torch.testing.assert_close(trunk, sum(gradient for (gradient,) in alone) / 4)
    (whole,) = torch.autograd.grad((outputs**2).sum(), model.heads.weight)
    torch.testing.assert_close(head, whole)
