"""One client's round by hand: a small network, thirty images of three classes, and methods made up for the purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Batch, LossFunction, Model, PseudoLabels, State, StateDict, Step
from fedlabel.methods.recipe import ByKnowledge, BySample, LabelKinds, Memory, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.shared import Shared
from tests.methods.recipes import task
from tests.methods.tables import CLASSES, net

PLAIN = AugmentConfig(crop_padding=0, flip=False)
TRANSFORM = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), PLAIN, allow_flip=False)
CONFIG = TrainingConfig(lr=0.2, batch_size=4, local_steps=5)
TASK = task(CLASSES)
BOTH = BySample(unlabeled=("weak",))
UNLABELED = BySample(labeled=(), unlabeled=("weak",))
MIXED = BySample(unlabeled=("weak",), mix=("weak",))
BY_KNOWLEDGE = ByKnowledge(unlabeled=("weak",))


def client(n: int = 30, labeled: int = 10) -> tuple[ClientData, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randint(60, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), 0, labels] += 120  # row y is bright: learnable
    mask = torch.arange(n) < labeled
    return ClientData(images, reveal_labels(labels, mask, CLASSES)), labels


def train(
    method: Method, data: ClientData, config: TrainingConfig = CONFIG, state: StateDict | None = None, seed: int = 7
) -> ClientUpdate:
    """Runs round 1, from `net()` where `state` is None."""
    start = state if state is not None else net().state_dict()
    return train_client(method.recipe(TASK), Trainer(net(), net(), TRANSFORM, config), start, data, 1, seed)


class _Everything(Shared):
    """The server gets all that a client remembers."""

    def statistics(self, memory: State) -> State:
        return memory


@dataclass(frozen=True)
class Made(Method):
    """A method of the phases it is given; losses may keep notes, which no real method's does."""

    made: tuple[Phase, ...] = ()
    memory: State = field(default_factory=dict)
    server: tuple[Phase, ...] = ()

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            (Stage(self.made),),
            uses=LabelKinds.TRUE,
            memory=Memory(start=lambda candidates: dict(self.memory)),
            shared=_Everything(),
            server_phases=self.server,
        )


def to_class(target: int) -> LossFunction:
    """Pulls every unlabelled sample to one class."""

    def loss(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        images = batch.unlabeled.views["weak"]
        return Step(
            -student(images).log_softmax(-1)[:, target].sum() / max(len(images), 1), {}, torch.tensor(len(images))
        )

    return loss


def noted(loss: LossFunction) -> tuple[LossFunction, list[Batch]]:
    """The loss, and the batches that it will have seen."""
    seen: list[Batch] = []

    def watched(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        seen.append(batch)
        return loss(student, teachers, batch)

    return watched, seen


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return sum((first[name] - second[name]).square().sum().item() for name in second) ** 0.5


def rows_of(views: Tensor, data: ClientData) -> list[int]:
    """The positions of plain views in the client's data."""
    every = data.images.float() / 255
    return [int((every == view).flatten(1).all(1).nonzero().item()) for view in views]


def mixed_client() -> ClientData:
    """30 samples, five of each: a label, a set, a noisy label, annotators, nothing, a label and annotators."""
    images, truth = client()[0].images, torch.arange(30) % CLASSES
    kind = torch.arange(30) // 5
    candidates = torch.ones(30, CLASSES, dtype=torch.bool)
    single = (kind == 0) | (kind == 2) | (kind == 5)
    candidates[single] = (truth[:, None] == torch.arange(CLASSES))[single]
    candidates[kind == 1] = (truth[:, None] != torch.arange(CLASSES))[kind == 1]
    annotations = torch.full((30, 2), -1)
    annotations[(kind == 3) | (kind == 5), 1] = 2
    return ClientData(images, Supervision.without_bags(candidates, kind == 2, annotations))


CERTAIN = set(range(5)) | set(range(25, 30))
KNOWN = set(range(30)) - set(range(20, 25))


def believing(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    """Uses all samples, and believes of each that its class is its position in the client's data."""
    drawn = torch.cat([batch.labeled.rows, batch.unlabeled.rows])
    views = torch.cat([batch.labeled.views["weak"], batch.unlabeled.views["weak"]])
    loss = student(views).square().mean()
    true = torch.ones_like(drawn).bool()
    return Step(loss, {}, torch.tensor(len(drawn)), PseudoLabels(drawn, true, true, drawn / 30))
