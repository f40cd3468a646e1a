"""FedRoD's generic predictor: balanced softmax with each client's class counts, so that all clients have one objective.

Source: Chen, Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022 (arXiv
2107.00778). The loss is Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020. Setting:
labels at clients whose classes differ.

Client k with n_c labels of class c minimises -log [n_y^gamma exp f_y(x) / sum_c n_c^gamma exp f_c(x)]: cross-entropy of
the logits f_c(x) + gamma log n_c. The model that is sent and evaluated is f, as for a client with balanced classes.

What differs, and why:
- The personal head is left out. In the paper every client has a second one, which stays there, is trained by plain
  cross-entropy on the same features and passes no gradient to them; so the generic predictor, which is all here, is
  the paper's. Runs here evaluate one global model, and nothing would show a personal one.
- The paper's other balanced losses and its hypernetwork that makes personal heads are left out.
- A class without a label is left out of the softmax (n_c = 0), as the loss has it; its logit is not trained.
- n_c are the counts of the client's labels (wrong ones as they are), as samples without a label are not trained on.
  With gamma = 1 it is `supervised` with prior.kind=labels and prior.smoothing=0, but for that prior's floor.
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
class FedRoD(Method):
    """Hyper-parameters of FedRoD's generic predictor."""

    name: str = "fedrod"
    gamma: float = 1.0
    """Power of the class counts; 0: plain cross-entropy on the client's classes."""
    oracle_labels: bool = False  # type: ignore[misc]  # a field, as in `Supervised`
    """Give every client the true label of all its training samples (the fully labelled upper bound)."""

    description: ClassVar[str] = "label skew: balanced softmax by the client's class counts (Chen & Chao, ICLR 2022)"
    corrects_class_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        finite(self, "method", "gamma")

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("train", self.loss),)),),
            uses=LabelKinds.SINGLE,
            memory=Memory(class_counts),
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean balanced softmax loss."""
        counts = batch.memory["class_counts"]
        shift = torch.where(counts > 0, self.gamma * counts.clamp_min(1).log(), LEFT_OUT)
        return labeled_step(student(batch.labeled.views["weak"]) + shift, batch.labeled.candidates)
