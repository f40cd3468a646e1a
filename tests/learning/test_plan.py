"""Which samples a step draws, how many steps there are, and which pseudo-labels count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.learning.plan import Plan, StepPlan, Units, bag_units, draw_batches, most_drawn, plan_phase, sample_pool
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Prepared, PseudoLabels, Survey
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import ByBag, BySample, Phase, Update
from fedlabel.seeding import torch_generator
from tests.learning.clients import (
    BOTH,
    BY_KNOWLEDGE,
    CERTAIN,
    CONFIG,
    KNOWN,
    MIXED,
    UNLABELED,
    Made,
    believing,
    client,
    mixed_client,
    noted,
    rows_of,
    to_class,
    train,
)
from tests.methods.tables import CLASSES


def test_batches_are_shuffled_passes_without_a_gap() -> None:
    batches = torch.stack(list(draw_batches(torch.arange(5, 15), 4, 5, torch_generator(0, "x"))))
    flat = batches.flatten()
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(5, 15))
    assert flat[:10].tolist() != list(range(5, 15))
    assert [len(b) for b in draw_batches(torch.arange(3), 4, 2, torch_generator(0, "x"))] == [3, 3]
    assert [len(b) for b in draw_batches(torch.arange(0), 4, 2, torch_generator(0, "x"))] == [0, 0]


def test_a_weight_is_the_share_of_the_passes_that_have_a_sample() -> None:
    """1,000 passes over 10 samples, of which four have weight .25: standard error of their share .014."""
    weight = torch.ones(10)
    weight[:4] = 0.25
    batches = draw_batches(torch.arange(5, 15), 7, 1000, torch_generator(0, "x"), weight)
    assert [len(batch) for batch in batches] == [7] * 1000
    times = torch.bincount(torch.cat(list(batches)), minlength=15)[5:].double()
    assert torch.allclose(times[:4] / times[4:].mean(), torch.full((4,), 0.25, dtype=torch.float64), atol=0.05)
    assert (times[4:] / times[4:].mean() - 1).abs().max() < 0.01
    same = draw_batches(torch.arange(5, 15), 7, 3, torch_generator(0, "x"), torch.ones(10))
    assert sorted(torch.cat(list(same))[:10].tolist()) == list(range(5, 15))


@pytest.mark.parametrize("draw", [BySample(labeled=("weak",)), ByBag(labeled=("weak",), singles=True)])
def test_a_plan_draws_labels_by_their_weights(draw: BySample | ByBag) -> None:
    """Of 20 labelled samples; four more are in a bag, which a step by bags draws, too."""
    place = torch.arange(24)
    known = reveal_labels(torch.zeros(24, dtype=torch.int64), place < 20, 3)
    bag = torch.where(place < 20, -1, 0)
    known = replace(known, bag=bag, bag_counts=torch.tensor([[4, 0, 0]]), weight=torch.where(place < 10, 0.1, 1.0))
    phase = Phase("x", labels_loss, draw=draw)
    config = TrainingConfig(local_steps=200, batch_size=4)
    plan = plan_phase(phase, sample_pool(draw, known, config), None, known, config, 0)
    drawn = torch.cat([step.labeled for step in plan.steps])
    drawn = drawn[drawn < 20]
    assert len(plan.steps) == 200
    assert 0.05 < float((drawn < 10).double().mean()) < 0.13  # 1 / 11


def test_units_of_a_client() -> None:
    """Bags of any order and size, then a labelled sample in none and, if asked for, one of which nothing is known."""
    candidates = torch.ones(7, 3, dtype=torch.bool)
    candidates[2] = torch.tensor([False, True, False])
    known = replace(
        Supervision.certain(candidates),
        bag=torch.tensor([1, 0, -1, 1, 1, 0, -1]),
        bag_counts=torch.tensor([[2, 0, 0], [1, 1, 1]]),
    )
    units = bag_units(known, singles=False)
    assert units.rows.tolist() == [[1, 5, -1], [0, 3, 4], [2, -1, -1]]
    assert units.counts.tolist() == [[2, 0, 0], [1, 1, 1], [0, 1, 0]]
    assert units.samples().tolist() == [0, 1, 2, 3, 4, 5]
    assert [units.per_step(size) for size in (1, 2, 4, 6, 8)] == [1, 1, 2, 3, 4]
    units = bag_units(known, singles=True)
    assert units.rows[3].tolist() == [6, -1, -1]
    assert units.counts[3].tolist() == [0, 0, 0]
    none = bag_units(reveal_labels(torch.zeros(2, dtype=torch.int64), torch.tensor([False, False]), 3), singles=False)
    assert len(none.rows) == 0


@pytest.mark.parametrize(
    ("phase", "config", "expected"),
    [
        (Phase("p", labels_loss), CONFIG, (5, 5 * 4)),
        (Phase("p", labels_loss), replace(CONFIG, local_steps=None, local_epochs=2), (2 * 3, 2 * 3 * 4)),
        (Phase("p", labels_loss, steps=2), CONFIG, (2, 2 * 4)),
        (Phase("p", labels_loss, BOTH), replace(CONFIG, unlabeled_ratio=2), (5, 5 * (4 + 8))),
        (Phase("p", labels_loss, MIXED), replace(CONFIG, unlabeled_ratio=9), (5, 5 * (4 + 10 + 10))),
        (Phase("p", labels_loss, UNLABELED), CONFIG, (5, 5 * 4)),
        (Phase("p", labels_loss, BY_KNOWLEDGE), CONFIG, (5, 5 * (4 + 4))),
        (Phase("p", labels_loss, then=(Update(labels_loss),)), CONFIG, (10, 10 * 4)),
    ],
)
def test_most_that_a_phase_draws(phase: Phase, config: TrainingConfig, expected: tuple[int, int]) -> None:
    """(optimiser steps, samples) of a client of ten samples, whatever their labels; batches of four."""
    assert most_drawn(phase, config, 10, None) == expected


def test_most_that_a_phase_by_bags_draws() -> None:
    """Three units of five samples, three of them in the largest: 4 / 5 of 3 units are 2 a step, or 3 if asked for."""
    units = Units(torch.tensor([[0, 1, 2], [3, -1, -1], [4, -1, -1]]), torch.zeros(3, CLASSES, dtype=torch.int64))
    epoch = replace(CONFIG, local_steps=None, local_epochs=1)
    assert most_drawn(Phase("p", labels_loss, ByBag()), CONFIG, 5, units) == (5, 5 * 2 * 3)
    assert most_drawn(Phase("p", labels_loss, ByBag()), epoch, 5, units) == (2, 2 * 2 * 3)
    assert most_drawn(Phase("p", labels_loss, ByBag(least=9)), epoch, 5, units) == (1, 1 * 3 * 3)


@pytest.mark.parametrize(("ratio", "labeled", "expected"), [(1, 10, 4), (3, 10, 12), (3, 2, 12), (9, 10, 20)])
def test_unlabeled_ratio_multiplies_the_unlabelled_batch_only(ratio: int, labeled: int, expected: int) -> None:
    """Batches of 4 labelled and ratio * 4 unlabelled samples; who has fewer gives all: 2 labels; 20 unlabelled."""
    data, _ = client(n=20 + labeled, labeled=labeled)
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, draw=MIXED)
    train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_ratio=ratio))
    assert {len(batch.labeled.candidates) for batch in seen} == {min(4, labeled)}
    assert {len(batch.unlabeled.candidates) for batch in seen} == {expected}
    assert {len(batch.mix.candidates) for batch in seen} == {expected}
    assert len(seen) == 5


def test_epochs_are_passes_over_the_unlabelled_samples_at_their_batch_size() -> None:
    """20 unlabelled samples, 3 * 4 a step: ceil(20 / 12) = 2 steps an epoch. Labels alone: ceil(10 / 4) = 3."""
    data, _ = client()
    config = replace(CONFIG, unlabeled_ratio=3, local_steps=None, local_epochs=2)
    both, labels = noted(to_class(0)), noted(labels_loss)
    phases = (
        Phase("both", both[0], draw=BOTH),
        Phase("labels", labels[0]),
    )
    train(Made(made=phases), data, config)
    assert len(both[1]) == 4
    assert len(labels[1]) == 6


def test_one_unknown_sample_does_not_end_an_epoch_over_the_known_ones() -> None:
    """29 samples with labels and one of which nothing is known: ceil(29 / 4) = 8 steps; 29 unknown, 12 a step: 3."""
    for known, steps in ((29, 8), (1, 3)):
        data, _ = client(n=30, labeled=known)
        loss, calls = noted(to_class(0))
        phase = Phase("both", loss, draw=BY_KNOWLEDGE)
        train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_ratio=3, local_steps=None, local_epochs=1))
        assert len(calls) == steps


def test_epochs_count_the_samples_that_a_phase_draws_from() -> None:
    """10 labelled in batches of 4: 3 steps an epoch; 20 unlabelled: 5. Two epochs: 6 * 4 + 10 * (4 + 4) of the
    student, back and forth, and 10 * (4 + 4) of the two teachers, forth only (the paper's 2P + 2B and more)."""
    data, _ = client()
    config = replace(CONFIG, local_steps=None, local_epochs=2)
    update = train(FedLabel(confidence_threshold=0.0), data, config)
    assert update.backward == 6 * 4 + 10 * 8
    assert update.forward == update.backward + 10 * 8
    nothing = train(FedLabel(confidence_threshold=1.0), data, config)  # nothing is kept: stage B only looks
    assert nothing.backward == 6 * 4
    assert nothing.forward == update.forward


def test_epochs_count_the_samples_that_prepare_lets_through() -> None:
    """5 of 20 unlabelled samples are drawn, in batches of 4: 2 steps an epoch, not 5."""
    data, _ = client(n=20, labeled=0)

    def five(survey: Survey) -> Prepared:
        return Prepared({}, torch.arange(20) < 5)

    phase = Phase("only", to_class(1), draw=UNLABELED, prepare=five)
    update = train(Made(made=(phase,)), data, replace(CONFIG, local_steps=None, local_epochs=3))
    assert update.backward == 3 * 2 * 4


@pytest.mark.parametrize("by_knowledge", [False, True])
@pytest.mark.parametrize("includes", [False, True])
def test_which_samples_are_the_labelled_ones(by_knowledge: bool, includes: bool) -> None:
    data = mixed_client()
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, draw=BY_KNOWLEDGE if by_knowledge else MIXED)
    config = replace(CONFIG, batch_size=25, local_steps=3, unlabeled_includes_labeled=includes)
    train(Made(made=(phase,)), data, config)
    labeled = KNOWN if by_knowledge else CERTAIN | set(range(10, 15))
    everyone = set(range(30))
    assert {row for batch in seen for row in batch.labeled.rows.tolist()} == labeled
    for part in ("unlabeled",) if by_knowledge else ("unlabeled", "mix"):
        rows = {row for batch in seen for row in getattr(batch, part).rows.tolist()}
        assert rows == (everyone if includes else everyone - labeled)
    for batch in seen:  # the labelled part shows all that is known of its samples
        known = data.supervision.rows(batch.labeled.rows)
        assert torch.equal(batch.labeled.candidates, known.candidates)
        assert torch.equal(batch.labeled.noisy, known.noisy)
        assert torch.equal(batch.labeled.annotations, known.annotations)
        assert rows_of(batch.labeled.views["weak"], data) == batch.labeled.rows.tolist()


