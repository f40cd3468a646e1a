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
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (root, *scope))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(root: int, *scope: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a torch generator on `device`, seeded by `derive_seed`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(root, *scope))
    return generator


def numpy_generator(root: int, *scope: str | int) -> np.random.Generator:
    """Returns a numpy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(root, *scope))
