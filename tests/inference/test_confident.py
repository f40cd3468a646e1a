"""Confident learning: against loops, against cleanlab, and the federation against the union of its data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.inference.confident import (
    NEVER,
    RULES,
    calibrated_joint,
    class_counts,
    confident_class,
    confident_counts,
    cuts_for,
    differs,
    noise_rates,
    normalized_margin,
    off_diagonal,
    pair_counts,
    prune_by_class,
    prune_by_noise_rate,
    prune_counts,
    self_confidence,
    suggested_label,
    thresholds_of,
)

CLASSES = 5
Data = tuple[Tensor, Tensor]
"""Probabilities (n, classes) and given labels (n,)."""


def simulate(seed: int, n: int = 2000, sharpness: float = 3.0) -> Data:
    """A fair predictor of the true class, and labels of which about a quarter is the next class."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(CLASSES, n, p=[0.3, 0.3, 0.2, 0.15, 0.05])
    logits = rng.normal(size=(n, CLASSES)) + sharpness * (truth[:, None] == np.arange(CLASSES))
    wrong = rng.random(n) < 0.25
    labels = np.where(wrong, (truth + 1) % CLASSES, truth)
    return torch.from_numpy(logits).softmax(1), torch.from_numpy(labels)


def split(data: Data, clients: int) -> list[Data]:
    """Clients of unequal sizes that hold neighbouring labels; the last one holds nothing."""
    probabilities, labels = data
    order = labels.argsort(stable=True)
    ends = (len(labels) * torch.linspace(0, 1, clients) ** 2).long().tolist()
    parts = [order[begin:end] for begin, end in pairwise(ends)] + [order[:0]]
    assert sum(map(len, parts)) == len(labels)
    return [(probabilities[rows], labels[rows]) for rows in parts]


def total(parts: list[Data], statistic: Callable[..., Tensor], *more: object) -> Tensor:
    return torch.stack([statistic(*part, *more) for part in parts]).sum(0)


def learn(parts: list[Data]) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, C and Q of a federation."""
    sums = total(parts, self_confidence)
    thresholds = thresholds_of(sums)
    counts = total(parts, confident_counts, thresholds)
    return thresholds, counts, calibrated_joint(counts, sums[:, 1])


def suspects(parts: list[Data], rule: str) -> list[Tensor]:
    """Each client's suspects."""
    thresholds, _, joint = learn(parts)
    if rule == "confident":
        return [off_diagonal(*part, thresholds) for part in parts]
    label_counts = total(parts, self_confidence)[:, 1].long()
    pruned = prune_counts(joint, int(label_counts.sum()))
    off = pruned - torch.diag(pruned.diagonal())
    by_class = cuts_for(lambda cuts: total(parts, class_counts, cuts), label_counts - pruned.diagonal())
    by_pair = cuts_for(lambda cuts: total(parts, pair_counts, cuts), off)
    found = {
        "prune_by_class": [prune_by_class(*part, by_class) for part in parts],
        "prune_by_noise_rate": [prune_by_noise_rate(*part, by_pair) for part in parts],
    }
    found["both"] = [one & other for one, other in zip(*found.values(), strict=True)]
    return found[rule]


def test_four_samples_by_hand() -> None:
    """Two classes. t_0 = (.9 + .3) / 2 = .6 and t_1 = (.8 + .6) / 2 = .7. Sample 0 is confidently 0, sample 1 (given 0)
    confidently 1 as .7 reaches .7, sample 2 confidently 1, sample 3 neither: .6 < .7 and .4 < .6.
    C = [[1, 1], [0, 1]], and of two samples a class Q = [[1/4, 1/4], [0, 1/2]].
    """
    first = torch.tensor([0.9, 0.3, 0.2, 0.4], dtype=torch.float64)
    probabilities, labels = torch.stack([first, 1 - first], 1), torch.tensor([0, 0, 1, 1])
    thresholds, counts, joint = learn([(probabilities, labels)])
    assert torch.allclose(thresholds, torch.tensor([0.6, 0.7], dtype=torch.float64), atol=1e-15)
    assert counts.tolist() == [[1, 1], [0, 1]]
    assert joint.tolist() == [[0.25, 0.25], [0, 0.5]]
    assert off_diagonal(probabilities, labels, thresholds).tolist() == [False, True, False, False]
    assert suggested_label(probabilities, labels).tolist() == [1, 1, 0, 0]
    margins = torch.tensor([0.9, 0.3, 0.8, 0.6], dtype=torch.float64)
    assert torch.allclose(normalized_margin(probabilities, labels), margins)
    # Of true class 0 nothing has another label; of the three quarters of class 1 a quarter has.
    assert torch.allclose(noise_rates(joint), torch.tensor([0, 1 / 3], dtype=torch.float64))


