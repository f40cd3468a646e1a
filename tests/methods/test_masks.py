"""The mask against slow derivations per sample, and worked numbers of each threshold; the docstrings derive them."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision
from fedlabel.methods.batch import State, Survey
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.freematch import FreeMatch
from fedlabel.methods.masks import (
    Mask,
    Selected,
    cbafed_thresholds,
    flexmatch_thresholds,
    freematch_thresholds,
    masked_recipe,
)
from fedlabel.methods.pseudo_label import PseudoLabel
from fedlabel.methods.recipe import Method
from fedlabel.methods.shared import Shared
from fedlabel.methods.uda import UDA
from tests.methods.recipes import task
from tests.methods.tables import CLASSES, ROUND, best, client, logits_of, net, same, softmax, train_round

SEEDS = range(5)


def random_logits(seed: int, n: int = 12, classes: int = 4) -> Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def survey(logits: Tensor, unlabeled: list[bool]) -> Survey:
    """All of a client's samples; the received model sees `logits` on plain images."""
    classes = logits.shape[1]
    candidates = torch.ones(len(logits), classes, dtype=torch.bool)
    candidates[[not unknown for unknown in unlabeled], 1:] = False

    def predict(teacher: str, view: str) -> Tensor:
        assert (teacher, view) == ("global", "clean")
        return logits

    return Survey(predict, Supervision.certain(candidates), {})


def started(mask: Mask, classes: int = 4) -> State:
    """The memory of a client without labels in round 1, after its look at data on which the model is unsure."""
    nothing = torch.ones(3, classes, dtype=torch.bool)
    recipe = masked_recipe(mask, classes, ())
    start = {**recipe.memory.start(nothing), **recipe.shared.start()}
    return {**start, **mask.prepare(survey(torch.zeros(3, classes), [True] * 3), 0.9)}


# Fixed.


@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_keeps_what_reaches_the_threshold(seed: int) -> None:
    logits = random_logits(seed)
    chosen = Mask().select(logits, 0.7, {})
    for i, row in enumerate(logits):
        confidence, label = best(softmax(row))
        assert chosen.label[i].item() == label
        assert chosen.confidence[i].item() == pytest.approx(confidence, abs=1e-6)
        assert chosen.keep[i].item() == (confidence >= 0.7)
    assert 0 < chosen.keep.sum() < len(logits)  # the case says something


def test_threshold_itself_is_kept() -> None:
    """p = (.5, .5) exactly, tau = .5: max p >= tau."""
    assert Mask().select(torch.zeros(1, 2), 0.5, {}).keep.item()
    assert not Mask().select(torch.zeros(1, 2), 0.5000001, {}).keep.item()


# FlexMatch.


def test_flexmatch_thresholds_by_hand() -> None:
    """sigma = (8, 4, 0), tau = .9, M(beta) = beta / (2 - beta).

    2 samples pass for no class: beta = (1, 1/2, 0), M = (1, 1/3, 0), T = (.9, .3, 0).
    16 pass for none, more than the largest class: beta = (1/2, 1/4, 0), M = (1/3, 1/7, 0), T = (.3, .128571, 0).
    """
    counts = torch.tensor([8.0, 4.0, 0.0])
    assert flexmatch_thresholds(counts, torch.tensor(2), 0.9).tolist() == pytest.approx([0.9, 0.3, 0])
    assert flexmatch_thresholds(counts, torch.tensor(16), 0.9).tolist() == pytest.approx([0.3, 0.9 / 7, 0])
    nothing = flexmatch_thresholds(torch.zeros(3), torch.tensor(0), 0.9)
    assert nothing.tolist() == [0, 0, 0]  # no sample at all: not NaN


