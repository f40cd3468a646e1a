"""A method of your own: the labels, and the global model's confident predictions as further labels.

A method is a frozen dataclass of hyper-parameters, which are the keys `method.*` of the configuration. Its recipe says
what a client does in a round: which samples each step draws, and with which loss. A loss sees models as functions
inputs -> logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedlabel import Method, Phase, Recipe, Stage
from fedlabel.checks import finite, in_unit_interval
from fedlabel.methods.batch import Batch, Model, PseudoLabels, Step
from fedlabel.methods.losses import labeled_and, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.recipe import BySample, LabelKinds, Task


@dataclass(frozen=True)
class SelfTraining(Method):
    """Hyper-parameters: keys of the configuration."""

    name: str = "method:SelfTraining"
    threshold: float = 0.9
    """Smallest probability from which a prediction is taken as a label."""
    weight: float = 0.5
    """Of the loss on these labels, beside that on the true ones."""

    description: ClassVar[str] = "labels, and the global model's confident predictions"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "threshold")
        finite(self, "method", "weight")

    def recipe(self, task: Task) -> Recipe:
        """Returns one phase for all rounds; more `Stage`s would follow each other, e.g. after a warm-up."""
        draw = BySample(labeled=("weak",), unlabeled=("weak", "strong"))
        train = Phase("train", self.loss, draw, teachers=("global",))
        return Recipe(stages=(Stage((train,)),), uses=LabelKinds.SINGLE)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the loss of a batch.

        Args:
            student: the model that is trained.
            teachers: frozen models; "global" is the one that the client received.
            batch: labelled and unlabelled samples, in the views that the phase draws.
        """
        supervised, logits = labeled_and(student, batch, "strong")
        predicted = teachers["global"](batch.unlabeled.views["weak"]).detach().softmax(-1)
        confidence, label = predicted.max(-1)
        keep = confidence > self.threshold
        unsupervised = pseudo_cross_entropy(logits.log_softmax(-1), label, keep)
        pseudo = PseudoLabels(label, keep, keep.new_ones(keep.shape), confidence)  # for pseudo/accuracy in TensorBoard
        return semi_supervised_step(supervised, unsupervised, self.weight, keep, pseudo)
