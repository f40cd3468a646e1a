"""Folds of the clients' labels, and a record without one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlabel.data.labels.folds import fold_of_samples, without_labels
from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.labels.supervision_config import SupervisionConfig
from fedlabel.data.ragged import Ragged
from tests.data.test_federation import build

PARTS = Ragged.of([np.arange(0, 40), np.arange(40, 43), np.arange(43, 43), np.arange(43, 60)])


def test_labels_of_a_client_and_of_each_of_its_classes_are_spread_evenly() -> None:
    label = np.arange(60) % 3
    label[::5] = -1
    fold = fold_of_samples(label, PARTS, 4, seed=0)
    assert ((fold == -1) == (label == -1)).all()
    for rows in PARTS:
        own = fold[rows][label[rows] >= 0]
        assert np.ptp(np.bincount(own, minlength=4)) <= 1
    classes = [np.bincount(fold[:40][label[:40] == each], minlength=4) for each in range(3)]
    assert np.ptp(classes, axis=1).max() <= 1
    assert not (fold == fold_of_samples(label, PARTS, 4, seed=1)).all()


def test_clients_with_few_labels_do_not_all_use_the_same_folds() -> None:
    parts = Ragged.of([np.array([client]) for client in range(8)])
    fold = fold_of_samples(np.zeros(8, dtype=np.int64), parts, 4, seed=0)
    assert np.bincount(fold).tolist() == [2, 2, 2, 2]


def test_who_loses_a_label_has_none_of_any_kind() -> None:
    candidates = torch.tensor([[True, False], [False, True], [True, False]])
    record = Supervision.without_bags(candidates, torch.tensor([True, True, False]), torch.tensor([[0], [1], [-1]]))
    left = without_labels(record, np.array([True, False, False]))
    assert left.has_supervision.tolist() == [False, True, True]
    assert left.candidates.tolist() == [[True, True], [False, True], [True, False]]
    assert left.noisy.tolist() == [False, True, False]
    assert left.annotations.tolist() == [[-1], [1], [-1]]


@pytest.mark.parametrize("keys", [{}, {"kind": "noisy", "noise_rate": 0.4, "label_rate": 0.5}])
def test_each_label_of_a_federation_is_withheld_once(keys: dict[str, object]) -> None:
    whole = build(**keys)
    times = torch.zeros(len(whole.labeled), dtype=torch.int64)
    for number in range(3):
        record = build(folds=3, withheld_fold=number, **keys).record
        kept = record.has_supervision
        times += whole.record.has_supervision & ~kept
        assert torch.equal(record.candidates[kept], whole.record.candidates[kept])
        assert torch.equal(record.noisy[kept], whole.record.noisy[kept])
        assert bool(record.candidates[~kept].all())
        assert not bool(record.noisy[~kept].any())
    assert torch.equal(times > 0, whole.record.has_supervision)
    assert int(times.max()) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folds": 3}, r"`supervision.folds` \(=3\) and `supervision.withheld_fold` \(=None\) belong together"),
        ({"withheld_fold": 0}, r"`supervision.folds` \(=None\) and `supervision.withheld_fold` \(=0\) belong"),
        ({"folds": 1, "withheld_fold": 0}, r"`supervision.folds` \(=1\) must be at least 2"),
        ({"folds": 3, "withheld_fold": 3}, r"`supervision.withheld_fold` \(=3\) must lie in \[0, 2\].*from 0"),
        ({"folds": 3, "withheld_fold": 0, "labels_at": "server"}, r"`supervision.folds` \(=3\).*labels_at=server"),
    ],
)
def test_folds_that_cannot_be(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**keys)  # type: ignore[arg-type]


def test_nothing_is_withheld_from_who_gets_all_labels() -> None:
    with pytest.raises(ValueError, match=r"`supervision.folds` \(=3\) withhold labels, and method.oracle_labels"):
        build(all_labels=True, folds=3, withheld_fold=0)
