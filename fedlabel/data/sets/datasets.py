"""Data sets as plain tensors: one door (`load_dataset`), one loader per kind of file, one error (`DataError`).

Sets of images end up as uint8 (n, channels, height, width) and int64 labels (n,) in memory. Normalisation, flips and
crops are left to `fedlabel.data.augment`; what it needs to know of a set (mean, std, whether a mirrored image still
shows its class) is kept with the images. Tables end up as float32 (n, features, 1, 1), see `data/sets/tables.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from fedlabel.data.sets.class_names import find_classes
from fedlabel.data.sets.image_folders import load_image_folder
from fedlabel.data.sets.loaders import (
    DIGITS,
    DataError,
    Loaded,
    Split,
    data_root,
    load_cifar,
    load_digits,
    load_idx,
    load_svhn,
)
from fedlabel.data.sets.npz_files import load_npz
from fedlabel.data.sets.table_files import load_adult, load_bank_marketing, load_breast_cancer, load_magic, load_table
from fedlabel.data.sets.tables import LoadedTable, Table, encode
from fedlabel.names import did_you_mean
from fedlabel.seeding import numpy_generator


@dataclass(frozen=True)
class DataConfig:
    """Which data set, where it is, and what part of it is kept for choosing hyper-parameters."""

    name: str = "digits"
    """One of `DATASETS`."""
    root: str = "data"
    """The folder of the data sets in torchvision's layout; for adult, bank_marketing and magic that of UCI's files (as
    they are or .gz), or one that has them in `[tabular/]adult`, `[tabular/]bank-marketing`, `[tabular/]magic`. For npz
    and table the file, for image_folder the folder with `train` and `test`. Not used by digits and breast_cancer, which
    come with scikit-learn."""
    download: bool = False
    """Whether a missing set is downloaded to `root`. Without effect on digits, npz, image_folder and tables."""
    validation_fraction: float = 0.1
    """Part of the training samples that have a label, held out for choosing hyper-parameters, in [0, 1)."""
    train_samples: int | None = None
    """How many of the other training samples are kept, drawn uniformly from the seed; null: all."""
    positive_classes: tuple[str, ...] = ()
    """Names of classes (or their numbers from 0, where they are not named by numbers) that are put together as class 1,
    against the rest as class 0: makes a task of two classes, e.g. [ship] or [airplane, automobile, ship, truck]; empty:
    the classes as they are. Elsewhere, and in files of labels, the classes then are 0 and 1."""
    label_column: str | None = None
    """table: the column that holds the labels."""
    categorical: tuple[str, ...] | None = None
    """Tables: columns whose cells are categories, even if they are numbers, besides the columns of texts."""
    drop_columns: tuple[str, ...] | None = None
    """Tables: columns that are left out; null: none, but of bank_marketing `duration`, which tells the label."""
    aside_columns: tuple[str, ...] = ()
    """Tables: columns that are read but are no features, such as a site that the rows are split by."""
    missing: tuple[str, ...] = ()
    """table: what else stands for a missing number or label, e.g. [-999, unknown]; an empty cell, NA, N/A, NaN, null, ?
    and their like always do, and among numbers also none, - and a point."""
    decimal: str = "point"
    """table: what stands before the decimals of numbers in a CSV file, point or comma; 1.234,5 is read with comma."""
    test_fraction: float = 0.2
    """Tables without a test set of their own (bank_marketing, magic, breast_cancer; table without `test_file`): share
    of every class's rows that is split off as test set, in (0, 1); drawn once and for all, whatever the seed."""
    test_file: str | None = None
    """table: a second file beside the first, with the same columns, as test set."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            hint = did_you_mean(self.name, DATASETS)
            raise DataError(f"`data.name` (={self.name}) must be one of {', '.join(DATASETS)}.{hint}")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"`data.validation_fraction` (={self.validation_fraction}) must lie in [0, 1).")
        if self.train_samples is not None and self.train_samples < 1:
            raise DataError(f"`data.train_samples` (={self.train_samples}) must be at least 1 (or null).")
        self._check_tables()

    def _check_tables(self) -> None:
        for key in ("positive_classes", "categorical", "drop_columns", "aside_columns", "missing"):
            value = getattr(self, key)  # YAML gives lists; this must be hashable
            object.__setattr__(self, key, None if value is None else tuple(map(str, value)))
        for key in ("categorical", "drop_columns", "aside_columns"):
            if getattr(self, key) not in (None, getattr(DataConfig, key)) and not DATASETS[self.name].tabular:
                raise DataError(f"`data.{key}` (={list(getattr(self, key))}) is for tables, not for {self.name}.")
        for key in ("label_column", "test_file", "missing", "decimal"):
            if getattr(self, key) != getattr(DataConfig, key) and self.name != "table":
                raise DataError(f"`data.{key}` (={getattr(self, key)}) is for data.name=table, not for {self.name}.")
        if self.name == "table" and self.label_column is None:
            raise DataError("`data.label_column` (=None) must name the column of labels for data.name=table.")
        if self.decimal not in ("point", "comma"):
            raise DataError(f"`data.decimal` (={self.decimal}) must be point or comma.")
        if not 0 < self.test_fraction < 1:
            raise DataError(f"`data.test_fraction` (={self.test_fraction}) must lie in (0, 1).")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. The tensors are shared by all who load it: do not write to them.

    A sample of `train` may have the label -1: nobody knows its class. Those of `validation` and `test` all have one.
    """

    name: str
    """`data.name`; with `data.positive_classes` also which they are."""
    train: Split
    validation: Split
    """Taken off the training set; empty if `data.validation_fraction` is 0."""
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of `train`, with pixels in [0, 1]; 0 for tables, which are standardised."""
    std: tuple[float, ...]
    """Per channel, of `train`, with pixels in [0, 1]; 1 for a constant channel, so that one can divide by it, and for
    tables."""
    allow_flip: bool
    """Whether an image mirrored left to right still shows its class."""
    train_rows: Tensor
    """(n,) int64, where in the set's own order, before validation was taken off, the samples of `train` stand; for a
    table whose test set is split off: in the file's order."""
    own_size: int
    """How many samples the set has in that order, whatever is kept of them."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """The rows of "train", "validation" and "test" before they became features; none for images. `Table.column` gives a
    column of them, also one of `data.aside_columns`."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the data were read, a sentence each."""

    def feature(self, name: str, part: str) -> np.ndarray:
        """Returns one value of every sample of `part` (train, validation or test), (n,), to sort by: of the column
        `name` of a table, or the pixel of that number (from 0, in the order of memory).

        Raises:
            DataError: there is none.
        """
        if self.tabular:
            table = self.tables[part]
            if name not in (*table.names, *table.aside):
                raise DataError(
                    f"`supervision.bag_feature` (={name}) must be one of the columns of {self.name}: "
                    f"{', '.join(table.names)}.{did_you_mean(name, table.names)}"
                )
            return table.column(name)
        pixels = getattr(self, part).images.flatten(1)
        if not name.isdecimal() or int(name) >= pixels.shape[1]:
            raise DataError(
                f"`supervision.bag_feature` (={name}) must be the number of one of the {pixels.shape[1]} pixels of an "
                f"image of {self.name}: 0 to {pixels.shape[1] - 1}."
            )
        found: np.ndarray = pixels[:, int(name)].numpy()
        return found

    def sample(self, place: int) -> np.ndarray | dict[str, float | str]:
        """Returns a sample of `train` as labelling functions get it: (channels, height, width) uint8, or a row's cells
        by column.
        """
        if self.tabular:
            return self.tables["train"].row(place)
        image: np.ndarray = self.train.images[place].numpy()
        return image

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image; (features, 1, 1) of a row."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def tabular(self) -> bool:
        """Whether the samples are rows of a table, as float32 (n, features, 1, 1), and not uint8 images."""
        return self.train.images.is_floating_point()


