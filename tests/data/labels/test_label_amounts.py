"""Mixes: which samples have which kind of label, over clients and over samples, and how many of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlabel.data.labels.label_amounts import kind_of_samples
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig
from fedlabel.data.partition import PartitionConfig, partition

SEEDS = (0, 1, 2)
CLASSES = 10


def make(seed: int = 0, n: int = 3000, num_clients: int = 20) -> tuple[np.ndarray, list[np.ndarray]]:
    labels = np.random.default_rng(seed).integers(0, CLASSES, n)
    return labels, partition(labels, num_clients, CLASSES, PartitionConfig(dirichlet_alpha=0.3, min_samples=20), seed)


def full(share: float, **keys: Any) -> MixPart:
    """A part of which every sample has its kind of label."""
    return MixPart(**({"kind": "full"} | keys), share=share)


PARTIAL = {"kind": "partial", "partial_ratio": 0.3, "label_rate": None}
NOISY = {"kind": "noisy", "noise_rate": 0.3, "label_rate": None}


def mix(*parts: MixPart, over: str = "clients") -> SupervisionConfig:
    return SupervisionConfig(mix=parts, mix_over=over)


def kinds_of(config: SupervisionConfig, seed: int = 0, hidden: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Per client, the kinds of its samples."""
    labels, parts = make()
    kinds = kind_of_samples(labels, parts, CLASSES, config, seed, hidden)
    assert kinds.dtype == np.int64
    return [kinds[rows] for rows in parts]


THREE = (full(0.25), full(0.3, **PARTIAL), full(0.35, **NOISY))
"""Of 20 clients 5, 6 and 7; 2 are left."""


@pytest.mark.parametrize("seed", SEEDS)
def test_over_clients_each_client_has_one_kind_and_the_shares_are_exact(seed: int) -> None:
    clients = kinds_of(mix(*THREE), seed)
    assert all(len(set(kinds)) == 1 for kinds in clients)
    assert np.bincount([kinds[0] + 1 for kinds in clients]).tolist() == [2, 5, 6, 7]


def test_which_client_has_which_kind_is_drawn_from_the_seed() -> None:
    drawn = [tuple(kinds[0] for kinds in kinds_of(mix(*THREE), seed)) for seed in range(40)]
    assert drawn == [tuple(kinds[0] for kinds in kinds_of(mix(*THREE), seed)) for seed in range(40)]
    assert len(set(drawn)) == 40
    # Each of 20 clients has nothing with probability .1: 4 of 40 expected, standard deviation 1.9.
    assert np.abs((np.array(drawn) == -1).sum(0) - 4).max() <= 4 * 1.9


@pytest.mark.parametrize("seed", SEEDS)
def test_over_samples_each_client_has_all_kinds_by_their_shares(seed: int) -> None:
    """Exact but for the rounding of two borders."""
    clients = kinds_of(mix(*THREE, over="samples"), seed)
    for kinds in clients:
        counts = np.bincount(kinds + 1, minlength=4)
        assert np.abs(counts - np.array([0.1, 0.25, 0.3, 0.35]) * len(kinds)).max() <= 1
    everyone = np.bincount(np.concatenate(clients) + 1) / 3000
    assert np.abs(everyone - [0.1, 0.25, 0.3, 0.35]).max() < 0.005


def test_over_samples_chance_decides_which_sample_has_which_kind() -> None:
    """Over 60 seeds a sample has nothing in 6, standard deviation 2.3; of 3,000 none may be beyond 5 of these."""
    config = mix(*THREE, over="samples")
    drawn = np.array([np.concatenate(kinds_of(config, seed)) for seed in range(60)])
    assert np.abs((drawn == -1).sum(0) - 6).max() < 5 * 2.33
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[1], np.concatenate(kinds_of(config, 1)))


def test_over_samples_clients_of_one_size_differ() -> None:
    """Two of 500: both have nothing at the same place in a hundredth of them, 5 (standard deviation 2.2), not 50."""
    labels, parts = np.zeros(1000, np.int64), [np.arange(500), np.arange(500, 1000)]
    kinds = kind_of_samples(labels, parts, 1, mix(*THREE, over="samples"), 0)
    first, second = (set(np.flatnonzero(kinds[rows] == -1)) for rows in parts)
    assert len(first) == len(second) == 50
    assert len(first & second) < 15


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_shares_of_one_leave_nobody_out(over: str) -> None:
    """In this order .7, .2 and .1 sum to a little less than 1 in floating point."""
    clients = kinds_of(mix(full(0.7), full(0.2), full(0.1), over=over))
    assert min(kinds.min() for kinds in clients) == 0


