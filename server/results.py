"""The result of a run: its folder, its numbers, and its model, for use in Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlabel.config import ExperimentConfig, parse_config
from fedlabel.errors import RunError, naming
from fedlabel.methods import recipe_of
from fedlabel.methods.recipe import Task, global_model
from fedlabel.prediction.card import Card, parse_card, read_json
from fedlabel.prediction.inputs import as_inputs
from fedlabel.prediction.module import Predictions, TrainedModel, predict, trained_model
from fedlabel.record.json_files import read_metrics, read_summary
from fedlabel.record.names import CARD_JSON, CHECKPOINTS, CONFIG_YAML, SUMMARY_JSON
from server.checkpoint import newest_checkpoint
from server.state import ServerState


@dataclass(frozen=True, eq=False)
class RunResult:
    """The result of a run, finished or not."""

    path: Path
    """The run's folder."""
    summary: dict[str, Any]
    """The content of `summary.json`; empty as long as the run is not finished."""
    metrics: list[dict[str, Any]]
    """One dictionary per round, as in `metrics.jsonl`."""

    @property
    def history(self) -> dict[str, list[Any]]:
        """The metrics as a table, column -> a value for each round, NaN where a round has none: what
        `pandas.DataFrame(result.history)` takes. Lists, such as the accuracy of each client, are left out.
        """
        names = dict.fromkeys(
            name for row in self.metrics for name, value in row.items() if not isinstance(value, list)
        )
        return {
            name: [math.nan if row.get(name) is None else row[name] for row in self.metrics]
            for name in ["round", *names]
        }

    @cached_property
    def config(self) -> ExperimentConfig:
        """The resolved configuration.

        Raises:
            ValueError: config.yaml is missing or damaged.
        """
        with naming(self.path / CONFIG_YAML):
            text = (self.path / CONFIG_YAML).read_text()
        return parse_config(text)

    @cached_property
    def card(self) -> Card:
        """The model card: classes, inputs, normalisation.

        Raises:
            ValueError: card.json is missing or damaged.
        """
        path = self.path / CARD_JSON
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist: the run is of an older version. `fedlabel run --resume --name "
                f"{self.path.name}` with one more round (num_rounds={self.config.num_rounds + 1}) writes it."
            )
        return parse_card(read_json(path), path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's logits."""
        return self.card.schema.classes

    @cached_property
    def _checkpoint(self) -> ServerState:
        """The newest checkpoint; read once, so that `model` and `round` go together while a run goes on."""
        state = newest_checkpoint(self.path / CHECKPOINTS)
        if state is None:
            raise RunError(f"{self.path} has no checkpoint as yet: wait for its first round, or resume it.")
        return state

    @property
    def round(self) -> int:
        """The round after which `model` is.

        Raises:
            ValueError: the checkpoint is missing or damaged.
            RunError: the run has no checkpoint as yet.
        """
        return self._checkpoint.round_number

    @cached_property
    def model(self) -> TrainedModel:
        """The global model of the newest checkpoint, on the CPU and in eval mode, with its preprocessing: it takes
        inputs as the data set has them and returns logits. Its accuracy on the test set is the `eval/accuracy` of its
        `round`.

        Raises:
            ValueError: the checkpoint or card.json is missing or damaged.
            RunError: the run has no checkpoint as yet, or is in a stage whose model is not the run's.
        """
        state = self._checkpoint
        schema, config = self.card.schema, self.config
        recipe = recipe_of(config.method, Task(len(schema.classes), config.num_rounds, self.card.labels))
        stage = recipe.place(state.round_number).stage
        if stage.predict is not global_model:
            raise RunError(
                f"{self.path} has done {state.round_number} of {config.num_rounds} rounds and is in the stage "
                f"`{stage.name}` of {config.method.name}, which has no classifier yet: resume it first."
            )
        return trained_model(config, self.card, state.model, str(self.path))

    def predict(self, inputs: Any) -> Predictions:
        """Returns probabilities and classes of inputs.

        Args:
            inputs: images, rows of a table, or a path to such, see `fedlabel.prediction.inputs.as_inputs`.

        Raises:
            ValueError: they are not of the form that the model was trained on.
            RunError: see `model`.
        """
        found = as_inputs(inputs, self.card, self.config.data)
        return predict(self.model, found.tensor, self.classes)


def load_run(path: str | Path) -> RunResult:
    """Returns the result of a run that was done before, or is going on.

    Args:
        path: the run's folder.

    Raises:
        ValueError: it is none, or its files are damaged.
    """
    path = Path(path)
    metrics = read_metrics(path)
    return RunResult(path, read_summary(path) if (path / SUMMARY_JSON).is_file() else {}, metrics)
