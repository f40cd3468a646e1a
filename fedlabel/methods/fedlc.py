"""FedLC: in a client's loss each logit is lowered by a margin, the larger the fewer labels of the class the client has.

Source: Zhang, Li, Li, Xu, Wu, Ding, Wu, "Federated Learning with Label Distribution Skew via Logits Calibration", ICML
2022 (arXiv 2209.00189). Setting: labels at clients whose classes differ.

Client k with n_c labels of class c minimises the cross-entropy of the logits f_c(x) - tau n_c^(-1/4). So class y has to
beat class c by the margin tau (n_y^(-1/4) - n_c^(-1/4)): rare classes get the larger one. The model that is sent and
evaluated is f, without it.

What differs, and why:
- The softmax runs over all classes of the client, as in public implementations (Flower's baseline, fluke, FL-bench).
- A class without a label has an infinite margin, n_c = 0: it is left out of the softmax, and its logit is not trained.
  Public implementations take 1e-8 labels in its place, which is nearly the same: 100 tau are subtracted.
- n_c are the counts of the client's labels (wrong ones as they are), as samples without a label are not trained on.
- The server's own labels, if it holds any, are trained with plain cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlabel.checks import finite
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import LEFT_OUT, class_counts, labeled_step
from fedlabel.methods.recipe import LabelKinds, Memory, Method, Phase, Recipe, Stage, Task


@dataclass(frozen=True)
class FedLC(Method):
    """Hyper-parameters of FedLC."""

    name: str = "fedlc"
    tau: float = 0.5
    """Factor of the margins (.1, .5 and 1 in Flower's baseline); 0: plain cross-entropy on the client's classes."""
    oracle_labels: bool = False  # type: ignore[misc]  # a field, as in `Supervised`
    """Give every client the true label of all its training samples (the fully labelled upper bound)."""

    description: ClassVar[str] = "label skew: logits calibrated by the client's class counts (Zhang et al., ICML 2022)"
    corrects_class_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        finite(self, "method", "tau")

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("train", self.loss),)),),
            uses=LabelKinds.SINGLE,
            memory=Memory(class_counts),
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean cross-entropy of the calibrated logits."""
        counts = batch.memory["class_counts"]
        margin = torch.where(counts > 0, -self.tau * counts.clamp_min(1) ** -0.25, LEFT_OUT)
        return labeled_step(student(batch.labeled.views["weak"]) + margin, batch.labeled.candidates)
