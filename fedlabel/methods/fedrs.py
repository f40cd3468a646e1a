"""FedRS: a restricted softmax, in which the logits of classes that the client lacks are scaled down.

Source: Li, Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data", KDD 2021, and
its released code (github.com/lxcnju/FedRepo). Setting: labels at clients that lack some of the classes.

Client k minimises the cross-entropy of the logits a_c f_c(x), with a_c = 1 for a class that it has labels of and alpha
for the others. A lacking class is pushed away in each step, by alpha times the usual gradient. The model that is sent
and evaluated is f.

What differs, and why:
- `scaling=counts` is the released code's a_c = alpha + (1 - alpha) n_c / max n, which restricts rare classes, too.
- The logit is scaled as a whole. The released code scales w_c h and leaves the classifier's bias out of training; a
  loss here sees no weights.
- n_c are the counts of the client's labels (wrong ones as they are), as samples without a label are not trained on.
- The server's own labels, if it holds any, are trained with plain cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedlabel.checks import in_unit_interval, one_of
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import class_counts, labeled_step
from fedlabel.methods.recipe import LabelKinds, Memory, Method, Phase, Recipe, Stage, Task


@dataclass(frozen=True)
class FedRS(Method):
    """Hyper-parameters of FedRS."""

    name: str = "fedrs"
    alpha: float = 0.5
    """Factor in [0, 1] of the logits of classes that the client lacks; 1: plain cross-entropy."""
    scaling: str = "missing"
    """missing: as the paper, all classes with a label count alike. counts: the released code, see above."""
    oracle_labels: bool = False  # type: ignore[misc]  # a field, as in `Supervised`
    """Give every client the true label of all its training samples (the fully labelled upper bound)."""

    description: ClassVar[str] = "label skew: logits of the client's missing classes are scaled (Li & Zhan, KDD 2021)"
    corrects_class_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "alpha")
        one_of(self, "method", scaling=("missing", "counts"))

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("train", self.loss),)),),
            uses=LabelKinds.SINGLE,
            memory=Memory(class_counts),
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean cross-entropy of the scaled logits."""
        counts = batch.memory["class_counts"]
        share = (counts > 0).float() if self.scaling == "missing" else counts / counts.max().clamp_min(1)
        scale = self.alpha + (1 - self.alpha) * share
        return labeled_step(student(batch.labeled.views["weak"]) * scale, batch.labeled.candidates)