def test_several_confident_classes_and_none() -> None:
    """The most probable of those that reach their thresholds, which need not be the most probable of all."""
    thresholds = torch.tensor([0.6, 0.25, 0.15])
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3], [0.58, 0.24, 0.1]])
    assert confident_class(probabilities, thresholds).tolist() == [1, 2, -1]
    # Whose label is the most probable class of all is no suspect, though C counts it off its diagonal.
    assert confident_counts(probabilities, torch.zeros(3, dtype=torch.int64), thresholds)[0].tolist() == [0, 1, 1]
    assert off_diagonal(probabilities, torch.tensor([0, 1, 1]), thresholds).tolist() == [False, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_loops_over_the_paper(seed: int) -> None:
    probabilities, labels = simulate(seed, 300)
    p, given = probabilities.tolist(), labels.tolist()
    t = [np.mean([p[i][j] for i in range(300) if given[i] == j]) for j in range(CLASSES)]
    c = np.zeros((CLASSES, CLASSES))
    for i in range(300):
        reached = [j for j in range(CLASSES) if p[i][j] >= t[j]]
        if reached:
            c[given[i], max(reached, key=lambda j: p[i][j])] += 1
    q = np.array([c[i] / c[i].sum() * given.count(i) for i in range(CLASSES)])
    thresholds, counts, joint = learn([(probabilities, labels)])
    assert np.abs(thresholds.numpy() - t).max() < 1e-12
    assert (counts.numpy() == c).all()
    assert np.abs(joint.numpy() - q / q.sum()).max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_federation_learns_what_the_union_of_its_data_would(seed: int) -> None:
    data = simulate(seed)
    thresholds, counts, joint = learn([data])
    theirs = learn(split(data, 7))
    assert (theirs[0] - thresholds).abs().max() < 1e-12
    assert torch.equal(theirs[1], counts)
    assert (theirs[2] - joint).abs().max() < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_federation_suspects_what_the_union_of_its_data_would(rule: str) -> None:
    data = simulate(3)
    (central,) = suspects([data], rule)
    assert 100 < int(central.sum()) < 1000
    order = data[1].argsort(stable=True)
    assert torch.equal(torch.cat(suspects(split(data, 7), rule)), central[order])


def test_prunings_take_as_many_as_the_joint_says() -> None:
    """Against sorting. Those of pairs may overlap, and labels that are the likeliest class are no suspects."""
    probabilities, labels = simulate(4)
    _, _, joint = learn([(probabilities, labels)])
    pruned = prune_counts(joint, len(labels))
    assert pruned.sum(1).tolist() == torch.bincount(labels, minlength=CLASSES).tolist()
    assert (pruned - joint * len(labels)).abs().max() <= 1
    by_class, by_pair = set(), set()
    p = probabilities.numpy()
    for i in range(CLASSES):
        rows = np.flatnonzero(labels.numpy() == i)
        by_class.update(rows[np.argsort(p[rows, i])][: len(rows) - int(pruned[i, i])].tolist())
        for j in range(CLASSES):
            if i != j:
                margin = p[rows, j] - p[rows, i]
                by_pair.update(rows[np.argsort(-margin)][: int(pruned[i, j])].tolist())
    likely = set((~differs(probabilities, labels)).nonzero()[:, 0].tolist())
    found = {rule: set(suspects([(probabilities, labels)], rule)[0].nonzero()[:, 0].tolist()) for rule in RULES}
    assert found["prune_by_class"] == by_class - likely
    assert found["prune_by_noise_rate"] == by_pair - likely
    assert found["both"] == (by_class & by_pair) - likely


def test_cuts() -> None:
    """Of .1, .2, .2, .9: one above a cut, one of two that tie, all of them, and nothing."""
    values = torch.tensor([0.1, 0.2, 0.2, 0.9], dtype=torch.float64)
    calls = []

    def over(cuts: Tensor) -> Tensor:
        calls.append(cuts)
        return (values >= cuts[:, None]).sum(1)

    wanted = torch.tensor([1, 2, 4, 0])
    cuts = cuts_for(over, wanted)
    assert over(cuts).tolist() == [1, 3, 4, 0]
    assert len(calls) <= 61
    assert 0.2 < cuts[0] < 0.9  # found at once, and no sample's value
    calls.clear()
    cuts_for(over, wanted[[0, 2, 3]])
    assert len(calls) < 5


def test_nobodys_class_and_equal_predictions() -> None:
    """A class without a label has no threshold to reach; where all predictions are equal, all reach their mean."""
    probabilities = torch.tensor([[0.1, 0.2, 0.7]]).expand(30, 3)
    labels = torch.tensor([0, 1]).repeat(15)
    thresholds, counts, joint = learn([(probabilities, labels)])
    assert thresholds[2] == NEVER
    assert counts.tolist() == [[0, 15, 0], [0, 15, 0], [0, 0, 0]]
    assert bool(joint.isfinite().all())
    assert noise_rates(joint)[2].isnan()
    empty = learn([(probabilities[:0], labels[:0])])
    assert empty[1].sum() == 0


@pytest.mark.parametrize("seed", range(3))
def test_cleanlab_finds_the_same(seed: int) -> None:
    count = pytest.importorskip("cleanlab.count", reason="pip install -e '.[crosscheck]'")
    rank = pytest.importorskip("cleanlab.rank", reason="pip install -e '.[crosscheck]'")
    probabilities, labels = _alike(simulate(seed, sharpness=5.0))
    p, given = probabilities.numpy(), labels.numpy()
    thresholds, counts, joint = learn(split((probabilities, labels), 7))
    assert np.abs(count.get_confident_thresholds(given, p) - thresholds.numpy()).max() < 1e-12
    assert (count.compute_confident_joint(given, p, calibrate=False) == counts.numpy()).all()
    assert (count.compute_confident_joint(given, p) == prune_counts(joint, len(given)).numpy()).all()
    scores = rank.get_label_quality_scores(given, p, method="normalized_margin")
    assert np.abs(scores - normalized_margin(probabilities, labels).numpy()).max() < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_cleanlab_suspects_the_same(rule: str) -> None:
    find = pytest.importorskip("cleanlab.filter", reason="pip install -e '.[crosscheck]'").find_label_issues
    data = _alike(simulate(5, sharpness=5.0))
    name = {"confident": "confident_learning"}.get(rule, rule)
    theirs = find(data[1].numpy(), data[0].numpy(), filter_by=name, n_jobs=1)
    order = data[1].argsort(stable=True)
    assert 100 < theirs.sum() < 1000
    assert (torch.cat(suspects(split(data, 7), rule)).numpy() == theirs[order.numpy()]).all()


def _alike(data: Data) -> Data:
    """Leaves out samples of which cleanlab's confident class is not the paper's: see the module."""
    probabilities, labels = data
    for _ in range(5):
        thresholds = thresholds_of(self_confidence(probabilities, labels))
        found = confident_class(probabilities, thresholds)
        several = (probabilities >= thresholds - 1e-6).sum(1) > 1
        kept = ~several | (found == probabilities.argmax(1))
        if bool(kept.all()):
            return probabilities, labels
        probabilities, labels = probabilities[kept], labels[kept]
    raise AssertionError("leaves out ever more")
