"""GCE against worked numbers and a slow derivation, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.gce import GCE
from fedlabel.methods.losses import labels_loss
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import assert_all_moved, client, logits_of, model, same, softmax, train_round

SEEDS = range(5)


def test_loss_by_hand() -> None:
    """p_y = .5, q = .7: (1 - .5^.7) / .7 = (1 - .615572) / .7 = .549183.

    Its gradient is that of cross-entropy, p - y = (-.5, .3, .2), times .615572. Without a label nothing counts.
    """
    known = Known(logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), sets([0], [0, 1, 2], classes=3))
    step, gradient = known.run(GCE().loss)
    assert step.loss.item() == pytest.approx(0.549183, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.307786, 0.184672, 0.123114], abs=1e-6)
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.examples.item() == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("q", [0.3, 0.7])
def test_loss_and_gradient_per_sample(seed: int, q: float) -> None:
    known = random_known(seed, several=False)
    step, gradient = known.run(GCE(q=q).loss)
    total = 0.0
    for i, label in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        p = softmax(known.logits[i])
        total += (1 - p[label] ** q) / q
        expected = [p[label] ** q * (p[k] - (k == label)) / 7 for k in range(4)]
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert step.examples.item() == 7
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_limits_of_q(seed: int) -> None:
    """q = 1: the mean of 1 - p_y. q towards 0: cross-entropy."""
    known = random_known(seed, several=False)
    step, _ = known.run(GCE(q=1.0).loss)
    probs = known.logits.detach().softmax(-1)[known.candidates.sum(1) == 1]
    labels = known.candidates[:-1].int().argmax(1)
    assert step.loss.item() == pytest.approx((1 - probs[torch.arange(7), labels]).mean().item(), abs=1e-6)
    ours, gradient = known.run(GCE(q=1e-6).loss)
    theirs, expected = known.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_an_impossible_label_pulls_not_at_all() -> None:
    """p_y = e^-200: the loss is 1 / q, the largest there is."""
    step, gradient = Known(torch.tensor([[200.0, 0.0]]), sets([1], classes=2)).run(GCE().loss)
    assert step.loss.item() == pytest.approx(1 / 0.7)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum().item() == pytest.approx(0, abs=math.exp(-100))


def test_clients_stack() -> None:
    assert_stacks(GCE().loss, [random_known(seed, several=False) for seed in range(3)], [{}] * 3)


def test_a_round_moves_every_parameter() -> None:
    update = train_round(GCE())
    assert_all_moved(update)
    assert update.parts["model"].weight == 5 * 4
    assert not same(model(train_round(GCE(q=1.0))), model(update))
    empty = train_round(GCE(), client(30, 0))
    assert empty.parts["model"].weight == 0


@pytest.mark.parametrize("value", [0.0, 1.1, -0.7, float("nan")])
def test_wrong_hyper_parameters_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`method.q` \(={value}\) must lie in \(0, 1\]"):
        GCE(q=value)
