"""Heads as labelling functions: who gets which classes, against every possible assignment, and votes within a set."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.inference.head_assignment import (
    LARGEST_LOSS,
    assign_classes,
    class_losses,
    classes_in_turn,
    random_classes,
    votes_of,
)


def sets_of(*rows: str) -> Tensor:
    """sets_of("110") is one head that may vote for classes 0 and 1."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


LOSSES = np.array([[0.2, 1.5], [0.9, 0.3], [0.5, 0.6]])
"""Check 7's heads x items; here an item is a class."""


def test_winners_by_hand() -> None:
    """Check 7: of two heads each class's winner is another, .2 + .3; two of three heads: .2 + .5 and .3 + .6."""
    one = assign_classes(LOSSES[:2], 1)
    assert one.tolist() == [[True, False], [False, True]]
    assert LOSSES[:2][one].sum() == pytest.approx(0.5)
    two = assign_classes(LOSSES, 2)
    assert two.tolist() == [[True, False], [False, True], [True, True]]
    assert LOSSES[two].sum() == pytest.approx(1.6)


@pytest.mark.parametrize(("heads", "classes", "rho"), [(3, 3, 2), (4, 3, 2), (2, 4, 1), (5, 2, 3), (3, 4, 3)])
def test_assignment_is_the_best_of_all(heads: int, classes: int, rho: int) -> None:
    """Every 0/1 matrix that keeps the sizes, tried out."""
    most = math.ceil(rho * classes / heads) + 1
    rows = [row for row in itertools.product((0, 1), repeat=classes) if 1 <= sum(row) <= most]
    allowed = [m for m in (np.array(m) for m in itertools.product(rows, repeat=heads)) if (m.sum(0) == rho).all()]
    for seed in range(5):
        losses = np.random.default_rng(seed).exponential(size=(heads, classes))
        losses[0] /= 10  # one head wins everywhere
        found = assign_classes(losses, rho)
        assert any((found == matrix).all() for matrix in allowed)
        assert losses[found].sum() == pytest.approx(min((losses * matrix).sum() for matrix in allowed), abs=1e-9)


@pytest.mark.parametrize(("heads", "classes", "rho"), [(50, 10, 10), (12, 10, 2), (10, 10, 1), (7, 3, 3), (20, 2, 10)])
def test_every_class_has_its_heads_and_no_head_is_empty_or_full(heads: int, classes: int, rho: int) -> None:
    """Also where a head is best at everything and another worst: dead heads are the failure of multiple choice."""
    losses = np.random.default_rng(0).exponential(size=(heads, classes))
    losses[0], losses[-1] = 0, 100
    sets = assign_classes(losses, rho)
    assert (sets.sum(0) == rho).all()
    sizes = sets.sum(1)
    assert sizes.min() >= 1
    assert sizes.max() <= math.ceil(rho * classes / heads) + 1
    assert sizes[0] > sizes[-1] or rho * classes == heads


def test_in_turn_every_head_gets_its_share() -> None:
    """Three heads, two classes, two heads each: 0, 1 of class 0 and then 2, 0 of class 1."""
    assert classes_in_turn(3, 2, 2).tolist() == [[True, True], [True, False], [False, True]]


def test_random_sets_have_the_sizes_and_cover() -> None:
    sets = random_classes(50, 10, 2, 4, seed=3)
    assert set(sets.sum(1)) == {2, 3, 4}
    assert sets.sum(0).min() >= 3
    assert (sets == random_classes(50, 10, 2, 4, seed=3)).all()
    assert (sets != random_classes(50, 10, 2, 4, seed=4)).any()
    with pytest.raises(
        ValueError, match=r"`method.num_functions` \(=4\) .* `method.most_classes` \(=2\) of 10 classes"
    ):
        random_classes(4, 10, 1, 2, seed=0)


def test_class_losses_by_hand() -> None:
    """Two heads, two classes; of the third sample the class is not known."""
    probs = [[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.4, 0.5, 0.1]], [[0.9, 0.05, 0.05]] * 2]
    losses, seen = class_losses(torch.tensor(probs).log(), torch.tensor([1, 1, -1]))
    expected = torch.tensor([[0, -math.log(0.25 * 0.8)], [0, -math.log(0.2 * 0.5)]])
    torch.testing.assert_close(losses, expected)
    assert seen.tolist() == [0, 2]
    impossible, _ = class_losses(torch.tensor([[[-math.inf, 0.0, 0.0]]]), torch.tensor([0]))
    assert impossible.tolist() == [[LARGEST_LOSS, 0.0]]  # no sample counts more


def test_votes_are_in_the_set_or_abstain() -> None:
    """Check 8, on logits that favour whatever is outside."""
    sets = sets_of("110", "001", "111", "100")
    logits = 5 * torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0))
    votes = votes_of(logits, sets)
    for head, row in enumerate(sets):
        own = {-1, *row.nonzero().flatten().tolist()}
        assert set(votes[:, head].tolist()) == own
    assert votes_of(torch.tensor([[[9.0, 0.5, 0.4]]]), sets_of("01")).item() == 1
    assert votes_of(torch.tensor([[[9.0, 0.5, 0.6]]]), sets_of("01")).item() == -1


def test_a_vote_below_the_threshold_is_none() -> None:
    """Of the set {1} and to abstain: .6 / .8 = .75."""
    logits = torch.tensor([[[0.2, 0.6, 0.2]]]).log()
    assert votes_of(logits, sets_of("01"), 0.74).item() == 1
    assert votes_of(logits, sets_of("01"), 0.76).item() == -1
    assert votes_of(logits, sets_of("01"), 0.0).item() == 1
