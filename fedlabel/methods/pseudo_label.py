"""Pseudo-labels: the model's own confident predictions as labels, computed in every batch or once a round.

Sources: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
workshop 2013. `relabel=round` is the fixed labelling by the received model that Diao et al., "SemiFL", NeurIPS 2022
found more stable when clients take many local steps.

What differs: Lee has no threshold; here max p >= `confidence_threshold`, as in FixMatch. The weight ramps up linearly
over `ramp_rounds` rounds (Lee: over epochs). Setting: labels at the clients, or wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from fedlabel.checks import at_least, finite, in_unit_interval, one_of
from fedlabel.methods.batch import Batch, Model, Prepared, Step, Survey
from fedlabel.methods.losses import labeled_and, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.masks import Mask, masked_phase, masked_recipe
from fedlabel.methods.recipe import Method, Phase, Recipe, Task


@dataclass(frozen=True)
class PseudoLabel(Method):
    """Hyper-parameters of pseudo-labelling."""

    name: str = "pseudo_label"
    mask: Mask = field(default_factory=Mask)
    """Thresholds per class, debiasing."""
    confidence_threshold: float = 0.95
    """tau: a pseudo-label is used if the largest probability reaches it."""
    relabel: str = "batch"
    """batch: by the current weights; round: once, by the received model on plain images."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss after the ramp."""
    ramp_rounds: int = 0
    """Rounds over which the weight grows from near 0 to lambda_u; 0: none."""

    description: ClassVar[str] = "own confident predictions as labels, per batch or per round (Lee, 2013)"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        one_of(self, "method", relabel=("batch", "round"))
        finite(self, "method", "lambda_u")
        at_least(self, "method", 0, "ramp_rounds")

    def recipe(self, task: Task) -> Recipe:
        return masked_recipe(self.mask, task.num_classes, self.phases)

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the phase of a round (1-based), with the weight of the ramp."""
        weight = self.lambda_u * min(1.0, round_number / self.ramp_rounds) if self.ramp_rounds else self.lambda_u
        loss, prepare = partial(self.loss, weight=weight), self.prepare if self.relabel == "round" else None
        return (masked_phase(self.mask, loss, self.confidence_threshold, ("weak",), prepare),)

    def prepare(self, survey: Survey) -> Prepared:
        """Labels the client's whole data with the received model."""
        memory = self.mask.prepare(survey, self.confidence_threshold)
        logits, unlabeled = survey.predict("global", "clean"), survey.supervision.candidates.sum(-1) != 1
        # Averages and counts are over unlabelled samples; labelled ones may be drawn, too, under the same mask.
        memory = self.mask.select(logits[unlabeled], self.confidence_threshold, memory).memory
        chosen = replace(self.mask, ema=1.0).select(logits, self.confidence_threshold, memory)
        targets = {"label": chosen.label, "keep": chosen.keep}
        return Prepared(targets, memory=memory, pseudo=chosen.pseudo_labels(from_global=True))

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, weight: float = 1.0) -> Step:
        """Returns CE(labels) + weight * mean(keep * CE(pseudo-labels)), both on the weak view."""
        supervised, logits = labeled_and(student, batch, "weak")
        if self.relabel == "round":
            label, keep = batch.unlabeled.targets["label"], batch.unlabeled.targets["keep"]
            unsupervised = pseudo_cross_entropy(logits.log_softmax(-1), label, keep)
            return semi_supervised_step(supervised, unsupervised, weight, keep)
        chosen = self.mask.select(logits, self.confidence_threshold, batch.memory)
        unsupervised = pseudo_cross_entropy(logits.log_softmax(-1), chosen.label, chosen.keep)
        step = semi_supervised_step(supervised, unsupervised, weight, chosen.keep, chosen.pseudo_labels(False))
        return step._replace(memory=chosen.memory)
