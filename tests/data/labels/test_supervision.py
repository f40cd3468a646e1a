"""Supervision: the record, how many labels each rule gives, and that hidden labels stay hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.data.labels.imprecision import LabelSources
from fedlabel.data.labels.label_amounts import kind_of_samples, labeled_clients
from fedlabel.data.labels.supervision import KIND_NAMES, Supervision, build_supervision, reveal_labels
from fedlabel.data.labels.supervision_config import LabelKind, SupervisionConfig
from fedlabel.data.partition import PartitionConfig, partition
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import load_dataset

SEEDS = (0, 1, 2)
NUM_CLASSES = 10


def labeled_mask(*arguments: Any) -> np.ndarray:
    """(n,) bool, whether something is known of a sample."""
    return kind_of_samples(*arguments) >= 0


def make(seed: int = 0, n: int = 3000, num_clients: int = 12) -> tuple[np.ndarray, list[np.ndarray]]:
    labels = np.random.default_rng(seed).integers(0, NUM_CLASSES, n)
    return labels, partition(labels, num_clients, NUM_CLASSES, PartitionConfig(dirichlet_alpha=0.3), seed)


# ------------------------------------------------------------------------------------------------------------- record


def test_record_reads_labels_from_candidates() -> None:
    record = Supervision.certain(torch.tensor([[0, 1, 0], [1, 1, 1], [1, 0, 1], [0, 0, 1]]).bool())
    assert record.labeled.tolist() == [True, False, False, True]
    assert record.label.tolist() == [1, -1, -1, 2]
    assert record.label.dtype == torch.int64


def test_empty_record() -> None:
    record = Supervision.certain(torch.ones(0, 3, dtype=torch.bool))
    assert record.labeled.shape == record.label.shape == (0,)


@pytest.mark.parametrize("candidates", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool)])
def test_record_must_be_a_boolean_matrix(candidates: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`candidates` \(torch.* of shape .*\) must be bool of shape \(n, classes\)"):
        Supervision.certain(candidates)


def test_record_names_the_first_impossible_sample() -> None:
    candidates = torch.ones(5, 3, dtype=torch.bool)
    candidates[[2, 4]] = False
    with pytest.raises(ValueError, match="`candidates` of sample 2 are all False"):
        Supervision.certain(candidates)


def record(
    candidates: list[list[int]], noisy: list[int] | None = None, annotations: list[list[int]] | None = None
) -> Supervision:
    n = len(candidates)
    return Supervision.without_bags(
        torch.tensor(candidates).bool(),
        torch.tensor(noisy or [0] * n).bool(),
        torch.tensor(annotations or [[]] * n, dtype=torch.int64),
    )


EVERY_KIND = record(
    [[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]],
    [0, 0, 0, 1, 1, 0, 0, 0, 1, 1],
    [[-1, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1], [2, -1], [-1, 0], [1, 1], [-1, -1], [0, -1]],
)
"""Nothing, a label, a set, a noisy label, a noisy set, annotators; a set and annotators, a label and annotators; a
noisy set of all classes, which says nothing; a noisy label and annotators."""


def test_kinds_of_record() -> None:
    names = [KIND_NAMES[place] for place in EVERY_KIND.kind.tolist()]
    assert names == [
        "nothing",
        "label",
        "candidates",
        "noisy label",
        "noisy candidates",
        "annotators",
        "candidates and labels",
        "candidates and labels",
        "nothing",
        "candidates and labels",
    ]
    assert EVERY_KIND.has_supervision.tolist() == [name != "nothing" for name in names]
    assert EVERY_KIND.labeled.tolist() == [False, True, False, True, False, False, False, True, False, True]
    assert EVERY_KIND.label.tolist() == [-1, 1, -1, 2, -1, -1, -1, 0, -1, 0]


def test_rows_of_a_record() -> None:
    index = torch.tensor([6, 3, 3])
    for rows in (EVERY_KIND.rows(index), EVERY_KIND.to(torch.device("cpu")).rows(index)):
        assert rows.candidates.tolist() == [[False, True, True], [False, False, True], [False, False, True]]
        assert rows.noisy.tolist() == [False, True, True]
        assert rows.annotations.tolist() == [[-1, 0], [-1, -1], [-1, -1]]
    assert EVERY_KIND.rows(EVERY_KIND.noisy).label.tolist() == [2, -1, -1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noisy": torch.zeros(3)}, r"`noisy` \(torch.float32 of shape \(3,\)\) must be bool of shape \(3,\)"),
        ({"noisy": torch.zeros(2).bool()}, r"`noisy` \(torch.bool of shape \(2,\)\) must be bool of shape \(3,\)"),
        ({"noisy": torch.zeros(3, 1).bool()}, r"`noisy` \(torch.bool of shape \(3, 1\)\)"),
        (
            {"annotations": torch.zeros(3, 1)},
            r"`annotations` \(torch.float32 of shape \(3, 1\)\) must be int64 of shape",
        ),
        ({"annotations": torch.zeros(3).long()}, r"`annotations` \(torch.int64 of shape \(3,\)\) .*\(3, annotators\)"),
        ({"annotations": torch.zeros(2, 1).long()}, r"`annotations` \(torch.int64 of shape \(2, 1\)\)"),
        (
            {"annotations": torch.tensor([[0, 1], [1, 3], [-2, 0]])},
            r"The label of sample 1 by annotator 1 \(=3\) must lie in \[0, 2\], or be -1 for none",
        ),
        ({"annotations": torch.tensor([[0], [-1], [-2]])}, r"sample 2 by annotator 0 \(=-2\) must lie in \[0, 2\]"),
        ({"candidates": torch.zeros(3, 3)}, r"`candidates` \(torch.float32 of shape \(3, 3\)\) must be bool"),
        ({"candidates": torch.eye(3).bool() & False}, r"`candidates` of sample 0 are all False: no class is possible"),
    ],
)
def test_a_malformed_record_is_named(changes: dict[str, torch.Tensor], message: str) -> None:
    good = vars(Supervision.certain(torch.ones(3, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match=message):
        Supervision(**{**good, **changes})


# ---------------------------------------------------------------------------------------------------- build_supervision


def alike() -> LabelSources:
    """Nothing is asked of it by uniform candidates and symmetric noise."""
    return LabelSources(None, Path(), 0, np.arange(0))  # type: ignore[arg-type]


def given(*parts: LabelKind, kinds: np.ndarray | None = None, seed: int = 0) -> tuple[np.ndarray, Supervision]:
    labels = np.random.default_rng(3).integers(0, NUM_CLASSES, 4000)
    kinds = np.arange(4000) % len(parts) if kinds is None else kinds
    return labels, build_supervision(labels, kinds, parts, NUM_CLASSES, alike(), seed)


PARTIAL = LabelKind(kind="partial", partial_ratio=0.3, label_rate=None)
NOISY_SETS = LabelKind(kind="partial", partial_ratio=0.3, noise_rate=0.2, label_rate=None)
NOISY = LabelKind(kind="noisy", noise_rate=0.4, label_rate=None)
BOTH = LabelKind(kind="partial_and_noisy", partial_ratio=0.3, noise_rate=0.4, label_rate=None)


def test_every_kind_of_label_is_imparted_to_its_own_samples() -> None:
    parts = (LabelKind(), PARTIAL, NOISY, NOISY_SETS, BOTH)
    kinds = np.arange(4000) % 6 - 1  # a sixth knows nothing
    labels, record = given(*parts, kinds=kinds)
    truth = torch.from_numpy(labels)
    holds = record.candidates.gather(1, truth[:, None])[:, 0]
    places = [torch.from_numpy(kinds == place) for place in range(-1, 5)]
    nothing, label, sets, noisy, noisy_sets, both = (record.rows(place) for place in places)
    assert not nothing.has_supervision.any()
    assert torch.equal(label.label, truth[places[1]])
    assert holds[places[2]].all()
    assert not sets.noisy.any()
    assert abs(sets.candidates.sum(1).double().mean() - 3.7) < 0.25  # 666 sets: standard deviation of the mean .053
    assert noisy.noisy.all()
    assert noisy.labeled.all()
    wrong = (noisy.label != truth[places[3]]).sum()
    assert abs(int(wrong) - 0.4 * 0.9 * len(noisy.noisy)) < 4 * (0.4 * 0.09 * len(noisy.noisy)) ** 0.5
    assert noisy_sets.noisy.all()
    assert abs(float(holds[places[4]].double().mean()) - 0.8) < 4 * (0.16 / 666) ** 0.5
    assert holds[places[5]].all()
    assert not both.noisy.any()
    assert (both.annotations >= 0).all()
    wrong = (both.annotations[:, 0] != truth[places[5]]).sum()
    assert abs(int(wrong) - 0.4 * 0.9 * len(both.noisy)) < 4 * (0.4 * 0.09 * len(both.noisy)) ** 0.5
    assert record.annotations.shape == (4000, 1)
    assert (record.annotations[~places[5]] == -1).all()


@pytest.mark.parametrize("part", [PARTIAL, NOISY, NOISY_SETS, BOTH])
def test_what_is_imparted_is_drawn_from_the_seed_and_from_the_place_in_the_mix(part: LabelKind) -> None:
    def bits(record: Supervision) -> list[object]:
        return [record.candidates.tolist(), record.annotations.tolist()]

    one, again, other = (given(part, seed=seed)[1] for seed in (1, 1, 2))
    assert bits(one) == bits(again)
    assert bits(one) != bits(other)
    halves = given(part, part, kinds=np.zeros(4000, np.int64))[1], given(part, part, kinds=np.ones(4000, np.int64))[1]
    assert bits(halves[0]) != bits(halves[1])


@pytest.mark.parametrize("part", [LabelKind(), PARTIAL, NOISY, NOISY_SETS, BOTH])
def test_imparting_looks_at_no_label_of_which_nothing_is_to_be_known(part: LabelKind) -> None:
    labels = np.random.default_rng(3).integers(0, NUM_CLASSES, 1000)
    kinds = np.where(np.arange(1000) % 3 == 0, 0, -1)
    clear, blind = (
        build_supervision(shown, kinds, [part], NUM_CLASSES, alike(), 0)
        for shown in (labels, np.where(kinds == 0, labels, -1))
    )
    for name in ("candidates", "noisy", "annotations"):
        assert torch.equal(getattr(clear, name), getattr(blind, name)), name
    labels[33] = 10
    with pytest.raises(ValueError, match=r"the label of sample 33 \(=10\) must lie in \[0, 9\]"):
        build_supervision(labels, kinds, [part], NUM_CLASSES, alike(), 0)


def test_annotators_of_two_parts_stand_side_by_side(tmp_path: Path) -> None:
    """One part has three annotators, the other a set and one noisy label, of a fourth; nobody is two people."""
    dataset = load_dataset(DataConfig(), 0)
    n, whole = len(dataset.train.labels), len(dataset.train.labels) + len(dataset.validation.labels)
    np.savez(tmp_path / "a.npz", a=np.zeros(whole, int), b=np.ones(whole, int), c=np.full(whole, 2))
    crowd = LabelKind(kind="noisy", noise="file", labels_file="a.npz", labels_keys=("a", "b", "c"), label_rate=None)
    kinds = np.arange(n) % 2
    like = LabelSources(dataset, tmp_path, 0, np.arange(n))
    record = build_supervision(dataset.train.labels.numpy(), kinds, [crowd, BOTH], NUM_CLASSES, like, 0)
    assert (record.annotations[::2] == torch.tensor([0, 1, 2, -1])).all()
    assert (record.annotations[1::2, :3] == -1).all()
    assert (record.annotations[1::2, 3] >= 0).all()
    assert record.candidates[::2].all()


# ------------------------------------------------------------------------------------------------------------ amounts


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("stratified", [False, True])
def test_label_rate_is_exact_on_every_client(rate: float, stratified: bool, seed: int) -> None:
    labels, parts = make(seed)
    mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(label_rate=rate, stratified=stratified), seed)
    assert [int(mask[part].sum()) for part in parts] == [int(rate * len(part)) for part in parts]


@pytest.mark.parametrize("seed", SEEDS)
def test_stratified_keeps_the_clients_class_shares(seed: int) -> None:
    labels, parts = make(seed)

    def worst_gap(stratified: bool) -> float:
        mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(label_rate=0.2, stratified=stratified), seed)
        gaps = []
        for part in parts:
            quota = np.bincount(labels[part], minlength=NUM_CLASSES) * int(0.2 * len(part)) / len(part)
            got = np.bincount(labels[part[mask[part]]], minlength=NUM_CLASSES)
            gaps.append(np.abs(got - quota).max())
        return float(max(gaps))

    assert worst_gap(stratified=True) < 1
    assert worst_gap(stratified=False) > 2


def test_stratified_ties_are_broken_at_random() -> None:
    """One label for ten equally large classes: over seeds every class must get it now and then."""
    labels = np.arange(100) % NUM_CLASSES
    config = SupervisionConfig(labels_total=1, stratified=True)
    got = {int(labels[labeled_mask(labels, [np.arange(100)], NUM_CLASSES, config, seed)][0]) for seed in range(200)}
    assert got == set(range(NUM_CLASSES))


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_per_class(seed: int) -> None:
    labels, parts = make(seed)
    mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(labels_per_class=7), seed)
    assert np.bincount(labels[mask]).tolist() == [7] * NUM_CLASSES


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stratified", [False, True])
def test_labels_per_client(stratified: bool, seed: int) -> None:
    labels, parts = make(seed)
    mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(labels_per_client=9, stratified=stratified), seed)
    assert [int(mask[part].sum()) for part in parts] == [9] * len(parts)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_total(seed: int) -> None:
    labels, parts = make(seed)
    uniform = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(labels_total=100), seed)
    assert uniform.sum() == 100
    stratified = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(labels_total=100, stratified=True), seed)
    quota = np.bincount(labels) / len(labels) * 100
    assert stratified.sum() == 100
    assert np.abs(np.bincount(labels[stratified], minlength=NUM_CLASSES) - quota).max() < 1


def test_full_reveals_everything() -> None:
    labels, parts = make()
    mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(kind="full"), 0)
    assert mask.all()
    assert reveal_labels(labels, mask, NUM_CLASSES).label.tolist() == labels.tolist()


def test_every_sample_can_be_chosen() -> None:
    labels, parts = np.arange(20) % 2, [np.arange(10), np.arange(10, 20)]
    chosen = [labeled_mask(labels, parts, 2, SupervisionConfig(label_rate=0.2), seed) for seed in range(200)]
    # 200 draws at 0.2: 40 expected, standard deviation 5.7.
    assert np.abs(np.sum(chosen, axis=0) - 40).max() < 4 * 5.7


# -------------------------------------------------------------------------------------------------- who has the labels


@pytest.mark.parametrize("seed", SEEDS)
def test_some_clients_have_all_their_labels_and_the_others_none(seed: int) -> None:
    labels, parts = make(seed)
    for config in (
        SupervisionConfig(labels_at="some_clients", labeled_clients=3, label_rate=None),
        SupervisionConfig(labels_at="some_clients", labeled_clients=3, kind="full"),
    ):
        mask = labeled_mask(labels, parts, NUM_CLASSES, config, seed)
        known = labeled_clients(len(parts), config, seed)
        assert len(known) == 3
        assert [mask[part].mean() for part in parts] == [float(client in known) for client in range(len(parts))]


def test_which_clients_have_labels_is_drawn_from_the_seed() -> None:
    """Over 60 seeds each of 5 clients is one of the 2: 24 times expected, standard deviation 3.8."""
    config = SupervisionConfig(labels_at="some_clients", labeled_clients=2, label_rate=None)
    drawn = [tuple(labeled_clients(5, config, seed)) for seed in range(60)]
    assert drawn == [tuple(labeled_clients(5, config, seed)) for seed in range(60)]
    assert all(first < second for first, second in drawn)
    assert np.abs(np.bincount(np.ravel(drawn), minlength=5) - 24).max() < 4 * 3.8


@pytest.mark.parametrize(
    ("amount", "total"),
    [({"labels_per_client": 9}, 27), ({"labels_total": 50}, 50), ({"labels_per_class": 2}, 2 * NUM_CLASSES)],
)
def test_an_amount_is_meant_of_the_clients_with_labels(amount: dict, total: int) -> None:
    labels, parts = make()
    config = SupervisionConfig(labels_at="some_clients", labeled_clients=3, **amount)
    mask = labeled_mask(labels, parts, NUM_CLASSES, config, 0)
    known = labeled_clients(len(parts), config, 0)
    assert mask.sum() == sum(mask[parts[client]].sum() for client in known) == total


def test_a_rate_is_of_each_client_with_labels() -> None:
    labels, parts = make()
    config = SupervisionConfig(labels_at="some_clients", labeled_clients=3, label_rate=0.25)
    mask, known = labeled_mask(labels, parts, NUM_CLASSES, config, 0), labeled_clients(len(parts), config, 0)
    expected = [int(0.25 * len(part)) if client in known else 0 for client, part in enumerate(parts)]
    assert [int(mask[part].sum()) for part in parts] == expected


CHOICES = [
    SupervisionConfig(),
    SupervisionConfig(labels_at="some_clients", labeled_clients=3, label_rate=None),
    SupervisionConfig(labels_at="some_clients", labeled_clients=3, labels_total=20),
    SupervisionConfig(stratified=True),
    SupervisionConfig(labels_per_class=5),
    SupervisionConfig(labels_per_client=5),
    SupervisionConfig(labels_total=50),
]


@pytest.mark.parametrize("config", CHOICES)
def test_same_seed_same_labels(config: SupervisionConfig) -> None:
    labels, parts = make()
    one, again, other = (labeled_mask(labels, parts, NUM_CLASSES, config, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_clients_labels_do_not_depend_on_the_other_clients() -> None:
    labels, parts = make()
    everyone = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(), 0)
    alone = labeled_mask(labels, [parts[0], parts[1][:5], parts[2]], NUM_CLASSES, SupervisionConfig(), 0)
    for client in (0, 2):
        assert np.array_equal(everyone[parts[client]], alone[parts[client]])


# ------------------------------------------------------------------------------------------------------------- hiding


@pytest.mark.parametrize("config", CHOICES)
def test_hidden_labels_are_not_looked_at(config: SupervisionConfig) -> None:
    labels, parts = make()
    mask = labeled_mask(labels, parts, NUM_CLASSES, config, 0)
    poisoned = np.where(mask, labels, -1)
    clean, blind = reveal_labels(labels, mask, NUM_CLASSES), reveal_labels(poisoned, mask, NUM_CLASSES)
    assert torch.equal(clean.candidates, blind.candidates)
    assert clean.candidates[torch.from_numpy(~mask)].all()
    assert np.array_equal(clean.labeled.numpy(), mask)
    assert np.array_equal(clean.label.numpy(), poisoned)


def test_supervise_takes_tensors_too() -> None:
    record = reveal_labels(torch.tensor([1, -1, 0]), torch.tensor([True, False, True]), 3)
    assert record.label.tolist() == [1, -1, 0]


@pytest.mark.parametrize("label", [-1, 3])
def test_supervise_names_a_label_out_of_range(label: int) -> None:
    with pytest.raises(ValueError, match=rf"the label of sample 2 \(={label}\) must lie in \[0, 2\]"):
        reveal_labels(np.array([0, -1, label]), np.array([True, False, True]), 3)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SupervisionConfig(labels_per_class=11),
            r"`supervision.labels_per_class` \(=11\) .*class 1 has 10\. Take .*=10",
        ),
        (SupervisionConfig(labels_per_client=6), r"`supervision.labels_per_client` \(=6\) .*client 1 has 5\."),
        (SupervisionConfig(labels_total=31), r"`supervision.labels_total` \(=31\) .*the training set has 30\."),
        (
            SupervisionConfig(labels_at="some_clients", labeled_clients=1, labels_total=28),
            r"`supervision.labels_total` \(=28\) .*the clients with labels have (25|5)\.",
        ),
    ],
)
def test_more_labels_than_samples(config: SupervisionConfig, message: str) -> None:
    labels = np.array([0] * 20 + [1] * 10)
    with pytest.raises(ValueError, match=message):
        labeled_mask(labels, [np.arange(25), np.arange(25, 30)], 2, config, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "nosy"}, r"`supervision.kind` \(=nosy\) must be one of few_labels, full, partial, noisy, "),
        ({"label_rate": 1.5}, r"`supervision.label_rate` \(=1.5\) must lie in \[0, 1\]"),
        ({"label_rate": float("nan")}, r"`supervision.label_rate` \(=nan\)"),
        ({"label_rate": None}, r"`supervision.label_rate` \(=None\) .*supervision.labels_per_class"),
        ({"labels_total": 0}, r"`supervision.labels_total` \(=0\) must be at least 1"),
        (
            {"labels_total": 10, "labels_per_class": 3},
            r"`supervision.labels_per_class` \(=3\) and `supervision.labels_total` \(=10\) exclude each other",
        ),
        ({"labels_at": "sever"}, r"`supervision.labels_at` \(=sever\) must be one of clients, server, some_clients\."),
        ({"labels_at": "some_clients"}, r"`supervision.labeled_clients` \(=None\) must be at least 1 .*say how many"),
        (
            {"labels_at": "some_clients", "labeled_clients": 0},
            r"`supervision.labeled_clients` \(=0\) must be at least 1",
        ),
        ({"labeled_clients": 3}, r"`supervision.labeled_clients` \(=3\) cannot be combined with .*labels_at=clients"),
        (
            {"labels_at": "server", "labels_per_client": 3},
            r"`supervision.labels_per_client` \(=3\) cannot be combined .*take labels_per_class or labels_total",
        ),
        (
            {"kind": "full", "labels_total": 10},
            r"`supervision.labels_total` \(=10\) cannot be combined with .*kind=full",
        ),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**changes)


def test_a_count_replaces_the_rate() -> None:
    labels, parts = make()
    for rate in (None, 0.9):
        mask = labeled_mask(labels, parts, NUM_CLASSES, SupervisionConfig(label_rate=rate, labels_total=5), 0)
        assert mask.sum() == 5
