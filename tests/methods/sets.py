"""Samples of which something is known, by hand: a student that is a table, and a client with candidate sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData
from fedlabel.methods.batch import Batch, LossFunction, Part, State, Step
from tests.methods.tables import CLASSES, client

NOTHING: State = {}


class Known:
    """Labelled samples and the logits of their weak views, (n, classes) or (n, networks, classes).

    Args:
        logits: the student's output, one entry per sample; the images hold their number.
        candidates: (n, classes) bool.
        noisy: (n,) bool; None: all False.
        rows: (n,) positions in the client's data; None: in order.
    """

    def __init__(
        self, logits: Tensor, candidates: Tensor, noisy: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        n = len(logits)
        self.logits = logits.clone().requires_grad_()
        self.candidates = candidates
        self.noisy = torch.zeros(n, dtype=torch.bool) if noisy is None else noisy
        self.rows = torch.arange(n) if rows is None else rows

    def student(self, images: Tensor) -> Tensor:
        return self.logits[images.flatten().long()]

    def batch(self, memory: State = NOTHING) -> Batch:
        n, classes = self.candidates.shape
        images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
        nobody = torch.full((n, 0), -1)
        part = Part(
            {"weak": images}, self.candidates, {}, self.noisy, nobody, self.rows, torch.tensor(float(len(self.rows)))
        )
        none = Part({}, torch.ones(0, classes).bool(), {}, self.noisy[:0], nobody[:0], self.rows[:0], torch.tensor(0.0))
        return Batch(part, none, none, torch.tensor(1.0), memory)

    def run(self, loss: LossFunction, memory: State = NOTHING) -> tuple[Step, Tensor]:
        """Returns a step and the gradient of its loss by the logits."""
        step = loss(self.student, {}, self.batch(memory))
        (gradient,) = torch.autograd.grad(step.loss, self.logits)
        return step, gradient


def sets(*members: Sequence[int], classes: int) -> Tensor:
    """Returns (n, classes) bool from the members of each set."""
    return torch.tensor([[label in inside for label in range(classes)] for inside in members])


def random_known(seed: int, n: int = 8, classes: int = 4, several: bool = True) -> Known:
    """Random logits and sets; the last sample's is of all classes. several=False: labels, half of them noisy."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    truth = torch.randint(classes, (n,), generator=generator)
    candidates = truth[:, None] == torch.arange(classes)
    if several:
        candidates = candidates | (torch.rand(n, classes, generator=generator) < 0.4)
    candidates[-1] = True
    return Known(logits, candidates, torch.arange(n) % 2 == 0, torch.randperm(n, generator=generator))


def client_with_sets(n: int = 30) -> ClientData:
    """The truth and, in two of three samples, a wrong class; nothing is known of the last five."""
    data = client(n, n)
    wrong = torch.nn.functional.one_hot((data.supervision.label + 1) % CLASSES, CLASSES).bool()
    candidates = data.supervision.candidates | (wrong & (torch.arange(n) % 3 > 0)[:, None])
    candidates[-5:] = True
    return ClientData(data.images, Supervision.certain(candidates))


def assert_stacks(loss: LossFunction, known: Sequence[Known], memories: Sequence[State]) -> None:
    """Several clients under `torch.func.vmap` have the loss and the memory that they have one by one."""

    def run(logits: Tensor, batch: Batch) -> tuple[Tensor, State]:
        student: Callable[[Tensor], Tensor] = lambda images: logits[images.flatten().long()]  # noqa: E731
        step = loss(student, {}, batch)
        return step.loss, step.memory or {}

    batches = [one.batch(memory) for one, memory in zip(known, memories, strict=True)]
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *batches)
    losses, kept = vmap(run)(torch.stack([one.logits.detach() for one in known]), stacked)
    for i, (one, batch) in enumerate(zip(known, batches, strict=True)):
        own_loss, own_kept = run(one.logits.detach(), batch)
        torch.testing.assert_close(losses[i], own_loss)
        for name, value in own_kept.items():
            torch.testing.assert_close(kept[name][i], value)
