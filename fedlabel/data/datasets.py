"""Image data sets as plain tensors: one door (`load_dataset`), one loader per kind of file, one error (`DataError`).

All sets end up as uint8 images (n, channels, height, width) and int64 labels (n,) in memory. Normalisation, flips and
crops are left to `fedlabel.data.augment`; what it needs to know of a set (mean, std, whether a mirrored image still
shows its class) is kept beside the images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from fedlabel.data.loaders import (
    DIGITS,
    DataError,
    Loaded,
    Split,
    data_root,
    load_cifar,
    load_digits,
    load_idx,
    load_image_folder,
    load_npz,
    load_svhn,
)
from fedlabel.seeding import numpy_generator


@dataclass(frozen=True)
class DataConfig:
    """Which data set, where it is, and what part of it is kept for choosing hyper-parameters."""

    name: str = "digits"
    """One of `DATASETS`."""
    root: str = "data"
    """The folder of the data sets in torchvision's layout. For npz the file, for image_folder the folder with `train`
    and `test`. Not used by digits, which comes with scikit-learn."""
    download: bool = False
    """Whether a missing set is downloaded to `root`. Without effect on digits, npz and image_folder."""
    validation_fraction: float = 0.1
    """Part of the training set held out for choosing hyper-parameters, in [0, 1)."""
    train_samples: int | None = None
    """How many of the other training samples are kept, drawn uniformly from the seed; null: all."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            near = difflib.get_close_matches(self.name, DATASETS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"`data.name` (={self.name}) must be one of {', '.join(DATASETS)}.{hint}")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"`data.validation_fraction` (={self.validation_fraction}) must lie in [0, 1).")
        if self.train_samples is not None and self.train_samples < 1:
            raise DataError(f"`data.train_samples` (={self.train_samples}) must be at least 1 (or null).")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. The tensors are shared by all who load it: do not write to them."""

    name: str
    train: Split
    validation: Split
    """Taken off the training set; empty if `data.validation_fraction` is 0."""
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of `train`, with pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of `train`, with pixels in [0, 1]; 1 for a constant channel, so that one can divide by it."""
    allow_flip: bool
    """Whether an image mirrored left to right still shows its class."""
    train_rows: Tensor
    """(n,) int64, where in the set's own order, before validation was taken off, the samples of `train` stand."""
    own_size: int
    """How many training samples the set has in that order, whatever is kept of them."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


class DatasetEntry(NamedTuple):
    """One line of `DATASETS`."""

    description: str
    load: Callable[[DataConfig], Loaded]
    allow_flip: bool


@lru_cache(maxsize=2)
def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Loads a data set and takes the validation set off its training set.

    Args:
        config: which set and where.
        seed: the experiment's seed; decides, uniformly at random, which `int(validation_fraction * n)` of the n
            training samples are held out. The order of the samples is kept.

    Returns:
        The data set. The last two are kept in memory.

    Raises:
        DataError: the set is missing, cannot be downloaded or is not as it should be.
    """
    entry = DATASETS[config.name]
    loaded = entry.load(config)
    if len(loaded.class_names) < 2:
        raise DataError(
            f"`data.root` (={data_root(config)}): the data set has {len(loaded.class_names)} class; "
            "at least 2 are needed."
        )
    order = torch.from_numpy(numpy_generator(seed, "validation").permutation(len(loaded.train.labels)))
    count = int(config.validation_fraction * len(order))
    kept = len(order) - count if config.train_samples is None else config.train_samples
    if kept > len(order) - count:
        raise DataError(
            f"`data.train_samples` (={kept}) is more than the training set has: {len(order) - count} samples of "
            f"{config.name} besides those held out for validation."
        )
    rows = order[count : count + kept].sort().values
    train, validation = _take(loaded.train, rows), _take(loaded.train, order[:count].sort().values)
    mean, std = _channel_statistics(train.images)
    names, size = loaded.class_names, len(loaded.train.labels)
    return Dataset(config.name, train, validation, loaded.test, names, mean, std, entry.allow_flip, rows, size)


def _take(split: Split, indices: Tensor) -> Split:
    return Split(split.images[indices], split.labels[indices])


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and population standard deviation per channel, pixels in [0, 1], from counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float((share * values).sum())
        std = float((share * (values - mean) ** 2).sum().sqrt())
        means.append(mean)
        stds.append(std if channel.min() < channel.max() else 1.0)
    return tuple(means), tuple(stds)


_TORCHVISION = torchvision.datasets

DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry("scikit-learn's digits: 1,797 grey 8x8, 10 classes, no download", load_digits, False),
    "fashion_mnist": DatasetEntry(
        "Fashion-MNIST: 70,000 grey 28x28, 10 kinds of clothes",
        partial(
            load_idx,
            torchvision_set=_TORCHVISION.FashionMNIST,
            folder="FashionMNIST",
            class_names=tuple(_TORCHVISION.FashionMNIST.classes),
        ),
        True,
    ),
    "mnist": DatasetEntry(
        "MNIST: 70,000 grey 28x28, 10 digits",
        partial(load_idx, torchvision_set=_TORCHVISION.MNIST, folder="MNIST", class_names=DIGITS),
        False,
    ),
    "emnist": DatasetEntry(
        "EMNIST byclass: 814,255 grey 28x28, 62 digits and letters",
        partial(
            load_idx,
            torchvision_set=partial(_TORCHVISION.EMNIST, split="byclass"),
            folder="EMNIST",
            class_names=tuple(_TORCHVISION.EMNIST.classes_split_dict["byclass"]),
            prefixes=("emnist-byclass-train", "emnist-byclass-test"),
            transposed=True,  # EMNIST's files hold columns where MNIST's hold rows.
        ),
        False,
    ),
    "cifar10": DatasetEntry(
        "CIFAR-10: 60,000 colour 32x32, 10 classes", partial(load_cifar, torchvision_set=_TORCHVISION.CIFAR10), True
    ),
    "cifar100": DatasetEntry(
        "CIFAR-100: 60,000 colour 32x32, 100 classes",
        partial(load_cifar, torchvision_set=_TORCHVISION.CIFAR100),
        True,
    ),
    "svhn": DatasetEntry("SVHN, cropped: 99,289 colour 32x32, 10 digits", load_svhn, False),
    "image_folder": DatasetEntry("a folder of yours: train/<class>/* and test/<class>/*", load_image_folder, True),
    "npz": DatasetEntry("a numpy file of yours: x_train, y_train, x_test, y_test", load_npz, False),
}
"""Name -> description, loader, whether images may be mirrored."""
