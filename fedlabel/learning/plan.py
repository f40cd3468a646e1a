"""Draws all randomness of a phase before its first step: the samples and bags of each step, and the mixing shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.recipe import ByBag, ByKnowledge, BySample, Draw, Phase
from fedlabel.seeding import numpy_generator, torch_generator


class Units(NamedTuple):
    """The units that a phase draws by bags: bags, and single samples."""

    rows: Tensor
    """(units, k) int64, positions in the client's data, -1 where a unit has fewer than k samples."""
    counts: Tensor
    """(units, classes) int64, number of samples in each class; all 0 if the counts are unknown."""

    def samples(self) -> Tensor:
        """Returns the sorted positions of all samples, (m,)."""
        return self.rows[self.rows >= 0].sort().values

    def per_step(self, batch_size: int, least: int = 1) -> int:
        """Returns the number of units with about `batch_size` samples in all, at least `least`."""
        return max(least, round(batch_size * len(self.rows) / max(1, int((self.rows >= 0).sum()))))


@dataclass(frozen=True, eq=False)
class Pool:
    """The samples of a client that a phase draws from; positions in its data, on the CPU."""

    labeled: Tensor
    """(m,) int64."""
    unlabeled: Tensor
    """(u,) int64."""
    units: Units | None = None
    """Of a phase by bags; its samples are those of `labeled` and `unlabeled`."""

    def __len__(self) -> int:
        return len(self.labeled) + len(self.unlabeled)


class StepPlan(NamedTuple):
    """The samples of one step; positions in the client's data, on the CPU."""

    labeled: Tensor
    unlabeled: Tensor
    mix: Tensor
    mixing: float
    """Mixing weight of the first sample."""
    units: Units | None
    """Bags of the samples in `labeled`."""
    pseudo: Tensor
    """The samples whose pseudo-labels a loss reports, in its order."""
    guessed: Tensor
    """bool, whether the pseudo-label of each of these is a guess: its class is not certain, or is hidden from the
    loss."""


