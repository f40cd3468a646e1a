"""How much of each kind of label there is."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlabel.data.labels.label_card import LabelCard, label_card
from fedlabel.data.labels.supervision import Supervision


def record() -> Supervision:
    """Of three classes: two labels, a noisy label, a set, a noisy set, nothing, and nothing that is called noisy."""
    candidates = torch.tensor(
        [[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1]], dtype=torch.bool
    )
    noisy = torch.tensor([False, False, True, False, True, False, True])
    annotations = torch.tensor([[-1, -1], [0, -1], [-1, -1], [2, 1], [-1, -1], [-1, 0], [-1, -1]])
    return replace(
        Supervision.without_bags(candidates, noisy, annotations),
        bag=torch.tensor([0, 0, 1, 1, -1, -1, -1]),
        bag_counts=torch.tensor([[1, 0, 1], [1, 1, 0]]),
        votes=torch.tensor([[0, 2], [0, -1], [-1, -1], [-2, -2], [1, 2], [-2, -2], [-2, -2]]),
    )


def test_every_kind_is_counted() -> None:
    """Four samples were given to the functions: one without a vote; the first votes 0, 0, 1, the second 2, 2."""
    card = label_card(record())
    assert card == LabelCard(
        samples=7,
        true=2,
        noisy=1,
        sets=1,
        noisy_sets=1,
        annotated=3,
        annotators=2,
        bags=2,
        asked=4,
        votes=((2, 1, 0), (0, 0, 2)),
    )
    assert card.functions == 2


def test_a_client_without_samples_or_functions_has_an_empty_card() -> None:
    card = label_card(Supervision.certain(torch.ones(0, 3, dtype=torch.bool)))
    assert card == LabelCard(0, 0, 0, 0, 0, 0, 0, 0, 0, ())
    assert card.functions == 0


def test_cards_of_clients_add_up_to_the_federations() -> None:
    """Each bag at one client; the number of annotators alone does not add up."""
    whole, rows = record(), (torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5, 6]))
    cards = [label_card(whole.rows(own)) for own in rows]
    for name in ("samples", "true", "noisy", "sets", "noisy_sets", "annotated", "bags", "asked"):
        assert sum(getattr(card, name) for card in cards) == getattr(label_card(whole), name), name
    summed = torch.tensor(cards[0].votes) + torch.tensor(cards[1].votes)
    assert summed.tolist() == [list(votes) for votes in label_card(whole).votes]
