"""Selects the best round of a run, by `evaluation.select` on the validation split."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlabel.config import SELECT
from fedlabel.errors import naming
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import StateDict
from fedlabel.methods.recipe import Recipe
from fedlabel.record.files import write_atomic
from fedlabel.record.results import best_row, lower_is_better

SELECTED = "selected_{:06d}.pt"
"""Weights by name; the round is in the name."""


def select_key(experiment: Experiment) -> str | None:
    """Returns the metric tag of `evaluation.select` on the validation split; None without a selection."""
    select = experiment.config.evaluation.select
    return None if select is None else "select/" + SELECT[select].rpartition("/")[2]


class Selection:
    """The best model so far: over all rounds, as a file, and over the stage."""

    def __init__(
        self, folder: Path, key: str | None, recipe: Recipe, rows: Sequence[Mapping[str, Any]], stage_model: StateDict
    ) -> None:
        """Continues from a run's state; removes files of later rounds, which will be repeated. Rewrites the file of the
        best round if it is of the last stage, as it may be missing or damaged.

        Args:
            folder: gets a file `SELECTED`.
            key: the metric's tag; None: nothing is selected.
            recipe: says where stages begin.
            rows: of the rounds that are done.
            stage_model: the best of their last stage.

        Raises:
            ValueError: there is no such model, though a round of the stage was scored.
        """
        self._folder, self._key = folder, key
        done = rows[-1]["round"] if rows else 0
        begun = next((number for number in range(done, 0, -1) if recipe.begins(number)), 1)
        best = None if key is None else best_row(rows, key)
        of_stage = None if key is None else best_row([row for row in rows if row["round"] >= begun], key)
        self._best: float | None = None if best is None or key is None else best[key]
        self._best_round = 0 if best is None else best["round"]
        self._of_stage: float | None = None if of_stage is None or key is None else of_stage[key]
        self.stage_model = stage_model
        """The best weights of this stage; empty where no round of it was scored."""
        if (self._of_stage is None) != (not stage_model):
            raise ValueError(
                f"The checkpoint of round {done} in {folder} and the scores in {folder.parent / 'metrics.jsonl'} are "
                "not of one run: put them back as they were, or begin a new run."
            )
        with naming(folder):
            for file in self._files():
                if self._round(file) > done:
                    file.unlink()
        if self._best_round >= begun and stage_model:
            self._write(stage_model)

    def begin_stage(self) -> StateDict:
        """Returns the best weights of the stage that ends, and clears them."""
        ended, self.stage_model, self._of_stage = self.stage_model, {}, None
        return ended

    def see(self, round_number: int, metrics: Mapping[str, float], model: StateDict) -> None:
        """Records a round; a model with an equal score does not replace an earlier one."""
        score = metrics.get(self._key) if self._key is not None else None
        if score is None:
            return
        if self._better(score, self._of_stage):
            self._of_stage, self.stage_model = score, model
        if self._better(score, self._best):
            self._best, self._best_round = score, round_number
            self._write(model)

    def settle(self) -> None:
        """Removes files of models that are no longer the best, once a checkpoint has been written."""
        with naming(self._folder):
            for file in self._files():
                if self._round(file) != self._best_round:
                    file.unlink()

    def _write(self, model: StateDict) -> None:
        buffer = io.BytesIO()
        torch.save({name: value.cpu() for name, value in model.items()}, buffer)
        write_atomic(self._folder / SELECTED.format(self._best_round), buffer.getbuffer())

    def _files(self) -> list[Path]:
        return sorted(file for file in self._folder.glob("selected_*.pt") if file.stem[len("selected_") :].isdecimal())

    @staticmethod
    def _round(file: Path) -> int:
        return int(file.stem[len("selected_") :])

    def _better(self, score: float, best: float | None) -> bool:
        assert self._key is not None
        return best is None or (score < best if lower_is_better(self._key) else score > best)
