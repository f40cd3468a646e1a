"""PRODEN against worked numbers and a slow derivation, its limits, and what it remembers."""

from __future__ import annotations

import math

import pytest
import torch

from fedlabel.methods.losses import labels_loss
from fedlabel.methods.proden import PRODEN, replace_rows, uniform_confidence
from tests.methods.sets import Known, assert_stacks, client_with_sets, random_known, sets
from tests.methods.tables import assert_all_moved, logits_of, model, same, softmax, train_round

SEEDS = range(5)
KEY = "candidate_confidence"


def test_two_visits_by_hand() -> None:
    """S = {0, 1}, q = (1/2, 1/2, 0). p = (.5, .3, .2): -(ln .5 + ln .3) / 2 = .948560; then q = (.625, .375, 0).

    Second visit, p = (.4, .4, .2): -ln .4 = .916291, and the gradient is p - q = (-.225, .025, .2); then q = (.5, .5,
    0). A sample of which nothing is known counts in neither.
    """
    candidates = sets([0, 1], [0, 1, 2], classes=3)
    memory = uniform_confidence(candidates)
    assert memory[KEY][0].tolist() == [0.5, 0.5, 0]
    known = Known(logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), candidates)
    step, gradient = known.run(PRODEN().loss, memory)
    assert step.loss.item() == pytest.approx(0.948560, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.0, -0.2, 0.2], abs=1e-6)
    assert gradient[1].tolist() == [0, 0, 0]
    assert step.memory is not None
    assert step.memory[KEY][0].tolist() == pytest.approx([0.625, 0.375, 0])
    again = Known(logits_of([0.4, 0.4, 0.2], [0.1, 0.1, 0.8]), candidates)
    second, gradient = again.run(PRODEN().loss, step.memory)
    assert second.loss.item() == pytest.approx(0.916291, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.225, 0.025, 0.2], abs=1e-6)
    assert second.memory is not None
    assert second.memory[KEY][0].tolist() == pytest.approx([0.5, 0.5, 0])
    assert second.examples.item() == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_gradient_and_memory_per_sample(seed: int) -> None:
    """Each sample's q is looked up, and left, at its position in the client's data."""
    known = random_known(seed)
    stored = torch.zeros_like(known.candidates, dtype=torch.float32)
    stored[known.rows] = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed)) * known.candidates
    stored = stored / stored.sum(1, keepdim=True)
    before = stored.clone()
    step, gradient = known.run(PRODEN().loss, {KEY: stored, "other": torch.ones(1)})
    assert torch.equal(stored, before)
    assert step.memory is not None
    assert step.memory["other"].item() == 1
    total, used = 0.0, int(step.examples)
    for i, inside in enumerate(known.candidates.tolist()):
        p, q = softmax(known.logits[i]), stored[known.rows[i]].tolist()
        mass = sum(p[y] for y in range(4) if inside[y])
        left = step.memory[KEY][known.rows[i]].tolist()
        assert left == pytest.approx([inside[y] * p[y] / mass for y in range(4)], abs=1e-6)
        if all(inside):
            assert gradient[i].abs().sum() == 0
            continue
        total -= sum(q[y] * math.log(p[y]) for y in range(4))
        assert gradient[i].tolist() == pytest.approx([(p[y] - q[y]) / used for y in range(4)], abs=1e-6)
    assert used == (~known.candidates.all(1)).sum()
    assert step.loss.item() == pytest.approx(total / used, abs=1e-5)
    assert not step.memory[KEY].requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_one_candidate_is_cross_entropy(seed: int) -> None:
    known = random_known(seed, several=False)
    own = torch.empty_like(known.candidates)
    own[known.rows] = known.candidates
    memory = uniform_confidence(own)
    ours, gradient = known.run(PRODEN().loss, memory)
    theirs, expected = known.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(gradient, expected)
    assert ours.memory is not None
    torch.testing.assert_close(ours.memory[KEY][known.rows[:-1]], memory[KEY][known.rows[:-1]])


def test_a_sample_drawn_twice_leaves_its_last_prediction() -> None:
    table = torch.zeros(3, 2)
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert replace_rows(table, torch.tensor([2, 0, 2, 2]), values)[:, 0].tolist() == [2, 0, 4]
    assert table.sum() == 0
    assert torch.equal(replace_rows(table, torch.zeros(0, dtype=torch.int64), values[:0]), table)


def test_clients_stack() -> None:
    known = [random_known(seed) for seed in range(3)]
    assert_stacks(PRODEN().loss, known, [uniform_confidence(one.candidates) for one in known])


def test_confidences_stay_from_round_to_round() -> None:
    """They begin uniform, are kept by the client, and another round goes on with them."""
    data = client_with_sets()
    first = train_round(PRODEN(), data)
    assert_all_moved(first)
    assert first.statistics == {}
    assert first.kept.keys() == {KEY}
    kept, candidates = first.kept[KEY], data.supervision.candidates
    assert kept.shape == candidates.shape
    torch.testing.assert_close(kept.sum(1), torch.ones(30))
    assert (kept[~candidates] == 0).all()
    uniform = uniform_confidence(candidates)[KEY]
    # 5 steps of 4 samples out of 25: five are not visited, and nothing is learnt of the last five.
    unvisited = (kept == uniform).all(1)
    several = (candidates.sum(1) == 2).sum()
    assert (~unvisited).sum() <= min(20, several)
    assert (~unvisited).any()
    second = train_round(PRODEN(), data, shared=first.kept)
    assert not same(model(second), model(first))
    assert same(model(train_round(PRODEN(), data, shared=first.kept)), model(second))
    sharp = {KEY: torch.nn.functional.one_hot(candidates.int().argmax(1), 3).float()}
    assert not same(model(train_round(PRODEN(), data, shared=sharp)), model(second))
