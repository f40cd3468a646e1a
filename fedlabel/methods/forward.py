"""Forward correction: the model's prediction is passed through the noise matrix before it meets the noisy label.

Source: Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label Noise: a Loss Correction
Approach", CVPR 2017 (arXiv 1609.03683). Setting: labels at the clients, some of them wrong.

The loss of a sample with noisy label j is -log sum_y p(y | x) T[y, j], where T[y, j] = p(noisy label j | true label y)
is fixed. T is known (`kind`=symmetric, given), or estimated once from a model that was trained on the noisy labels
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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.inference.imprecise import candidates_log_likelihood, label_log_likelihood, marginal_nll
from fedlabel.inference.transition import diagonal_transition
from fedlabel.methods.base import Limits, Method, Phase, Prepared, Survey
from fedlabel.methods.plausible import check_flags, check_shares
from fedlabel.methods.steps import Batch, Model, State, Step, label_step

KINDS = ("symmetric", "given", "anchor")
ROW_TOLERANCE = 1e-4
"""A row of a given matrix may miss the sum of 1 by that much (rounded numbers)."""


def anchor_rows(logits: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each class's row by its most probable sample, (classes, classes), and where there is one, (classes,).

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


@dataclass(frozen=True)
class Forward(Method):
    """Hyper-parameters of the forward correction."""

    name: str = "forward"
    kind: str = "anchor"
    """Where T is from. symmetric: from `noise_rate`. given: `matrix`. anchor: estimated after `warmup_rounds`."""
    noise_rate: float = 0.2
    """kind=symmetric: the share in [0, 1) of labels that were drawn anew from all classes, as
    `supervision.noise_rate` for supervision.noise=symmetric; T = (1 - noise_rate) I + noise_rate / classes."""
    matrix: tuple[tuple[float, ...], ...] = ()
    """kind=given: T, one row per true class, each of which sums to 1."""
    warmup_rounds: int = 10
    """kind=anchor: rounds of plain cross-entropy, at least 2: the last one estimates T with what the earlier ones made
    of the model."""

    description: ClassVar[str] = "noisy labels: forward correction by a fixed noise matrix (Patrini et al., CVPR 2017)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", tuple(tuple(row) for row in self.matrix))  # YAML gives lists
        if self.kind not in KINDS:
            raise ValueError(f"`method.kind` (={self.kind}) must be one of {', '.join(KINDS)}.")
        if not 0 <= self.noise_rate < 1:
            raise ValueError(f"`method.noise_rate` (={self.noise_rate}) must lie in [0, 1).")
        if self.warmup_rounds < 2:
            raise ValueError(f"`method.warmup_rounds` (={self.warmup_rounds}) must be at least 2.")
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

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        if self.kind == "anchor" and round_number >= self.warmup_rounds:
            return (Phase("train", self.loss, labeled=("weak",), teachers=("global",), prepare=self.prepare),)
        return (Phase("train", self.loss, labeled=("weak",)),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of -log sum_y p_y T[y, label], of -log p_label where the label is certain.

        T is the identity until it is estimated, which makes both the same.
        """
        labeled = batch.labeled
        is_label = labeled.candidates.sum(-1) == 1
        label = torch.where(is_label, labeled.candidates.int().argmax(-1), -1)
        noise = label_log_likelihood(label, batch.memory["transition"])
        said = torch.where(labeled.noisy[:, None], noise, candidates_log_likelihood(labeled.candidates))
        return label_step(marginal_nll(student(labeled.views["weak"]), said), labeled.candidates)

    # ------------------------------------------------------------------------------------------ the matrix, kind=anchor

    def prepare(self, survey: Survey) -> Prepared:
        """Reports one row per class, unless T is estimated already."""
        if survey.memory["estimated"] > 0:
            return Prepared({})
        rows, found = anchor_rows(survey.predict("global", "clean"), survey.supervision.labeled)
        return Prepared({}, memory={**survey.memory, "anchor_rows": rows, "anchor_counts": found})

    def initial_memory(self, candidates: Tensor) -> State:
        if self.kind != "anchor":
            return {}
        classes, device = candidates.shape[-1], candidates.device
        return {
            "anchor_rows": torch.zeros(classes, classes, device=device),
            "anchor_counts": torch.zeros(classes, device=device),
        }

    def statistics(self, memory: State) -> State:
        if self.kind != "anchor":
            return {}
        return {name: memory[name] for name in ("anchor_rows", "anchor_counts")}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        if self.kind == "anchor":
            check_flags("anchor_counts", statistics["anchor_counts"])
            check_shares("its statistic anchor_rows", statistics["anchor_rows"], statistics["anchor_counts"])

    def check_shared(self, shared: State) -> None:
        check_shares("transition", shared["transition"], torch.ones(()))

    def initial_shared(self, num_classes: int) -> State:
        """Returns T.

        Raises:
            ValueError: the given matrix is of another number of classes.
        """
        if self.kind == "anchor":
            return {"transition": torch.eye(num_classes), "estimated": torch.zeros(())}
        if self.kind == "symmetric":
            wrong = self.noise_rate * (num_classes - 1) / num_classes
            return {"transition": diagonal_transition(num_classes, wrong)}
        if len(self.matrix) != num_classes:
            raise ValueError(
                f"`method.matrix` ({len(self.matrix)} rows) must have as many rows as the data set has classes "
                f"(={num_classes})."
            )
        return {"transition": torch.tensor(self.matrix, dtype=torch.float32)}

    def server_step(self, shared: State, total: State) -> State:
        """Returns T from the clients' mean rows, once."""
        if self.kind != "anchor" or "anchor_counts" not in total or shared["estimated"] > 0:
            return shared
        counts, transition = total["anchor_counts"], shared["transition"]
        mean = total["anchor_rows"] / counts.clamp_min(1)[:, None]
        return {
            "transition": torch.where(counts[:, None] > 0, mean, transition),
            "estimated": (counts.sum() > 0).to(transition.dtype),
        }

    def noise_matrix(self, shared: State) -> Tensor | None:
        return shared["transition"][None]
