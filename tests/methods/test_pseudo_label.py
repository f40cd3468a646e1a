"""Pseudo-labels, per batch and per round, against a slow derivation per sample and a worked number; their limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.methods.batch import Step, Survey
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.masks import Mask
from fedlabel.methods.pseudo_label import PseudoLabel
from fedlabel.methods.recipe import BySample, Phase, Update
from tests.methods.recipes import task
from tests.methods.tables import (
    NOTHING,
    ROUND,
    Table,
    assert_all_moved,
    assert_equals_labels_only,
    assert_without_unlabeled_equals_supervised,
    best,
    client,
    labeled_mean,
    logits_of,
    model,
    net,
    random_table,
    same,
    softmax,
    train_round,
)

SEEDS = range(5)


def phase_of(method: PseudoLabel, round_number: int = 1) -> Phase:
    (phase,) = method.recipe(task()).phases(round_number)
    return phase


def update_of(method: PseudoLabel, round_number: int = 1) -> Update:
    (update,) = phase_of(method, round_number).updates
    return update


def loss_of(method: PseudoLabel, table: Table, targets: dict[str, torch.Tensor] | None = None) -> Step:
    return update_of(method).loss(table.student, NOTHING, table.batch(targets=targets))


def test_loss_by_hand() -> None:
    """Weak views (.96, .04), kept, its own label 0: -ln .96 = .040822; (.9, .1), dropped. Over two: .020411.

    Labelled p(y) = .5: ln 2 = .693147; sum .713558. Strong views are not looked at.
    """
    table = Table(
        torch.zeros(1, 2), torch.tensor([1]), logits_of([0.96, 0.04], [0.9, 0.1]), torch.full((2, 2), math.nan)
    )
    step = loss_of(PseudoLabel(), table)
    assert step.loss.item() == pytest.approx(0.713558, abs=1e-6)
    assert step.examples.item() == 2
    assert phase_of(PseudoLabel()).draw == BySample(labeled=("weak",), unlabeled=("weak",))


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    """The label is a constant: d CE / d logits = p - onehot of the very view that made it, over the batch size."""
    tau, lambda_u = 0.8, 0.7
    table = random_table(seed)
    step = loss_of(PseudoLabel(confidence_threshold=tau, lambda_u=lambda_u), table)
    gradients = table.gradients(step)
    unlabeled, kept = 0.0, 0
    for i, row in enumerate(table.weak):
        probs = softmax(row)
        confidence, label = best(probs)
        if confidence >= tau:
            kept += 1
            unlabeled += -math.log(confidence)
            expected = [lambda_u * (probs[c] - (c == label)) / 8 for c in range(4)]
            assert gradients.weak[i].tolist() == pytest.approx(expected, abs=1e-6)
        else:
            assert gradients.weak[i].tolist() == [0] * 4
    assert 0 < kept < 8
    assert step.loss.item() == pytest.approx(labeled_mean(table) + lambda_u * unlabeled / 8, abs=1e-5)
    assert step.examples.item() == 3 + kept
    assert gradients.strong.abs().sum() == 0
    for i, label in enumerate(table.labels.tolist()):
        probs = softmax(table.labeled[i])
        assert gradients.labeled[i].tolist() == pytest.approx(
            [(probs[c] - (c == label)) / 3 for c in range(4)], abs=1e-6
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_of_the_round_are_the_received_models(seed: int) -> None:
    """`prepare` labels everything with the received model on plain images; the loss takes these labels, whatever the
    student believes."""
    method = PseudoLabel(confidence_threshold=0.8, relabel="round")
    phase = phase_of(method)
    received, table = random_table(seed + 100).weak, random_table(seed)
    asked = []

    def predict(teacher: str, view: str) -> torch.Tensor:
        asked.append((teacher, view))
        return received

    assert phase.prepare is not None
    prepared = phase.prepare(Survey(predict, Supervision.certain(torch.ones(8, 4, dtype=torch.bool)), {}))
    assert asked == [("global", "clean")]
    assert phase.teachers == ("global",)
    assert prepared.draw is None
    assert prepared.pseudo is not None
    assert prepared.pseudo.from_global.all()
    step = loss_of(method, table, prepared.targets)
    gradients = table.gradients(step)
    unlabeled, kept = 0.0, 0
    for i, row in enumerate(received):
        confidence, label = best(softmax(row))
        keep = confidence >= 0.8
        assert prepared.pseudo.keep[i].item() == keep
        assert prepared.pseudo.label[i].item() == label
        assert prepared.pseudo.confidence[i].item() == pytest.approx(confidence, abs=1e-6)
        probs = softmax(table.weak[i])
        unlabeled += -math.log(probs[label]) if keep else 0.0
        kept += keep
        expected = [(probs[c] - (c == label)) / 8 if keep else 0 for c in range(4)]
        assert gradients.weak[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 < kept < 8
    assert step.loss.item() == pytest.approx(labeled_mean(table) + unlabeled / 8, abs=1e-5)
    assert step.examples.item() == 3 + kept
    assert step.pseudo is None  # they were reported once, when they were made


def test_one_step_on_plain_images_is_the_same_per_batch_and_per_round() -> None:
    """Before the first step the student is the received model, and here weak views are the plain images."""
    one = replace(ROUND, local_steps=1)
    per_batch, per_round = (
        train_round(PseudoLabel(confidence_threshold=0.36, relabel=relabel), config=one)
        for relabel in ("batch", "round")
    )
    assert same(model(per_batch), model(per_round))
    assert per_batch.parts["model"].weight == per_round.parts["model"].weight
    assert_all_moved(per_batch)


def test_labels_of_the_round_stay_while_the_weights_move() -> None:
    """Every unlabelled sample is reported once, with the received model's label, however many steps follow."""
    update = train_round(PseudoLabel(confidence_threshold=0.36, relabel="round"))
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo_index.tolist() == list(range(10, 30))
    with torch.no_grad():
        probs = net()(client().images[10:].float() / 255).softmax(-1)
    assert torch.equal(update.pseudo.label, probs.argmax(-1))
    torch.testing.assert_close(update.pseudo.confidence, probs.max(-1).values)
    assert torch.equal(update.pseudo.keep, probs.max(-1).values >= 0.36)
    assert 0 < update.pseudo.keep.sum() < 20
    per_batch = train_round(PseudoLabel(confidence_threshold=0.36))
    assert not same(model(update), model(per_batch))
    assert_all_moved(per_batch)