@pytest.mark.parametrize("seed", SEEDS)
def test_flexmatch_counts_the_clients_unlabelled_samples_with_the_received_model(seed: int) -> None:
    tau, logits = 0.7, random_logits(seed, 40)
    unlabeled = [i % 4 != 0 for i in range(40)]
    counts, unused = [0] * 4, 0
    for row, unknown in zip(logits, unlabeled, strict=True):
        confidence, label = best(softmax(row))
        if unknown and confidence >= tau:
            counts[label] += 1
        elif unknown:
            unused += 1
    largest = max(max(counts), unused)
    expected = [tau * (count / largest) / (2 - count / largest) for count in counts]
    mask = Mask(kind="flexmatch")
    memory = mask.prepare(survey(logits, unlabeled), tau)
    assert memory["class_threshold"].tolist() == pytest.approx(expected, abs=1e-6)
    batch = random_logits(seed + 100)
    chosen = mask.select(batch, tau, memory)
    for i, row in enumerate(batch):
        confidence, label = best(softmax(row))
        assert chosen.keep[i].item() == (confidence >= expected[label])


@pytest.mark.parametrize("seed", SEEDS)
def test_flexmatch_with_equally_learnt_classes_is_fixed(seed: int) -> None:
    """Every class has 3 sure samples and one sample is unsure: beta = 1 for all."""
    seen = torch.cat([10 * torch.eye(4).repeat(3, 1), torch.zeros(1, 4)])
    memory = Mask(kind="flexmatch").prepare(survey(seen, [True] * 13), 0.8)
    batch = random_logits(seed, 30)
    flexible, fixed = Mask(kind="flexmatch").select(batch, 0.8, memory), Mask().select(batch, 0.8, {})
    assert torch.equal(flexible.keep, fixed.keep)
    assert 0 < fixed.keep.sum() < 30


# FreeMatch.


def test_freematch_by_hand() -> None:
    """Two classes, ema .9, start tau = .5, p = h = (.5, .5); a batch with p = (.9, .1) and (.6, .4).

    Means: confidence .75, probabilities (.75, .25), predicted shares (1, 0).
    tau = .45 + .075 = .525, p = (.525, .475), h = (.55, .45); T = tau * p / max p = (.525, .475).
    """
    mask = Mask(kind="freematch", ema=0.9)
    chosen = mask.select(logits_of([0.9, 0.1], [0.6, 0.4]), 0.0, started(mask, 2))
    assert chosen.memory["threshold"].item() == pytest.approx(0.525)
    assert chosen.memory["class_mean"].tolist() == pytest.approx([0.525, 0.475])
    assert chosen.memory["class_share"].tolist() == pytest.approx([0.55, 0.45])
    thresholds = freematch_thresholds(chosen.memory["threshold"], chosen.memory["class_mean"])
    assert thresholds.tolist() == pytest.approx([0.525, 0.475])
    assert chosen.keep.all()


def test_freematch_starts_at_one_over_the_number_of_classes() -> None:
    shared = masked_recipe(Mask(kind="freematch"), 5, ()).shared.start()
    assert shared["threshold"].item() == pytest.approx(0.2)
    assert shared["class_mean"].tolist() == shared["class_share"].tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("seed", SEEDS)
def test_freematch_moves_its_averages_before_it_judges(seed: int) -> None:
    ema, classes = 0.6, 4
    mask = Mask(kind="freematch", ema=ema)
    memory = started(mask)
    tau, mean, share = 1 / classes, [1 / classes] * classes, [1 / classes] * classes
    dropped = 0
    for step in range(3):
        batch = random_logits(10 * seed + step)
        probs = [softmax(row) for row in batch]
        tau = ema * tau + (1 - ema) * sum(max(p) for p in probs) / len(probs)
        for c in range(classes):
            mean[c] = ema * mean[c] + (1 - ema) * sum(p[c] for p in probs) / len(probs)
            share[c] = ema * share[c] + (1 - ema) * sum(best(p)[1] == c for p in probs) / len(probs)
        chosen = mask.select(batch, 0.0, memory)
        memory = chosen.memory
        for i, p in enumerate(probs):
            confidence, label = best(p)
            assert chosen.keep[i].item() == (confidence >= tau * mean[label] / max(mean))
            dropped += confidence < tau * mean[label] / max(mean)
        assert memory["threshold"].item() == pytest.approx(tau, abs=1e-6)
        assert memory["class_mean"].tolist() == pytest.approx(mean, abs=1e-6)
        assert memory["class_share"].tolist() == pytest.approx(share, abs=1e-6)
    assert dropped


