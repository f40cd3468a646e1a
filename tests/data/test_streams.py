"""Generators side by side, each against numpy's own generator of the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from fedlabel.data import streams
from fedlabel.data.ragged import Ragged
from fedlabel.data.streams import Streams, choose, permute
from fedlabel.seeding import derive_seed, derive_seeds, numpy_generator

NAMES = np.arange(1500) * 7 + 3


def make(largest: int, sizes: int = len(NAMES)) -> Ragged:
    lengths = np.random.default_rng(0).integers(0, largest + 1, sizes)
    return Ragged.of_lengths(np.random.default_rng(1).permutation(lengths.sum()), lengths)


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of streams, although there are few."""
    monkeypatch.setattr(streams, "AT_ONCE", 400)


def test_seeds_are_those_derived_one_by_one() -> None:
    expected = [derive_seed(5, "bags", 2, int(name)) for name in NAMES]
    assert derive_seeds(5, "bags", 2, last=NAMES).tolist() == expected
    assert derive_seeds(5, last=NAMES[:0]).tolist() == []


@pytest.mark.parametrize("most", [1, 2, 5, 9_999, 2**31 + 5, 2**32 - 3])
def test_bounded_integers_are_numpys(most: int) -> None:
    """2**31 + 5: half of what is drawn is rejected; small seeds: half of the seed is zero."""
    seeds = np.concatenate([np.arange(50), derive_seeds(0, last=np.arange(50))]).astype(np.uint64)
    side_by_side, generators = Streams(seeds), [np.random.default_rng(int(seed)) for seed in seeds]
    for _ in range(5):
        drawn = side_by_side.up_to(np.arange(100), np.full(100, most))
        assert drawn.tolist() == [int(rng.integers(most + 1)) for rng in generators]


def test_nothing_is_drawn_where_there_is_no_choice() -> None:
    seeds = np.arange(3, dtype=np.uint64)
    side_by_side = Streams(seeds)
    assert side_by_side.up_to(np.array([0, 2]), np.array([0, 9])).tolist() == [0, np.random.default_rng(2).integers(10)]
    assert side_by_side.up_to(np.array([0]), np.array([9])).tolist() == [np.random.default_rng(0).integers(10)]


def test_choices_are_numpys_as_sets() -> None:
    """Of parts of up to 200 rows, from none to all: some side by side, those of more than 64 one by one."""
    parts = make(200)
    counts = (parts.lengths * np.random.default_rng(2).random(len(parts))).astype(np.int64)
    counts[::5] = parts.lengths[::5]
    counts[1::5] = 0
    assert (counts > streams.MOST_STEPS).any()
    expected = [
        numpy_generator(3, "labels", int(name)).choice(rows, count, replace=False)
        for name, rows, count in zip(NAMES, parts, counts, strict=True)
    ]
    chosen = choose(parts, counts, NAMES, 3, "labels")
    assert np.sort(chosen).tolist() == np.sort(np.concatenate(expected)).tolist()


def test_a_few_of_very_many_are_chosen_as_numpy_chooses_them() -> None:
    """Of more than 10,000, numpy may shuffle instead."""
    parts = Ragged.of([np.arange(20_000), np.arange(20_000, 20_004)])
    for counts in ([60, 2], [1_000, 2]):
        expected = [
            numpy_generator(0, client).choice(parts[client], count, replace=False)
            for client, count in enumerate(counts)
        ]
        chosen = choose(parts, np.array(counts), np.arange(2), 0)
        assert np.sort(chosen).tolist() == np.sort(np.concatenate(expected)).tolist()


def test_permutations_are_numpys() -> None:
    parts = make(90)
    assert (parts.lengths > streams.MOST_STEPS).any()
    before = parts.rows.copy()
    mixed = permute(parts, NAMES, 3, "bags", 0)
    for name, rows, found in zip(NAMES, parts, mixed, strict=True):
        assert found.tolist() == numpy_generator(3, "bags", 0, int(name)).permutation(rows).tolist()
    assert parts.rows.tolist() == before.tolist()