@pytest.mark.parametrize(
    ("ramp_rounds", "round_number", "weight"), [(0, 1, 0.8), (4, 1, 0.2), (4, 3, 0.6), (4, 4, 0.8), (4, 100, 0.8)]
)
def test_weight_ramps_up_linearly_over_rounds(ramp_rounds: int, round_number: int, weight: float) -> None:
    """lambda_u = .8 over 4 rounds: .2, .4, .6, .8, .8, ..."""
    table = random_table(1)
    update = update_of(PseudoLabel(confidence_threshold=0.5, lambda_u=0.8, ramp_rounds=ramp_rounds), round_number)
    step = update.loss(table.student, NOTHING, table.batch())
    unlabeled = step.metrics["train/loss_unsupervised"][0].item() / 8
    assert unlabeled > 0
    assert step.loss.item() == pytest.approx(labeled_mean(table) + weight * unlabeled, abs=1e-6)


@pytest.mark.parametrize("relabel", ["batch", "round"])
@pytest.mark.parametrize("kind", ["fixed", "flexmatch", "freematch", "cbafed"])
@pytest.mark.parametrize("debias", ["none", "prior"])
def test_every_mask_works_per_batch_and_per_round(relabel: str, kind: str, debias: str) -> None:
    mask = Mask(kind=kind, debias=debias, base=0.0, cap=0.3)
    update = train_round(PseudoLabel(confidence_threshold=0.35, relabel=relabel, mask=mask))
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo.keep.any()
    assert update.pseudo.from_global.all().item() == (relabel == "round")
    assert bool(update.statistics) == (kind in ("freematch", "cbafed"))


