"""A student that is a table of logits, one row per view of each sample: a row's gradient is that view's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import reveal_labels
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Batch, Model, State, StateDict, Step
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task
from tests.methods.batches import certain_part
from tests.methods.recipes import task

NOTHING: Mapping[str, Model] = {}


class Table:
    """Labelled samples with a weak view, unlabelled ones with a weak and a strong view, and their logits.

    Args:
        labeled: (l, classes) logits of the labelled samples.
        labels: (l,) their labels.
        weak: (u, classes) logits of the unlabelled samples' weak views.
        strong: (u, classes) logits of their strong views.
    """

    def __init__(self, labeled: Tensor, labels: Tensor, weak: Tensor, strong: Tensor) -> None:
        self.labels = labels
        self.labeled, self.weak, self.strong = labeled, weak, strong
        self.rows = torch.cat([labeled, weak, strong]).clone().requires_grad_()

    def student(self, images: Tensor) -> Tensor:
        """Looks images up, which hold the number of their row."""
        return self.rows[images.flatten().long()]

    def batch(self, memory: State | None = None, targets: dict[str, Tensor] | None = None) -> Batch:
        count, unlabeled, classes = len(self.labeled), len(self.weak), self.rows.shape[1]

        def images(first: int, size: int) -> Tensor:
            return torch.arange(first, first + size, dtype=torch.float32).view(size, 1, 1, 1)

        unknown = torch.ones(unlabeled, classes, dtype=torch.bool)
        views = {"weak": images(count, unlabeled), "strong": images(count + unlabeled, unlabeled)}
        return Batch(
            labeled=certain_part({"weak": images(0, count)}, self.labels[:, None] == torch.arange(classes), {}),
            unlabeled=certain_part(views, unknown, targets or {}),
            mix=certain_part({}, unknown[:0], {}),
            mixing=torch.tensor(1.0),
            memory=memory or {},
        )

    def gradients(self, step: Step) -> Gradients:
        """Returns the gradient of a loss with respect to the logits of each view."""
        (gradient,) = torch.autograd.grad(step.loss, self.rows)
        return Gradients(*gradient.split([len(self.labeled), len(self.weak), len(self.strong)]))


class Gradients(NamedTuple):
    labeled: Tensor
    weak: Tensor
    strong: Tensor


def random_table(seed: int, labeled: int = 3, unlabeled: int = 8, classes: int = 4, scale: float = 3.0) -> Table:
    """Random logits; with the default scale the largest probabilities spread from .4 to .99."""
    generator = torch.Generator().manual_seed(seed)

    def logits(n: int) -> Tensor:
        return scale * torch.randn(n, classes, generator=generator)

    labels = torch.randint(classes, (labeled,), generator=generator)
    return Table(logits(labeled), labels, logits(unlabeled), logits(unlabeled))


def logits_of(*probabilities: list[float]) -> Tensor:
    """Returns logits (n, classes) whose softmax is the given rows."""
    return torch.tensor(probabilities).log()


def softmax(row: Tensor) -> list[float]:
    """One row of logits as probabilities, in plain Python."""
    powers = [math.exp(value - max(row.tolist())) for value in row.tolist()]
    return [power / sum(powers) for power in powers]


def best(probs: list[float]) -> tuple[float, int]:
    """The largest probability and its class."""
    return max(probs), probs.index(max(probs))


def labeled_mean(table: Table) -> float:
    """Mean of -log p(label) over the labelled samples."""
    losses = [-math.log(softmax(row)[label]) for row, label in zip(table.labeled, table.labels.tolist(), strict=True)]
    return sum(losses) / len(losses)


# One round of one client, on images of 36 pixels and three classes.

CLASSES = 3
ROUND = TrainingConfig(lr=0.2, batch_size=4, local_steps=5)


def net(seed: int = 1) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES)
        )


def client(n: int = 30, labeled: int = 10) -> ClientData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randint(60, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), 0, labels] += 120
    return ClientData(images, reveal_labels(labels, torch.arange(n) < labeled, CLASSES))


def train_round(
    method: Method, data: ClientData | None = None, config: TrainingConfig = ROUND, shared: State | None = None
) -> ClientUpdate:
    """Trains from `net()`, whose weights must not change; weak views are the images themselves."""
    start = net().state_dict()
    before = {name: value.clone() for name, value in start.items()}
    transform = ImageTransform(
        torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(crop_padding=0, flip=False), allow_flip=False
    )
    trainer = Trainer(net(5), net(6), transform, config)
    recipe = method.recipe(task(CLASSES))
    memory = recipe.shared.start() if shared is None else shared
    update = train_client(recipe, trainer, start, client() if data is None else data, 1, 7, memory)
    assert same(start, before)
    return update


@dataclass(frozen=True)
class LabelsOnly(Method):
    """`Supervised` in a phase of another name, so that it draws the batches that a phase of that name draws."""

    name: str = "labels_only"
    phase: str = "train"

    def recipe(self, task: Task) -> Recipe:
        return Recipe((Stage((Phase(self.phase, labels_loss),)),), uses=LabelKinds.TRUE)


def model(update: ClientUpdate) -> StateDict:
    return update.parts["model"].state


def same(first: StateDict, second: StateDict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


def assert_all_moved(update: ClientUpdate) -> None:
    """Every parameter of the uploaded model differs from what was received, and is finite."""
    for name, value in net().state_dict().items():
        assert torch.isfinite(model(update)[name]).all()
        assert not torch.equal(model(update)[name], value), name


def assert_equals_labels_only(update: ClientUpdate) -> None:
    """A round in which no pseudo-label counts is a round on labels: same batches, same weights, same weight.

    Up to the order of additions: the batch has further rows, whose gradient is exactly 0.
    """
    expected = train_round(LabelsOnly())
    for name, value in model(expected).items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-7, rtol=1e-6)
    assert not same(model(expected), net().state_dict())


def assert_without_unlabeled_equals_supervised(method: Method) -> None:
    """A client that has labels only trains as `LabelsOnly` does, to the bit."""
    data = client(10, 10)
    assert same(model(train_round(method, data)), model(train_round(LabelsOnly(), data)))
