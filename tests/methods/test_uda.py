"""UDA against a slow derivation per sample and worked numbers, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.masks import Mask
from fedlabel.methods.recipe import Update
from fedlabel.methods.uda import UDA, soft_target_divergence, tsa_threshold
from tests.methods.recipes import task
from tests.methods.tables import (
    NOTHING,
    Table,
    assert_all_moved,
    assert_equals_labels_only,
    assert_without_unlabeled_equals_supervised,
    best,
    labeled_mean,
    logits_of,
    random_table,
    softmax,
    train_round,
)

SEEDS = range(5)


def update_of(method: UDA, round_number: int) -> Update:
    (phase,) = method.recipe(task()).phases(round_number)
    (update,) = phase.updates
    return update


def test_divergence_by_hand() -> None:
    """Weak p = (.8, .2), T = .5: q ~ p^2 = (.64, .04), q = (16/17, 1/17) = (.941176, .058824), H(q) = .223718.

    Strong view uniform: KL(q || u) = ln 2 - H(q) = .693147 - .223718 = .469429. (KL(u || q) would be .753772.)
    A second sample with weak p = (.6, .4) is dropped at tau = .7; the mean over two is .234715. It is dropped even
    where sharpening would lift it over tau (T = 1/3: .216 / .280 = .771429): the mask looks at p before sharpening.
    """
    target, uniform = logits_of([0.8, 0.2]), torch.full((1, 2), 0.5).log()
    assert soft_target_divergence(target, 0.5, uniform).item() == pytest.approx(0.469429, abs=1e-6)
    table = Table(torch.zeros(1, 2), torch.tensor([0]), logits_of([0.8, 0.2], [0.6, 0.4]), torch.zeros(2, 2))
    step = UDA(confidence_threshold=0.7, temperature=0.5).loss(table.student, NOTHING, table.batch())
    assert step.loss.item() == pytest.approx(0.693147 + 0.469429 / 2, abs=1e-6)
    colder = UDA(confidence_threshold=0.7, temperature=1 / 3).loss(table.student, NOTHING, table.batch())
    assert colder.pseudo is not None
    assert colder.pseudo.keep.tolist() == [True, False]
    assert colder.pseudo.confidence.tolist() == pytest.approx([0.8, 0.6])


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    """d KL(q || p) / d logits = p - q, divided by the number of samples; the target's view gets exactly nothing."""
    tau, temperature, lambda_u = 0.8, 0.6, 0.7
    table = random_table(seed)
    method = UDA(confidence_threshold=tau, temperature=temperature, lambda_u=lambda_u)
    step = method.loss(table.student, NOTHING, table.batch())
    gradients = table.gradients(step)
    unlabeled, kept = 0.0, 0
    for i, (weak, strong) in enumerate(zip(table.weak, table.strong, strict=True)):
        q, p = softmax(weak / temperature), softmax(strong)
        if best(softmax(weak))[0] >= tau:
            kept += 1
            unlabeled += sum(q[c] * math.log(q[c] / p[c]) for c in range(4))
            expected = [lambda_u * (p[c] - q[c]) / 8 for c in range(4)]
            assert gradients.strong[i].tolist() == pytest.approx(expected, abs=1e-6)
        else:
            assert gradients.strong[i].tolist() == [0] * 4
    assert 0 < kept < 8
    assert step.loss.item() == pytest.approx(labeled_mean(table) + lambda_u * unlabeled / 8, abs=1e-5)
    assert step.examples.item() == 3 + kept
    assert gradients.weak.abs().sum() == 0
    for i, label in enumerate(table.labels.tolist()):
        probs = softmax(table.labeled[i])
        expected = [(probs[c] - (c == label)) / 3 for c in range(4)]
        assert gradients.labeled[i].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_cold_limit_is_fixmatch(seed: int) -> None:
    table = random_table(seed)
    cold = UDA(confidence_threshold=0.8, temperature=1e-4).loss(table.student, NOTHING, table.batch())
    hard = FixMatch(confidence_threshold=0.8).loss(table.student, NOTHING, table.batch())
    torch.testing.assert_close(cold.loss, hard.loss)
    for ours, theirs in zip(table.gradients(cold), table.gradients(hard), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_same_views_without_sharpening_cost_nothing() -> None:
    table = random_table(0)
    same = Table(table.labeled, table.labels, table.weak, table.weak)
    step = UDA(confidence_threshold=0.0, temperature=1.0).loss(same.student, NOTHING, same.batch())
    assert step.loss.item() == pytest.approx(labeled_mean(table), abs=1e-6)
    assert same.gradients(step).strong.abs().max() < 1e-7


def test_debiased_probabilities_are_sharpened() -> None:
    """p = (.6, .4), prior (.8, .2): q = (3/11, 8/11); T = .5: q ~ (9, 64) / 73. KL to uniform = ln 2 - H = .319723."""
    q = [9 / 73, 64 / 73]
    expected = math.log(2) + sum(value * math.log(value) for value in q)
    assert expected == pytest.approx(0.319723, abs=1e-6)
    table = Table(torch.zeros(1, 2), torch.tensor([0]), logits_of([0.6, 0.4]), torch.zeros(1, 2))
    method = UDA(confidence_threshold=0.7, temperature=0.5, mask=Mask(debias="prior"))
    step = method.loss(table.student, NOTHING, table.batch({"prior": torch.tensor([0.8, 0.2])}))
    assert step.loss.item() == pytest.approx(math.log(2) + expected, abs=1e-6)


def test_annealing_thresholds_by_hand() -> None:
    """eta = alpha (1 - 1/C) + 1/C with C = 10.

    linear, t = .5: .5 * .9 + .1 = .55. log, t = .2: alpha = 1 - e^-1 = .632121, eta = .668909.
    exp, t = .8: alpha = e^-1 = .367879, eta = .431091. At t = 1: 1, 1 - .9 e^-5 = .993936, 1. Linear at t = 0: 1/C.
    """
    assert tsa_threshold("linear", 0.5, 10) == pytest.approx(0.55)
    assert tsa_threshold("log", 0.2, 10) == pytest.approx(0.668909, abs=1e-6)
    assert tsa_threshold("exp", 0.8, 10) == pytest.approx(0.431091, abs=1e-6)
    assert tsa_threshold("linear", 1.0, 10) == pytest.approx(1.0)
    assert tsa_threshold("log", 1.0, 10) == pytest.approx(0.993936, abs=1e-6)
    assert tsa_threshold("exp", 1.0, 10) == pytest.approx(1.0)
    assert tsa_threshold("linear", 0.0, 10) == pytest.approx(0.1)


def test_annealing_leaves_out_labels_that_are_known_too_well() -> None:
    """C = 2, round 2 of 10, linear: eta = .2 * .5 + .5 = .6. p(y) = .9 is left out, .5 and .55 stay; mean over two.

    The third sample's label is class 1 with p = .1, though class 0 has .9: it is p(y) that counts, so it stays, too.
    """
    table = Table(
        logits_of([0.9, 0.1], [0.5, 0.5], [0.9, 0.1]),
        torch.tensor([0, 1, 1]),
        torch.zeros(0, 2),
        torch.zeros(0, 2),
    )
    step = update_of(UDA(tsa="linear", tsa_rounds=10), 2).loss(table.student, NOTHING, table.batch())
    assert step.loss.item() == pytest.approx((math.log(2) + math.log(10)) / 2, abs=1e-6)
    assert step.examples.item() == 2
    gradients = table.gradients(step).labeled
    assert gradients[0].tolist() == [0, 0]
    assert gradients[1].tolist() == pytest.approx([0.25, -0.25])
    assert gradients[2].tolist() == pytest.approx([0.45, -0.45])


@pytest.mark.parametrize(("round_number", "expected"), [(1, 2), (2, 3), (4, 4), (9, 4)])
def test_annealing_runs_over_rounds_and_then_stays_at_its_end(round_number: int, expected: int) -> None:
    """Linear over 4 rounds, C = 2: eta = .625, .75, 1, 1 in rounds 1, 2, 4, 9."""
    table = Table(
        logits_of([0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.99, 0.01]),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(0, 2),
        torch.zeros(0, 2),
    )
    step = update_of(UDA(tsa="linear", tsa_rounds=4), round_number).loss(table.student, NOTHING, table.batch())
    assert step.examples.item() == expected


def test_all_labels_left_out_gives_exactly_zero() -> None:
    """exp, round 1 of 100: eta = .5 * e^-4.95 + .5 = .5035 < .9."""
    table = Table(logits_of([0.9, 0.1]), torch.tensor([0]), torch.zeros(0, 2), torch.zeros(0, 2))
    step = update_of(UDA(tsa="exp", tsa_rounds=100), 1).loss(table.student, NOTHING, table.batch())
    assert step.loss.item() == 0
    assert step.examples.item() == 0


@pytest.mark.parametrize("method", [UDA(confidence_threshold=1.0), UDA(confidence_threshold=0, lambda_u=0)])
def test_nothing_kept_or_no_weight_is_the_labelled_loss(method: UDA) -> None:
    table = random_table(0)
    step, supervised = (loss(table.student, NOTHING, table.batch()) for loss in (method.loss, labels_loss))
    assert torch.equal(step.loss, supervised.loss)
    for ours, theirs in zip(table.gradients(step), table.gradients(supervised), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "method", [UDA(confidence_threshold=0.36), UDA(confidence_threshold=0.36, tsa="log", tsa_rounds=3)]
)
def test_a_round_moves_every_parameter(method: UDA) -> None:
    update = train_round(method)
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo.keep.any()


def test_a_round_with_an_unreachable_threshold_or_no_weight_is_a_round_on_labels() -> None:
    unreachable = train_round(UDA(confidence_threshold=1.0))
    assert unreachable.parts["model"].weight == 20
    assert_equals_labels_only(unreachable)
    assert_equals_labels_only(train_round(UDA(confidence_threshold=0.0, lambda_u=0.0)))
    assert_equals_labels_only(train_round(UDA(confidence_threshold=1.0, tsa="linear", tsa_rounds=1)))  # eta = 1
    assert_without_unlabeled_equals_supervised(UDA())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confidence_threshold": -0.1}, r"`method.confidence_threshold` \(=-0.1\) must lie in \[0, 1\]"),
        ({"temperature": 0.0}, r"`method.temperature` \(=0.0\) must be a positive number"),
        ({"temperature": float("nan")}, r"`method.temperature` \(=nan\)"),
        ({"lambda_u": -1.0}, r"`method.lambda_u` \(=-1.0\) must be a finite number of at least 0"),
        ({"tsa": "cosine", "tsa_rounds": 3}, r"`method.tsa` \(=cosine\) must be one of none, linear, log, exp"),
        ({"tsa": "linear"}, r"`method.tsa_rounds` \(=0\) must be above 0 if and only if `method.tsa` \(=linear\)"),
        ({"tsa_rounds": 5}, r"`method.tsa_rounds` \(=5\) must be above 0 if and only if `method.tsa` \(=none\)"),
        ({"tsa": "log", "tsa_rounds": -2}, r"`method.tsa_rounds` \(=-2\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UDA(**fields)