def test_debiased_labels_of_the_round() -> None:
    """Nine times p = (.75, .25), once (.65, .35): prior (.74, .26), the last one's q ~ (.878, 1.346): label 1."""
    method = PseudoLabel(confidence_threshold=0.6, relabel="round", mask=Mask(debias="prior"))
    logits = logits_of(*[[0.75, 0.25]] * 9, [0.65, 0.35])
    prepared = method.prepare(
        Survey(lambda teacher, view: logits, Supervision.certain(torch.ones(10, 2, dtype=torch.bool)), {})
    )
    assert prepared.targets["label"].tolist() == [0] * 9 + [1]
    assert prepared.targets["keep"].tolist() == [False] * 9 + [True]


def test_labels_of_the_round_count_unlabelled_samples_only() -> None:
    """Ten surely predicted labelled samples and four unlabelled ones, p = (.9, .1) twice, (.6, .4), (.3, .7).

    cbafed, thresholds .7: one label of class 1 each for ten samples, and two kept of class 0 and one of class 1.
    freematch, ema .5, from tau = .5, p = (.5, .5): tau = .25 + .5 * .775 = .6375, p = .25 + .5 * (.675, .325) =
    (.5875, .4125), so T = (.6375, .447606): of the four only (.6, .4) is dropped. Labelled ones are judged, too.
    """
    logits = logits_of(*[[0.001, 0.999]] * 10, [0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7])
    candidates = torch.ones(14, 2, dtype=torch.bool)
    candidates[:10, 0] = False
    for kind in ("cbafed", "freematch"):
        mask = Mask(kind=kind, ema=0.5, base=0.6, cap=0.7)  # no counts yet: .5 * 2 / 10 + .6 = .7
        method = PseudoLabel(relabel="round", mask=mask)
        recipe = method.recipe(task(2))
        memory = {**recipe.memory.start(candidates), **recipe.shared.start()}
        prepared = method.prepare(Survey(lambda teacher, view: logits, Supervision.certain(candidates), memory))
        assert prepared.memory is not None
        statistics = recipe.shared.statistics(prepared.memory)
        assert prepared.targets["keep"].tolist() == [True] * 12 + [False, True]
        if kind == "cbafed":
            assert statistics["class_counts"].tolist() == [2, 11]
        else:
            assert statistics["threshold"].item() == pytest.approx(0.6375)
            assert statistics["class_mean"].tolist() == pytest.approx([0.5875, 0.4125])
            assert statistics["class_share"].tolist() == pytest.approx([0.25 + 0.5 * 0.75, 0.25 + 0.5 * 0.25])


@pytest.mark.parametrize(
    "method", [PseudoLabel(confidence_threshold=1.0), PseudoLabel(confidence_threshold=0, lambda_u=0)]
)
def test_nothing_kept_or_no_weight_is_the_labelled_loss(method: PseudoLabel) -> None:
    table = random_table(0)
    step, supervised = (loss(table.student, NOTHING, table.batch()) for loss in (update_of(method).loss, labels_loss))
    assert torch.equal(step.loss, supervised.loss)
    for ours, theirs in zip(table.gradients(step), table.gradients(supervised), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relabel", ["batch", "round"])
def test_a_round_with_an_unreachable_threshold_or_no_weight_is_a_round_on_labels(relabel: str) -> None:
    unreachable = train_round(PseudoLabel(confidence_threshold=1.0, relabel=relabel))
    assert unreachable.parts["model"].weight == 20
    assert_equals_labels_only(unreachable)
    assert_equals_labels_only(train_round(PseudoLabel(confidence_threshold=0.0, lambda_u=0.0, relabel=relabel)))
    assert_without_unlabeled_equals_supervised(PseudoLabel(relabel=relabel))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("relabel", "epoch", r"`method.relabel` \(=epoch\) must be one of batch, round"),
        ("lambda_u", float("nan"), r"`method.lambda_u` \(=nan\) must be a finite number of at least 0"),
        ("ramp_rounds", -1, r"`method.ramp_rounds` \(=-1\) must be at least 0"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoLabel(**{field: value})
