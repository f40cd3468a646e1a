"""LWS against worked numbers and a slow derivation, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.losses import labels_loss
from fedlabel.methods.lws import LWS, leveraged_loss
from fedlabel.methods.proden import PRODEN, uniform_confidence
from tests.methods.sets import Known, assert_stacks, client_with_sets, random_known, sets
from tests.methods.tables import assert_all_moved, logits_of, softmax, train_round

SEEDS = range(5)


def test_loss_by_hand() -> None:
    """p = (.5, .3, .2), S = {0, 1}: w = (.625, .375) on S, 1 on {2}.

    .625 ln 2 - .375 ln .3 = .433217 + .451490 = .884707; -ln .8 = .223144; with beta = 2 together 1.330994.
    p = (.4, .3, .2, .1), S = {0}: -ln .4 = .916291; outside w = (1/2, 1/3, 1/6), -(ln .7 / 2 + ln .8 / 3 + ln .9 / 6)
    = .178337 + .074381 + .017560 = .270279; with beta = 1 together 1.186570. If all classes are candidates there is
    nothing outside: -sum p ln p = .5 ln 2 + .5 ln 4 = 1.039721 for p = (.5, .25, .25).
    """
    known = Known(logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), sets([0, 1], [0, 1, 2], classes=3))
    step, gradient = known.run(LWS().loss)
    assert step.loss.item() == pytest.approx(1.330994, abs=1e-5)
    assert step.examples.item() == 1
    assert gradient[1].tolist() == [0, 0, 0]
    value = leveraged_loss(logits_of([0.4, 0.3, 0.2, 0.1]), sets([0], classes=4), 1.0)
    assert value.item() == pytest.approx(1.186570, abs=1e-5)
    everything = leveraged_loss(logits_of([0.5, 0.25, 0.25]), sets([0, 1, 2], classes=3), 2.0)
    assert everything.item() == pytest.approx(1.039721, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_loss_and_gradient_per_sample(seed: int, beta: float) -> None:
    """With w constant: p - w inside, and w_z p_z ([k = z] - p_k) / (1 - p_z) by the logit of k for every z outside."""
    known = random_known(seed)
    step, gradient = known.run(LWS(beta=beta).loss)
    total, used = 0.0, int(step.examples)
    for i, inside in enumerate(known.candidates.tolist()):
        if all(inside):
            assert gradient[i].abs().sum() == 0
            continue
        p = softmax(known.logits[i])
        mass = sum(p[z] for z in range(4) if inside[z])
        w = [p[z] / (mass if inside[z] else 1 - mass) for z in range(4)]
        expected = [p[k] - inside[k] * w[k] for k in range(4)]
        for z in range(4):
            if inside[z]:
                total -= w[z] * math.log(p[z])
            else:
                total -= beta * w[z] * math.log(1 - p[z])
                for k in range(4):
                    expected[k] += beta * w[z] * p[z] * ((k == z) - p[k]) / (1 - p[z])
        assert gradient[i].tolist() == pytest.approx([value / used for value in expected], abs=1e-5)
    assert used == (~known.candidates.all(1)).sum()
    assert step.loss.item() == pytest.approx(total / used, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_leverage_one_candidate_is_cross_entropy_and_a_set_is_proden(seed: int) -> None:
    """PRODEN with the confidences of the moment."""
    labels = random_known(seed, several=False)
    ours, gradient = labels.run(LWS(beta=0.0).loss)
    theirs, expected = labels.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(gradient, expected)
    known = random_known(seed)
    fresh, _ = known.run(PRODEN().loss, uniform_confidence(known.candidates))
    assert fresh.memory is not None
    proden, expected = known.run(PRODEN().loss, fresh.memory)
    ours, gradient = known.run(LWS(beta=0.0).loss)
    torch.testing.assert_close(ours.loss, proden.loss)
    torch.testing.assert_close(gradient, expected)


def test_certain_predictions_are_finite() -> None:
    """All mass on one class, outside the set or in it, and a set of all classes.

    Outside, p = 1: the set pulls with p - w = (1, -1/2, -1/2), and the class itself with beta = 2 times p as its own
    logit grows, shared by the others as it falls, (2, -1, -1); the mean is over two samples.
    """
    known = Known(torch.tensor([[200.0, 0.0, 0.0]] * 3), sets([1, 2], [0], [0, 1, 2], classes=3))
    step, gradient = known.run(LWS().loss)
    assert torch.isfinite(step.loss)
    assert torch.isfinite(gradient).all()
    assert gradient[0].tolist() == pytest.approx([1.5, -0.75, -0.75], abs=1e-4)
    assert gradient[1].abs().sum() == 0


def test_clients_stack() -> None:
    assert_stacks(LWS().loss, [random_known(seed) for seed in range(3)], [{}] * 3)


def test_a_round_moves_every_parameter() -> None:
    update = train_round(LWS(), client_with_sets())
    assert_all_moved(update)
    assert update.parts["model"].weight == 5 * 4
    assert update.kept == {}


@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_wrong_hyper_parameters_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`method.beta` \(={value}\) must be a finite number of at least 0"):
        LWS(beta=value)
