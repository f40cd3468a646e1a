"""FreeMatch against a slow derivation per sample, worked numbers of its fairness term, and its limits.

The thresholds and the federation's moving averages are tested in test_masks.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlabel.methods.batch import State
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.freematch import FreeMatch, fairness
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.masks import Mask
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
    net,
    random_table,
    softmax,
    train_round,
)

SEEDS = range(5)
EMA = 0.6
MASK = Mask(kind="freematch", ema=EMA)


def memory(classes: int = 4) -> State:
    """Averages as after some rounds."""
    mean = torch.tensor([4.0, 3.0, 2.0, 1.0])[:classes]
    share = torch.tensor([3.0, 3.0, 1.0, 3.0])[:classes]
    steps = torch.zeros(())
    return {
        "threshold": torch.tensor(0.95),
        "class_mean": mean / mean.sum(),
        "class_share": share / share.sum(),
        "steps": steps,
    }


def test_fairness_by_hand() -> None:
    """-H(a, b) = sum_c a_c ln b_c, a = SumNorm(p / h) of the averages, b of the kept samples of the batch.

    p = (.6, .4), h = (.5, .5): a = (.6, .4). Kept (.8, .2), (.3, .7): mean (.55, .45), shares (.5, .5), b = (.55, .45).
    .6 ln .55 + .4 ln .45 = -.358702 - .319403 = -.678105. A dropped third sample does not matter.

    p = (.6, .4), h = (.75, .25): a = SumNorm(.8, 1.6) = (1/3, 2/3). Kept (.8, .2), (.6, .4), (.1, .9): mean (.5, .5),
    shares (2/3, 1/3), b = SumNorm(.75, 1.5) = (1/3, 2/3). (ln 1/3 + 2 ln 2/3) / 3 = -.636514.
    """
    average, even = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
    probs, keep = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]), torch.tensor([True, True, False])
    assert fairness(probs, keep, average, even).item() == pytest.approx(-0.678105, abs=1e-6)
    probs, skewed = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]), torch.tensor([0.75, 0.25])
    everything = torch.ones(3, dtype=torch.bool)
    assert fairness(probs, everything, average, skewed).item() == pytest.approx(-0.636514, abs=1e-6)


def test_fairness_of_classes_without_predictions() -> None:
    """1 / 0 counts as 0, in the batch and in the averages (the released code sets infinities to zero).

    Kept (.7, .2, .1): shares (1, 0, 0), b = (1, 0, 0), plus 1e-12 in the logarithm: a_2 = a_3 = 1/3 give
    2/3 ln 1e-12 = -18.420681. With h = (.5, .5, 0) a = (1/2, 1/2, 0): 1/2 ln 1e-12 = -13.815511.
    """
    probs, keep = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([True])
    third = torch.full((3,), 1 / 3)
    assert fairness(probs, keep, third, third).item() == pytest.approx(-18.420681, abs=1e-4)
    absent = fairness(probs, keep, third, torch.tensor([0.5, 0.5, 0.0]))
    assert absent.item() == pytest.approx(-13.815511, abs=1e-4)


def test_fairness_of_nothing_is_exactly_zero_with_gradient_zero() -> None:
    probs = torch.rand(3, 4).requires_grad_()
    value = fairness(probs, torch.zeros(3, dtype=torch.bool), *[torch.full((4,), 0.25)] * 2)
    value.backward()
    assert value.item() == 0
    assert probs.grad is not None
    assert probs.grad.tolist() == [[0] * 4] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_fairness_is_its_numerical_derivative_and_spares_dropped_samples(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    keep = torch.arange(6) % 3 != 0
    mean, share = (torch.rand(3, generator=generator, dtype=torch.float64).add(0.1) for _ in range(2))

    def value(given: Tensor) -> Tensor:
        return fairness(given.softmax(-1), keep, mean / mean.sum(), share / share.sum())

    assert torch.autograd.gradcheck(value, logits)
    (gradient,) = torch.autograd.grad(value(logits), logits)
    assert gradient[~keep].abs().sum() == 0
    several = len(set(logits[keep].argmax(-1).tolist())) > 1  # with one class predicted SumNorm leaves nothing to move
    assert (gradient.abs().max().item() > 1e-9) == several


def test_loss_by_hand() -> None:
    """Weak (.9, .1), (.2, .8), (.6, .4), averages from before with weight .5: all thresholds are .7.

    Threshold (.633333 + .766667) / 2 = .7, class mean ((.433333, .566667) + (.566667, .433333)) / 2 = (.5, .5), shares
    ((1/3, 2/3) + (2/3, 1/3)) / 2 = (.5, .5). The first two are kept; strong (.8, .2), (.3, .7), (.5, .5):
    (-ln .8 - ln .7) / 3 = .193273. Fairness: a = (.5, .5), b = (.55, .45): (ln .55 + ln .45) / 2 = -.698172.
    Labelled p(y) = .5: ln 2 = .693147. .693147 + .193273 - .05 * .698172 = .851511.
    """
    table = Table(
        labeled=torch.zeros(1, 2),
        labels=torch.tensor([1]),
        weak=logits_of([0.9, 0.1], [0.2, 0.8], [0.6, 0.4]),
        strong=logits_of([0.8, 0.2], [0.3, 0.7], [0.5, 0.5]),
    )
    before = {
        "threshold": torch.tensor(0.633333),
        "class_mean": torch.tensor([0.433333, 0.566667]),
        "class_share": torch.tensor([1 / 3, 2 / 3]),
        "steps": torch.zeros(()),
    }
    method = FreeMatch(lambda_u=1, lambda_f=0.05, mask=Mask(kind="freematch", ema=0.5))
    step = method.loss(table.student, NOTHING, table.batch(before))
    assert step.loss.item() == pytest.approx(0.851511, abs=2e-6)
    assert step.examples.item() == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_per_sample(seed: int) -> None:
    lambda_u, lambda_f, classes = 0.7, 0.3, 4
    table, before = random_table(seed), memory()
    method = FreeMatch(lambda_u=lambda_u, lambda_f=lambda_f, mask=MASK)
    step = method.loss(table.student, NOTHING, table.batch(before))
    weak, strong = ([softmax(row) for row in rows] for rows in (table.weak, table.strong))
    n = len(weak)
    tau = EMA * 0.95 + (1 - EMA) * sum(max(p) for p in weak) / n
    old_mean, old_share = before["class_mean"].tolist(), before["class_share"].tolist()
    mean = [EMA * old_mean[c] + (1 - EMA) * sum(p[c] for p in weak) / n for c in range(classes)]
    share = [EMA * old_share[c] + (1 - EMA) * sum(best(p)[1] == c for p in weak) / n for c in range(classes)]
    kept, unlabeled = [], 0.0
    for p, s in zip(weak, strong, strict=True):
        confidence, label = best(p)
        if confidence >= tau * mean[label] / max(mean):
            kept.append(s)
            unlabeled += -math.log(s[label])
    assert 0 < len(kept) < n
    batch_mean = [sum(s[c] for s in kept) / len(kept) for c in range(classes)]
    batch_share = [sum(best(s)[1] == c for s in kept) / len(kept) for c in range(classes)]
    ratio = [m / h if h > 0 else 0.0 for m, h in zip(batch_mean, batch_share, strict=True)]
    target = [m / h for m, h in zip(mean, share, strict=True)]
    fair = sum(a / sum(target) * math.log(b / sum(ratio) + 1e-12) for a, b in zip(target, ratio, strict=True))
    expected = labeled_mean(table) + lambda_u * unlabeled / n + lambda_f * fair
    assert step.loss.item() == pytest.approx(expected, abs=1e-4)
    assert step.metrics["train/loss"].tolist() == pytest.approx([expected, 1], abs=1e-4)
    assert step.metrics["train/loss_fairness"].tolist() == pytest.approx([fair, 1], abs=1e-4)
    assert step.metrics["pseudo/threshold"].tolist() == pytest.approx([tau, 1], abs=1e-6)
    assert step.examples.item() == 3 + len(kept)
    assert step.memory is not None
    assert step.memory["class_share"].tolist() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_reaches_labels_and_kept_strong_views_only(seed: int) -> None:
    table = random_table(seed)
    step = FreeMatch(lambda_f=0.5, mask=MASK).loss(table.student, NOTHING, table.batch(memory()))
    gradients = table.gradients(step)
    assert step.pseudo is not None
    keep = step.pseudo.keep
    assert 0 < keep.sum() < 8
    assert gradients.weak.abs().sum() == 0
    assert gradients.strong[~keep].abs().sum() == 0
    assert (gradients.strong[keep].abs().sum(-1) > 0).all()
    for i, label in enumerate(table.labels.tolist()):
        probs = softmax(table.labeled[i])
        assert gradients.labeled[i].tolist() == pytest.approx(
            [(probs[c] - (c == label)) / 3 for c in range(4)], abs=1e-6
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_without_fairness_it_is_fixmatch_with_its_thresholds(seed: int) -> None:
    table = random_table(seed)
    ours = FreeMatch(lambda_f=0.0, mask=MASK).loss(table.student, NOTHING, table.batch(memory()))
    theirs = FixMatch(mask=MASK).loss(table.student, NOTHING, table.batch(memory()))
    assert torch.equal(ours.loss, theirs.loss)
    for first, second in zip(table.gradients(ours), table.gradients(theirs), strict=True):
        assert torch.equal(first, second)
    assert ours.memory is not None
    assert theirs.memory is not None
    assert all(torch.equal(ours.memory[name], theirs.memory[name]) for name in memory())


def test_without_both_weights_it_is_the_labelled_loss() -> None:
    table = random_table(0)
    step = FreeMatch(lambda_u=0.0, lambda_f=0.0).loss(table.student, NOTHING, table.batch(memory()))
    supervised = labels_loss(table.student, NOTHING, table.batch())
    assert torch.equal(step.loss, supervised.loss)
    for ours, theirs in zip(table.gradients(step), table.gradients(supervised), strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_without_unlabelled_samples_leaves_the_averages_and_has_no_fairness() -> None:
    table = random_table(0, unlabeled=0)
    step = FreeMatch(lambda_f=1.0).loss(table.student, NOTHING, table.batch(memory()))
    assert step.loss.item() == pytest.approx(labeled_mean(table), abs=1e-6)
    assert step.memory is not None
    assert all(torch.equal(step.memory[name], value) for name, value in memory().items())


@pytest.mark.parametrize("debias", ["none", "prior"])
def test_a_round_moves_every_parameter(debias: str) -> None:
    method = FreeMatch(mask=replace(MASK, debias=debias))
    update = train_round(method)
    assert_all_moved(update)
    assert update.pseudo is not None
    assert update.pseudo.keep.any()
    assert update.statistics["clients"].item() == 1
    assert len(net().state_dict()) == len(update.parts["model"].state)
    assert (method.recipe(task()).phases(1)[0].prepare is not None) == (debias == "prior")


def test_a_round_without_weights_is_a_round_on_labels() -> None:
    assert_equals_labels_only(train_round(FreeMatch(lambda_u=0.0, lambda_f=0.0)))
    assert_without_unlabeled_equals_supervised(FreeMatch())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lambda_u", -1.0, r"`method.lambda_u` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_f", float("nan"), r"`method.lambda_f` \(=nan\) must be a finite number of at least 0"),
        ("mask", Mask(), r"`method.mask.kind` \(=fixed\) must be freematch for method freematch"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeMatch(**{field: value})
