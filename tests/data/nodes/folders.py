"""Small folders of nodes for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedlabel.data.nodes.schema import Column, Schema

CLASSES = ("cat", "dog", "owl")
IMAGES = Schema(CLASSES, (1, 4, 5), (0.5,), (0.25,), annotators=("ann", "bob"), functions=("ears", "wings"))
TABLE = Schema(
    CLASSES,
    (4, 1, 1),
    columns=(Column("age", "number", 3.0, 2.0, 4.0), Column("job", "category", categories=("", "cook", "nurse"))),
)
AMOUNT = 8


def pixels(count: int = AMOUNT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5), dtype=np.uint8)


def write(folder: Path, images: np.ndarray | None = None, **files: str) -> Path:
    """Writes a folder; files: name without .csv -> its lines, separated by blanks or by line ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if "inputs" not in files:
        np.savez(folder / "inputs.npz", x=pixels() if images is None else images)
    for name, text in files.items():
        lines = text.split("\n") if "\n" in text else text.split(" ")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder
