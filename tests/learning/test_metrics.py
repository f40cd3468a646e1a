"""Metrics from counts, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlabel.learning.metrics import (
    CALIBRATION_BINS,
    add_counts,
    area_under_curve,
    bins_of,
    calibration_bins,
    calibration_error,
    jain_index,
    pseudo_label_counts,
    pseudo_label_metrics,
    tenths,
    worst_share_mean,
)
from fedlabel.methods.batch import PseudoLabels

CONFIDENCE = torch.tensor([0.91, 0.92, 0.98, 1.0, 0.42])
TRUTH = torch.tensor([0, 1, 1, 2, 0])
LABEL = torch.tensor([0, 1, 1, 0, 2])
"""Right, right, right, wrong, wrong."""
KIND = torch.tensor([0, 0, 2, 3, 0])
"""Candidates were known of the third, a noisy label of the fourth."""


def pseudo_labels(keep: list[bool], label: torch.Tensor = LABEL) -> PseudoLabels:
    """The five samples above; the second and the last come from the global model."""
    return PseudoLabels(label, torch.tensor(keep), torch.tensor([False, True, False, False, True]), CONFIDENCE)


def test_calibration_bins() -> None:
    """0.91 and 0.92 fall into bin 13 (0.867 to 0.933), 0.98 and 1 into the last, 0.42 into bin 6 (0.4 to 0.467)."""
    bins = calibration_bins(CONFIDENCE, LABEL == TRUTH)
    assert bins.shape == (3, CALIBRATION_BINS) == (3, 15)
    assert {place: bins[:, place].round(6).tolist() for place in np.flatnonzero(bins[0]).tolist()} == {
        6: [1, 0.42, 0],
        13: [2, 1.83, 2],
        14: [2, 1.98, 1],
    }


def test_calibration_error() -> None:
    """|0 - 0.42| + |2 - 1.83| + |1 - 1.98| = 1.57, over five samples 0.314."""
    assert calibration_error(calibration_bins(CONFIDENCE, LABEL == TRUTH)) == pytest.approx(0.314)
    assert calibration_error(calibration_bins(torch.ones(3), torch.ones(3, dtype=torch.bool))) == 0
    assert calibration_error(calibration_bins(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == 1
    assert math.isnan(calibration_error(calibration_bins(torch.ones(0), torch.ones(0, dtype=torch.bool))))


def test_area_under_curve() -> None:
    """Scores of class 1: 3, 1, of class 0: 2, 1, 0. Of the six pairs class 1 wins (3: 3) + (1: 1 and a tie): 4.5."""
    scores, labels = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0]), torch.tensor([1, 0, 1, 0, 0])
    assert area_under_curve(scores, labels) == pytest.approx(4.5 / 6)
    assert area_under_curve(-scores, labels) == pytest.approx(1.5 / 6)
    for undefined in (torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)):
        assert math.isnan(area_under_curve(scores, undefined))
    assert math.isnan(area_under_curve(scores.log(), labels))  # -inf
    assert math.isnan(area_under_curve(torch.ones(0), torch.ones(0, dtype=torch.int64)))


def test_tenths_are_means_of_the_lowest_and_the_highest_tenth_of_what_is_known() -> None:
    values = np.array([*np.arange(20.0), np.nan])
    assert tenths(values) == (0.5, 18.5)
    assert tenths(np.array([3.0, np.nan])) == (3, 3)
    assert np.isnan(tenths(np.array([np.nan]))).all()


def test_pseudo_label_metrics() -> None:
    """All but the third are kept: 2 right, 2 wrong. The local expert has 1 of 2 right, the global one 1 of 2.

    Calibration of the kept: bin 6 |0 - 0.42|, bin 13 |2 - 1.83|, bin 14 |0 - 1|, in all 1.59 over four.
    """
    counts = pseudo_label_counts(pseudo_labels([True, True, False, True, True]), TRUTH, 3, KIND)
    assert (counts["drawn"], counts["kept"], counts["correct"]) == ([2, 2, 1], [2, 1, 1], [1, 1, 0])
    both = np.reshape(counts["kept_by_both"], (3, 2)), np.reshape(counts["correct_by_both"], (3, 2))
    assert [(each.sum(1).tolist(), each.sum(0).tolist()) for each in both] == [([2, 1, 1], [2, 2]), ([1, 1, 0], [1, 1])]
    assert counts["confidence_by_expert"] == pytest.approx([1.91, 1.34])
    assert pseudo_label_metrics(counts) == pytest.approx(
        {
            "pseudo/confidence_local": 1.91 / 2,
            "pseudo/confidence_global": 1.34 / 2,
            "pseudo/accuracy": 0.5,
            "pseudo/accuracy_local": 0.5,
            "pseudo/accuracy_global": 0.5,
            "pseudo/coverage_local": 2 / 3,
            "pseudo/coverage_global": 1.0,
            "pseudo/correct_wrong_ratio": 1.0,
            "pseudo/ece": 0.314,
            "pseudo/ece_kept": 1.59 / 4,
            "posterior/accuracy_nothing": 2 / 3,
            "posterior/accuracy_candidates": 1.0,
            "posterior/accuracy_noisy_label": 0.0,
        }
    )


def test_counts_of_clients_add_up_to_those_of_their_union() -> None:
    """Two and three samples on two clients count as all five on one."""
    whole = pseudo_labels([True, True, False, True, True])
    parts = [
        pseudo_label_counts(PseudoLabels(*(values[rows] for values in whole)), TRUTH[rows], 3, KIND[rows])
        for rows in (slice(0, 2), slice(2, 5))
    ]
    together = pseudo_label_metrics(add_counts(parts))
    assert together == pytest.approx(pseudo_label_metrics(pseudo_label_counts(whole, TRUTH, 3, KIND)))
    assert together["pseudo/ece"] == pytest.approx(0.314)


def test_what_has_no_sample_is_left_out() -> None:
    """Nothing kept: no accuracy, no ratio. Nothing wrong: no ratio. No truth: nothing at all."""
    none = pseudo_label_metrics(pseudo_label_counts(pseudo_labels([False] * 5), TRUTH, 3, KIND))
    assert {name for name in none if name.startswith("pseudo/")} == {
        "pseudo/coverage_local",
        "pseudo/coverage_global",
        "pseudo/ece",
    }
    right = pseudo_label_metrics(pseudo_label_counts(pseudo_labels([True] * 5, label=TRUTH), TRUTH, 3, KIND))
    assert right["pseudo/accuracy"] == 1
    assert "pseudo/correct_wrong_ratio" not in right
    assert pseudo_label_counts(pseudo_labels([True] * 5), torch.full((5,), -1), 3, KIND) == {}
    assert pseudo_label_metrics({}) == {}


def test_unknown_truth_does_not_count() -> None:
    """Only the third sample's truth is known, with confidence 0.98: error 0.02."""
    truth = torch.tensor([-1, -1, 1, -1, -1])
    counts = pseudo_label_counts(pseudo_labels([True] * 5), truth, 3, KIND)
    assert bins_of(counts).sum(1) == pytest.approx([1, 0.98, 1])
    assert pseudo_label_metrics(counts)["pseudo/ece_kept"] == pytest.approx(0.02)


