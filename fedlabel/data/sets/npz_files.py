"""Arrays of numbers and texts in a user's .npz file: `read_npz`, and `load_npz`, a data set in such a file."""

from __future__ import annotations

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy

from fedlabel.data.sets.array_labels import Labels, number_labels
from fedlabel.data.sets.array_pixels import to_pixels
from fedlabel.data.sets.cells import LARGEST
from fedlabel.data.sets.config import DataError, data_root
from fedlabel.data.sets.loaders import Loaded, Split, check_expansion, check_memory, instead_of_data
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.repeats import repeated_images
from fedlabel.names import near
from fedlabel.shown import shown

if TYPE_CHECKING:
    from fedlabel.data.sets.config import DataConfig

KEYS = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL_KEYS = ("class_names",)
CHANNEL_AXIS = "channel_axis"
ALIKE = {
    "x_train": ("train_x", "xtrain", "train_images", "images_train", "train_data", "data_train", "x", "images", "data"),
    "y_train": ("train_y", "ytrain", "train_labels", "labels_train", "train_targets", "y", "labels", "targets"),
    "x_test": ("test_x", "xtest", "test_images", "images_test", "test_data", "data_test"),
    "y_test": ("test_y", "ytest", "test_labels", "labels_test", "test_targets"),
    "class_names": ("classes", "names", "label_names", "target_names", "labelnames", "classnames"),
}
"""What others call these arrays."""
PIECE = 1 << 20
"""Bytes that are read at a time."""
AGAIN = "Write it again with `numpy.savez`."


def load_npz(config: DataConfig) -> Loaded:
    """A numpy archive of images: x_train, y_train, x_test, y_test and optionally class_names (an array of texts).

    x: (n, h, w) grey; or (n, h, w, c) or (n, c, h, w) with c = 1 or 3; with another array `channel_axis` (1 or 3) any
    number of channels; for the values see `to_pixels`. y: one label per image, for what they may be see
    `number_labels`.
    """
    archive = _read_set(config, (CHANNEL_AXIS,))
    arrays = archive.arrays
    axis = _channel_axis(arrays[CHANNEL_AXIS], f"{archive.path}: `{CHANNEL_AXIS}`") if CHANNEL_AXIS in arrays else None
    pixels, notes = to_pixels(arrays.pop("x_train"), arrays.pop("x_test"), str(archive.path), axis)
    train, test = archive.splits([torch.from_numpy(images) for images in pixels])
    notes += [*archive.notes, *repeated_images(train, test, str(archive.path))]
    return Loaded(train, test, archive.labels.class_names, tuple(notes))


def load_arrays(config: DataConfig) -> Loaded:
    """A numpy archive as of `load_npz` whose x_train and x_test are no images, but numbers of any meaning: sequences of
    tokens, signals, features. They are neither scaled nor normalised.

    x: (n, a), (n, a, b) or (n, a, b, c); a network receives float32, (n, a, 1, 1), (n, a, b, 1) or (n, a, b, c).
    Whole numbers (of an integer type) get no noise in augmented views; `augment.feature_dropout` makes zeros of them.
    """
    archive = _read_set(config)
    where = [f"{archive.path}: `{key}`" for key in ("x_train", "x_test")]
    found = [archive.arrays[key] for key in ("x_train", "x_test")]
    for array, name in zip(found, where, strict=True):
        if array.dtype.kind not in "biuf" or not 2 <= array.ndim <= 4 or array.size == 0:
            raise DataError(
                f"{name} is {array.dtype} of shape {array.shape}; it must hold numbers, (n, a), (n, a, b) or "
                "(n, a, b, c), at least one for each sample."
            )
        low, high = float(array.min()), float(array.max())
        if not (-LARGEST <= low <= high <= LARGEST):  # NaN, too
            raise DataError(
                f"{name} holds values from {low:g} to {high:g}; they must be numbers in [-{LARGEST:g}, {LARGEST:g}]. "
                "Leave out the samples that have others, or fill them."
            )
        if array.dtype.kind in "iu" and max(-low, high) > 2**24:
            raise DataError(
                f"{name} holds whole numbers up to {max(-low, high):g}; single precision holds each one up to 2^24 "
                "alone. Number the tokens from 0 on."
            )
    if found[0].shape[1:] != found[1].shape[1:] or found[0].dtype.kind != found[1].dtype.kind:
        raise DataError(
            f"{' and '.join(where)} are {found[0].dtype} of shape {found[0].shape} and {found[1].dtype} of shape "
            f"{found[1].shape}. Samples of both must be alike."
        )
    check_memory(4 * (found[0].size + found[1].size), f"The arrays of {archive.path}")
    inputs = [
        torch.from_numpy(array.astype(np.float32)).reshape(*array.shape, *(1,) * (4 - array.ndim)) for array in found
    ]
    train, test = archive.splits(inputs)
    return Loaded(train, test, archive.labels.class_names, tuple(archive.notes), discrete=found[0].dtype.kind != "f")


