"""Reads users' image files with Pillow: headers and pixels."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.loaders import check_memory, instead_of_data
from fedlabel.shown import shown

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
"""Pillow's readers that are asked: none that calls another program, and none (TGA) that takes anything for an image."""
EXTENSIONS = frozenset(
    f".{name}"
    for name in "png apng jpg jpeg jpe jfif gif bmp tif tiff webp ppm pgm pbm pnm jp2 j2k mpo avif".split()  # noqa: SIM905
)
"""Of these formats, in lower case."""
ORIENTATION = 0x0112
"""Exif's tag that says how the camera was held."""
TURNED_BY_READER = ("TIFF",)
"""Formats whose images Pillow turns as Exif says when it reads them."""

Value = TypeVar("Value")


class Header(NamedTuple):
    """The header of an image, read before its pixels."""

    size: tuple[int, int]
    """(width, height) after rotation by Exif."""
    mode: str
    grey: bool
    see_through: bool
    """Whether it has an alpha channel, or a transparent colour."""
    turned: bool
    """Whether Exif rotates the image by 90 degrees."""
    animated: bool


def read_headers(paths: Sequence[Path]) -> tuple[list[Header], str]:
    """Returns all headers and "L" or "RGB"; raises a DataError if sizes differ or pixels have more than 8 bits."""
    headers: list[Header] = []
    _each(paths, read_header, headers.append)
    deep = [path for path, header in zip(paths, headers, strict=True) if header.mode.startswith(("I", "F"))]
    if deep:
        raise DataError(
            f"{shown(deep[0], 500)} has more than 8 bits a pixel; {len(deep)} of {len(paths)} images have. Convert "
            "them to 8 bits first, all on one scale."
        )
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        first = {size: path for path, header in zip(paths[::-1], headers[::-1], strict=True) for size in [header.size]}
        each = [f"{size[0]}x{size[1]} ({count}, e.g. {shown(first[size], 300)})" for size, count in sizes.most_common()]
        raise DataError(
            f"Images are of {len(sizes)} sizes (width x height): {'; '.join(each[:3])}{'; …' * (len(each) > 3)}. "
            "All images must be of one size: resize or crop them first."
        )
    return headers, "L" if all(header.grey for header in headers) else "RGB"


def read_header(image: Image.Image) -> Header:
    """Returns what an image says of itself."""
    turned = _orientation(image)
    grey = image.mode in ("1", "L", "LA")
    if image.mode in ("P", "PA"):
        colours = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        grey = bool((colours == colours[:, :1]).all())
    sideways = turned in (5, 6, 7, 8) and image.format not in TURNED_BY_READER
    return Header(
        size=image.size[::-1] if sideways else image.size,
        mode=image.mode,
        grey=grey,
        see_through=image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info,
        turned=turned != 1,
        animated=getattr(image, "is_animated", False),
    )


def _orientation(image: Image.Image) -> int:
    """Returns Exif's number, from 1 (upright) to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would read all pixels, for it may come behind them
    found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def read_pixels(paths: Sequence[Path], mode: str, size: tuple[int, int]) -> np.ndarray:
    """Returns (n, channels, height, width) uint8."""
    shape = (len(mode), size[1], size[0])
    check_memory(len(paths) * math.prod(shape), f"{len(paths)} images of {size[0]}x{size[1]} pixels")
    pixels = np.empty((len(paths), *shape), np.uint8)
    place = iter(range(len(paths)))

    def take(image: np.ndarray) -> None:
        pixels[next(place)] = image

    _each(paths, partial(_read, mode=mode), take)
    return pixels


def _read(image: Image.Image, mode: str) -> np.ndarray:
    """Returns (channels, height, width) uint8."""
    turns = _orientation(image) != 1 and image.format not in TURNED_BY_READER
    upright = ImageOps.exif_transpose(image) if turns else image
    return np.atleast_3d(np.asarray(upright.convert(mode))).transpose(2, 0, 1)


def _each(paths: Sequence[Path], read: Callable[[Image.Image], Value], take: Callable[[Value], None]) -> None:
    """Applies `read` to each image and passes the result to `take`; raises a DataError that counts unreadable
    images.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # not every Pillow was built with all of them
    failures: list[tuple[Path, str]] = []
    for path in paths:
        try:
            if not path.is_file():
                raise FileNotFoundError("it is no file, but a broken link or a pipe")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged Exif, say
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=formats) as image:
                    take(read(image))
        except Exception as error:  # Pillow's readers raise whatever comes to them in a damaged file
            failures.append((path, _reason(path, error)))
    if failures:
        path, reason = failures[0]
        many = f" {len(failures)} of {len(paths)} images cannot be read." if len(failures) > 1 else ""
        raise DataError(
            f"{shown(path, 500)} cannot be read as an image: {reason}.{many} Replace or delete it."
        ) from None


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"it claims to be larger than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is in none of the formats {', '.join(FORMATS)}.{instead_of_data(path)}".rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown(" ".join(f"{error}".split()) or type(error).__name__, 200).rstrip(".")
