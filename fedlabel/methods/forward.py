"""Forward correction: the model's prediction is multiplied by the noise matrix before the loss on the noisy label.

Source: Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label Noise: a Loss Correction
Approach", CVPR 2017 (arXiv 1609.03683). Setting: labels at the clients, some of them wrong.

The loss of a sample with noisy label j is -log sum_y p(y | x) T[y, j], where T[y, j] = p(noisy label j | true label y)
is fixed. T is given (`kind`=symmetric, given), or estimated once from a model that was trained on the noisy labels
(anchor): for a sample that is certainly of class i, the noisy label's distribution is row i of T, and the sample that
the model finds most probable to be i is taken for one.

What differs, and why:
- The estimate is federated. In the last round of the warm-up every client reports, over its labelled samples and with
  the model it received, one row per class, and the server averages the rows. Clients that the round did not draw have
  no say. If it brought no report at all, the next round's clients are asked.
- A client reports a class only if the sample that it would report is predicted to be of it. A client without the class,
  as there are many in a skewed partition, has no such sample, and its row would be of another class. A class that
  nobody reports keeps the row of the identity: its labels are taken as they are.
- The most probable sample is taken; the paper's 97th percentile for many classes is left out, as is its backward
  correction.
- A label that is certain (not noisy) gets plain cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import at_least, in_unit_interval, one_of
from fedlabel.inference.imprecise import candidates_log_likelihood, label_log_likelihood, marginal_nll
from fedlabel.inference.transition import diagonal_transition
from fedlabel.methods.batch import Batch, Model, Prepared, State, Step, Survey
from fedlabel.methods.federated_transition import FixedTransition, check_transition, noise_matrix
from fedlabel.methods.losses import label_step
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.shared import Limits, Shared, check_flags, check_shares

ROW_TOLERANCE = 1e-4
"""A row of a given matrix may miss the sum of 1 by that much (rounded numbers)."""


def anchor_rows(logits: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row of T of each class at its most probable sample, (classes, classes), and whether there is one,
    (classes,).

    Args:
        logits: (n, classes) of the model trained on noisy labels.
        labeled: (n,) bool, the samples to look at.

    Returns:
        The rows, 0 for a class whose most probable sample is predicted to be of another class; 1 for the others, or 0.
    """
    classes = logits.shape[-1]
    probs = logits[labeled].softmax(-1)
    if len(probs) == 0:
        return logits.new_zeros(classes, classes), logits.new_zeros(classes)
    rows = probs[probs.argmax(0)]
    found = (rows.argmax(-1) == torch.arange(classes, device=rows.device)).to(rows.dtype)
    return rows * found[:, None], found


def report_anchors(survey: Survey) -> Prepared:
    """Reports one row per class, unless T is estimated already."""
    if survey.memory["estimated"] > 0:
        return Prepared({})
    rows, found = anchor_rows(survey.predict("global", "clean"), survey.supervision.labeled)
    return Prepared({}, memory={**survey.memory, "anchor_rows": rows, "anchor_counts": found})


@dataclass(frozen=True)
class AnchorTransition(Shared):
    """T: the identity, until it is estimated once by the clients' mean rows."""

    num_classes: int

    def start(self) -> State:
        return {"transition": torch.eye(self.num_classes), "estimated": torch.zeros(())}

    def statistics(self, memory: State) -> State:
        nothing = torch.zeros_like(memory["transition"])
        return {
            "anchor_rows": memory.get("anchor_rows", nothing),
            "anchor_counts": memory.get("anchor_counts", nothing[0]),
        }

    def update(self, shared: State, total: State) -> State:
        if "anchor_counts" not in total or shared["estimated"] > 0:
            return shared
        counts, transition = total["anchor_counts"], shared["transition"]
        mean = total["anchor_rows"] / counts.clamp_min(1)[:, None]
        return {
            "transition": torch.where(counts[:, None] > 0, mean, transition),
            "estimated": (counts.sum() > 0).to(transition.dtype),
        }

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        check_flags("anchor_counts", statistics["anchor_counts"])
        check_shares("its statistic anchor_rows", statistics["anchor_rows"], statistics["anchor_counts"])

    def check(self, shared: State) -> None:
        check_transition(shared)


