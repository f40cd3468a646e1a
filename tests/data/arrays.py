"""Small npz files and folders of images for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fedlabel.data.sets.config import DataConfig

RNG = np.random.default_rng(0)


def arrays(**changes: object) -> dict[str, np.ndarray]:
    """Returns 20 training and 6 test images, grey, 5 x 4, of four classes; a change to None leaves an array out."""
    made: dict[str, object] = {
        "x_train": RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_test": np.arange(6) % 4,
    } | changes
    return {key: np.asanyarray(value) for key, value in made.items() if value is not None}


def write_npz(path: Path, **changes: object) -> DataConfig:
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    return DataConfig(name="npz", root=str(path), validation_fraction=0.0)


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (5, 6), mode: str = "L", **options: object) -> Path:
    """Writes an image that is `value` all over; size: (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    Image.new(mode, size, value if bands == 1 else (value,) * bands).save(path, **options)
    return path


def write_images(root: Path, mode: str = "RGB") -> Path:
    """Writes three training and two test images of each of two classes: 0, 1, 2 are cats; 10, 11, 12 are dogs."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(root / part / name / f"{i}.png", 10 * label + i + 100 * (part == "test"), mode=mode)
    return root