def test_freematch_is_not_moved_by_an_empty_batch() -> None:
    mask = Mask(kind="freematch", ema=0.5)
    memory = started(mask)
    after = mask.select(torch.zeros(0, 4), 0.0, memory).memory
    assert all(torch.equal(after[name], memory[name]) for name in memory)


# CBAFed.


def test_cbafed_thresholds_by_hand() -> None:
    """Ten classes, shares .55 and nine times .05: mean .1, variance (.45^2 + 9 * .05^2) / 9 = .025, sd .158114.

    T = .55 + .84 - .158114 = 1.231886, capped at .95; .05 + .84 - .158114 = .731886.

    Four classes, shares (.4, .3, .2, .1), times 4/10: (.16, .12, .08, .04); sd sqrt(.008 / 3) = .0516398.
    T = (.9483602, .9083602, .8683602, .8283602). Without any sample: .25 * .4 + .84 - 0 = .94.
    """
    ten = cbafed_thresholds(torch.tensor([110.0] + 9 * [10.0]), 0.84, 0.95)
    assert ten.tolist() == pytest.approx([0.95] + 9 * [0.731886], abs=1e-6)
    four = torch.tensor([40.0, 30.0, 20.0, 10.0])
    expected = [0.9483602, 0.9083602, 0.8683602, 0.8283602]
    assert cbafed_thresholds(four, 0.84, 0.95).tolist() == pytest.approx(expected, abs=1e-6)
    capped = [0.9, 0.9, 0.8683602, 0.8283602]
    assert cbafed_thresholds(four, 0.84, 0.9).tolist() == pytest.approx(capped, abs=1e-6)
    lower = [value - 0.34 for value in expected]
    assert cbafed_thresholds(four, 0.5, 0.95).tolist() == pytest.approx(lower, abs=1e-6)
    assert cbafed_thresholds(torch.zeros(4), 0.84, 0.95).tolist() == pytest.approx([0.94] * 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_cbafed_judges_by_the_shared_counts_and_counts_what_it_keeps(seed: int) -> None:
    counts = torch.randint(1, 200, (4,), generator=torch.Generator().manual_seed(seed)).float()
    shares = [count / sum(counts.tolist()) * 4 / 10 for count in counts.tolist()]
    thresholds = [min(share + 0.6 - statistics.stdev(shares), 0.8) for share in shares]
    mask = Mask(kind="cbafed", base=0.6, cap=0.8)
    memory = {**started(mask), "class_counts": counts}
    kept = [0] * 4
    for step in range(2):
        batch = random_logits(seed * 10 + step)
        chosen = mask.select(batch, 0.0, memory)
        memory = chosen.memory
        for i, row in enumerate(batch):
            confidence, label = best(softmax(row))
            assert chosen.keep[i].item() == (confidence >= thresholds[label])
            kept[label] += confidence >= thresholds[label]
    assert memory["kept_counts"].tolist() == kept
    assert 0 < sum(kept) < memory["drawn"].item() == 24
    assert torch.equal(memory["class_counts"], counts)  # thresholds stay as they are within a round


# Debiasing.


def test_debiasing_by_hand() -> None:
    """p = (.6, .4), prior (.8, .2): q ~ (.75, 2), so q = (.272727, .727273); the label turns from 0 to 1.

    Then the prior moves half way to the batch's mean p: .5 * (.8, .2) + .5 * (.6, .4) = (.7, .3).
    """
    chosen = Mask(debias="prior").select(logits_of([0.6, 0.4]), 0.7, {"prior": torch.tensor([0.8, 0.2])})
    assert chosen.label.item() == 1
    assert chosen.confidence.item() == pytest.approx(8 / 11)
    assert chosen.logits.softmax(-1)[0].tolist() == pytest.approx([3 / 11, 8 / 11])
    assert chosen.keep.item()
    assert chosen.memory["prior"].tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("seed", SEEDS)
def test_prior_is_the_mean_prediction_on_unlabelled_samples(seed: int) -> None:
    logits = random_logits(seed)
    unlabeled = [i % 3 != 0 for i in range(len(logits))]
    rows = [softmax(row) for row, unknown in zip(logits, unlabeled, strict=True) if unknown]
    expected = [sum(row[c] for row in rows) / len(rows) for c in range(4)]
    mask = Mask(debias="prior")
    assert mask.prepare(survey(logits, unlabeled), 0.9)["prior"].tolist() == pytest.approx(expected, abs=1e-6)
    without = mask.prepare(survey(logits, [False] * len(logits)), 0.9)
    assert without["prior"].tolist() == [0.25] * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_debiasing_per_sample_over_two_batches(seed: int) -> None:
    prior = [0.4, 0.3, 0.2, 0.1]
    mask, memory = Mask(debias="prior"), {"prior": torch.tensor(prior)}
    for step in range(2):
        batch = random_logits(seed * 10 + step)
        chosen = mask.select(batch, 0.7, memory)
        memory = chosen.memory
        probs = [softmax(row) for row in batch]
        for i, p in enumerate(probs):
            ratio = [p[c] / prior[c] for c in range(4)]
            confidence, label = best([value / sum(ratio) for value in ratio])
            assert chosen.label[i].item() == label
            assert chosen.confidence[i].item() == pytest.approx(confidence, abs=1e-5)
            assert chosen.keep[i].item() == (confidence >= 0.7)
        prior = [0.5 * prior[c] + 0.5 * sum(p[c] for p in probs) / len(probs) for c in range(4)]
        assert memory["prior"].tolist() == pytest.approx(prior, abs=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "flexmatch", "freematch", "cbafed"])
