"""Evaluation of the global model: overall, per class and per client, in one pass over the evaluation split."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labels.bags import Bags
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.datasets import Split
from fedlabel.inference.sums import add_at
from fedlabel.learning.metrics import (
    area_under_curve,
    best_share_mean,
    calibration_bins,
    calibration_error,
    confusion_matrix,
    jain_index,
    ratio,
    worst_share_mean,
)
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Model

BATCH_SIZE = 500


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of the global model on one split."""

    loss: float
    """Mean cross-entropy in nats."""
    confusion: np.ndarray
    """(classes, classes) int64, row = truth, column = prediction."""
    client_accuracy: np.ndarray
    """(clients,) accuracy on each client's share of the split; NaN for a client without a sample in it."""
    calibration: np.ndarray
    """(3, bins), see `calibration_bins`."""
    auc: float = math.nan
    """Area under the ROC curve of class 1 against class 0, where these are all classes; NaN otherwise, or if the split
    has samples of one class only."""
    bag_mae: float = math.nan
    """See `bag_error`; NaN without bags."""
    bag_shares: np.ndarray | None = None
    """See `bag_shares`; None without bags."""

    @property
    def class_accuracy(self) -> np.ndarray:
        """(classes,) recall; NaN for a class without a sample."""
        return ratio(np.diag(self.confusion), self.confusion.sum(1))

    def metrics(self) -> dict[str, float]:
        """Returns the `eval/...` scalars."""
        clients = self.client_accuracy[np.isfinite(self.client_accuracy)]
        return {
            **({"eval/auc": self.auc} if np.isfinite(self.auc) else {}),
            **({"eval/bag_mae": self.bag_mae} if np.isfinite(self.bag_mae) else {}),
            "eval/accuracy": float(np.trace(self.confusion) / self.confusion.sum()),
            "eval/loss": self.loss,
            "eval/balanced_accuracy": float(np.nanmean(self.class_accuracy)),
            **(_of_clients(clients) if len(clients) else {}),  # real nodes need not say theirs
            "eval/ece": calibration_error(self.calibration),
        }


def _of_clients(accuracy: np.ndarray) -> dict[str, float]:
    """Returns what is reported of the clients' accuracies, (n,), n > 0."""
    return {
        "eval/mean_client_accuracy": float(accuracy.mean()),
        "eval/worst_client_accuracy": float(accuracy.min()),
        "eval/worst_10pct_client_accuracy": worst_share_mean(accuracy),
        "eval/best_10pct_client_accuracy": best_share_mean(accuracy),
        "eval/jain_index": jain_index(accuracy),
        "eval/client_accuracy_sd": float(accuracy.std()),
    }


_ANY = Evaluation(0.0, np.eye(2, dtype=np.int64), np.ones(1), np.zeros((3, 1)), auc=0.5, bag_mae=0.0)
EVALUATED = tuple(_ANY.metrics())
"""All that an evaluation may report; eval/auc needs two classes and eval/bag_mae bags."""


class EvaluationSums(NamedTuple):
    """What of an evaluation adds up over nodes that each have samples of their own."""

    confusion: np.ndarray
    """See `Evaluation`."""
    loss: float
    """Sum of the cross-entropies in nats."""
    calibration: np.ndarray
    """See `Evaluation`."""

    @classmethod
    def of(cls, evaluation: Evaluation) -> EvaluationSums:
        """Returns the sums of an evaluation."""
        return cls(evaluation.confusion, evaluation.loss * int(evaluation.confusion.sum()), evaluation.calibration)

    @property
    def samples(self) -> int:
        """How many samples were evaluated."""
        return int(self.confusion.sum())


