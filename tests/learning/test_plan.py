"""Which samples a step draws."""

from __future__ import annotations

from dataclasses import replace

import torch
from fedlabel.batches import bag_units, draw_batches

from fedlabel.data.labels.supervision import Supervision, supervise
from fedlabel.seeding import torch_generator


def test_batches_are_shuffled_passes_without_a_gap() -> None:
    batches = torch.stack(list(draw_batches(torch.arange(5, 15), 4, 5, torch_generator(0, "x"))))
    flat = batches.flatten()
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(5, 15))
    assert flat[:10].tolist() != list(range(5, 15))
    assert [len(b) for b in draw_batches(torch.arange(3), 4, 2, torch_generator(0, "x"))] == [3, 3]
    assert [len(b) for b in draw_batches(torch.arange(0), 4, 2, torch_generator(0, "x"))] == [0, 0]


def test_units_of_a_client() -> None:
    """Bags of any order and size, then a labelled sample in none and, if asked for, one of which nothing is known."""
    candidates = torch.ones(7, 3, dtype=torch.bool)
    candidates[2] = torch.tensor([False, True, False])
    known = replace(
        Supervision.certain(candidates),
        bag=torch.tensor([1, 0, -1, 1, 1, 0, -1]),
        bag_counts=torch.tensor([[2, 0, 0], [1, 1, 1]]),
    )
    units = bag_units(known, unlabeled=False)
    assert units.rows.tolist() == [[1, 5, -1], [0, 3, 4], [2, -1, -1]]
    assert units.counts.tolist() == [[2, 0, 0], [1, 1, 1], [0, 1, 0]]
    assert units.samples().tolist() == [0, 1, 2, 3, 4, 5]
    assert [units.per_step(size) for size in (1, 2, 4, 6, 8)] == [1, 1, 2, 3, 4]
    units = bag_units(known, unlabeled=True)
    assert units.rows[3].tolist() == [6, -1, -1]
    assert units.counts[3].tolist() == [0, 0, 0]
    none = bag_units(supervise(torch.zeros(2, dtype=torch.int64), torch.tensor([False, False]), 3), unlabeled=False)
    assert len(none.rows) == 0