def test_uniform_prior_is_no_debiasing(kind: str) -> None:
    logits, plain, debiased = random_logits(3, 20), Mask(kind=kind), Mask(kind=kind, debias="prior")
    memory = started(plain)
    without = plain.select(logits, 0.8, memory)
    uniform = debiased.select(logits, 0.8, {**memory, "prior": torch.full((4,), 0.25)})
    assert torch.equal(uniform.label, without.label)
    assert torch.equal(uniform.keep, without.keep)
    torch.testing.assert_close(uniform.confidence, without.confidence)


def test_flexmatch_counts_debiased_predictions() -> None:
    """Nine times p = (.75, .25) and once (.65, .35): prior (.74, .26), so the last has q ~ (.878, 1.346): class 1.

    q = (.394786, .605214), and (.513158, .486842) of the others: with tau .6 only the last passes, and 9 pass for no
    class: beta = (0, 1/9), T_1 = .6 * (1/9) / (2 - 1/9) = .6 / 17.
    """
    seen = logits_of(*[[0.75, 0.25]] * 9, [0.65, 0.35])
    memory = Mask(kind="flexmatch", debias="prior").prepare(survey(seen, [True] * 10), 0.6)
    assert memory["class_threshold"].tolist() == pytest.approx([0, 0.6 / 17])
    undebiased = Mask(kind="flexmatch").prepare(survey(seen, [True] * 10), 0.6)
    assert undebiased["class_threshold"].tolist() == pytest.approx([0.6, 0])


# All of them.

EVERY = [
    Mask(kind=kind, debias=debias)
    for kind in ("fixed", "flexmatch", "freematch", "cbafed")
    for debias in ("none", "prior")
]


