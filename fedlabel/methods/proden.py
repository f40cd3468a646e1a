"""PRODEN: progressively identifies the true class among the candidates while the model trains.

Source: Lv, Xu, Feng, Niu, Geng, Sugiyama, "Progressive Identification of True Labels for Partial-Label Learning",
ICML 2020 (arXiv 2002.08053). Setting: candidate sets that hold the truth, at the clients.

Every sample has a confidence q over its candidates, uniform at first. The loss is CE(q, p); afterwards q becomes the
model's prediction on the set, p * 1[S] normalised. RC of Feng et al. (NeurIPS 2020; see `cc.py`) weighs candidates by
the same q, so with cross-entropy it is PRODEN up to a factor, and has no file of its own.

What differs, and why:
- q stays at the client from round to round (n x classes floats), and is of the last time that the sample was drawn,
  from weights that the server has averaged since. A client that does not take part in a round keeps its q.
- Noisy sets are taken for sets that hold the truth, as the paper knows no others; a set of all classes says nothing and
  is left out, and annotators' labels are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.methods.batch import Batch, Model, State, Step
from fedlabel.methods.cc import candidate_posterior, candidate_step, candidates_recipe
from fedlabel.methods.recipe import Memory, Method, Recipe, Task
from fedlabel.methods.uploads import PhaseResult


def replace_rows(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Returns a copy of `table` with new values in some rows; a row that is named twice gets the later value.

    Args:
        table: (n, classes).
        rows: (batch,) int64.
        values: (batch, classes).
    """
    if len(rows) == 0:
        return table
    # Which of several values an index gets is not defined on a GPU: give them all the last one.
    position = torch.arange(len(rows), device=rows.device)
    last = torch.where(rows[:, None] == rows, position, -1).amax(-1)
    return table.index_put((rows,), values[last])


def uniform_confidence(candidates: Tensor) -> State:
    """Returns q, uniform over each set; candidates: (n, classes) bool."""
    return {"candidate_confidence": candidates.float() / candidates.sum(-1, keepdim=True)}


def keep_only(name: str, memory: State, results: Sequence[PhaseResult]) -> State:
    """Keeps one tensor of the memory, see `Memory.keep`."""
    return {name: memory[name]}


@dataclass(frozen=True)
class PRODEN(Method):
    """PRODEN has no hyper-parameters."""

    name: str = "proden"

    description: ClassVar[str] = "candidate sets: confidences follow the model (Lv et al., ICML 2020)"

    def recipe(self, task: Task) -> Recipe:
        memory = Memory(uniform_confidence, partial(keep_only, "candidate_confidence"))
        return replace(candidates_recipe(self.loss), memory=memory)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the mean of CE(q, p) with the stored q, and the memory with p * 1[S] normalised in q's place."""
        labeled, table = batch.labeled, batch.memory["candidate_confidence"]
        logits = student(labeled.views["weak"])
        values = -(table[labeled.rows] * logits.log_softmax(-1)).sum(-1)
        identified = candidate_posterior(logits, labeled.candidates)
        memory = {**batch.memory, "candidate_confidence": replace_rows(table, labeled.rows, identified)}
        return candidate_step(values, identified, labeled.candidates, memory)
