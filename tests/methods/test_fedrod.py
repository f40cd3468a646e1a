"""FedRoD's balanced softmax against worked numbers, and against the client prior, which is the same here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlabel.learning.client import Trainer, train_client
from fedlabel.learning.prior import PriorConfig
from fedlabel.methods.fedrod import FedRoD
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import Method
from tests.learning.clients import TRANSFORM
from tests.methods.recipes import task
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import ROUND, LabelsOnly, assert_all_moved, client, model, net, same, train_round


def counts(*numbers: int) -> dict[str, torch.Tensor]:
    return {"class_counts": torch.tensor(numbers).float()}


def test_loss_by_hand() -> None:
    """3, 1 and 0 labels, f = 0, y = 1: -log(1 / 4) = 1.386294, p = (3/4, 1/4, 0). gamma = .5: log(1 + sqrt 3)."""
    known = Known(torch.zeros(2, 3), sets([1], [0, 1, 2], classes=3))
    step, gradient = known.run(FedRoD().loss, counts(3, 1, 0))
    assert step.loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.75, -0.75, 0])
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.examples.item() == 1
    half, _ = known.run(FedRoD(gamma=0.5).loss, counts(3, 1, 0))
    assert half.loss.item() == pytest.approx(math.log(1 + math.sqrt(3)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_per_sample(seed: int) -> None:
    known, numbers, gamma = random_known(seed, several=False), [7, 2, 30, 1], 1.3
    step, gradient = known.run(FedRoD(gamma=gamma).loss, counts(*numbers))
    total = 0.0
    for i, y in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        powers = [n**gamma * math.exp(f) for n, f in zip(numbers, known.logits[i].tolist(), strict=True)]
        total -= math.log(powers[y] / sum(powers))
        expected = [(p / sum(powers) - (c == y)) / 7 for c, p in enumerate(powers)]
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)


def test_equal_counts_and_gamma_0_are_cross_entropy() -> None:
    known = random_known(0, several=False)
    theirs, expected = known.run(labels_loss)
    for method, numbers in ((FedRoD(), (5, 5, 5, 5)), (FedRoD(gamma=0.0), (1, 2, 3, 4))):
        ours, gradient = known.run(method.loss, counts(*numbers))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_a_round_is_that_of_labels_with_the_prior_of_the_labels() -> None:
    """prior.kind=labels without smoothing adds log(n_c / n): the same softmax."""

    def trained(method: Method, prior: PriorConfig) -> dict[str, torch.Tensor]:
        trainer = replace(Trainer(net(5), net(6), TRANSFORM, ROUND), prior=prior)
        return model(train_client(method.recipe(task()), trainer, net().state_dict(), client(30, 20), 1, seed=7))

    ours = trained(FedRoD(), PriorConfig())
    theirs = trained(LabelsOnly(), PriorConfig("labels", smoothing=0.0))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)
    assert not same(ours, trained(LabelsOnly(), PriorConfig()))


def test_clients_stack() -> None:
    known = [random_known(seed, several=False) for seed in range(3)]
    assert_stacks(FedRoD().loss, known, [counts(1, 2, 3, 4), counts(0, 9, 0, 1), counts(5, 5, 5, 5)])


def test_a_round_moves_every_parameter() -> None:
    update = train_round(FedRoD())
    assert_all_moved(update)
    assert update.kept == update.statistics == {}
    assert update.parts["model"].weight == 5 * 4
    assert train_round(FedRoD(), client(30, 0)).parts["model"].weight == 0


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_wrong_hyper_parameters_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`method.gamma` \(={value}\) must be a finite number of at least 0"):
        FedRoD(gamma=value)
