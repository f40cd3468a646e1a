"""Common parts of methods for bags with class counts: batches of whole bags, and a loss per bag."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fedlabel.methods.batch import Batch, LossFunction, Model, Part, Prepared, Step, Survey
from fedlabel.methods.losses import mean_metric
from fedlabel.methods.recipe import ByBag, LabelKinds, Phase, Recipe, Stage

BagLoss = Callable[[Tensor, Batch], Tensor]
"""(logits (n, classes) of the labelled part, batch) -> (bags,) loss of each; anything where its counts are unknown."""


def by_bag(values: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of each bag.

    Args:
        values: (n, ...).
        members: (bags, k) int64, -1 for none.

    Returns:
        (bags, k, ...) with 0 for none; (bags, k) bool, where there is one.
    """
    there = members >= 0
    rows = values[members.clamp_min(0)] if len(values) else values.new_zeros((*members.shape, *values.shape[1:]))
    mask = there.view(*there.shape, *[1] * (values.dim() - 1))
    return torch.where(mask, rows, torch.zeros_like(rows)), there


def bag_sums(values: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums (bags, ...) of the rows of each bag, and (bags,) float, their numbers."""
    rows, there = by_bag(values, members)
    return rows.sum(1), there.sum(1).to(values.dtype)


def bag_means(values: Tensor, members: Tensor) -> Tensor:
    """Returns the mean of the rows of each bag, (bags, ...)."""
    sums, sizes = bag_sums(values, members)
    return sums / sizes.clamp_min(1).view(-1, *[1] * (values.dim() - 1))


def log_bag_means(log_values: Tensor, members: Tensor) -> Tensor:
    """Returns the log of the mean of exp(row) over the rows of each bag, (bags, ...); its gradient never vanishes."""
    rows, there = by_bag(log_values, members)
    mask = there.view(*there.shape, *[1] * (log_values.dim() - 1))
    size = there.sum(1).clamp_min(1).to(log_values.dtype).log()
    return rows.masked_fill(~mask, -math.inf).logsumexp(1) - size.view(-1, *[1] * (log_values.dim() - 1))


def known_bags(part: Part) -> Tensor:
    """Returns (bags,) bool, whether a bag has counts."""
    return part.bag_counts.sum(-1) > 0


def shares(part: Part) -> Tensor:
    """Returns (bags, classes) float, the share of each class in each bag by its counts; 0 without counts."""
    counts = part.bag_counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def bag_step(values: Tensor, logits: Tensor, part: Part) -> Step:
    """Returns the mean loss over the bags with counts, 0 if there are none.

    Args:
        values: (bags,) loss of each.
        logits: (n, classes) of the part's samples, for the metrics.
        part: the bags.
    """
    has_counts = known_bags(part)
    values = torch.where(has_counts, values, torch.zeros_like(values))
    predicted = bag_means(logits.detach().softmax(-1), part.members)
    error = (predicted - shares(part)).abs().sum(-1) / 2  # of two classes: of the share of one
    metrics = {"train/loss": mean_metric(values, has_counts), "bag/share_error": mean_metric(error, has_counts)}
    samples = ((part.members >= 0) & has_counts[:, None]).sum()
    return Step(values.sum() / has_counts.sum().clamp_min(1), metrics, samples)


def of_bags(bag_loss: BagLoss) -> LossFunction:
    """Returns the mean of a loss over the bags of a batch, see `bag_step`."""
    return partial(_of_bags, bag_loss=bag_loss)


def _of_bags(student: Model, teachers: Mapping[str, Model], batch: Batch, bag_loss: BagLoss) -> Step:
    logits = student(batch.labeled.views["weak"])
    return bag_step(bag_loss(logits, batch), logits, batch.labeled)


def bag_recipe(loss: LossFunction, least: int = 1, prepare: Callable[[Survey], Prepared] | None = None) -> Recipe:
    """Returns one phase over whole bags. A labelled sample in no bag is a bag of one; unlabelled samples in no bag are
    not used. Arguments: see `Phase` and `ByBag`.
    """
    train = Phase("train", loss, draw=ByBag(least=least), prepare=prepare)
    return Recipe((Stage((train,)),), uses=LabelKinds.TRUE | LabelKinds.BAGS | LabelKinds.AT_SERVER)