@pytest.mark.parametrize("over", ["clients", "samples"])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_rate_inside_a_part_is_of_what_each_client_has_of_it(over: str, stratified: bool) -> None:
    rate = 0.4
    everything = kinds_of(mix(full(0.25), full(0.5), over=over))
    config = mix(full(0.25), MixPart(share=0.5, label_rate=rate, stratified=stratified), over=over)
    for kinds, mine in zip(kinds_of(config), everything, strict=True):
        assert (kinds == 0).tolist() == (mine == 0).tolist()
        assert (kinds == 1).sum() == int(rate * (mine == 1).sum())
        assert (mine[kinds == 1] == 1).all()


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_counts_inside_a_part(over: str) -> None:
    labels, parts = make()
    config = mix(
        MixPart(share=0.5, labels_per_class=3),
        MixPart(share=0.25, **{**NOISY, "labels_total": 40}),
        MixPart(share=0.25, **{**PARTIAL, "labels_per_client": 4}),
        over=over,
    )
    kinds = kind_of_samples(labels, parts, CLASSES, config, 0)
    everything = kind_of_samples(labels, parts, CLASSES, mix(full(0.5), full(0.25), full(0.25), over=over), 0)
    known = kinds >= 0
    assert (kinds[known] == everything[known]).all()
    assert np.bincount(labels[kinds == 0], minlength=CLASSES).tolist() == [3] * CLASSES
    assert (kinds == 1).sum() == 40
    per_client = [int((kinds[rows] == 2).sum()) for rows in parts]
    assert per_client == [4 if (everything[rows] == 2).any() else 0 for rows in parts]
    assert (kind_of_samples(labels, parts, CLASSES, config, 0) >= 0).tolist() == known.tolist()


def test_parts_of_the_same_rule_draw_numbers_of_their_own() -> None:
    """Half of one client's 2,000 samples each: with the same numbers both would choose the same places."""
    labels, parts = np.zeros(2000, np.int64), [np.arange(2000)]
    everything = kind_of_samples(labels, parts, 1, mix(full(0.5), full(0.5), over="samples"), 0)
    few = mix(MixPart(share=0.5, label_rate=0.3), MixPart(share=0.5, label_rate=0.3), over="samples")
    kinds = kind_of_samples(labels, parts, 1, few, 0)
    places = [set(np.flatnonzero(kinds[everything == place] == place)) for place in (0, 1)]
    assert [len(chosen) for chosen in places] == [300, 300]
    assert len(places[0] & places[1]) < 150  # 90 expected, standard deviation 6.6


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_classes_that_nobody_labels_stay_out_of_a_mix(over: str) -> None:
    """Amounts are meant of the samples of the other classes."""
    labels, parts = make()
    config = mix(full(0.5, **PARTIAL), MixPart(share=0.5, labels_per_class=2), over=over)
    kinds = kind_of_samples(labels, parts, CLASSES, config, 0, (8, 3))
    assert (kinds[np.isin(labels, (8, 3))] == -1).all()
    assert np.bincount(labels[kinds == 1], minlength=CLASSES).tolist() == [0 if c in (3, 8) else 2 for c in range(10)]
    others = ~np.isin(labels, (8, 3))
    if over == "clients":
        mine = [rows for rows in parts if (kinds[rows] == 0).any()]
        assert len(mine) == 10
        assert all((kinds[rows[others[rows]]] == 0).all() for rows in mine)
    else:
        assert all(abs((kinds[rows] == 0).sum() - others[rows].sum() / 2) <= 0.5 for rows in parts)


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_the_choice_is_the_same_whatever_the_kinds_are_called(over: str) -> None:
    """Which samples: not how their labels are spoilt."""
    one, other = mix(full(0.5), full(0.3), over=over), mix(full(0.5, **NOISY), full(0.3, **PARTIAL), over=over)
    assert np.array_equal(np.concatenate(kinds_of(one)), np.concatenate(kinds_of(other)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"labels_per_class": 11},
            r"`supervision.labels_per_class` \(=11\) asks for more .*: class 0 in part 1 of the mix has 10\. Take",
        ),
        (
            {"labels_total": 21},
            r"`supervision.labels_total` \(=21\) .*: part 1 of the mix has 20\. Take .*labels_total=20 or less",
        ),
        ({"labels_per_client": 21}, r"`supervision.labels_per_client` \(=21\) .*: client \d has 20\."),
    ],
)
def test_more_labels_than_a_part_has(part: dict[str, int], message: str) -> None:
    labels = np.arange(40) % 2
    config = mix(MixPart(share=0.5), MixPart(share=0.5, **part))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        kind_of_samples(labels, [np.arange(20), np.arange(20, 40)], 2, config, 0)


def test_a_part_too_small_for_a_client_is_an_error() -> None:
    """A twentieth of four clients rounds to none of them."""
    labels, parts = np.arange(40) % 2, list(np.arange(40).reshape(4, 10))
    with pytest.raises(ValueError, match=r"`supervision.mix\[0\].share` \(=0.05\) of 4 clients is none of them"):
        kind_of_samples(labels, parts, 2, mix(full(0.05), full(0.95)), 0)
