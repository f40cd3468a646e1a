"""FixMatch against a slow derivation per sample and a worked number, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.masks import Mask
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


def test_loss_by_hand() -> None:
    """Weak views (.96, .04), kept with label 0, and (.9, .1), dropped at tau = .95; strong views (.75, .25) both.

    Labelled p(y) = .5: ln 2 = .693147. Unlabelled: -ln .75 = .287682 over *two* samples = .143841. Sum .836988.
    """
    table = Table(
        labeled=torch.zeros(1, 2),
        labels=torch.tensor([1]),
        weak=logits_of([0.96, 0.04], [0.9, 0.1]),
        strong=logits_of([0.75, 0.25], [0.75, 0.25]),
    )
    step = FixMatch().loss(table.student, NOTHING, table.batch())
    assert step.loss.item() == pytest.approx(0.836988, abs=1e-6)
    assert step.examples.item() == 2
    assert step.metrics["train/loss_supervised"].tolist() == pytest.approx([0.693147, 1])
    assert step.metrics["train/loss_unsupervised"].tolist() == pytest.approx([0.287682, 2])
    assert step.metrics["train/loss"].tolist() == pytest.approx([0.836988, 1])
    assert step.metrics["pseudo/coverage"].tolist() == [1, 2]
    assert step.metrics["pseudo/confidence"].tolist() == pytest.approx([1.86, 2])


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    """d CE / d logits = p - onehot, divided by the number of samples; the weak view gets exactly nothing."""
    tau, lambda_u = 0.8, 0.7
    table = random_table(seed)
    step = FixMatch(confidence_threshold=tau, lambda_u=lambda_u).loss(table.student, NOTHING, table.batch())
    gradients = table.gradients(step)
    unlabeled, kept = 0.0, 0
    for i, (weak, strong) in enumerate(zip(table.weak, table.strong, strict=True)):
        confidence, label = best(softmax(weak))
        probs = softmax(strong)
        if confidence >= tau:
            kept += 1
            unlabeled += -math.log(probs[label])
            expected = [lambda_u * (probs[c] - (c == label)) / 8 for c in range(4)]
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


@pytest.mark.parametrize("method", [FixMatch(confidence_threshold=1.0), FixMatch(confidence_threshold=0, lambda_u=0)])
def test_nothing_kept_or_no_weight_is_the_labelled_loss(method: FixMatch) -> None:
    table = random_table(0)
    step, supervised = (loss(table.student, NOTHING, table.batch()) for loss in (method.loss, labels_loss))
    assert torch.equal(step.loss, supervised.loss)
    for ours, theirs in zip(table.gradients(step), table.gradients(supervised), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_flexmatch_with_equally_learnt_classes_and_a_uniform_prior_change_nothing(seed: int) -> None:
    table = random_table(seed)
    plain = FixMatch(confidence_threshold=0.8).loss(table.student, NOTHING, table.batch())
    flexible = FixMatch(confidence_threshold=0.8, mask=Mask(kind="flexmatch"))
    equal = flexible.loss(table.student, NOTHING, table.batch({"class_threshold": torch.full((4,), 0.8)}))
    assert torch.equal(equal.loss, plain.loss)
    debiased = FixMatch(confidence_threshold=0.8, mask=Mask(debias="prior"))
    uniform = debiased.loss(table.student, NOTHING, table.batch({"prior": torch.full((4,), 0.25)}))
    torch.testing.assert_close(uniform.loss, plain.loss)


def test_debiased_label_is_the_target() -> None:
    """p = (.6, .4) with prior (.8, .2) is q = (.27, .73): the label is 1, CE on a strong view (.75, .25) is -ln .25."""
    table = Table(torch.zeros(1, 2), torch.tensor([0]), logits_of([0.6, 0.4]), logits_of([0.75, 0.25]))
    method = FixMatch(confidence_threshold=0.7, mask=Mask(debias="prior"))
    step = method.loss(table.student, NOTHING, table.batch({"prior": torch.tensor([0.8, 0.2])}))
    assert step.loss.item() == pytest.approx(math.log(2) + math.log(4), abs=1e-6)
    assert step.memory is not None
    assert step.memory["prior"].tolist() == pytest.approx([0.7, 0.3])


MASKS = [Mask(kind=kind, debias=d) for kind in ("fixed", "flexmatch", "freematch", "cbafed") for d in ("none", "prior")]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.kind}-{mask.debias}")
def test_a_round_moves_every_parameter(mask: Mask) -> None:
    mask = Mask(kind=mask.kind, debias=mask.debias, base=0.0, cap=0.3)
    update = train_round(FixMatch(confidence_threshold=0.36, mask=mask))
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo.keep.any()
    assert update.parts["model"].weight == 20 + update.pseudo.keep.sum()
    assert not update.pseudo.from_global.any()


def test_a_round_with_an_unreachable_threshold_or_no_weight_is_a_round_on_labels() -> None:
    unreachable = train_round(FixMatch(confidence_threshold=1.0))
    assert unreachable.parts["model"].weight == 20
    assert_equals_labels_only(unreachable)
    assert_equals_labels_only(train_round(FixMatch(confidence_threshold=0.0, lambda_u=0.0)))
    assert_without_unlabeled_equals_supervised(FixMatch())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("confidence_threshold", float("nan"), r"`method.confidence_threshold` \(=nan\)"),
        ("lambda_u", -1.0, r"`method.lambda_u` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_u", float("inf"), r"`method.lambda_u` \(=inf\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixMatch(**{field: value})