@pytest.mark.parametrize("mask", EVERY, ids=lambda mask: f"{mask.kind}-{mask.debias}")
def test_select_is_pure_detached_and_runs_on_stacked_clients(mask: Mask) -> None:
    memories = []
    for seed in SEEDS:
        memory = started(mask)
        memories.append(mask.select(random_logits(seed + 50), 0.8, memory).memory)
    batches = [random_logits(seed).requires_grad_() for seed in SEEDS]
    before = [{name: value.clone() for name, value in memory.items()} for memory in memories]
    single = [mask.select(batch, 0.8, memory) for batch, memory in zip(batches, memories, strict=True)]
    for memory, copy in zip(memories, before, strict=True):
        assert memory.keys() == copy.keys()
        assert all(torch.equal(memory[name], copy[name]) for name in copy)
    stacked = {name: torch.stack([memory[name] for memory in memories]) for name in memories[0]}

    def select(logits: Tensor, memory: State) -> Selected:
        return mask.select(logits, 0.8, memory)

    together = torch.func.vmap(select)(torch.stack(batches), stacked)
    for i, one in enumerate(single):
        assert not one.logits.requires_grad
        assert not one.confidence.requires_grad
        assert torch.equal(together.label[i], one.label)
        assert torch.equal(together.keep[i], one.keep)
        for name, value in one.memory.items():
            torch.testing.assert_close(together.memory[name][i], value)


# What the federation shares.


def shared_of(method: Method) -> Shared:
    return method.recipe(task(CLASSES)).shared


METHODS_WITH_MASK = [FixMatch, PseudoLabel, UDA]


def federated(kind: str, ema: float = 0.5) -> list[Method]:
    methods: list[Method] = [method(mask=Mask(kind=kind, ema=ema)) for method in METHODS_WITH_MASK]
    return [*methods, FreeMatch(mask=Mask(kind="freematch", ema=ema))] if kind == "freematch" else methods


def add(states: list[State]) -> State:
    return {name: sum((state[name] for state in states[1:]), states[0][name]) for name in states[0]}


@pytest.mark.parametrize("method", federated("freematch"), ids=lambda method: method.name)
def test_freematch_clients_go_on_from_the_servers_averages_and_it_takes_their_mean(method: Method) -> None:
    """With lr so small that nothing moves and whole-set batches, after s steps x = e^s x_0 + (1 - e^s) mean, e = .5.

    Client 0 has 20 unlabelled samples, client 1 has 4 of the same, client 2 none: the mean is over the first two.
    """
    config = replace(ROUND, lr=1e-12, batch_size=50, local_steps=3)
    start = {"threshold": torch.tensor(0.6), "class_mean": torch.tensor([0.2, 0.3, 0.5])}
    shared = {**start, "class_share": torch.tensor([0.1, 0.1, 0.8])}
    expected = []
    totals = []
    for n, labeled in ((30, 10), (30, 26), (10, 10)):
        data = client(n, labeled)
        totals.append(train_round(method, data, config, shared).statistics)
        probs = [softmax(row) for row in net()(data.images[labeled:].float() / 255)]
        if probs:
            mean = [sum(p[c] for p in probs) / len(probs) for c in range(CLASSES)]
            share = [sum(best(p)[1] == c for p in probs) / len(probs) for c in range(CLASSES)]
            expected.append([sum(max(p) for p in probs) / len(probs), *mean, *share])
    assert [total["clients"].item() for total in totals] == [1, 1, 0]
    after = shared_of(method).update(shared, add(totals))
    assert after.keys() == shared.keys()
    flat = [*after["threshold"].reshape(1).tolist(), *after["class_mean"].tolist(), *after["class_share"].tolist()]
    old = [0.6, 0.2, 0.3, 0.5, 0.1, 0.1, 0.8]
    both = zip(old, *expected, strict=True)
    assert flat == pytest.approx([o / 8 + 7 / 8 * (first + second) / 2 for o, first, second in both], abs=1e-5)


@pytest.mark.parametrize("method", federated("freematch"), ids=lambda method: method.name)
def test_freematch_round_without_unlabelled_samples_leaves_the_shared_state(method: Method) -> None:
    shared = {name: value + 0.1 for name, value in shared_of(method).start().items()}
    total = add([train_round(method, client(10, 10), shared=shared).statistics for _ in range(2)])
    for nothing in (total, {}):
        after = shared_of(method).update(shared, nothing)
        assert after.keys() == shared.keys()
        assert all(torch.equal(after[name], shared[name]) for name in shared)


