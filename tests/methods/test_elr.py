"""ELR against worked numbers and a slow derivation, its limits, and what it remembers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlabel.methods.elr import ELR, no_targets
from fedlabel.methods.losses import labels_loss
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import (
    ROUND,
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
KEY = "early_target"


def test_two_visits_by_hand() -> None:
    """p = (.5, .3, .2), label 0, t = 0: t becomes .3 p = (.15, .09, .06), <p, t> = .075 + .027 + .012 = .114.

    ln 2 + 3 ln .886 = .693147 - .363115 = .330032. Again: t = .7 t + .3 p = .51 p = (.255, .153, .102), <p, t> =
    .1938, ln 2 + 3 ln .8062 = .693147 - .646270 = .046877. (With t before the update: .330032 again.)
    """
    candidates = sets([0], [0, 1, 2], classes=3)
    memory = no_targets(candidates)
    assert torch.equal(memory[KEY], torch.zeros(2, 3))
    known = Known(logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), candidates)
    step, gradient = known.run(ELR().loss, memory)
    assert step.loss.item() == pytest.approx(0.330032, abs=1e-5)
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.memory is not None
    assert step.memory[KEY][0].tolist() == pytest.approx([0.15, 0.09, 0.06])
    assert step.memory[KEY][1].tolist() == [0, 0, 0]
    second, _ = known.run(ELR().loss, step.memory)
    assert second.loss.item() == pytest.approx(0.046877, abs=1e-5)
    assert second.memory is not None
    assert second.memory[KEY][0].tolist() == pytest.approx([0.255, 0.153, 0.102])
    assert second.examples.item() == 1


def test_certain_predictions_are_cut() -> None:
    """p = (1, 0, 0) is cut to (.9999, .0001, .0001); t = .3 of it, normalised by 1.0001; no gradient by the penalty."""
    known = Known(torch.tensor([[100.0, 0.0, 0.0]]), sets([1], classes=3))
    step, gradient = known.run(ELR().loss, no_targets(known.candidates))
    assert step.memory is not None
    target = [0.3 * 0.9999 / 1.0001, 0.3 * 0.0001 / 1.0001, 0.3 * 0.0001 / 1.0001]
    assert step.memory[KEY][0].tolist() == pytest.approx(target, rel=1e-4)
    agreement = 0.9999 * target[0] + 2 * 0.0001 * target[1]
    assert step.loss.item() == pytest.approx(100 + 3 * math.log(1 - agreement), abs=1e-4)
    assert gradient[0].tolist() == pytest.approx([1, -1, 0])
    old = {KEY: torch.tensor([[1.0, 0.0, 0.0]])}
    saturated, _ = known.run(ELR(beta=0.999).loss, old)
    assert torch.isfinite(saturated.loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_gradient_and_memory_per_sample(seed: int) -> None:
    """d log(1 - <p, t>) / d logit k = -p_k (t_k - <p, t>) / (1 - <p, t>), with t constant."""
    beta, weight = 0.6, 2.0
    known = random_known(seed, several=False)
    known.logits = (known.logits.detach() / 2).requires_grad_()
    stored = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1) * 0.8
    before = stored.clone()
    step, gradient = known.run(ELR(beta=beta, lambda_elr=weight).loss, {KEY: stored})
    assert torch.equal(stored, before)
    assert step.memory is not None
    assert not step.memory[KEY].requires_grad
    total = 0.0
    for i, label in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        p = softmax(known.logits[i])
        assert 1e-4 < min(p) < max(p) < 1 - 1e-4
        t = [beta * old + (1 - beta) * new for old, new in zip(stored[known.rows[i]].tolist(), p, strict=True)]
        assert step.memory[KEY][known.rows[i]].tolist() == pytest.approx(t, abs=1e-6)
        agreement = sum(a * b for a, b in zip(p, t, strict=True))
        total += -math.log(p[label]) + weight * math.log(1 - agreement)
        expected = [(p[k] - (k == label) - weight * p[k] * (t[k] - agreement) / (1 - agreement)) / 7 for k in range(4)]
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-5)
    assert step.examples.item() == 7
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)
    assert torch.equal(step.memory[KEY][known.rows[-1]], stored[known.rows[-1]])  # it has no label


@pytest.mark.parametrize("seed", SEEDS)
def test_without_weight_it_is_cross_entropy(seed: int) -> None:
    known = random_known(seed, several=False)
    ours, gradient = known.run(ELR(lambda_elr=0.0).loss, no_targets(known.candidates))
    theirs, expected = known.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(gradient, expected)


def test_clients_stack() -> None:
    known = [random_known(seed, several=False) for seed in range(3)]
    memories = [{KEY: torch.rand(8, 4, generator=torch.Generator().manual_seed(seed)) / 4} for seed in range(3)]
    assert_stacks(ELR().loss, known, memories)


def test_targets_stay_from_round_to_round() -> None:
    """6 steps of 4 out of 12 labelled samples: every one is seen twice, and in the next round twice more."""
    data, config = client(30, 12), replace(ROUND, local_steps=6)
    first = train_round(ELR(), data, config)
    assert_all_moved(first)
    assert first.statistics == {}
    assert first.kept.keys() == {KEY}
    kept = first.kept[KEY]
    assert kept.shape == (30, 3)
    torch.testing.assert_close(kept[:12].sum(1), torch.full((12,), 1 - 0.7**2), atol=1e-4, rtol=0)
    assert (kept[12:] == 0).all()
    second = train_round(ELR(), data, config, shared=first.kept)
    torch.testing.assert_close(second.kept[KEY][:12].sum(1), torch.full((12,), 1 - 0.7**4), atol=1e-4, rtol=0)
    assert not same(model(second), model(first))
    plain = train_round(ELR(lambda_elr=0.0))
    for name, value in model(train_round(LabelsOnly())).items():
        torch.testing.assert_close(model(plain)[name], value)
    assert train_round(ELR(), client(30, 0)).parts["model"].weight == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lambda_elr", -1.0, r"`method.lambda_elr` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_elr", float("inf"), r"`method.lambda_elr` \(=inf\) must be a finite number of at least 0"),
        ("beta", 1.0, r"`method.beta` \(=1.0\) must lie in \[0, 1\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELR(**{field: value})
