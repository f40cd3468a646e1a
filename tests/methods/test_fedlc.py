"""FedLC against worked numbers and a slow derivation, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.fedlc import FedLC
from fedlabel.methods.losses import labels_loss
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import assert_all_moved, client, logits_of, model, same, train_round

SEEDS = range(5)


def counts(*numbers: int) -> dict[str, torch.Tensor]:
    return {"class_counts": torch.tensor(numbers).float()}


def test_loss_by_hand() -> None:
    """16, 1 and 0 labels: with tau = 1 margins 16^-.25 = .5 and 1, the third class is left out. f = (0, 0, 5), y = 1:

    -log [e^-1 / (e^-.5 + e^-1)] = log(1 + e^.5) = .974077; p = (.622459, .377541). Without a label nothing counts.
    """
    known = Known(torch.tensor([[0.0, 0, 5], [0, 0, 0]]), sets([1], [0, 1, 2], classes=3))
    step, gradient = known.run(FedLC(tau=1.0).loss, counts(16, 1, 0))
    assert step.loss.item() == pytest.approx(0.974077, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.622459, -0.622459, 0], abs=1e-6)
    assert gradient[0, 2].item() == 0
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.examples.item() == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_that_of_pairwise_margins(seed: int) -> None:
    """log sum_c exp(f_c - f_y + tau (n_y^-1/4 - n_c^-1/4)) over the classes that the client has."""
    known, numbers, tau = random_known(seed, several=False), [7, 2, 30, 1], 0.8
    step, gradient = known.run(FedLC(tau=tau).loss, counts(*numbers))
    total = 0.0
    for i, y in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        f = known.logits[i].tolist()
        powers = [math.exp(f[c] - f[y] + tau * (numbers[y] ** -0.25 - n**-0.25)) for c, n in enumerate(numbers)]
        total += math.log(sum(powers))
        assert gradient[i].tolist() == pytest.approx([(p / sum(powers) - (c == y)) / 7 for c, p in enumerate(powers)])
    assert step.examples.item() == 7
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)


def test_equal_counts_and_tau_0_are_cross_entropy() -> None:
    known = random_known(0, several=False)
    theirs, expected = known.run(labels_loss)
    for method, numbers in ((FedLC(), (5, 5, 5, 5)), (FedLC(tau=0.0), (1, 2, 3, 4))):
        ours, gradient = known.run(method.loss, counts(*numbers))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_counts_are_those_of_the_labels() -> None:
    """Two labels of class 0, one of 2; a set of two classes and a sample without a label count nothing."""
    memory = FedLC().recipe(None).memory  # type: ignore[arg-type]  # the task is not looked at
    candidates = sets([0], [0], [2], [1, 2], [0, 1, 2], classes=3)
    assert memory.start(candidates)["class_counts"].tolist() == [2, 0, 1]


def test_clients_stack() -> None:
    known = [random_known(seed, several=False) for seed in range(3)]
    assert_stacks(FedLC().loss, known, [counts(1, 2, 3, 4), counts(0, 9, 0, 1), counts(5, 5, 5, 5)])


def test_a_round_moves_every_parameter_and_keeps_nothing() -> None:
    update = train_round(FedLC())
    assert_all_moved(update)
    assert update.kept == update.statistics == {}
    assert update.parts["model"].weight == 5 * 4
    assert not same(model(train_round(FedLC(tau=0.0))), model(update))
    assert train_round(FedLC(), client(30, 0)).parts["model"].weight == 0


def test_a_class_that_the_client_lacks_is_not_trained() -> None:
    """Labels of classes 0 and 1 only: the bias of class 2 stays, which cross-entropy lowers."""
    data = client(30, 30)
    data.supervision.candidates[data.supervision.candidates[:, 2]] = True  # no label
    before, after = train_round(FedLC(), client(30, 0)), train_round(FedLC(), data)
    assert model(after)["3.bias"][2] == model(before)["3.bias"][2]
    assert model(after)["3.bias"][0] != model(before)["3.bias"][0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_wrong_hyper_parameters_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`method.tau` \(={value}\) must be a finite number of at least 0"):
        FedLC(tau=value)


def test_logits_far_apart_stay_finite() -> None:
    step, gradient = Known(logits_of([1.0, 1e-30]) * 3, sets([1], classes=2)).run(FedLC().loss, counts(0, 1))
    assert step.loss.item() == pytest.approx(0)
    assert torch.isfinite(gradient).all()