def test_fairness_over_clients() -> None:
    """Jain: (1 + 0)^2 / (2 * 1) = 1/2. The worst tenth of 11 clients are the two lowest of 0, 0.1, ..., 1."""
    assert jain_index(np.array([1.0, 0.0])) == 0.5
    assert jain_index(np.zeros(3)) == 1
    assert worst_share_mean(np.linspace(1, 0, 11)) == pytest.approx(0.05)


def test_beliefs_of_two_classes_are_counted_by_the_probability_of_class_one() -> None:
    """p(1) = .9, 1 - .9 = .1, 1 and 1 - .975 = .025: parts 18, 2, 19 (1 belongs to the last) and 0 of 20."""
    confidence = torch.tensor([0.905, 0.895, 1.0, 0.975])
    pseudo = PseudoLabels(torch.tensor([1, 0, 1, 0]), *[torch.ones(4, dtype=torch.bool)] * 2, confidence)
    counts = pseudo_label_counts(pseudo, torch.tensor([1, 1, 0, 0]), 2, torch.zeros(4, dtype=torch.int64))
    assert {place: n for place, n in enumerate(counts["beliefs"]) if n} == {18: 1, 2: 1, 19: 1, 0: 1}
    three = pseudo_label_counts(pseudo, torch.tensor([1, 1, 0, 0]), 3, torch.zeros(4, dtype=torch.int64))
    assert "beliefs" not in three