def test_draw_restricts_the_unlabelled_draws_but_not_those_to_mix_with() -> None:
    """Samples 5 (labelled), 12 and 20 are to be drawn: two unlabelled ones; the mix comes from all twenty."""
    data, _ = client()
    loss, seen = noted(to_class(0))
    wanted = torch.isin(torch.arange(30), torch.tensor([5, 12, 20]))
    believed = PseudoLabels(torch.arange(30) % 3, wanted, wanted, torch.linspace(0, 1, 30))
    phase = Phase(
        "train",
        loss,
        draw=BySample(labeled=(), unlabeled=("weak",), mix=("weak",), mix_alpha=0.75),
        prepare=lambda survey: Prepared({}, wanted, pseudo=believed),
    )
    update = train(Made(made=(phase,)), data, replace(CONFIG, local_steps=12))
    drawn = [rows_of(batch.unlabeled.views["weak"], data) for batch in seen]
    assert {row for rows in drawn for row in rows} == {12, 20}
    mixed = [rows_of(batch.mix.views["weak"], data) for batch in seen]
    assert {len(rows) for rows in mixed} == {2}  # as many as drawn
    assert {row for rows in mixed for row in rows} == set(range(10, 30))
    shares = [batch.mixing.item() for batch in seen]
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) == 12
    assert update.pseudo is not None
    assert update.pseudo_index.tolist() == list(range(10, 30))
    assert torch.equal(update.pseudo.label, believed.label[10:])
    assert update.sums["pseudo/coverage"] == [2, 20]


