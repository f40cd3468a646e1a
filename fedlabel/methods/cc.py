"""CC: maximises the total probability of the candidate set.

Source: Feng, Lv, Han, Xu, Niu, Geng, An, Sugiyama, "Provably Consistent Partial-Label Learning", NeurIPS 2020 (arXiv
2007.08929): the classifier-consistent method. Setting: candidate sets that hold the truth, at the clients.

The loss of a sample is -log sum_{y in S} p(y | x). A certain label is a set of one class; a set of all classes says
nothing and is left out.

What differs: noisy sets are taken for sets that hold the truth, as the paper knows no others. Annotators' labels are
not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.inference.imprecise import candidates_log_likelihood, marginal_nll, unchecked_posterior
from fedlabel.methods.batch import Batch, LossFunction, Model, PseudoLabels, State, Step
from fedlabel.methods.losses import mean_metric, pseudo_metrics
from fedlabel.methods.recipe import ByKnowledge, LabelKinds, Method, Phase, Recipe, Stage, Task


def candidate_posterior(logits: Tensor, candidates: Tensor) -> Tensor:
    """Returns p * 1[S] with rows normalised, (n, classes), detached.

    Args:
        logits: (n, classes) of p.
        candidates: S (n, classes) bool, at least one True in a row.
    """
    return unchecked_posterior(logits.detach(), candidates_log_likelihood(candidates))


def candidate_step(values: Tensor, posterior: Tensor, candidates: Tensor, memory: State | None = None) -> Step:
    """Returns the mean loss over the samples with a candidate set smaller than all classes, 0 if there are none.

    Args:
        values: (n,) loss per sample.
        posterior: (n, classes) of them, detached.
        candidates: (n, classes) bool.
        memory: see `Step.memory`.
    """
    counted = ~candidates.all(-1)
    values = torch.where(counted, values, torch.zeros_like(values))
    confidence, label = posterior.max(-1)
    pseudo = PseudoLabels(label, counted, torch.zeros_like(counted), confidence)
    metrics = {
        "train/loss": mean_metric(values, counted),
        "pseudo/confidence": pseudo_metrics(pseudo)["pseudo/confidence"],
    }
    count = counted.sum()
    return Step(values.sum() / count.clamp_min(1), metrics, count, pseudo, memory)


def candidates_recipe(loss: LossFunction) -> Recipe:
    """Returns the recipe of a method that learns from candidate sets with one loss."""
    return Recipe(
        stages=(Stage((Phase("train", loss, draw=ByKnowledge()),)),),
        uses=LabelKinds.TRUE | LabelKinds.NOISY | LabelKinds.SETS | LabelKinds.AT_SERVER,
    )


@dataclass(frozen=True)
class CC(Method):
    """CC has no hyper-parameters."""

    name: str = "cc"

    description: ClassVar[str] = "candidate sets: -log of the set's probability (Feng et al., NeurIPS 2020)"

    def recipe(self, task: Task) -> Recipe:
        return candidates_recipe(self.loss)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of -log sum_{y in S} p(y)."""
        candidates = batch.labeled.candidates
        logits = student(batch.labeled.views["weak"])
        values = marginal_nll(logits, candidates_log_likelihood(candidates))
        return candidate_step(values, candidate_posterior(logits, candidates), candidates)