class DatasetEntry(NamedTuple):
    """One line of `DATASETS`."""

    description: str
    load: Callable[[DataConfig], Loaded | LoadedTable]
    allow_flip: bool
    tabular: bool = False
    own: bool = False
    """Whether the files are the user's, who may change them between two runs of a process."""


@lru_cache(maxsize=2)
def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Loads a data set and takes the validation set off its training set.

    Args:
        config: which set and where.
        seed: the experiment's seed; decides, uniformly at random, which `int(validation_fraction * n)` of the n
            training samples that have a label are held out. The order of the samples is kept.

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
    name = config.name
    if config.positive_classes:
        loaded, name = _positive_against_rest(loaded, config)
    order = torch.from_numpy(numpy_generator(seed, "validation").permutation(len(loaded.train.labels)))
    has_label = loaded.train.labels[order] >= 0  # models are judged on what is held out
    count = int(config.validation_fraction * int(has_label.sum()))
    is_held_out = has_label & (has_label.cumsum(0) <= count)
    held_out, others = order[is_held_out].sort().values, order[~is_held_out]
    kept = len(others) if config.train_samples is None else config.train_samples
    if kept > len(others):
        raise DataError(
            f"`data.train_samples` (={kept}) is more than the training set has: {len(others)} samples of "
            f"{config.name} besides those held out for validation."
        )
    rows = others[:kept].sort().values
    if isinstance(loaded, LoadedTable):
        whole = loaded.train
        train, validation, test = encode(whole.rows(rows), (whole.rows(held_out), loaded.test))
        features = train.images.shape[1]
        tables = {"train": whole.rows(rows), "validation": whole.rows(held_out), "test": loaded.test}
        mean, std = (0.0,) * features, (1.0,) * features
    else:
        tables = {}
        train, validation, test = _take(loaded.train, rows), _take(loaded.train, held_out), loaded.test
        mean, std = _channel_statistics(train.images)
    names, size = loaded.class_names, len(loaded.train.labels)
    if isinstance(loaded, LoadedTable) and loaded.rows is not None:
        rows, size = loaded.rows[rows], loaded.file_size or size
    return Dataset(name, train, validation, test, names, mean, std, entry.allow_flip, rows, size, tables, loaded.notes)