@pytest.mark.parametrize("includes", [False, True])
def test_pseudo_labels_of_certain_labels_are_not_counted(includes: bool) -> None:
    """Of a phase by knowledge's samples all are believed something of; where the label is certain that is no news, and
    what is believed of a known sample that is drawn without what is known of it is not counted."""
    phase = Phase("train", believing, draw=BY_KNOWLEDGE)
    config = replace(CONFIG, batch_size=30, local_steps=2, unlabeled_includes_labeled=includes)
    update = train(Made(made=(phase,)), mixed_client(), config)
    assert update.pseudo is not None
    rows = update.pseudo_index
    assert torch.equal(update.pseudo.label, rows)  # each belief stands beside its own sample
    assert torch.equal(update.pseudo.confidence, rows / 30)
    counts = torch.bincount(rows, minlength=30).tolist()
    each = {row: 0 if row in CERTAIN else 2 for row in range(30)}
    assert counts == list(each.values())
    assert update.parts["model"].weight == 2 * (25 + (30 if includes else 5))


def test_a_client_whose_labels_are_all_certain_has_no_pseudo_labels() -> None:
    data, _ = client(n=10)
    phase = Phase("train", believing, draw=BY_KNOWLEDGE)
    update = train(Made(made=(phase,)), data)
    assert len(update.pseudo_index) == 0
    assert update.pseudo is None or len(update.pseudo.label) == 0


def test_how_often_one_sample_is_drawn() -> None:
    """Seven draws of three labelled samples take one of them three times, four of four others each once."""
    none, few = torch.zeros(0, dtype=torch.int64), torch.arange(3)
    streams = (few.repeat(3)[:7].split([4, 3]), torch.arange(3, 7).split([2, 2]))
    steps = tuple(StepPlan(a, b, none, 1.0, None, none, none.bool()) for a, b in zip(*streams, strict=True))
    assert Plan(steps, (3, 4, 0)).most_drawn == 3 + 1
    bags = Units(torch.tensor([[0, 1], [2, -1]]), torch.zeros(2, 3, dtype=torch.int64))
    of_bags = tuple(step._replace(units=bags, unlabeled=none) for step in steps)
    assert Plan(of_bags, (2, 0, 0)).most_drawn == 2
