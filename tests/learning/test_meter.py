"""Sums of metrics and pseudo-labels over a round."""

from __future__ import annotations

import pytest
import torch

from fedlabel.learning.meter import Meter
from fedlabel.methods.batch import PseudoLabels
from fedlabel.metric_tags import LEARNING, Tag, client_tags

OWN = Tag("train/own", "Own", "nats", LEARNING)


def pseudo(*labels: int) -> PseudoLabels:
    label = torch.tensor(labels)
    return PseudoLabels(label, label > 0, label > 1, label / 10)


def test_metrics_are_added_up_in_float64() -> None:
    """1e8 + 1 is not 1e8; in float32 it would be."""
    meter = Meter(client_tags())
    meter.add({"train/loss": torch.tensor([1e8, 1.0]), "pseudo/coverage": torch.tensor([2.0, 4.0])})
    meter.add({"train/loss": torch.tensor([1.0, 3.0])})
    assert meter.sums() == {"train/loss": [1e8 + 1, 4], "pseudo/coverage": [2, 4]}


def test_a_metric_that_nobody_declared_is_refused() -> None:
    pair = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r'metric train/own, which is not declared.* metrics = \(Tag\("train/own", '):
        Meter(client_tags()).add({"train/own": pair})
    meter = Meter(client_tags((OWN,)))
    meter.add({"train/own": pair})
    assert meter.sums()["train/own"] == [1, 2]


def test_only_guesses_are_kept_each_with_its_sample() -> None:
    meter = Meter({})
    meter.add_pseudo(pseudo(1, 2, 0), torch.tensor([7, 3, 9]), torch.tensor([True, False, True]))
    meter.add_pseudo(None, torch.tensor([5]), torch.tensor([True]))
    meter.add_pseudo(pseudo(2), torch.tensor([3]), torch.tensor([True]))
    rows, labels = meter.pseudo_labels()
    assert rows.tolist() == [7, 9, 3]
    assert labels is not None
    for found, expected in zip(labels, pseudo(1, 0, 2), strict=True):
        assert torch.equal(found, expected)


def test_without_pseudo_labels_there_are_no_draws() -> None:
    rows, labels = Meter({}).pseudo_labels()
    assert rows.tolist() == []
    assert rows.dtype == torch.int64
    assert labels is None