@pytest.mark.parametrize("method", federated("cbafed"), ids=lambda method: method.name)
def test_cbafed_shares_the_sum_of_labelled_and_kept_counts(method: Method) -> None:
    """A client adds its labels per class and what it kept per class, scaled from the draws to its unlabelled samples.

    base 0 and cap 0 keep everything: 5 steps of 4 draws are 20 kept, of 20 unlabelled samples: 20 in all.
    """
    everything = replace(method, mask=Mask(kind="cbafed", base=0.0, cap=0.0))  # type: ignore[call-arg]
    data = client()
    update = train_round(everything, data)
    labeled = data.supervision.candidates[:10].float().sum(0)
    counts = update.statistics["class_counts"]
    assert update.pseudo is not None
    assert update.pseudo.keep.all()
    kept = torch.tensor([(update.pseudo.label == c).sum().item() for c in range(CLASSES)])
    torch.testing.assert_close(counts, labeled + kept)
    few = train_round(everything, data, replace(ROUND, local_steps=2))
    assert few.statistics["class_counts"].sum().item() == pytest.approx(10 + 20)
    total = add([update.statistics, few.statistics])
    after = shared_of(everything).update({"class_counts": torch.full((CLASSES,), 7.0)}, total)
    torch.testing.assert_close(after["class_counts"], counts + few.statistics["class_counts"])


@pytest.mark.parametrize("method", federated("cbafed"), ids=lambda method: method.name)
def test_cbafed_without_kept_samples_counts_labels_and_keeps_its_counts_if_nobody_reports(method: Method) -> None:
    nothing = replace(method, mask=Mask(kind="cbafed", base=1.0, cap=1.0))  # type: ignore[call-arg]
    data = client()
    counts = train_round(nothing, data).statistics["class_counts"]
    assert torch.equal(counts, data.supervision.candidates[:10].float().sum(0))
    shared = {"class_counts": torch.tensor([3.0, 2.0, 1.0])}
    assert torch.equal(shared_of(nothing).update(shared, {})["class_counts"], shared["class_counts"])


@pytest.mark.parametrize("kind", ["fixed", "flexmatch"])
def test_masks_of_one_client_share_nothing(kind: str) -> None:
    method = FixMatch(mask=Mask(kind=kind))
    assert shared_of(method).start() == {}
    assert train_round(method).statistics == {}


@pytest.mark.parametrize("method_type", METHODS_WITH_MASK)
def test_only_masks_that_survey_prepare_a_phase(method_type: type[FixMatch]) -> None:
    for mask in EVERY:
        (phase,) = method_type(mask=mask, confidence_threshold=0.7).recipe(task()).phases(1)
        looks = mask.kind == "flexmatch" or mask.debias == "prior"
        assert (phase.prepare is not None) == looks
        assert phase.teachers == (("global",) if looks else ())
        if phase.prepare is not None:  # with the method's threshold
            seen = survey(random_logits(0, 40), [True] * 40)
            prepared, expected = phase.prepare(seen).memory, mask.prepare(seen, 0.7)
            assert prepared is not None
            assert same(prepared, expected)
            assert expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "softmatch", r"`method.mask.kind` \(=softmatch\) must be one of fixed, flexmatch, freematch, cbafed"),
        ("debias", "yes", r"`method.mask.debias` \(=yes\) must be one of none, prior"),
        ("ema", 1.1, r"`method.mask.ema` \(=1.1\) must lie in \[0, 1\]"),
        ("base", -0.1, r"`method.mask.base` \(=-0.1\) must lie in \[0, 1\]"),
        ("cap", float("nan"), r"`method.mask.cap` \(=nan\) must lie in \[0, 1\]"),
    ],
)
def test_wrong_mask_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask(**{field: value})
