"""Data sets as plain tensors: one entry point (`load_dataset`), one loader per kind of file, one error (`DataError`).

Sets of images end up as uint8 (n, channels, height, width) and int64 labels (n,) in memory. Normalisation, flips and
crops are left to `fedlabel.data.augment`; what it needs to know of a set (mean, std, whether a mirrored image still
shows its class) is kept with the images. Tables end up as float32 (n, features, 1, 1), see `data/sets/tables.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.sets.class_names import find_classes
from fedlabel.data.sets.config import NODES, SETS, DataConfig, DataError, data_root
from fedlabel.data.sets.image_folders import load_image_folder
from fedlabel.data.sets.loaders import (
    DIGITS,
    Loaded,
    Split,
    load_cifar,
    load_digits,
    load_idx,
    load_svhn,
)
from fedlabel.data.sets.npz_files import load_arrays, load_npz
from fedlabel.data.sets.table_files import load_adult, load_bank_marketing, load_breast_cancer, load_magic, load_table
from fedlabel.data.sets.tables import LoadedTable, Table, encode
from fedlabel.names import did_you_mean
from fedlabel.seeding import numpy_generator


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. The tensors are shared by all callers: do not write to them.

    A sample of `train` may have the label -1: nobody knows its class. Those of `validation` and `test` all have one.
    """

    name: str
    """`data.name`; with `data.positive_classes` also these classes."""
    train: Split
    validation: Split
    """Held out of the training set; empty if `data.validation_fraction` is 0."""
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
    """(n,) int64, positions of the samples of `train` in the set's own order, before validation was held out; for a
    table whose test set is split off: in the file's order."""
    own_size: int
    """Number of samples in that order, however many are kept."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """The rows of "train", "validation" and "test" before they became features; none for images. `Table.column` gives a
    column of them, also one of `data.aside_columns`."""
    discrete: bool = False
    """Whether inputs are whole numbers such as tokens, to which no noise can be added."""
    test_rows: Tensor | None = None
    """(m,) int64, rows of the file (0 = the first data row) that make `test`, of a table whose test set is split off by
    `data.test_fraction`; else None."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data were read, a sentence each."""

    def feature(self, name: str, part: str) -> np.ndarray:
        """Returns one value of every sample of `part` (train, validation or test), (n,), to sort by: of the column
        `name` of a table, or the pixel of that number (from 0, in the order of memory).

        Raises:
            DataError: there is none.
        """
        if self.tables:
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
        """Returns a sample of `train` in the form that labelling functions receive: (channels, height, width) uint8, or
        a row's cells by column; or a float32 array.
        """
        if self.tables:
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
        """Whether the samples are float32, rows of a table (n, features, 1, 1) or other arrays, not uint8 images."""
        return self.train.images.is_floating_point()


@lru_cache(maxsize=2)
def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Loads the data set and holds out the validation set.

    Args:
        config: which set and where.
        seed: the experiment's seed; decides, uniformly at random, which `int(validation_fraction * n)` of the n
            training samples that have a label are held out. The order of the samples is kept.

    Returns:
        The data set. The last two are kept in memory.

    Raises:
        DataError: the set is missing, cannot be downloaded or is not as it should be.
    """
    loaded = LOADERS[config.name](config)
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
        channels = train.images.shape[1]
        as_it_is = ((0.0,) * channels, (1.0,) * channels)
        mean, std = as_it_is if train.images.is_floating_point() else _channel_statistics(train.images)
    names, size = loaded.class_names, len(loaded.train.labels)
    test_rows = None
    if isinstance(loaded, LoadedTable) and loaded.rows is not None:
        rows, size = loaded.rows[rows], loaded.file_size or size
        is_test = torch.ones(size, dtype=torch.bool)
        is_test[loaded.rows] = False
        test_rows = is_test.nonzero().flatten()
    return Dataset(
        name=name,
        train=train,
        validation=validation,
        test=test,
        class_names=names,
        mean=mean,
        std=std,
        allow_flip=SETS[config.name].allow_flip,
        train_rows=rows,
        test_rows=test_rows,
        own_size=size,
        tables=tables,
        discrete=isinstance(loaded, Loaded) and loaded.discrete,
        notes=loaded.notes,
    )


def _positive_against_rest(loaded: Loaded | LoadedTable, config: DataConfig) -> tuple[Loaded | LoadedTable, str]:
    """Returns the set with labels 1 for `data.positive_classes` and 0 for the others, and its name."""
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


def _fashion_mnist(config: DataConfig) -> Loaded:
    from torchvision.datasets import FashionMNIST as set_

    return load_idx(config, torchvision_set=set_, folder="FashionMNIST", class_names=tuple(set_.classes))


def _mnist(config: DataConfig) -> Loaded:
    from torchvision.datasets import MNIST

    return load_idx(config, torchvision_set=MNIST, folder="MNIST", class_names=DIGITS)


def _emnist(config: DataConfig) -> Loaded:
    from torchvision.datasets import EMNIST

    return load_idx(
        config,
        torchvision_set=partial(EMNIST, split="byclass"),
        folder="EMNIST",
        class_names=tuple(EMNIST.classes_split_dict["byclass"]),
        prefixes=("emnist-byclass-train", "emnist-byclass-test"),
        transposed=True,  # EMNIST's files hold columns where MNIST's hold rows.
    )


def _cifar10(config: DataConfig) -> Loaded:
    from torchvision.datasets import CIFAR10

    return load_cifar(config, torchvision_set=CIFAR10)


def _cifar100(config: DataConfig) -> Loaded:
    from torchvision.datasets import CIFAR100

    return load_cifar(config, torchvision_set=CIFAR100)


def _elsewhere(config: DataConfig) -> Loaded:
    raise DataError(
        f"`data.name` (={config.name}): the samples are in the folders of real nodes, which `flwr run` reaches (see "
        "docs/data.md); a simulation needs a data set of this machine."
    )


LOADERS: dict[str, Callable[[DataConfig], Loaded | LoadedTable]] = {
    "digits": load_digits,
    "fashion_mnist": _fashion_mnist,
    "mnist": _mnist,
    "emnist": _emnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": load_svhn,
    "image_folder": load_image_folder,
    "npz": load_npz,
    "arrays": load_arrays,
    "breast_cancer": load_breast_cancer,
    "adult": load_adult,
    "bank_marketing": load_bank_marketing,
    "magic": load_magic,
    "table": load_table,
    NODES: _elsewhere,
}
"""Name, as in `SETS` -> loader. torchvision, which takes long to import, only where its files are read."""