def _positive_against_rest(loaded: Loaded | LoadedTable, config: DataConfig) -> tuple[Loaded | LoadedTable, str]:
    """Returns the set with labels 1 for `data.positive_classes` and 0 for the others, and what to call it."""
    classes = loaded.class_names
    try:
        chosen = find_classes("data.positive_classes", config.positive_classes, classes, "none for the rest")
    except ValueError as error:
        raise DataError(str(error)) from error
    positive = torch.zeros(len(classes), dtype=torch.int64)
    positive[chosen] = 1
    train, test = (
        replace(split, labels=torch.where(split.labels < 0, -1, positive[split.labels.clamp_min(0)]))
        for split in (loaded.train, loaded.test)
    )
    name = "+".join(classes[number] for number in chosen)
    made = loaded._replace(train=train, test=test, class_names=("rest", name))  # type: ignore[arg-type]
    return made, f"{config.name} ({name} against the rest)"


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
    "image_folder": DatasetEntry(
        "a folder of yours: train/<class>/* and test/<class>/*", load_image_folder, True, own=True
    ),
    "npz": DatasetEntry("a numpy file of yours: x_train, y_train, x_test, y_test", load_npz, False, own=True),
    "breast_cancer": DatasetEntry(
        "scikit-learn's table: 569 tumours, 30 features, malignant or benign, no download",
        load_breast_cancer,
        False,
        tabular=True,
    ),
    "adult": DatasetEntry("UCI's table: 48,842 people of a census, income above 50K or not", load_adult, False, True),
    "bank_marketing": DatasetEntry(
        "UCI's table: 45,211 calls of a bank, sold or not", load_bank_marketing, False, tabular=True
    ),
    "magic": DatasetEntry("UCI's table: 19,020 showers in a telescope, gamma or hadron", load_magic, False, True),
    "table": DatasetEntry(
        "a CSV or Parquet file of yours: data.label_column names the labels", load_table, False, True, own=True
    ),
}
"""Name -> description, loader, whether images may be mirrored, whether it is a table."""
