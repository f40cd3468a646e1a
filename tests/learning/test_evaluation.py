"""Evaluation of a model whose predictions are known, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.bags import Bags
from fedlabel.data.sets.datasets import Split
from fedlabel.learning.client import ImageTransform
from fedlabel.learning.evaluation import bag_error, bag_shares, evaluate


def test_evaluation_by_hand() -> None:
    """Four images of one pixel, which says the class that the model predicts with probability 3/4.

    Classes 0, 0, 1, 1 are predicted as 0, 1, 1, 1: accuracy 3/4, recall 1/2 and 1. Client 0 has the first two images
    (1/2), client 1 none, client 2 the others (1): mean 3/4, sd 1/4, worst 1/2, Jain (3/2)^2 / (2 * 5/4) = 0.9. All
    confidences are 3/4, as is the accuracy in their bin: the calibration error is 0. The loss is -ln of 3/4 three times
    and of 1/4 once. Of the four pairs of an image of class 0 and one of class 1 two are in order and two tie: AUC 3/4.
    """
    images = torch.tensor([0, 1, 1, 1], dtype=torch.uint8).view(4, 1, 1, 1)
    split = Split(images, torch.tensor([0, 0, 1, 1]))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(), allow_flip=False)

    def model(batch: torch.Tensor) -> torch.Tensor:
        predicted = (batch.view(-1) * 255).round().long()
        return torch.nn.functional.one_hot(predicted, 2) * math.log(3.0)

    evaluation = evaluate(model, split, transform, 2, [np.array([0, 1]), np.array([], dtype=int), np.array([2, 3])])
    np.testing.assert_array_equal(evaluation.client_accuracy, [0.5, math.nan, 1])
    assert evaluation.confusion.tolist() == [[1, 1], [0, 2]]
    assert evaluation.metrics() == pytest.approx(
        {
            "eval/auc": 0.75,
            "eval/accuracy": 0.75,
            "eval/loss": (3 * math.log(4 / 3) + math.log(4)) / 4,
            "eval/balanced_accuracy": 0.75,
            "eval/mean_client_accuracy": 0.75,
            "eval/worst_client_accuracy": 0.5,
            "eval/worst_10pct_client_accuracy": 0.5,
            "eval/best_10pct_client_accuracy": 1.0,
            "eval/jain_index": 0.9,
            "eval/client_accuracy_sd": 0.25,
            "eval/ece": 0.0,
        },
        abs=1e-6,
    )
    sure = evaluate(lambda batch: 100 * model(batch), split, transform, 2, [np.arange(4)])
    assert sure.metrics()["eval/ece"] == pytest.approx(0.25)  # certain, and wrong in one of four


def test_error_of_bags_is_that_of_their_predicted_shares() -> None:
    """Bag 1: p = (.9, .6), both counted; bag 0: (.2, .1, .4), one counted; a sample in none: (.25 + 1/10) / 2."""
    p = torch.tensor([0.9, 0.2, 0.6, 0.1, 0.5, 0.4])
    bags = Bags(torch.tensor([1, 0, 1, 0, -1, 0]), torch.tensor([[2, 1], [0, 2]]))
    assert bag_error(torch.stack([1 - p, p], 1), bags) == pytest.approx((0.5 / 2 + 0.3 / 3) / 2)
    predicted, counted = bag_shares(torch.stack([1 - p, p], 1), bags)
    np.testing.assert_allclose(predicted[:, 1], [0.7 / 3, 0.75])
    np.testing.assert_allclose(counted, [[2 / 3, 1 / 3], [0, 1]])
    perfect = torch.nn.functional.one_hot(torch.tensor([1, 0, 1, 1, 0, 0]), 2).float()
    assert bag_error(perfect, bags) == 0


def test_auc_ranks_where_probabilities_are_all_one_and_is_for_two_classes() -> None:
    """Logits (0, 50), (0, 60), (0, 70): float32 probabilities are all 1, but the sample of class 0 is lowest."""
    split = Split(torch.tensor([50, 60, 70], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 1]))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1 / 255), AugmentConfig(), allow_flip=False)

    def model(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(batch.view(-1, 1), (1, 0))

    assert evaluate(model, split, transform, 2, [np.arange(3)]).metrics()["eval/auc"] == 1
    third = evaluate(lambda batch: torch.nn.functional.pad(model(batch), (0, 1)), split, transform, 3, [np.arange(3)])
    assert "eval/auc" not in third.metrics()
    alone = Split(split.images[1:], split.labels[1:])
    assert "eval/auc" not in evaluate(model, alone, transform, 2, [np.arange(2)]).metrics()