def add_evaluations(sums: Mapping[int, EvaluationSums], shared: Collection[int], num_clients: int) -> Evaluation | None:
    """Returns the evaluation on the samples of all nodes together; None without any.

    The area under the ROC curve and the error of bags do not add up, and are missing.

    Args:
        sums: client -> of its samples.
        shared: clients whose own accuracy may be shown.
        num_clients: in the federation.
    """
    samples = sum(each.samples for each in sums.values())
    if not samples:
        return None
    accuracy = np.full(num_clients, np.nan)
    for client in set(shared) & sums.keys():
        confusion = sums[client].confusion
        accuracy[client] = ratio(np.trace(confusion), confusion.sum())
    return Evaluation(
        loss=math.fsum(each.loss for each in sums.values()) / samples,
        confusion=np.sum([each.confusion for each in sums.values()], 0),
        client_accuracy=accuracy,
        calibration=np.sum([each.calibration for each in sums.values()], 0),
    )


def bag_error(probabilities: Tensor, bags: Bags) -> float:
    """Returns the mean absolute error of the predicted share of a class in a bag, over bags and classes.

    Needs only the counts of the bags: what may choose a model where no single label is known.

    Args:
        probabilities: (n, classes).
        bags: (n,) the bag of each sample, and (bags, classes) counts.
    """
    sums, counts = _bag_sums(probabilities, bags)
    return float(((sums - counts) / counts.sum(1, keepdim=True)).abs().mean())


def bag_shares(probabilities: Tensor, bags: Bags) -> np.ndarray:
    """Returns the predicted and the counted share of each class in each bag, (2, bags, classes).

    Args:
        probabilities: (n, classes).
        bags: see `bag_error`.
    """
    sums, counts = _bag_sums(probabilities, bags)
    return (torch.stack([sums, counts]) / counts.sum(1, keepdim=True)).cpu().numpy()


def _bag_sums(probabilities: Tensor, bags: Bags) -> tuple[Tensor, Tensor]:
    """Returns the sum of the probabilities over each bag, and its counts, both (bags, classes) in double precision."""
    inside = bags.bag >= 0
    counts = bags.counts.double()
    return add_at(torch.zeros_like(counts), bags.bag[inside], probabilities[inside].double()), counts


def evaluate(
    model: Model,
    split: Split,
    transform: ImageTransform,
    num_classes: int,
    client_parts: Sequence[np.ndarray],
    bags: Bags | None = None,
) -> Evaluation:
    """Evaluates a model.

    Args:
        model: images -> logits, in eval mode.
        split: images (or rows of a table) and labels on the model's device, at least one sample.
        transform: normalises.
        num_classes: number of classes.
        client_parts: rows of the split that each client is judged on.
        bags: of the samples of the split; None: there are none.
    """
    losses: list[Tensor] = []
    predictions: list[Tensor] = []
    confidences: list[Tensor] = []
    margins: list[Tensor] = []
    probabilities: list[Tensor] = []
    with torch.no_grad():
        for images, labels in zip(split.images.split(BATCH_SIZE), split.labels.split(BATCH_SIZE), strict=True):
            logits = model(transform.normalize(images))
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").double())
            predictions.append(logits.argmax(-1))
            probabilities.append(logits.softmax(-1) if bags is not None else logits[:0])
            confidences.append(logits.softmax(-1).amax(-1))
            margins.append((logits[:, -1] - logits[:, 0]).double())  # probabilities near 1 would round to ties
    predicted = torch.cat(predictions)
    correct = (predicted == split.labels).cpu()
    parts = Ragged.of(client_parts)
    return Evaluation(
        loss=float(torch.cat(losses).mean()),
        confusion=confusion_matrix(split.labels, predicted, num_classes).cpu().numpy(),
        client_accuracy=ratio(parts.sums(correct.numpy()[parts.rows]), parts.lengths),
        calibration=calibration_bins(torch.cat(confidences), correct),
        auc=area_under_curve(torch.cat(margins), split.labels) if num_classes == 2 else math.nan,
        bag_mae=math.nan if bags is None else bag_error(torch.cat(probabilities), bags),
        bag_shares=None if bags is None else bag_shares(torch.cat(probabilities), bags),
    )
