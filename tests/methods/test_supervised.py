"""Cross-entropy on labels, by hand."""

from __future__ import annotations

import pytest
import torch

from fedlabel.methods.supervised import Supervised
from tests.methods.batches import make_batch
from tests.methods.recipes import task


def test_loss_by_hand() -> None:
    """p(y) = .5 and .8: (.693147 + .223144) / 2 = .458145; a sample with two possible classes has no say."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]]).log().requires_grad_()
    batch = make_batch(3, torch.tensor([0, 2, 1]))
    candidates = batch.labeled.candidates.clone()
    candidates[2, 0] = True
    batch = batch._replace(labeled=batch.labeled._replace(candidates=candidates))
    (phase,) = Supervised().recipe(task()).phases(1)
    step = phase.loss(lambda images: logits[images.flatten().long()], {}, batch)
    assert step.loss.item() == pytest.approx(0.458145, abs=1e-6)
    assert step.examples.item() == 2
    (gradient,) = torch.autograd.grad(step.loss, logits)
    expected = torch.tensor([[-0.25, 0.15, 0.1], [0.05, 0.05, -0.1], [0, 0, 0]])  # (p - onehot) / 2
    torch.testing.assert_close(gradient, expected)
