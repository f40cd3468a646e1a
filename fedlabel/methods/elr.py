"""ELR: early predictions for a sample, made before wrong labels are memorised, regularise the model later.

Source: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
Labels", NeurIPS 2020 (arXiv 2007.00151), and its released code. Setting: labels at the clients, some of them wrong.

Every sample has a target t, 0 at first and then the moving average of the model's predictions, t <- beta t + (1 - beta)
p. The loss is CE(y, p) + lambda log(1 - <p, t>): it falls as p agrees with t, whatever the label says.

What differs, and why:
- t stays at the client from round to round (n x classes floats) and moves when the sample is drawn, so it counts the
  sample's visits (one for all in the same batch): for a client that trains in few rounds t is young for long. `beta`
  may want to be lower then.
- ELR+ (two networks, weight averages, mixup) is left out.
- A label that is certain is treated like the others.

As in the released code, p is cut to [.0001, .9999] in both places, and what enters t is normalised after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import finite, in_unit_interval
from fedlabel.methods.batch import Batch, Model, State, Step
from fedlabel.methods.losses import label_step
from fedlabel.methods.proden import keep_only, replace_rows
from fedlabel.methods.recipe import LabelKinds, Memory, Method, Phase, Recipe, Stage, Task

SMALLEST = 1e-4
"""Probabilities are cut to [SMALLEST, 1 - SMALLEST], so that the log is finite."""


def no_targets(candidates: Tensor) -> State:
    """Returns the targets t of a client that never trained, 0; candidates: (n, classes) bool."""
    return {"early_target": torch.zeros_like(candidates, dtype=torch.float32)}


@dataclass(frozen=True)
class ELR(Method):
    """Hyper-parameters of early-learning regularisation."""

    name: str = "elr"
    lambda_elr: float = 3.0
    """lambda: weight of the regularisation."""
    beta: float = 0.7
    """Share of the old target in the moving average, in [0, 1)."""

    description: ClassVar[str] = "noisy labels: early-learning regularisation (Liu et al., NeurIPS 2020)"

    def __post_init__(self) -> None:
        finite(self, "method", "lambda_elr")
        in_unit_interval(self, "method", "beta", below_one=True)

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("train", self.loss),)),),
            uses=LabelKinds.SINGLE,
            memory=Memory(no_targets, partial(keep_only, "early_target")),
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of CE(y, p) + lambda log(1 - <p, t>), where this batch's p is in t already."""
        labeled, table = batch.labeled, batch.memory["early_target"]
        log_probs = student(labeled.views["weak"]).log_softmax(-1)
        probs = log_probs.exp().clamp(SMALLEST, 1 - SMALLEST)
        seen = probs.detach() / probs.detach().sum(-1, keepdim=True)
        old = table[labeled.rows]
        target = self.beta * old + (1 - self.beta) * seen
        agreement = (probs * target).sum(-1)
        values = -(log_probs * labeled.candidates).sum(-1) + self.lambda_elr * torch.log1p(-agreement)
        # Samples without a label are not trained on, so nothing is learnt of them here.
        target = torch.where((labeled.candidates.sum(-1) == 1)[:, None], target, old)
        memory = {**batch.memory, "early_target": replace_rows(table, labeled.rows, target)}
        return label_step(values, labeled.candidates, memory)
