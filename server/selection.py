"""Which round's model a run puts forward, by `evaluation.select` on the validation split."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlabel.methods.base import Method
from fedlabel.methods.steps import StateDict
from fedlabel.tracking import best_row, lower_is_better, write_atomic

SELECTED = "selected.pt"


class Selection:
    """The best model so far, of all rounds (as a file of weights by name) and of the stage."""

    def __init__(
        self, folder: Path, key: str | None, method: Method, rows: Sequence[Mapping[str, Any]], stage_model: StateDict
    ) -> None:
        """Goes on where a run stands.

        Args:
            folder: gets `SELECTED`.
            key: the metric's tag; None: nothing is selected.
            method: says where stages begin.
            rows: of the rounds that are done.
            stage_model: the best of their last stage.
        """
        self._file, self._key = folder / SELECTED, key
        done = rows[-1]["round"] if rows else 0
        begun = next((number for number in range(done, 0, -1) if method.starts_stage(number)), 1)
        self._best = self._of(rows)
        self._of_stage = self._of([row for row in rows if row["round"] >= begun])
        self.stage_model = stage_model
        """The best weights of this stage; empty where no round of it was scored."""

    def begin_stage(self) -> StateDict:
        """Returns the best weights of the stage that ends, and forgets them."""
        ended, self.stage_model, self._of_stage = self.stage_model, {}, None
        return ended

    def see(self, metrics: Mapping[str, float], model: StateDict) -> None:
        """Takes in a round; a model that is only as good as an earlier one is not better."""
        score = metrics.get(self._key) if self._key is not None else None
        if score is None:
            return
        if self._better(score, self._of_stage):
            self._of_stage, self.stage_model = score, model
        if self._better(score, self._best):
            self._best = score
            buffer = io.BytesIO()
            torch.save({name: value.cpu() for name, value in model.items()}, buffer)
            write_atomic(self._file, buffer.getbuffer())

    def _of(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        row = best_row(rows, self._key) if self._key is not None else None
        return None if row is None or self._key is None else row[self._key]

    def _better(self, score: float, best: float | None) -> bool:
        assert self._key is not None
        return best is None or (score < best if lower_is_better(self._key) else score > best)
