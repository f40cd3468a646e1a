"""Which samples a step draws: shuffled passes over samples, or whole bags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.data.supervision import Supervision
from fedlabel.methods.base import Phase
from fedlabel.training_config import TrainingConfig


def draw_batches(index: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields `steps` batches of min(batch_size, n) positions: shuffled passes over `index` (n,), cut without a gap."""
    size = min(batch_size, len(index))
    order = index[:0]
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, index[torch.randperm(len(index), generator=generator)]])
        yield order[:size]
        order = order[size:]


def count_steps(phase: Phase, config: TrainingConfig, num_samples: int, batch_size: int) -> int:
    """Returns how many steps a phase takes over `num_samples` samples, `batch_size` a step."""
    if phase.steps is not None:
        return phase.steps
    if config.local_steps is not None:
        return config.local_steps
    assert config.local_epochs is not None
    return config.local_epochs * -(-num_samples // batch_size)


def most_drawn(phase: Phase, config: TrainingConfig, num_samples: int, units: Units | None) -> tuple[int, int]:
    """Returns how many (optimiser steps, samples over all of them) a phase has at most, whatever is known of them.

    Args:
        phase: the phase.
        config: how clients train.
        num_samples: how many samples the client holds.
        units: what a phase by bags draws; None for any other.
    """
    if units is None:
        steps = count_steps(phase, config, num_samples, config.batch_size)
        more = config.batch_size * config.unlabeled_ratio
        sizes = ((phase.labeled, config.batch_size), (phase.unlabeled, more), (phase.mix, more))
        per_step = sum(min(size, num_samples) for views, size in sizes if views)
    else:
        drawn = units.per_step(config.batch_size, phase.least_bags)
        steps = count_steps(phase, config, len(units.rows), drawn)
        per_step = min(drawn, len(units.rows)) * units.rows.shape[1]
    steps *= len(phase.updates)
    return steps, steps * per_step


class Units(NamedTuple):
    """What a phase by bags draws: bags, and samples on their own."""

    rows: Tensor
    """(units, k) int64, positions in the client's data, -1 where a unit has fewer than k samples."""
    counts: Tensor
    """(units, classes) int64, samples in each class; all 0 where it is not known."""

    def samples(self) -> Tensor:
        """Returns the sorted positions of all samples, (m,)."""
        return self.rows[self.rows >= 0].sort().values

    def per_step(self, batch_size: int, least: int = 1) -> int:
        """Returns how many units have about `batch_size` samples, or `least`."""
        return max(least, round(batch_size * len(self.rows) / max(1, int((self.rows >= 0).sum()))))


def bag_units(supervision: Supervision, unlabeled: bool) -> Units:
    """Returns bags, then the labelled samples in no bag and, if asked for, the others; on the CPU.

    A noisy label is none: it would count as exact.
    """
    bag, counts, labeled = (x.cpu() for x in (supervision.bag, supervision.bag_counts, supervision.labeled))
    certain = labeled & ~supervision.noisy.cpu()
    alone = ((bag < 0) & (certain | unlabeled)).nonzero().squeeze(1)
    order = bag.argsort(stable=True)[int((bag < 0).sum()) :]
    sizes = torch.bincount(bag[order], minlength=len(counts))
    k = int(sizes.max()) if len(sizes) else 1
    rows = torch.full((len(counts) + len(alone), k), -1)
    rows[bag[order], torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[bag[order]]] = order
    rows[len(counts) :, 0] = alone
    known = supervision.candidates.cpu()[alone] & certain[alone, None]
    return Units(rows, torch.cat([counts, known.long()]))
