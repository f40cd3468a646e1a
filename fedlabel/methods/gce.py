"""GCE: a loss between cross-entropy and the mean absolute error, which is more robust to wrong labels.

Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS
2018 (arXiv 1805.07836). Setting: labels at the clients, some of them wrong.

The loss of a sample with label y is (1 - p_y^q) / q: towards q = 0 cross-entropy, for q = 1 it is 1 - p_y. Its gradient
is that of cross-entropy times p_y^q, so a label that the model finds improbable counts little.

What differs: the paper's truncated variant, which leaves samples out between epochs over all data, is left out. A label
that is certain is treated like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlabel.checks import within
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import label_step
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task


@dataclass(frozen=True)
class GCE(Method):
    """Hyper-parameters of generalised cross-entropy."""

    name: str = "gce"
    q: float = 0.7
    """In (0, 1]: near 0 it is cross-entropy, at 1 the mean absolute error."""

    description: ClassVar[str] = "noisy labels: generalised cross-entropy (Zhang & Sabuncu, NeurIPS 2018)"

    def __post_init__(self) -> None:
        within(self, "method", 0, 1, "q", ends="(]", hint="for q = 0 take method.name=supervised")

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("train", self.loss),)),),
            uses=LabelKinds.SINGLE,
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of (1 - p_y^q) / q."""
        candidates = batch.labeled.candidates
        log_prob = (student(batch.labeled.views["weak"]).log_softmax(-1) * candidates).sum(-1)
        return label_step(-torch.expm1(self.q * log_prob) / self.q, candidates)