class _Archive(NamedTuple):
    """The content of an archive."""

    path: Path
    arrays: dict[str, np.ndarray]
    labels: Labels
    notes: list[str]

    def splits(self, inputs: Sequence[torch.Tensor]) -> tuple[Split, Split]:
        """Returns training and test set; inputs: of both."""
        train, test = map(torch.from_numpy, (self.labels.train, self.labels.test))
        return Split(inputs[0], train), Split(inputs[1], test)


def _read_set(config: DataConfig, further: Sequence[str] = ()) -> _Archive:
    """Reads inputs and labels; further: names of other arrays that mean something."""
    path = data_root(config)
    if not path.is_file():
        inside = sorted(path.glob("*.npz")) if path.is_dir() else []
        raise DataError(
            f"`data.root` (={config.root}): there is no file {path}. Set data.root=<file.npz> that holds the keys "
            f"{', '.join(KEYS)}." + (f" That folder has {listed([each.name for each in inside])}." if inside else "")
        )
    read = (*KEYS, *OPTIONAL_KEYS, *further)
    arrays, names = read_npz(path, read)
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it holds {listed(names) or 'nothing'}. The keys must be "
            f"{', '.join(KEYS)} and, if wanted, class_names."
            + (_meant(missing, names) if len(names) > 1 else " A file of labels alone is for supervision.labels_file.")
        )
    where = {key: f"{path}: `{key}`" for key in (*KEYS, *OPTIONAL_KEYS)}
    for part in ("train", "test"):
        _check_lengths(arrays[f"x_{part}"], arrays[f"y_{part}"], where[f"x_{part}"], where[f"y_{part}"])
    labels = number_labels(arrays["y_train"], arrays["y_test"], arrays.get("class_names"), where)
    notes = []
    unread = [name for name in names if name not in read]
    if unread:
        hint = _meant(["class_names"], unread) if "class_names" not in names else ""
        is_used = "is used" if len(unread) == 1 else "are used"
        notes.append(
            f"{path}: {listed(unread)} of it {is_used} only where a key names it, e.g. partition.column.{hint}"
        )
    return _Archive(path, arrays, labels, [*notes, *labels.notes])


def _channel_axis(value: np.ndarray, name: str) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or int(value.flat[0]) not in (1, 3):
        raise DataError(f"{name} (={shown(value)}) must be 1, for (n, c, h, w), or 3, for (n, h, w, c).")
    return int(value.flat[0])


def _check_lengths(images: np.ndarray, labels: np.ndarray, images_name: str, labels_name: str) -> None:
    if images.ndim == 0 or len(images) == 0:
        raise DataError(f"{images_name} holds no images. At least one is needed.")
    count = labels.size if labels.ndim < 2 else max(labels.shape) if labels.size == max(labels.shape) else len(labels)
    if len(images) != count:
        last = images.ndim > 2 and images.shape[-1] == count
        raise DataError(
            f"{images_name} holds {len(images)} images, but {labels_name} holds {count} labels. "
            "There must be one label per image"
            + (" (-1 for an image without one)." if images_name.endswith("train`") else ".")
            + (" If the images stand along the last axis: `numpy.moveaxis(x, -1, 0)`." if last else "")
        )


def _meant(missing: Collection[str], names: Collection[str]) -> str:
    """Returns " Did you mean ...?" for keys with other names; "" if none is similar."""
    last = {name: name.rpartition("/")[2].casefold() for name in names if name not in KEYS}  # without folders
    plain = {text.replace("-", "_").replace(" ", "_"): name for name, text in last.items()}
    found: dict[str, str] = {}
    for key in missing:
        same_start = [name for name in plain if name[:1] == key[0]]
        likely = (key, *ALIKE[key], *near(key, same_start, cutoff=0.75))
        meant = next((plain[name] for name in likely if name in plain), None)
        if meant is not None:
            found[key] = meant
    if not found:
        return ""
    pairs = ", ".join(f"{shown(name)} as {key}" for key, name in found.items())
    return f" Did you mean {pairs}? Save the file with these names."


