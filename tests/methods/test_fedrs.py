"""FedRS against worked numbers and a slow derivation, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.fedrs import FedRS
from fedlabel.methods.losses import labels_loss
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import assert_all_moved, client, model, same, train_round


def counts(*numbers: int) -> dict[str, torch.Tensor]:
    return {"class_counts": torch.tensor(numbers).float()}


def test_loss_by_hand() -> None:
    """Labels of classes 0 and 1; f = (0, ln 2, ln 9), alpha = .5, y = 1: powers 1, 2, 3, so -log(2 / 6) = 1.098612.

    d / d f_2 = alpha p_2 = .25: half of the push that p_2 = .5 gives.
    """
    known = Known(torch.tensor([[0, math.log(2), math.log(9)], [0, 0, 0]]), sets([1], [0, 1, 2], classes=3))
    step, gradient = known.run(FedRS(alpha=0.5).loss, counts(4, 1, 0))
    assert step.loss.item() == pytest.approx(math.log(3), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([1 / 6, -2 / 3, 0.25], abs=1e-6)
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.examples.item() == 1


def test_scaling_by_counts_by_hand() -> None:
    """4, 1 and 0 labels, alpha = .2: factors 1, .2 + .8 / 4 = .4 and .2; f = ln (2, 32, 32), y = 0: powers 2, 4, 2."""
    known = Known(torch.tensor([[2.0, 32, 32]]).log(), sets([0], classes=3))
    step, gradient = known.run(FedRS(alpha=0.2, scaling="counts").loss, counts(4, 1, 0))
    assert step.loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.75, 0.4 * 0.5, 0.2 * 0.25], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_per_sample(seed: int) -> None:
    known, alpha = random_known(seed, several=False), 0.3
    step, gradient = known.run(FedRS(alpha=alpha).loss, counts(7, 0, 30, 1))
    total = 0.0
    for i, y in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        factors = [1, alpha, 1, 1]
        powers = [math.exp(a * f) for a, f in zip(factors, known.logits[i].tolist(), strict=True)]
        total -= math.log(powers[y] / sum(powers))
        expected = [a * (p / sum(powers) - (c == y)) / 7 for c, (a, p) in enumerate(zip(factors, powers, strict=True))]
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)


@pytest.mark.parametrize("scaling", ["missing", "counts"])
def test_equal_counts_and_alpha_1_are_cross_entropy(scaling: str) -> None:
    known = random_known(0, several=False)
    theirs, expected = known.run(labels_loss)
    for alpha, numbers in ((0.5, (5, 5, 5, 5)), (1.0, (0, 2, 3, 4))):
        ours, gradient = known.run(FedRS(alpha=alpha, scaling=scaling).loss, counts(*numbers))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(gradient, expected)


def test_clients_stack() -> None:
    known = [random_known(seed, several=False) for seed in range(3)]
    for scaling in ("missing", "counts"):
        memories = [counts(1, 2, 3, 4), counts(0, 9, 0, 1), counts(5, 5, 5, 5)]
        assert_stacks(FedRS(scaling=scaling).loss, known, memories)


def test_a_round_moves_every_parameter() -> None:
    update = train_round(FedRS())
    assert_all_moved(update)
    assert update.kept == update.statistics == {}
    assert update.parts["model"].weight == 5 * 4
    data = client(30, 30)
    data.supervision.candidates[data.supervision.candidates[:, 2]] = True  # no label
    assert not same(model(train_round(FedRS(alpha=1.0), data)), model(train_round(FedRS(), data)))
    assert train_round(FedRS(), client(30, 0)).parts["model"].weight == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", 1.5, r"`method.alpha` \(=1.5\) must lie in \[0, 1\]"),
        ("scaling", "soft", r"`method.scaling` \(=soft\) must be one of missing, counts"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedRS(**{field: value})
