"""Makes batches from plans, for one client or several at once: hides labels from losses, and makes views."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.augment import Numbers
from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.plan import Plan, StepPlan
from fedlabel.learning.prior import NO_PRIOR
from fedlabel.learning.views import ImageTransform, joined
from fedlabel.methods.batch import Batch, Part, State
from fedlabel.methods.recipe import ByBag, ByKnowledge, BySample, Draw, Views
from fedlabel.seeding import Draws
from fedlabel.transfer import to_device

KINDS = ("labeled", "unlabeled", "mix")
AHEAD = {"cpu": 512, "cuda": 4096}
"""Samples of steps to come whose batches are made together, at least, by device: beyond it a core's cache is too small
for them."""
AHEAD_BYTES = 64 * 2**20
"""Memory that their views may take, about."""


class Samples(NamedTuple):
    """The samples of one client, for the batches of a phase."""

    images: Tensor
    """(n, ...) on the device."""
    supervision: Supervision
    """On the CPU."""
    targets: Mapping[str, Tensor]
    """See `Prepared.targets`."""
    plan: Plan
    generator: torch.Generator
    """Of the augmentation, on the CPU."""
    log_prior: Tensor = NO_PRIOR
    """See `Batch.log_prior`."""


class _Ahead(NamedTuple):
    """What the samples of one kind have in some steps in a row: a tensor for each step, one client after the other."""

    rows: Sequence[Tensor]
    """Positions among all clients' samples."""
    candidates: Sequence[Tensor]
    noisy: Sequence[Tensor]
    annotations: Sequence[Tensor]
    targets: Mapping[str, Sequence[Tensor]]
    views: Mapping[str, Sequence[Tensor]]


