"""Files for TensorBoard's projector: points, what is known of each, and a thumbnail of each."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

FOLDER = "projector"
CONFIG = "projector_config.pbtxt"
"""TensorBoard looks for it in the folder of a run."""
TILE = 32
"""Largest side of a thumbnail, in pixels."""


def projector_files(
    name: str, points: np.ndarray, columns: Mapping[str, Sequence[object]], images: np.ndarray | None
) -> dict[str, str | bytes]:
    """Returns path in the run's folder -> content; the configuration comes last.

    Args:
        name: of the points.
        points: (n, features) numbers.
        columns: heading -> (n,) values, at least two columns.
        images: (n, channels, height, width) uint8; None: no pictures.
    """
    rows = zip(*columns.values(), strict=True)
    table = [_line(columns), *(_line(row) for row in rows)]
    files: dict[str, str | bytes] = {
        f"{FOLDER}/points.bytes": np.ascontiguousarray(points, dtype="<f4").tobytes(),
        f"{FOLDER}/metadata.tsv": "\n".join(table) + "\n",
    }
    text = [
        "embeddings {",
        f'  tensor_name: "{name}"',
        f'  tensor_path: "{FOLDER}/points.bytes"',
        f"  tensor_shape: {points.shape[0]}",
        f"  tensor_shape: {points.shape[1]}",
        f'  metadata_path: "{FOLDER}/metadata.tsv"',
    ]
    if images is not None:
        sprite, height, width = _sprite(images)
        files[f"{FOLDER}/sprite.png"] = sprite
        text += [
            "  sprite {",
            f'    image_path: "{FOLDER}/sprite.png"',
            f"    single_image_dim: {width}",
            f"    single_image_dim: {height}",
            "  }",
        ]
    return {**files, CONFIG: "\n".join([*text, "}"]) + "\n"}


def _line(values: Sequence[object] | Mapping[str, object]) -> str:
    return "\t".join(" ".join(str(value).split()) for value in values)


def _sprite(images: np.ndarray) -> tuple[bytes, int, int]:
    """Returns a square of thumbnails, row by row, as PNG, and the height and width of each."""
    from PIL import Image

    step = max(1, math.ceil(max(images.shape[2:]) / TILE))
    tiles = images[:, :, ::step, ::step]
    tiles = np.repeat(tiles[:, :1], 3, 1) if tiles.shape[1] != 3 else tiles
    count, _, height, width = tiles.shape
    side = math.ceil(math.sqrt(count))
    sheet = np.zeros((side, side, height, width, 3), dtype=np.uint8)
    sheet.reshape(-1, height, width, 3)[:count] = tiles.transpose(0, 2, 3, 1)
    buffer = io.BytesIO()
    Image.fromarray(sheet.transpose(0, 2, 1, 3, 4).reshape(side * height, side * width, 3)).save(buffer, format="PNG")
    return buffer.getvalue(), height, width
