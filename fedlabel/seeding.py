"""Randomness as a pure function of (seed, purpose, round, client), so that any worker draws the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(root: int, *scope: str | int) -> int:
    """Returns a 63-bit seed that depends on `root` and every element of `scope`.

    Args:
        root: the experiment's `seed`.
        scope: what the numbers are for, e.g. `("augment", round, client)`. Order and type matter.

    Returns:
        An integer in [0, 2**63).
    """
    return int.from_bytes(_hash(root, *scope).digest(), "big") >> 1


def derive_seeds(root: int, *scope: str | int, last: np.ndarray) -> np.ndarray:
    """Returns (m,) uint64, `derive_seed(root, *scope, each)` for each of `last`, (m,) integers, e.g. clients."""
    begun, digests = _hash(root, *scope), []
    for each in last.tolist():
        each_hash = begun.copy()
        each_hash.update(b"\x1fint:%d" % each)
        digests.append(each_hash.digest())
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64) >> np.uint64(1)


def _hash(*scope: str | int) -> hashlib.blake2b:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in scope)
    return hashlib.blake2b(text.encode(), digest_size=8)


def torch_generator(root: int, *scope: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a torch generator on `device`, seeded by `derive_seed`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(root, *scope))
    return generator


def numpy_generator(root: int, *scope: str | int) -> np.random.Generator:
    """Returns a numpy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(root, *scope))


class Draws:
    """Random numbers for a batch whose samples belong to several clients in equal shares, one client after the other.

    Each client's come from its own generator, so that they do not depend on who shares the batch; all are made on the
    CPU, so that they do not depend on the device either.
    """

    def __init__(self, *generators: torch.Generator) -> None:
        """Takes a CPU generator for each client."""
        self._generators: Sequence[torch.Generator] = generators

    def integers(self, low: int, high: int, shape: Sequence[int], dim: int = 0) -> Tensor:
        """Returns int64 in [low, high); dim: the dimension of `shape` that counts the samples."""
        return self._drawn(lambda size, g: torch.randint(low, high, size, generator=g), shape, dim)

    def uniform(self, shape: Sequence[int], dim: int = 0) -> Tensor:
        """Returns float32 in [0, 1); dim: see `integers`."""
        return self._drawn(lambda size, g: torch.rand(size, generator=g), shape, dim)

    def normal(self, shape: Sequence[int], dim: int = 0) -> Tensor:
        """Returns float32 with mean 0 and variance 1; dim: see `integers`."""
        return self._drawn(lambda size, g: torch.randn(size, generator=g), shape, dim)

    def _drawn(self, draw: Callable[[list[int], torch.Generator], Tensor], shape: Sequence[int], dim: int) -> Tensor:
        size = list(shape)
        if len(self._generators) == 1:
            return draw(size, self._generators[0])
        assert size[dim] % len(self._generators) == 0, (size, dim, len(self._generators))
        size[dim] //= len(self._generators)
        return torch.cat([draw(size, generator) for generator in self._generators], dim)
