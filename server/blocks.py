"""Blocks of a cohort, and the weighted sums of their clients' models: which sums are made in which order.

A cohort, in client order, is cut into blocks that depend on its size only. A block's weighted sum is accumulated in
client order where its clients ran, and the server adds the sums of the blocks in their order. A failed client leaves a
hole in its block. So a round's result is the same to the bit on every grid and for any number of workers; see
docs/decisions/0009-engine.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.cohort import ClientResult
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart

Block = Sequence[int]
"""Clients whose models are added up before they reach the server, in ascending order."""
LARGEST_BLOCK = 8
"""Clients in a block: beyond it, a sum saves little traffic and the last blocks leave workers idle."""
BLOCKS = 16
"""How many blocks a cohort has at least, if it has so many clients: enough for as many workers."""


def cut_into_blocks(cohort: Sequence[int]) -> list[Block]:
    """Returns the blocks of a cohort in ascending order: one client each in small ones, at most `LARGEST_BLOCK`."""
    size = min(max(len(cohort) // BLOCKS, 1), LARGEST_BLOCK)
    return [cohort[start : start + size] for start in range(0, len(cohort), size)]


def cut_into_tasks(blocks: Sequence[Block], stack: int) -> list[list[Block]]:
    """Returns runs of consecutive blocks, each of the fewest blocks with at least `stack` clients.

    What is trained together may round differently, so tasks depend on the cohort and the configuration only.
    """
    tasks: list[list[Block]] = []
    for block in blocks:
        if tasks and sum(map(len, tasks[-1])) < stack:
            tasks[-1].append(block)
        else:
            tasks.append([block])
    return tasks


class Failure(NamedTuple):
    """A client without a usable result, or a reply that belongs to nobody."""

    who: str
    """ "client 3" or "node 12"."""
    reason: str
    """A line, then lines of a traceback, if any; may be a client's own words."""
    refused: bool = False
    """Whether something came and is not used."""


class BlockResult(NamedTuple):
    """What became of a block's clients."""

    results: list[ClientResult]
    """The checked results, in client order; their models are left out if they are in `total`."""
    failures: list[Failure]
    total: WeightedSum | None
    """The weighted sum of the models; None if nobody asked for it."""


class WeightedSum:
    """Weighted sums of models, one for each part of an upload, in double precision."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        """Part -> (numbers in a model,) float64, its arrays one after the other."""
        self.weights: dict[str, float] = {}
        """Part -> sum of the weights."""

    @classmethod
    def of(cls, results: Iterable[ClientResult]) -> WeightedSum:
        """Returns the sum of some clients' models, added in the given order."""
        models: dict[str, list[ModelPart]] = {}
        for result in results:
            for name, part in result.parts.items():
                models.setdefault(name, []).append(part)
        total = cls()
        for name, parts in models.items():
            total._add(name, weighted_sum(parts), sum(float(weight) for _, weight in parts))
        return total

    def add(self, parts: Mapping[str, ModelPart]) -> None:
        """Adds one client's models."""
        for name, part in parts.items():
            self._add(name, weighted_sum([part]), part.weight)

    def merge(self, other: WeightedSum) -> None:
        """Adds the sum of another block, which is not changed."""
        for name, total in other.totals.items():
            self._add(name, total if name in self.totals else total.clone(), other.weights[name])

    def _add(self, name: str, values: Tensor, weight: float) -> None:
        if name in self.totals:
            self.totals[name].add_(values)
            self.weights[name] += weight
        else:
            self.totals[name], self.weights[name] = values, float(weight)

    def mean(self, like: StateDict) -> StateDict | None:
        """Returns the plain mean of the parts' weighted means, with the names, types and device of `like`; None if a
        part has no weight, or there is none. Integers (BatchNorm's batch counter) and bools are rounded.
        """
        if not self.totals or any(weight <= 0 for weight in self.weights.values()):
            return None
        # Divided by a tensor: CUDA would multiply by a number's reciprocal, which rounds differently.
        means = [total / total.new_tensor(self.weights[name]) for name, total in self.totals.items()]
        mean = sum(means[1:], means[0])
        return dict(_apart(mean / mean.new_tensor(len(means)), like))


def weighted_sum(models: Sequence[ModelPart]) -> Tensor:
    """Returns the sum of some models times their weights, added in the given order: all numbers of a model, one array
    after the other, as a new (n,) float64 tensor; on the CPU where the device has no such numbers.

    Each product is rounded before it is added. `torch.add(..., alpha=weight)` would fuse both on some processors, or in
    some part of a tensor only. Arrays are added as they lie in memory, and put in order once.
    """
    sums: list[Tensor] = []
    products: list[Tensor] = []
    for state, weight in models:
        arrays = [value.cpu() if value.device.type == "mps" else value for value in state.values() if value.numel()]
        if not sums:
            sums = [value.to(torch.float64, copy=True) for value in arrays]
            torch._foreach_mul_(sums, float(weight))
            continue
        products = products or [torch.empty_like(value) for value in sums]
        torch._foreach_copy_(products, arrays)
        torch._foreach_mul_(products, float(weight))
        torch._foreach_add_(sums, products)
    return torch.cat([value.reshape(-1) for value in sums])


def _apart(values: Tensor, like: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Yields the arrays of a model from its numbers."""
    for (name, example), part in zip(
        like.items(), values.split([example.numel() for example in like.values()]), strict=True
    ):
        whole = part if example.is_floating_point() else part.round()
        yield name, whole.reshape(example.shape).to(example.device, example.dtype)
