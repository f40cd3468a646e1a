"""What a simulation compares with hidden labels: pseudo-labels, pairs of a graph, votes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.audit import against_truth, votes_against_truth
from fedlabel.learning.client import ClientUpdate
from fedlabel.learning.metrics import function_counts
from fedlabel.methods.batch import PseudoLabels, Votes

TRUTH = torch.tensor([0, 1, 1, 0, -1])


def update(**fields: Any) -> ClientUpdate:
    nothing = ClientUpdate({}, {}, {}, {}, torch.zeros(0, dtype=torch.int64), None, 0, 0, 0, None, None)
    return replace(nothing, **fields)


def supervision() -> Supervision:
    """Five samples of two classes: a label of the first, nothing of the others."""
    candidates = torch.ones(5, 2, dtype=torch.bool)
    candidates[0, 1] = False
    return Supervision.certain(candidates)


def test_of_a_round_without_guesses_there_is_nothing_to_count() -> None:
    assert against_truth(update(), supervision(), TRUTH) == ({}, {})
    assert votes_against_truth(update(), supervision(), TRUTH) == {}


def test_pseudo_labels_are_held_against_the_truth_of_their_samples() -> None:
    """Draws of samples 3, 1, 1 and 4, of classes 0, 1, 1 and none known: right, wrong, right but dropped, left out."""
    label, keep = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, True])
    pseudo = PseudoLabels(label, keep, torch.tensor([True, False, False, True]), torch.tensor([0.9, 0.8, 0.7, 0.6]))
    sums, counts = against_truth(update(pseudo=pseudo, pseudo_index=torch.tensor([3, 1, 1, 4])), supervision(), TRUTH)
    assert sums == {}
    assert (counts["drawn"], counts["kept"], counts["correct"]) == ([1, 2], [1, 1], [1, 0])
    assert (counts["kept_by_expert"], counts["correct_by_expert"]) == ([1, 1], [0, 1])
    assert counts["drawn_by_kind"][:2] == [3, 0]
    assert counts["correct_by_kind"][0] == 2


def test_the_kind_is_that_of_the_samples_drawn() -> None:
    """Of sample 0 a label, of sample 2 nothing: two draws of the first."""
    ones = torch.ones(3, dtype=torch.bool)
    pseudo = PseudoLabels(torch.tensor([0, 1, 0]), ones, ones, torch.full((3,), 0.5))
    _, counts = against_truth(update(pseudo=pseudo, pseudo_index=torch.tensor([0, 2, 0])), supervision(), TRUTH)
    assert counts["drawn_by_kind"][:2] == [1, 2]


def test_neighbours_of_unknown_class_are_no_pair() -> None:
    """0-3 and 1-2 agree, 0-1 does not, 2-4 is not known."""
    pairs = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 4]])
    assert against_truth(update(pairs=pairs), supervision(), TRUTH) == ({"graph/homophily": [2, 3]}, {})


def test_votes_count_on_samples_without_a_label_that_the_functions_were_given() -> None:
    """Of sample 0 there is a label, sample 2 was given to no function: 1, 3 and 4 are left."""
    cast = torch.tensor([[0, 0], [1, -1], [-2, -2], [-1, -1], [0, 1]])
    sets = torch.ones(2, 2, dtype=torch.bool)
    votes = update(votes=Votes(cast, sets))
    rows = torch.tensor([1, 3, 4])
    expected = function_counts(cast[rows], sets, TRUTH[rows])
    assert votes_against_truth(votes, supervision(), TRUTH) == expected
    assert expected["function_votes"] == [1, 1, 0, 1]
    assert expected["function_samples"][:3] == [3, 2, 2]
    hidden = votes_against_truth(votes, supervision(), torch.full((5,), -1))
    assert hidden["function_votes"] == expected["function_votes"]
    assert hidden["function_samples"] == [3, 2, 0, 0, 0]