@dataclass(frozen=True)
class Forward(Method):
    """Hyper-parameters of the forward correction."""

    name: str = "forward"
    kind: str = "anchor"
    """Source of T. symmetric: from `noise_rate`. given: `matrix`. anchor: estimated after `warmup_rounds`."""
    noise_rate: float = 0.2
    """kind=symmetric: the share in [0, 1) of labels that were redrawn from all classes, as `supervision.noise_rate` for
    supervision.noise=symmetric; T = (1 - noise_rate) I + noise_rate / classes."""
    matrix: tuple[tuple[float, ...], ...] = ()
    """kind=given: T, one row per true class, each of which sums to 1."""
    warmup_rounds: int = 10
    """kind=anchor: rounds of plain cross-entropy, at least 2: the last one estimates T with the model trained in the
    earlier ones."""

    description: ClassVar[str] = "noisy labels: forward correction by a fixed noise matrix (Patrini et al., CVPR 2017)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", tuple(tuple(row) for row in self.matrix))  # YAML gives lists
        one_of(self, "method", kind=("symmetric", "given", "anchor"))
        in_unit_interval(self, "method", "noise_rate", below_one=True)
        at_least(self, "method", 2, "warmup_rounds")
        if self.kind == "given" and not self.matrix:
            raise ValueError(
                "`method.matrix` is missing: `method.kind` (=given) takes T from it, e.g. "
                "method.matrix=[[0.9,0.1],[0.2,0.8]] for two classes."
            )
        if self.kind != "given" and self.matrix:
            raise ValueError(
                f"`method.matrix` ({len(self.matrix)} rows) would do nothing with `method.kind` (={self.kind}): leave "
                "it out, or take method.kind=given."
            )
        for place, row in enumerate(self.matrix):
            if len(row) != len(self.matrix):
                raise ValueError(
                    f"`method.matrix` must be square: row {place} has {len(row)} entries, there are {len(self.matrix)} "
                    "rows."
                )
            if not all(0 <= value <= 1 for value in row) or not math.isclose(sum(row), 1, abs_tol=ROW_TOLERANCE):
                raise ValueError(
                    f"`method.matrix`, row {place} (={list(row)}), must hold numbers in [0, 1] whose sum is 1: "
                    f"p(noisy label | true label {place})."
                )

    def check_rounds(self, num_rounds: int) -> None:
        if self.kind == "anchor" and num_rounds <= self.warmup_rounds:
            raise ValueError(
                f"`num_rounds` (={num_rounds}) ends before anything is corrected: T is estimated after "
                f"`method.warmup_rounds` (={self.warmup_rounds}). Take at least {self.warmup_rounds + 1}, a shorter "
                "warm-up, or another method.kind."
            )

    def recipe(self, task: Task) -> Recipe:
        train = Phase("train", self.loss)
        stages: tuple[Stage, ...] = (Stage((train,)),)
        if self.kind == "anchor":
            estimate = replace(train, teachers=("global",), prepare=report_anchors)
            stages = (Stage((train,), rounds=self.warmup_rounds - 1), Stage((estimate,)))
        return Recipe(
            stages,
            uses=LabelKinds.SINGLE,
            shared=self._shared(task.num_classes),
            inspect=noise_matrix,
        )

    def _shared(self, num_classes: int) -> Shared:
        if self.kind == "anchor":
            return AnchorTransition(num_classes)
        if self.kind == "symmetric":
            wrong = self.noise_rate * (num_classes - 1) / num_classes
            return FixedTransition(diagonal_transition(num_classes, wrong))
        if len(self.matrix) != num_classes:
            raise ValueError(
                f"`method.matrix` ({len(self.matrix)} rows) must have as many rows as the data set has classes "
                f"(={num_classes})."
            )
        return FixedTransition(torch.tensor(self.matrix, dtype=torch.float32))

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of -log sum_y p_y T[y, label], of -log p_label where the label is certain.

        T is the identity until it is estimated, which makes both the same.
        """
        labeled = batch.labeled
        is_label = labeled.candidates.sum(-1) == 1
        label = torch.where(is_label, labeled.candidates.int().argmax(-1), -1)
        noise = label_log_likelihood(label, batch.memory["transition"])
        likelihood = torch.where(labeled.noisy[:, None], noise, candidates_log_likelihood(labeled.candidates))
        return label_step(marginal_nll(student(labeled.views["weak"]), likelihood), labeled.candidates)
