"""Pseudo-labels: the model's own confident predictions as labels, made anew in every batch or once a round.

Sources: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
workshop 2013. `relabel=round` is the fixed labelling by the received model that Diao et al., "SemiFL", NeurIPS 2022
found more stable when clients take many local steps.

What differs: Lee has no threshold; here max p >= `confidence_threshold`, as in FixMatch. The weight ramps up linearly
over `ramp_rounds` rounds (Lee: over epochs). Setting: labels at the clients, or wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from fedlabel.methods.base import Phase, Prepared, Survey
from fedlabel.methods.masks import MaskedMethod
from fedlabel.methods.steps import Batch, Model, Step, labeled_and, pseudo_cross_entropy, semi_supervised_step


@dataclass(frozen=True)
class PseudoLabel(MaskedMethod):
    """Hyper-parameters of pseudo-labelling."""

    name: str = "pseudo_label"
    confidence_threshold: float = 0.95
    """tau: a pseudo-label is used if the largest probability reaches it."""
    relabel: str = "batch"
    """batch: by the weights of the moment; round: once, by the received model on plain images."""
    lambda_u: float = 1.0
    """Weight of the unlabelled loss after the ramp."""
    ramp_rounds: int = 0
    """Rounds over which the weight grows from near 0 to lambda_u; 0: none."""

    description: ClassVar[str] = "own confident predictions as labels, per batch or per round (Lee, 2013)"

    def __post_init__(self) -> None:
        self.check_mask()
        if self.relabel not in ("batch", "round"):
            raise ValueError(f"`method.relabel` (={self.relabel}) must be one of batch, round.")
        if not 0 <= self.lambda_u < float("inf"):
            raise ValueError(f"`method.lambda_u` (={self.lambda_u}) must be a finite number of at least 0.")
        if self.ramp_rounds < 0:
            raise ValueError(f"`method.ramp_rounds` (={self.ramp_rounds}) must be at least 0.")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        weight = self.lambda_u * min(1.0, round_number / self.ramp_rounds) if self.ramp_rounds else self.lambda_u
        return (self.masked_phase(partial(self.loss, weight=weight), ("weak",), prepares=self.relabel == "round"),)

    def prepare(self, survey: Survey) -> Prepared:
        """Labels the client's whole data with the received model, where that is the way."""
        memory = self.mask.prepare(survey, self.confidence_threshold) if self.mask.surveys else survey.memory
        if self.relabel == "batch":
            return Prepared({}, memory=memory)
        logits, unlabeled = survey.predict("global", "clean"), survey.supervision.candidates.sum(-1) != 1
        # Averages and counts are over unlabelled samples; labelled ones, which may be drawn too, are judged by them.
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
