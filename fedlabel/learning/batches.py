"""Makes batches from plans, for one client or several at once: hides labels from losses, and makes views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.plan import Plan, StepPlan
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Batch, Part, State
from fedlabel.methods.recipe import ByBag, ByKnowledge, BySample, Draw, Views
from fedlabel.seeding import Draws

KINDS = ("labeled", "unlabeled", "mix")


class Samples(NamedTuple):
    """The samples of one client, for the batches of a phase."""

    images: Tensor
    """(n, ...) on the device."""
    supervision: Supervision
    targets: Mapping[str, Tensor]
    """See `Prepared.targets`."""
    plan: Plan
    generator: torch.Generator
    """Of the augmentation, on the CPU."""


class BatchMaker:
    """Makes the batches of one phase, step by step: of a client, or of several whose steps have the same shapes.

    Args:
        draw: the phase's.
        clients: their samples; of several at least as many steps as are asked for.
        transform: makes views.
        stacked: whether all tensors of a batch get a first dimension, which counts the clients.
    """

    def __init__(self, draw: Draw, clients: Sequence[Samples], transform: ImageTransform, stacked: bool) -> None:
        assert stacked or len(clients) == 1
        self._by_supervision = isinstance(draw, ByKnowledge)
        self._views: dict[str, Views] = {
            "labeled": draw.labeled,
            "unlabeled": () if isinstance(draw, ByBag) else draw.unlabeled,
            "mix": draw.mix if isinstance(draw, BySample) else (),
        }
        self._clients, self._transform, self._stacked = clients, transform, stacked
        self._one = clients[0]
        self._device = self._one.images.device
        sizes = torch.tensor([client.plan.sizes for client in clients], dtype=torch.float32)
        sizes = (sizes if stacked else sizes[0]).to(self._device)
        self._sizes = {kind: sizes[..., place] for place, kind in enumerate(KINDS)}
        self._starts = torch.tensor([0, *(len(client.images) for client in clients[:-1])]).cumsum(0)
        together = (lambda values: values[0]) if len(clients) == 1 else torch.cat
        self._images: Tensor = together([client.images for client in clients])
        records = [client.supervision for client in clients]
        self._candidates: Tensor = together([record.candidates for record in records])
        self._noisy: Tensor = together([record.noisy for record in records])
        self._annotations: Tensor = together([record.annotations for record in records])
        self._targets = {name: together([c.targets[name] for c in clients]) for name in self._one.targets}
        self._empty: dict[str, Part] = {}

    def make(self, place: int, memory: State, clients: int = 1) -> Batch:
        """Returns the batch of a step.

        Args:
            place: number of the step, from 0.
            memory: of the client; of a stack with the first dimension.
            clients: number of clients, counted from the first, that take part in it.
        """
        steps = [client.plan.steps[place] for client in self._clients[:clients]]
        draws = Draws(*(client.generator for client in self._clients[:clients]))
        mixing = torch.tensor([step.mixing for step in steps], dtype=torch.float32)
        return Batch(
            labeled=self._part("labeled", steps, draws),
            unlabeled=self._part("unlabeled", steps, draws),
            mix=self._part("mix", steps, draws),
            mixing=(mixing if self._stacked else mixing[0]).to(self._device),
            memory=memory,
        )

    def _part(self, kind: str, steps: Sequence[StepPlan], draws: Draws) -> Part:
        if kind in self._empty and len(self._empty[kind].rows) == (len(steps) if self._stacked else 0):
            return self._empty[kind]
        chosen: list[Tensor] = [getattr(step, kind) for step in steps]
        size = self._sizes[kind]
        if self._stacked:
            local, size = torch.stack(chosen), size[: len(steps)]
            everywhere = (local + self._starts[: len(steps), None]).flatten()
        else:
            local = everywhere = chosen[0]
        rows = everywhere.to(self._device)
        candidates, noisy, annotations = self._candidates[rows], self._noisy[rows], self._annotations[rows]
        if kind != "labeled":  # a labelled sample drawn as an unlabelled one keeps its label to itself
            hidden = torch.ones_like(noisy) if self._by_supervision else candidates.sum(1) == 1
            candidates, noisy = candidates | hidden[:, None], noisy & ~hidden
            annotations = torch.where(hidden[:, None], -1, annotations)
        views = self._transform.views(self._images[rows], self._views[kind], draws)
        targets = {name: values[rows] for name, values in self._targets.items()}
        members, counts = self._bags(steps if kind == "labeled" else ())
        if self._stacked:
            shape = local.shape
            views = {name: values.unflatten(0, shape) for name, values in views.items()}
            targets = {name: values.unflatten(0, shape) for name, values in targets.items()}
            candidates, noisy, annotations = (v.unflatten(0, shape) for v in (candidates, noisy, annotations))
            if not len(members):
                members, counts = (v.expand(len(steps), *v.shape) for v in (members, counts))
        local = local.to(self._device) if self._stacked else rows
        part = Part(views, candidates, targets, noisy, annotations, local, size, members, counts)
        if not len(everywhere):  # so it is in every step
            self._empty[kind] = part
        return part

    def _bags(self, steps: Sequence[StepPlan]) -> tuple[Tensor, Tensor]:
        """Returns the members and counts of the bags of a step, of a stack with its dimension; of no bag without it."""
        units = [step.units for step in steps if step.units is not None]
        if not units:
            nobody = torch.zeros(0, 0, dtype=torch.int64, device=self._device)
            return nobody, self._one.supervision.bag_counts[:0]
        rows, counts = torch.stack([unit.rows for unit in units]), torch.stack([unit.counts for unit in units])
        inside = rows >= 0
        order = torch.arange(int(inside[0].sum())).repeat(len(units))
        members = rows.masked_scatter(inside, order)
        if not self._stacked:
            members, counts = members[0], counts[0]
        return members.to(self._device), counts.to(self._device)
