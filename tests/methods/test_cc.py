"""CC against worked numbers and a slow derivation, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData
from fedlabel.methods.cc import CC
from fedlabel.methods.losses import labels_loss
from tests.methods.sets import Known, assert_stacks, client_with_sets, random_known, sets
from tests.methods.tables import (
    LabelsOnly,
    assert_all_moved,
    client,
    logits_of,
    model,
    same,
    softmax,
    train_round,
)

SEEDS = range(5)


def test_loss_by_hand() -> None:
    """p = (.5, .3, .2), S = {0, 1}: -ln .8 = .223144. On S, p is (.625, .375, 0), and the gradient is p minus that.

    A second sample of which nothing is known is not in the mean.
    """
    known = Known(logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), sets([0, 1], [0, 1, 2], classes=3))
    step, gradient = known.run(CC().loss)
    assert step.loss.item() == pytest.approx(0.223144, abs=1e-6)
    assert step.examples.item() == 1
    assert gradient[0].tolist() == pytest.approx([-0.125, -0.075, 0.2], abs=1e-6)
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.pseudo is not None
    assert step.pseudo.label[0].item() == 0
    assert step.pseudo.confidence[0].item() == pytest.approx(0.625)
    assert step.pseudo.keep.tolist() == [True, False]
    assert step.metrics["train/loss"].tolist() == pytest.approx([0.223144, 1], abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    known = random_known(seed)
    step, gradient = known.run(CC().loss)
    total = 0.0
    for logits, inside, grad in zip(known.logits, known.candidates.tolist(), gradient, strict=True):
        p = softmax(logits)
        if all(inside):
            assert grad.abs().sum() == 0
            continue
        mass = sum(p[y] for y in range(4) if inside[y])
        total -= math.log(mass)
        used = int(step.examples)
        expected = [(p[y] - inside[y] * p[y] / mass) / used for y in range(4)]
        assert grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert step.examples == (~known.candidates.all(1)).sum()
    assert step.loss.item() == pytest.approx(total / int(step.examples), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_candidate_is_cross_entropy(seed: int) -> None:
    known = random_known(seed, several=False)
    ours, gradient = known.run(CC().loss)
    theirs, expected = known.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(gradient, expected)
    assert ours.examples == theirs.examples


def test_a_set_without_probability_is_finite() -> None:
    known = Known(torch.tensor([[200.0, 0.0, 0.0]]), sets([1, 2], classes=3))
    step, gradient = known.run(CC().loss)
    assert step.loss.item() == pytest.approx(200 - math.log(2))
    assert gradient[0].tolist() == pytest.approx([1, -0.5, -0.5], abs=1e-5)


def test_clients_stack() -> None:
    assert_stacks(CC().loss, [random_known(seed) for seed in range(3)], [{}] * 3)


def test_a_round_moves_every_parameter_and_counts_what_is_known() -> None:
    """Nothing is made of the five samples without a set, nor said of labels; sets may as well be called noisy."""
    data = client_with_sets()
    update = train_round(CC(), data)
    assert_all_moved(update)
    assert update.parts["model"].weight == 5 * 4
    assert update.pseudo is not None
    assert (update.pseudo_index < 25).all()
    assert not (update.pseudo_index % 3 == 0).any()  # these have labels
    known = data.supervision
    noisy = Supervision.without_bags(known.candidates, torch.ones_like(known.noisy), known.annotations)
    assert same(model(train_round(CC(), ClientData(data.images, noisy))), model(update))


def test_a_round_on_labels_is_a_round_of_cross_entropy() -> None:
    labels = client(10, 10)
    expected = model(train_round(LabelsOnly(), labels))
    for name, value in model(train_round(CC(), labels)).items():
        torch.testing.assert_close(value, expected[name])