# ------------------------------------------------------------------------------------------------------- reading a file


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads arrays of numbers or texts; the declared sizes are compared with the file's before memory is allocated.

    Nothing in the file is run: arrays of Python objects, which numpy pickles, are refused.

    Args:
        path: the file.
        wanted: which arrays are read, of those that are there.

    Returns:
        The wanted arrays by name, and the names of all there are.

    Raises:
        DataError: it is damaged, larger than memory, or written in a way that `numpy.savez` does not.
    """
    with _reported(path), path.open("rb") as file:
        if file.read(6) == npy.MAGIC_PREFIX:
            raise DataError(
                f"{path} cannot be read as an npz file: it is a single array (.npy). "
                "Save all arrays in one file: `numpy.savez(file, x_train=..., y_train=..., x_test=..., y_test=...)`."
            )
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist() if not info.is_dir()]
            twice = [name for name in wanted if names.count(name) > 1]
            if twice:
                raise DataError(f"{path} cannot be read as an npz file: it has two arrays {twice[0]}. {AGAIN}")
            found = {
                name: info for info in archive.infolist() if (name := info.filename.removesuffix(".npy")) in wanted
            }
            check_memory(sum(info.file_size for info in found.values()), f"The arrays of {path}")
            return {name: _read_array(archive, info, f"{path}: `{name}`") for name, info in found.items()}, names


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns the errors of zipfile and of numpy's header reader into a DataError."""
    kinds = (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
    parsing = (SyntaxError, tokenize.TokenError, TypeError, KeyError, IndexError, OverflowError)  # of a damaged header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path} is more than the memory of this machine can hold. Take fewer or smaller images."
        ) from error
    except (*kinds, *parsing) as error:
        reason = shown(" ".join(f"{error}".split()) or type(error).__name__, 200)
        hint = instead_of_data(path) if isinstance(error, zipfile.BadZipFile) else ""
        raise DataError(f"{path} cannot be read as an npz file: {reason.rstrip('.')}.{hint} {AGAIN}") from error


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    if info.flag_bits & 1:
        raise DataError(f"{name} is encrypted. Write the file again without a password.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{name} is packed in a way that numpy does not write. {AGAIN}")
    check_expansion(info.file_size, info.compress_size, name)
    with archive.open(info) as stream:
        dtype, shape, columns_first = _read_header(stream, name)
        size = math.prod(shape) * dtype.itemsize
        left = info.file_size - stream.tell()
        if size != left:
            raise DataError(f"{name} claims {size} bytes ({dtype}, shape {shape}), but holds {left}: damaged. {AGAIN}")
        content = np.empty(size, np.uint8)
        at = 0
        while at < size:
            piece = stream.read(min(PIECE, size - at))
            if not piece:
                raise DataError(f"{name} ends after {at} of {size} bytes: damaged. {AGAIN}")
            content[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    if dtype.kind == "U" and size and content.view(dtype.byteorder.replace("|", "=") + "u4").max() > 0x10FFFF:
        raise DataError(f"{name} holds texts that are none: damaged. {AGAIN}")
    array = content.view(dtype) if size else np.empty(0, dtype)
    return array.reshape(shape, order="F" if columns_first else "C")


def _read_header(stream: IO[bytes], name: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Returns dtype, shape and whether the first index runs fastest."""
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:  # 3.0 is for names of fields
        raise DataError(f"{name} is written in version {version} of numpy's format; it must be 1.0 or 2.0. {AGAIN}")
    shape, columns_first, dtype = readers[version](stream)
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects, which are not read since that could run code (images of several sizes are "
            "such, too). Save numbers or texts: `numpy.array(values, dtype='int64')` or `dtype='str'`."
        )
    if dtype.itemsize == 0 or dtype.names is not None or min(shape, default=0) < 0:
        raise DataError(f"{name} is an array of {dtype} of shape {shape}. It must be plain numbers or texts.")
    return dtype, shape, columns_first
