"""SAGE against a slow derivation per sample and a worked number, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlabel.methods.batch import Model, Step
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.sage import SAGE, mix
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
KAPPA = math.log(2) / 0.05


def with_global(table: Table, global_weak: Tensor) -> dict[str, Model]:
    """The global model's table, of which only the weak views' rows may be asked for."""
    rows = torch.full_like(table.rows.detach(), math.nan)
    rows[len(table.labeled) : len(table.labeled) + len(table.weak)] = global_weak.detach()
    return {"global": lambda images: rows[images.flatten().long()]}


def loss_of(method: SAGE, table: Table, global_weak: Tensor) -> Step:
    return method.loss(table.student, with_global(table, global_weak), table.batch())


def test_loss_by_hand() -> None:
    """Threshold .9. Local (.97, .03) passes; global (.08, .92): delta = .05, lam = exp(-ln 2 / .05 * .05) = 1/2.

    Target (1/2, 1/2). Strong view (.75, .25): KL = -ln 2 - (ln .75 + ln .25) / 2 = -.693147 + .836988 = .143841.
    A second sample that neither model is sure of counts as 0: mean .0719205. Labelled p(y) = .5: ln 2.
    """
    assert SAGE().kappa == pytest.approx(13.862944)
    mixed = mix(torch.tensor([[0.97, 0.03]]), torch.tensor([[0.08, 0.92]]), 0.9, KAPPA)
    assert mixed.local_share.item() == pytest.approx(0.5, abs=1e-5)
    assert mixed.target[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    table = Table(
        torch.zeros(1, 2),
        torch.tensor([0]),
        logits_of([0.97, 0.03], [0.8, 0.2]),
        logits_of([0.75, 0.25], [0.75, 0.25]),
    )
    step = loss_of(SAGE(confidence_threshold=0.9), table, logits_of([0.08, 0.92], [0.2, 0.8]))
    assert step.loss.item() == pytest.approx(0.693147 + 0.143841 / 2, abs=1e-5)
    assert step.examples.item() == 2


@pytest.mark.parametrize(
    ("local", "given", "target", "keep"),
    [
        # The gap is .1 in the first three: lam = 1/4.
        ([0.99, 0.01], [0.11, 0.89], [0.25, 0.75], True),  # only the local model passes
        ([0.89, 0.11], [0.01, 0.99], [0.0, 1.0], True),  # only the global model passes: its label alone
        ([0.89, 0.11], [0.21, 0.79], [0.0, 1.0], False),  # none passes
        ([0.99, 0.01], [0.89, 0.11], [1.0, 0.0], True),  # both name the same class
        ([0.97, 0.03], [0.03, 0.97], [1.0, 0.0], True),  # no gap: lam = 1
    ],
)
def test_mixture_by_hand(local: list[float], given: list[float], target: list[float], keep: bool) -> None:
    mixed = mix(torch.tensor([local]), torch.tensor([given]), 0.95, KAPPA)
    assert mixed.target[0].tolist() == pytest.approx(target, abs=1e-5)
    assert mixed.keep.item() == keep


def test_threshold_itself_passes() -> None:
    half = torch.tensor([[0.5, 0.5]])
    low = torch.tensor([[0.4, 0.35, 0.25]])
    assert mix(half, half, 0.5, KAPPA).keep.item()
    assert mix(half, half, 0.5, KAPPA).local_share.item() == 1
    assert mix(low, torch.tensor([[0.5, 0.25, 0.25]]), 0.5, KAPPA).keep.item()


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    """d KL(t || p) / d logits = p - t, divided by the number of samples; weak view and teacher get exactly nothing."""
    tau, kappa, lambda_u = 0.8, 5.0, 0.7
    table, teacher = random_table(seed), random_table(seed + 100)
    step = loss_of(SAGE(confidence_threshold=tau, kappa=kappa, lambda_u=lambda_u), table, teacher.weak)
    gradients = table.gradients(step)
    assert step.pseudo is not None
    unlabeled, kept = 0.0, 0
    for i in range(8):
        (local_max, local_label), (global_max, global_label) = (
            best(softmax(rows[i])) for rows in (table.weak, teacher.weak)
        )
        share = math.exp(-kappa * abs(local_max - global_max)) if local_max >= tau else 0.0
        target = [share * (c == local_label) + (1 - share) * (c == global_label) for c in range(4)]
        p = softmax(table.strong[i])
        keep = local_max >= tau or global_max >= tau
        assert step.pseudo.keep[i].item() == keep
        assert step.pseudo.from_global[i].item() == (share < 0.5)
        assert step.pseudo.label[i].item() == (global_label if share < 0.5 else local_label)
        assert step.pseudo.confidence[i].item() == pytest.approx(global_max if share < 0.5 else local_max, abs=1e-6)
        if keep:
            kept += 1
            unlabeled += sum(t * math.log(t / q) for t, q in zip(target, p, strict=True) if t > 0)
            expected = [lambda_u * (p[c] - target[c]) / 8 for c in range(4)]
            assert gradients.strong[i].tolist() == pytest.approx(expected, abs=1e-5)
        else:
            assert gradients.strong[i].tolist() == [0] * 4
    assert 0 < kept < 8
    assert step.loss.item() == pytest.approx(labeled_mean(table) + lambda_u * unlabeled / 8, abs=1e-5)
    assert step.examples.item() == 3 + kept
    assert gradients.weak.abs().sum() == 0
    for i, label in enumerate(table.labels.tolist()):
        probs = softmax(table.labeled[i])
        assert gradients.labeled[i].tolist() == pytest.approx(
            [(probs[c] - (c == label)) / 3 for c in range(4)], abs=1e-6
        )


def test_teacher_gets_no_gradient_even_if_it_could() -> None:
    table, teacher = random_table(0), random_table(100)
    rows = teacher.rows
    teachers: dict[str, Model] = {"global": lambda images: rows[images.flatten().long()]}
    SAGE(confidence_threshold=0.0).loss(table.student, teachers, table.batch()).loss.backward()
    assert rows.grad is None
    assert table.rows.grad is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_models_give_fixmatch(seed: int) -> None:
    table = random_table(seed)
    ours = loss_of(SAGE(confidence_threshold=0.8), table, table.weak)
    theirs = FixMatch(confidence_threshold=0.8).loss(table.student, NOTHING, table.batch())
    torch.testing.assert_close(ours.loss, theirs.loss)
    for first, second in zip(table.gradients(ours), table.gradients(theirs), strict=True):
        torch.testing.assert_close(first, second)
    assert ours.pseudo is not None
    assert theirs.pseudo is not None
    assert torch.equal(ours.pseudo.keep, theirs.pseudo.keep)
    assert torch.equal(ours.pseudo.label, theirs.pseudo.label)


@pytest.mark.parametrize("seed", SEEDS)
def test_limits_of_kappa(seed: int) -> None:
    """kappa = 0: the local label wherever the local model passes. kappa large: the global label everywhere."""
    local, given = (random_table(s, unlabeled=30).weak.softmax(-1) for s in (seed, seed + 100))
    passes = local.max(-1).values >= 0.8
    assert 0 < passes.sum() < 30
    soft = mix(local, given, 0.8, 0.0)
    assert torch.equal(soft.target.argmax(-1), torch.where(passes, local.argmax(-1), given.argmax(-1)))
    assert torch.equal(soft.target.max(-1).values, torch.ones(30))
    assert torch.equal(mix(local, given, 0.8, 1e9).target.argmax(-1), given.argmax(-1))


@pytest.mark.parametrize("method", [SAGE(confidence_threshold=1.0), SAGE(confidence_threshold=0, lambda_u=0)])
def test_nothing_kept_or_no_weight_is_the_labelled_loss(method: SAGE) -> None:
    table = random_table(0)
    step = loss_of(method, table, random_table(100).weak)
    supervised = labels_loss(table.student, NOTHING, table.batch())
    assert torch.equal(step.loss, supervised.loss)
    for ours, theirs in zip(table.gradients(step), table.gradients(supervised), strict=True):
        assert torch.equal(ours, theirs)


def test_a_round_moves_every_parameter_and_its_teacher_is_the_received_model() -> None:
    """In the first step both models are the same: no gap, so the expert is the local model; later they part."""
    method = SAGE(confidence_threshold=0.0, kappa=1000.0)
    update = train_round(method)
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo.keep.all()
    assert not update.pseudo.from_global[:4].any()
    assert update.pseudo.from_global[4:].any()
    assert method.recipe(task()).phases(1)[0].teachers == ("global",)


def test_a_round_with_an_unreachable_threshold_or_no_weight_is_a_round_on_labels() -> None:
    unreachable = train_round(SAGE(confidence_threshold=1.0))
    assert unreachable.parts["model"].weight == 20
    assert_equals_labels_only(unreachable)
    assert_equals_labels_only(train_round(SAGE(confidence_threshold=0.0, lambda_u=0.0)))
    assert_without_unlabeled_equals_supervised(SAGE())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("kappa", -1.0, r"`method.kappa` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_u", float("inf"), r"`method.lambda_u` \(=inf\) must be a finite number of at least 0"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAGE(**{field: value})