class BatchMaker:
    """Makes the batches of one phase, step by step: of a client, or of several whose steps have the same shapes.

    Args:
        draw: the phase's.
        clients: their samples; those with more steps come first.
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
        together = (lambda values: values[0]) if len(clients) == 1 else torch.cat
        records = [client.supervision for client in clients]
        self._images: Tensor = together([client.images for client in clients])
        self._candidates, self._noisy, self._annotations = (
            to_device(together([getattr(record, name) for record in records]), self._device)
            for name in ("candidates", "noisy", "annotations")
        )
        priors = torch.stack([client.log_prior for client in clients])
        self._log_prior = to_device(priors if stacked else priors[0], self._device)
        self._targets = {name: together([c.targets[name] for c in clients]) for name in self._one.targets}
        self._starts = [0, *itertools.accumulate(len(client.images) for client in clients[:-1])]
        """Where each client's samples begin among those of all."""
        self._starts_there = to_device(torch.tensor(self._starts), self._device)
        mixing = [[step.mixing for step in self._steps(place)] for place in range(self._count)]
        every = to_device(torch.tensor(list(itertools.chain(*mixing))), self._device)
        self._mixing = every.split([len(each) for each in mixing])
        self._no_bags = self._bags(())
        views = max(1, sum(map(len, self._views.values())))
        most = AHEAD_BYTES // (4 * views * max(1, self._images[0].numel()))
        self._at_once = min(AHEAD.get(self._device.type, AHEAD["cpu"]), most)
        self._begin, self._end = 0, 0
        """The steps, from the first to before the last, whose batches are made."""
        self._ahead: dict[str, _Ahead] = {}
        self._empty: dict[str, Part] = {}

    @property
    def _count(self) -> int:
        return len(self._one.plan.steps)

    def _steps(self, place: int) -> list[StepPlan]:
        """Returns the plans of a step of the clients that take it; those with more steps come first."""
        return [client.plan.steps[place] for client in self._clients if place < len(client.plan.steps)]

    def _make_ahead(self, begin: int) -> None:
        """Makes the batches of some steps, from step `begin` on: at once, which for steps of few samples takes a
        fraction of the time. Random numbers are drawn as for one step after the other.
        """
        rows: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        sizes: dict[str, list[int]] = {kind: [] for kind in KINDS}
        numbers: dict[str, list[dict[str, Numbers]]] = {kind: [] for kind in KINDS}
        end, samples = begin, 0
        while end < self._count and samples < max(self._at_once, 1):
            steps = self._steps(end)
            draws = Draws(*(client.generator for client in self._clients[: len(steps)]))
            for kind in KINDS:
                own = [getattr(step, kind) for step in steps]
                rows[kind] += [each + start if start else each for each, start in zip(own, self._starts, strict=False)]
                sizes[kind].append(sum(map(len, own)))
                samples += sizes[kind][-1]
                if sizes[kind][-1] or not numbers[kind]:
                    numbers[kind].append(
                        self._transform.numbers(self._images, sizes[kind][-1], self._views[kind], draws)
                    )
            end += 1
        self._begin, self._end = begin, end
        self._ahead = {kind: self._look_up(kind, rows[kind], sizes[kind], joined(numbers[kind])) for kind in KINDS}

    def _look_up(self, kind: str, rows: Sequence[Tensor], sizes: list[int], numbers: Mapping[str, Numbers]) -> _Ahead:
        """Returns what the samples of one kind have in some steps.

        Args:
            kind: one of `KINDS`.
            rows: positions of each client's in each step.
            sizes: how many samples each step has.
            numbers: for the views.
        """
        where = to_device(torch.cat(list(rows)), self._device)

        def take(values: Tensor) -> Tensor:
            return values[where] if len(where) else values[:0]  # which takes less time

        candidates, noisy, annotations = take(self._candidates), take(self._noisy), take(self._annotations)
        names = self._views[kind]
        if kind != "labeled" and names:  # a labelled sample drawn as an unlabelled one keeps its label to itself
            hidden = torch.ones_like(noisy) if self._by_supervision else candidates.sum(1) == 1
            candidates, noisy = candidates | hidden[:, None], noisy & ~hidden
            annotations = torch.where(hidden[:, None], -1, annotations)
        views = self._transform.views_with(take(self._images), numbers) if names else {}
        return _Ahead(
            where.split(sizes),
            candidates.split(sizes),
            noisy.split(sizes),
            annotations.split(sizes),
            {name: take(values).split(sizes) for name, values in self._targets.items()},
            {name: values.split(sizes) for name, values in views.items()},
        )

    def make(self, place: int, memory: State) -> Batch:
        """Returns the batch of a step.

        Args:
            place: number of the step, from 0.
            memory: of the client; of a stack with the first dimension, for the clients that take the step.
        """
        if not self._begin <= place < self._end:
            self._make_ahead(place)
        steps = self._steps(place)
        mixing = self._mixing[place]
        return Batch(
            labeled=self._part("labeled", place, steps),
            unlabeled=self._part("unlabeled", place, steps),
            mix=self._part("mix", place, steps),
            mixing=mixing if self._stacked else mixing[0],
            memory=memory,
            log_prior=self._log_prior[: len(steps)] if self._stacked else self._log_prior,
        )

    def _part(self, kind: str, place: int, steps: Sequence[StepPlan]) -> Part:
        if kind in self._empty and (not self._stacked or len(self._empty[kind].rows) == len(steps)):
            return self._empty[kind]
        ahead, at = self._ahead[kind], place - self._begin
        rows, size = ahead.rows[at], self._sizes[kind]
        candidates, noisy, annotations = ahead.candidates[at], ahead.noisy[at], ahead.annotations[at]
        views = {name: values[at] for name, values in ahead.views.items()}
        targets = {name: values[at] for name, values in ahead.targets.items()}
        members, counts = self._bags(steps) if kind == "labeled" and steps[0].units is not None else self._no_bags
        empty = not len(rows)
        if self._stacked:
            shape, size = (len(steps), len(rows) // len(steps)), size[: len(steps)]
            rows = rows.unflatten(0, shape) - self._starts_there[: len(steps), None]
            views = {name: values.unflatten(0, shape) for name, values in views.items()}
            targets = {name: values.unflatten(0, shape) for name, values in targets.items()}
            candidates, noisy, annotations = (v.unflatten(0, shape) for v in (candidates, noisy, annotations))
            if not len(members):
                members, counts = (v.expand(len(steps), *v.shape) for v in (members, counts))
        part = Part(views, candidates, targets, noisy, annotations, rows, size, members, counts)
        if empty:  # so it is in every step
            self._empty[kind] = part
        return part

    def _bags(self, steps: Sequence[StepPlan]) -> tuple[Tensor, Tensor]:
        """Returns the members and counts of the bags of a step, of a stack with its dimension; of no bag without it."""
        units = [step.units for step in steps if step.units is not None]
        if not units:
            nobody = torch.zeros(0, 0, dtype=torch.int64, device=self._device)
            return nobody, self._candidates[:0].long()
        rows, counts = torch.stack([unit.rows for unit in units]), torch.stack([unit.counts for unit in units])
        inside = rows >= 0
        order = torch.arange(int(inside[0].sum())).repeat(len(units))
        members = rows.masked_scatter(inside, order)
        if not self._stacked:
            members, counts = members[0], counts[0]
        return to_device(members, self._device), to_device(counts, self._device)
