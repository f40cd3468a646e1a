"""Loaders of published sets of images: from `data.root` to uint8 images and int64 labels, or a `DataError`.

What all loaders share is here, too. A user's own images are read by `npz_files` and `image_folders`.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.sets.config import DataConfig, DataError, data_root
from fedlabel.data.sets.stratified import split_stratified

DIGITS = tuple("0123456789")
SMALL, MAX_EXPANSION = 1 << 26, 100
"""Files may unpack to more than `SMALL` bytes only if it is no more than so many times their size: images do not become
that small, but a file of zeros takes a thousandth of its size."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their true labels."""

    images: Tensor
    """(n, channels, height, width) uint8; rows of a table: (n, features, 1, 1) float32, standardised."""
    labels: Tensor
    """(n,) int64; in a training set -1 where the data have no label."""


class Loaded(NamedTuple):
    """What a loader returns."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data were read, a sentence each."""
    discrete: bool = False
    """See `Dataset`."""


# ---------------------------------------------------------------------------------------------- border: errors, checks


def instead_of_data(path: Path) -> str:
    """Returns a sentence that names a file which is often found in place of data; "" for any other."""
    with path.open("rb") as file:
        start = file.read(100).lstrip().lower()
    if not start:
        return " It is empty."
    if start.startswith(b"version https://git-lfs"):
        return " It is a pointer of Git LFS: `git lfs pull` gets the file itself."
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return " It is a web page, and not what was to be downloaded."
    return ""


def machine_memory() -> float:
    """Returns the bytes of memory of this machine; infinity if the system does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_expansion(unpacked: int, packed: int, what: str) -> None:
    """Raises a DataError if the decompressed size that `what` declares is implausible for its compressed size."""
    if unpacked > max(SMALL, MAX_EXPANSION * packed):
        raise DataError(
            f"{what} is to unpack to {unpacked / 2**30:.1f} GiB, {unpacked // max(1, packed)} times its size: damaged, "
            "or meant to fill the memory. If it is right, write it again without packing it (`numpy.savez`)."
        )


def check_memory(size: int, what: str) -> None:
    """Raises a DataError if `what`, of `size` bytes, is more than this machine can hold."""
    if size > machine_memory():
        raise DataError(
            f"{what} would take {size / 2**30:.1f} GiB, more than the memory of this machine "
            f"({machine_memory() / 2**30:.1f} GiB). Take fewer or smaller images."
        )


def _missing(config: DataConfig, looked_for: str) -> DataError:
    return DataError(
        f"`data.name` (={config.name}): no complete copy in {data_root(config)} (looked for {looked_for}). "
        "Set data.download=true to download it, or copy the files there (or set data.root=<folder that has them>)."
    )


def _not_downloaded(config: DataConfig, error: Exception) -> DataError:
    cause = " ".join(f"{type(error).__name__}: {error}".split())  # torchvision's messages run over several lines
    return DataError(
        f"`data.name` (={config.name}): could not be downloaded to {data_root(config)} ({cause}). "
        "Try again with a network and a folder that can be written to, or copy the files there and set "
        "data.download=false (or set data.root=<folder that has them>)."
    )


def _checked_split(images: np.ndarray, labels: np.ndarray, num_classes: int, names: tuple[str, str]) -> Split:
    """Returns a split of (n, channels, height, width) images; `names`: where the two arrays come from, for errors."""
    if len(images) == 0:
        raise DataError(f"{names[0]} holds no images. At least one is needed.")
    if len(images) != len(labels):
        raise DataError(
            f"{names[0]} holds {len(images)} images, but {names[1]} holds {len(labels)} labels. "
            "There must be one label per image."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{names[1]}: the label of sample {wrong[0]} (={labels[wrong[0]]}) must lie in [0, {num_classes - 1}]."
        )
    return Split(
        torch.from_numpy(np.array(images, order="C")),
        torch.from_numpy(labels.astype(np.int64)),
    )


# -------------------------------------------------------------------------------------------------------------- loaders


def load_digits(config: DataConfig) -> Loaded:
    """Handwritten digits of scikit-learn; its 80/20 test split is fixed and does not follow the experiment's seed."""
    # The file alone, not `sklearn.datasets`, which takes as long to import as torch.
    package = find_spec("sklearn")
    where = next(iter(package.submodule_search_locations or ()), "") if package else ""
    path = Path(where) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataError(f"`data.name` (=digits): there is no {path}; it comes with scikit-learn: install that again.")
    table = np.loadtxt(path, delimiter=",")
    labels = table[:, -1].astype(np.int64)
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = split_stratified(labels, 0.2, seed=0)
    splits = [_checked_split(images[part], labels[part], 10, ("digits", "digits")) for part in (train, test)]
    return Loaded(splits[0], splits[1], DIGITS)


