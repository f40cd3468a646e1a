"""Randomness as a pure function of (seed, purpose, round, client), so that any worker draws the same numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


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
