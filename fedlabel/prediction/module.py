"""A trained network as one torch module: inputs as the data set has them go in, logits come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedlabel.config import ExperimentConfig
from fedlabel.data.nodes.schema import NUMBER, Column
from fedlabel.experiment import build_network
from fedlabel.methods import recipe_of
from fedlabel.methods.recipe import Task
from fedlabel.prediction.card import Card

BATCH_SIZE = 500
"""Inputs that run through the network at a time, as in a run's own evaluation."""


class Pixels(nn.Module):
    """Scales pixels to [0, 1] and normalises each channel.

    Args:
        mean: per channel, on the [0, 1] scale.
        std: likewise; above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Returns normalised float32 of images (batch, channels, height, width): uint8, or floats in [0, 1]."""
        values = images if images.is_floating_point() else images.float() / 255
        return (values.to(self.mean.dtype) - self.mean) / self.std


class Cells(nn.Module):
    """Makes features of a table's rows: missing numbers filled, numbers standardised, categories as zeros and ones.

    Args:
        columns: of the table, those of numbers first.
    """

    missing: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        numbers = [column for column in columns if column.kind == NUMBER]
        for name in ("missing", "mean", "std"):
            values = torch.tensor([getattr(column, name) for column in numbers], dtype=torch.float64)
            self.register_buffer(name, values)
        self.widths = tuple(column.width for column in columns[len(numbers) :])

    def forward(self, rows: Tensor) -> Tensor:
        """Returns features (batch, features, 1, 1) float32.

        Args:
            rows: (batch, columns) float64, in the order of the schema: numbers as the table has them, NaN = missing; of
                a category its place among the column's categories, -1 = none of them.
        """
        count = len(self.mean)
        numbers = rows[:, :count].double()
        numbers = torch.where(numbers.isnan(), self.missing, numbers)
        made = [((numbers - self.mean) / self.std).float()]
        for place, width in enumerate(self.widths, start=count):
            made.append((rows[:, place : place + 1] == torch.arange(width, device=rows.device)).float())
        return torch.cat(made, 1)[:, :, None, None]


class TrainedModel(nn.Module):
    """The global model of a run with its preprocessing; in eval mode.

    Args:
        network: normalised inputs -> logits.
        card: of the run.
    """

    def __init__(self, network: nn.Module, card: Card) -> None:
        super().__init__()
        self.card, schema = card, card.schema
        if card.raw:
            self.preprocess: nn.Module = nn.Identity()
        else:
            self.preprocess = Cells(schema.columns) if schema.tabular else Pixels(schema.mean, schema.std)
        self.network = network
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.card.schema.classes

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits (batch, classes).

        Args:
            inputs: images (batch, channels, height, width), uint8 or floats in [0, 1]; rows of a table (batch,
                columns), see `Cells`; or arrays of data.name=arrays, float32 (batch, a, b, c).
                `fedlabel.prediction.inputs.as_inputs` makes these of other forms.
        """
        logits: Tensor = self.network(self.preprocess(inputs))
        return logits

    def example(self) -> Tensor:
        """Returns two inputs of zeros, in the form in which data sets have them."""
        schema = self.card.schema
        if schema.tabular:
            return torch.zeros(2, len(schema.columns), dtype=torch.float64)
        return torch.zeros(2, *schema.shape, dtype=torch.float32 if self.card.raw else torch.uint8)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of n inputs."""

    probabilities: np.ndarray
    """(n, classes) float32, summing to 1."""
    index: np.ndarray
    """(n,) int64, the number of the most probable class."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the columns of `probabilities`."""

    @property
    def labels(self) -> list[str]:
        """The name of the most probable class of each input."""
        return [self.classes[number] for number in self.index.tolist()]

    def __len__(self) -> int:
        return len(self.index)


def predict(model: nn.Module, inputs: Tensor, classes: Sequence[str]) -> Predictions:
    """Returns a model's predictions.

    Args:
        model: inputs -> logits; it runs on the device of its weights.
        inputs: (n, ...), see `TrainedModel.forward`.
        classes: names.
    """
    where = next((value.device for value in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    logits = [torch.zeros(0, len(classes))]
    with torch.no_grad():
        for batch in inputs.split(BATCH_SIZE) if len(inputs) else ():
            logits.append(model(batch.to(where)).float().cpu())
    every = torch.cat(logits)
    return Predictions(every.softmax(-1).numpy(), every.argmax(-1).numpy(), tuple(classes))


def trained_model(config: ExperimentConfig, card: Card, state: Mapping[str, Tensor], where: str) -> TrainedModel:
    """Returns the model of a run with these weights, on the CPU.

    Args:
        config: of the run.
        card: of the run.
        state: weights of its network.
        where: they come from, for messages.

    Raises:
        ValueError: the weights are not of this network, or the network cannot be built.
    """
    schema, config = card.schema, replace(config, model=replace(config.model, weights=None))  # here is all there was
    recipe = recipe_of(config.method, Task(len(schema.classes), config.num_rounds, card.labels))
    network = build_network(config, recipe, schema.shape, len(schema.classes), seed=0)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{where}: the weights are not of the network that the configuration describes "
            f"(`model.name`={config.model.name}): {' '.join(str(error).split())[:300]}"
        ) from error
    return TrainedModel(network, card)