def load_idx(
    config: DataConfig,
    *,
    torchvision_set: Callable[..., Any],
    folder: str,
    class_names: tuple[str, ...],
    prefixes: tuple[str, str] = ("train", "t10k"),
    transposed: bool = False,
) -> Loaded:
    """The MNIST family, read from `<root>/<folder>/raw/<prefix>-{images,labels}...`, packed (.gz) or not.

    torchvision only reads the unpacked files, so it cannot read a folder with the packed ones that is not writable;
    here it does no more than download.
    """
    names = [f"{prefix}-{kind}-ubyte" for prefix in prefixes for kind in ("images-idx3", "labels-idx1")]
    raw = data_root(config) / folder / "raw"
    if config.download and None in [_find_idx(raw, name) for name in names]:
        try:
            torchvision_set(root=str(data_root(config)), download=True)
        except (RuntimeError, OSError, HTTPException) as error:
            raise _not_downloaded(config, error) from error

    paths = []
    for name in names:
        path = _find_idx(raw, name)
        if path is None:
            raise _missing(config, f"{Path(folder) / 'raw' / name} or the same with .gz")
        paths.append(path)
    splits = []
    for image_path, label_path in (paths[:2], paths[2:]):
        images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
        images = images.transpose(0, 2, 1) if transposed else images
        where = (str(image_path), str(label_path))
        splits.append(_checked_split(images[:, None], labels, len(class_names), where))
    return Loaded(splits[0], splits[1], class_names)


def _find_idx(raw: Path, name: str) -> Path | None:
    return next((path for path in (raw / name, raw / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Returns the uint8 array of an idx file: two zero bytes, type, number of dimensions, big-endian sizes, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = np.frombuffer(header[4:], ">u4").tolist() if len(header) == 4 + 4 * dimensions else [0]
            size = math.prod(shape)
            if header[:4] == bytes([0, 0, 8, dimensions]):
                check_expansion(size, path.stat().st_size, str(path))
                check_memory(size, f"{path}: an array of shape {tuple(shape)}")
                content = file.read(size + 1)  # one more than there should be: the end is looked at, too
                if len(content) == size:
                    return np.frombuffer(content, np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error} Delete it and download or copy it again.") from error
    raise DataError(
        f"{path} is not a complete idx file of {dimensions}-dimensional uint8 values. "
        "Delete it and download or copy it again."
    )


def load_cifar(config: DataConfig, *, torchvision_set: Callable[..., Any]) -> Loaded:
    """CIFAR-10 or CIFAR-100 from the python archive that torchvision unpacks."""
    looked_for = f"{torchvision_set.base_folder}/ with its files"  # type: ignore[attr-defined]
    sets = _load_torchvision(config, torchvision_set, ({"train": True}, {"train": False}), looked_for)
    names = tuple(sets[0].classes)
    splits = [
        _checked_split(part.data.transpose(0, 3, 1, 2), np.array(part.targets), len(names), (config.name,) * 2)
        for part in sets
    ]
    return Loaded(splits[0], splits[1], names)


def load_svhn(config: DataConfig) -> Loaded:
    """The cropped digits of SVHN, without the `extra` set."""
    splits = ({"split": "train"}, {"split": "test"})
    from torchvision.datasets import SVHN

    sets = _load_torchvision(config, SVHN, splits, "train_32x32.mat and test_32x32.mat")
    loaded = [_checked_split(part.data, part.labels, 10, (config.name,) * 2) for part in sets]
    return Loaded(loaded[0], loaded[1], DIGITS)


def _load_torchvision(
    config: DataConfig, torchvision_set: Callable[..., Any], splits: tuple[dict, dict], looked_for: str
) -> list[Any]:
    """Returns torchvision's training and test set, whose files it compares with their md5 sums."""
    try:
        return [torchvision_set(root=str(data_root(config)), download=config.download, **split) for split in splits]
    except (RuntimeError, OSError, HTTPException) as error:
        if config.download:
            raise _not_downloaded(config, error) from error
        raise _missing(config, looked_for) from error