class Plan(NamedTuple):
    """The steps of a phase."""

    steps: tuple[StepPlan, ...]
    sizes: tuple[int, int, int]
    """Sizes of the pools of samples (units) that the labelled, the unlabelled and the mixed part are drawn from."""

    @property
    def most_drawn(self) -> int:
        """How often one sample (unit) is in a step, at most: all are drawn once before one is drawn again."""
        drawn = (
            sum(len(step.labeled if step.units is None else step.units.rows) for step in self.steps),
            sum(len(step.unlabeled) for step in self.steps),
            sum(len(step.mix) for step in self.steps),
        )
        return sum(-(-number // size) for number, size in zip(drawn, self.sizes, strict=True) if size)


def sample_pool(draw: Draw, supervision: Supervision, config: TrainingConfig) -> Pool:
    """Returns the samples that a phase draws from."""
    if isinstance(draw, ByBag):
        units, labeled = bag_units(supervision, draw.singles), supervision.labeled.cpu()
        samples = units.samples()
        return Pool(samples[labeled[samples]], samples[~labeled[samples]], units)
    with_label = (supervision.has_supervision if isinstance(draw, ByKnowledge) else supervision.labeled).cpu()
    rows, others = with_label.nonzero().squeeze(1), (~with_label).nonzero().squeeze(1)
    if config.unlabeled_includes_labeled:
        others = torch.arange(len(with_label))
    return Pool(rows if draw.labeled else rows[:0], others if draw.unlabeled else others[:0])


def plan_phase(
    phase: Phase, pool: Pool, chosen: Tensor | None, supervision: Supervision, config: TrainingConfig, seed: int
) -> Plan:
    """Draws the samples of all steps of a phase.

    Args:
        phase: the phase.
        pool: see `sample_pool`.
        chosen: (n,) bool, see `Prepared.draw`; None: all.
        supervision: the client's.
        config: how clients train.
        seed: the client's in this round.
    """
    draw = phase.draw
    labeled, unlabeled = pool.labeled, pool.unlabeled
    if chosen is not None:
        unlabeled = unlabeled[chosen.cpu()[unlabeled]]
    if len(labeled) + len(unlabeled) == 0:
        return Plan((), (0, 0, 0))
    size = config.batch_size * config.unlabeled_ratio
    if pool.units is not None:
        assert isinstance(draw, ByBag)
        places, per_step = torch.arange(len(pool.units.rows)), pool.units.per_step(config.batch_size, draw.least)
        unlabeled, mix = unlabeled[:0], unlabeled[:0]
        steps = count_steps(phase, config, len(places), per_step)
    else:
        places, per_step = labeled, config.batch_size
        mix = pool.unlabeled if isinstance(draw, BySample) and draw.mix else unlabeled[:0]
        over_labeled = count_steps(phase, config, len(labeled), config.batch_size)
        over_unlabeled = count_steps(phase, config, len(unlabeled), size)
        steps = over_unlabeled if len(unlabeled) else over_labeled
        if isinstance(draw, ByKnowledge):  # a single unlabelled sample must not end the epoch after a step
            steps = max(over_labeled, over_unlabeled)
    sources = {"labeled": (places, per_step), "unlabeled": (unlabeled, size), "mix": (mix, min(size, len(unlabeled)))}
    weight = supervision.weight
    if weight is not None:  # of a bag that of its first sample: no sample in a bag has another one
        weight = weight.cpu()[labeled if pool.units is None else pool.units.rows[:, 0]]
    streams = [
        draw_batches(rows, count, steps, torch_generator(seed, phase.name, kind), weight if kind == "labeled" else None)
        if len(rows)
        else [rows] * steps
        for kind, (rows, count) in sources.items()
    ]
    make = _StepMaker(draw, pool.units, supervision)
    drawn = zip(*streams, _mixing_shares(phase, steps, seed), strict=True)
    return Plan(tuple(make(*each) for each in drawn), (len(places), len(unlabeled), len(mix)))


def _mixing_shares(phase: Phase, steps: int, seed: int) -> list[float]:
    """Returns each step's draw from the Beta distribution; 1 where nothing is mixed."""
    draw = phase.draw
    if not isinstance(draw, BySample) or not draw.mix:
        return [1.0] * steps
    generator = numpy_generator(seed, phase.name, "mixing")
    return [float(generator.beta(draw.mix_alpha, draw.mix_alpha)) for _ in range(steps)]


class _StepMaker:
    """Makes the plan of a step of what was drawn for it."""

    def __init__(self, draw: Draw, units: Units | None, supervision: Supervision) -> None:
        self._by_knowledge, self._units = isinstance(draw, ByKnowledge), units
        if self._by_knowledge or units is not None:
            # Nothing is guessed where the label is certain, nor of a sample that is drawn without its supervision.
            self._unsure = (~supervision.labeled | supervision.noisy).cpu()
            self._hidden = ~supervision.has_supervision.cpu()
        self._everyone = torch.ones(0, dtype=torch.bool)

    def __call__(self, places: Tensor, unlabeled: Tensor, mix: Tensor, share: float) -> StepPlan:
        if self._units is not None:
            units = Units(self._units.rows[places], self._units.counts[places])
            rows = units.rows[units.rows >= 0]
            return StepPlan(rows, unlabeled, mix, share, units, rows, self._unsure[rows])
        if self._by_knowledge:
            guessed = torch.cat([self._unsure[places], self._hidden[unlabeled]])
            return StepPlan(places, unlabeled, mix, share, None, torch.cat([places, unlabeled]), guessed)
        if len(self._everyone) != len(unlabeled):
            self._everyone = torch.ones(len(unlabeled), dtype=torch.bool)
        return StepPlan(places, unlabeled, mix, share, None, unlabeled, self._everyone)


def draw_batches(
    index: Tensor, batch_size: int, steps: int, generator: torch.Generator, weight: Tensor | None = None
) -> Sequence[Tensor]:
    """Returns `steps` batches of min(batch_size, n) positions: shuffled passes over `index` (n,), cut without a gap.

    Args:
        index: the positions.
        batch_size: of a batch, at most.
        steps: number of batches.
        generator: of the passes.
        weight: (n,) in (0, 1], the probability that a pass has a position; None: it has all.
    """
    size = min(batch_size, len(index))
    if not size * steps:
        return [index[:0]] * steps
    if weight is None:
        passes = [torch.randperm(len(index), generator=generator) for _ in range(-(-size * steps // len(index)))]
    else:
        passes, drawn = [], 0
        while drawn < size * steps:
            order = torch.randperm(len(index), generator=generator)
            passes.append(order[torch.rand(len(index), generator=generator) < weight[order]])
            drawn += len(passes[-1])
    order = torch.cat(passes)[: size * steps] if len(passes) > 1 else passes[0][: size * steps]
    return index[order].split(size)


def count_steps(phase: Phase, config: TrainingConfig, num_samples: int, batch_size: int) -> int:
    """Returns the number of steps of a phase over `num_samples` samples, `batch_size` per step."""
    if phase.steps is not None:
        return phase.steps
    if config.local_steps is not None:
        return config.local_steps
    assert config.local_epochs is not None
    return config.local_epochs * -(-num_samples // batch_size)


def most_drawn(phase: Phase, config: TrainingConfig, num_samples: int, units: Units | None) -> tuple[int, int]:
    """Returns the largest number of (optimiser steps, samples over all of them) of a phase, whatever the labels.

    Args:
        phase: the phase.
        config: how clients train.
        num_samples: how many samples the client holds.
        units: what a phase by bags draws; None for any other.
    """
    draw = phase.draw
    if isinstance(draw, ByBag):
        assert units is not None
        drawn = units.per_step(config.batch_size, draw.least)
        steps = count_steps(phase, config, len(units.rows), drawn)
        per_step = min(drawn, len(units.rows)) * units.rows.shape[1]
    else:
        steps = count_steps(phase, config, num_samples, config.batch_size)
        more = config.batch_size * config.unlabeled_ratio
        mix = draw.mix if isinstance(draw, BySample) else ()
        sizes = ((draw.labeled, config.batch_size), (draw.unlabeled, more), (mix, more))
        per_step = sum(min(size, num_samples) for views, size in sizes if views)
    steps *= len(phase.updates)
    return steps, steps * per_step


def bag_units(supervision: Supervision, singles: bool) -> Units:
    """Returns bags, then the labelled samples in no bag and, with `singles`, the other samples in no bag; on the CPU.

    A noisy label is none: it would count as exact.
    """
    bag, counts, labeled = (x.cpu() for x in (supervision.bag, supervision.bag_counts, supervision.labeled))
    certain = labeled & ~supervision.noisy.cpu()
    alone = ((bag < 0) & (certain | singles)).nonzero().squeeze(1)
    order = bag.argsort(stable=True)[int((bag < 0).sum()) :]
    sizes = torch.bincount(bag[order], minlength=len(counts))
    k = int(sizes.max()) if len(sizes) else 1
    rows = torch.full((len(counts) + len(alone), k), -1)
    rows[bag[order], torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[bag[order]]] = order
    rows[len(counts) :, 0] = alone
    true = supervision.candidates.cpu()[alone] & certain[alone, None]
    return Units(rows, torch.cat([counts, true.long()]))
