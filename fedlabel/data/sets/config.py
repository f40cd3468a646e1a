"""The configuration of the data set, and the table of available sets. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedlabel.checks import at_least, in_unit_interval, no_effect, one_of, within
from fedlabel.names import did_you_mean


class DataError(ValueError):
    """The data set is unknown, missing or invalid; the message says what to do."""


class SetInfo(NamedTuple):
    """One row of `SETS`."""

    description: str
    allow_flip: bool = False
    """Whether an image mirrored left to right still shows its class."""
    tabular: bool = False
    own: bool = False
    """Whether the files are the user's, who may change them between two runs of a process."""


NODES = "nodes"
"""`data.name` where each node has a folder of its own, and the server no training data."""

SETS = {
    "digits": SetInfo("scikit-learn's digits: 1,797 grey 8x8, 10 classes, no download"),
    "fashion_mnist": SetInfo("Fashion-MNIST: 70,000 grey 28x28, 10 kinds of clothes", allow_flip=True),
    "mnist": SetInfo("MNIST: 70,000 grey 28x28, 10 digits"),
    "emnist": SetInfo("EMNIST byclass: 814,255 grey 28x28, 62 digits and letters"),
    "cifar10": SetInfo("CIFAR-10: 60,000 colour 32x32, 10 classes", allow_flip=True),
    "cifar100": SetInfo("CIFAR-100: 60,000 colour 32x32, 100 classes", allow_flip=True),
    "svhn": SetInfo("SVHN, cropped: 99,289 colour 32x32, 10 digits"),
    "image_folder": SetInfo("a folder of yours: train/<class>/* and test/<class>/*", allow_flip=True, own=True),
    "npz": SetInfo("a numpy file of yours: x_train, y_train, x_test, y_test", own=True),
    "arrays": SetInfo("a numpy file of yours whose x are no images: tokens, signals, features, as they are", own=True),
    "breast_cancer": SetInfo("scikit-learn's table: 569 tumours, 30 features, malignant or benign", tabular=True),
    "adult": SetInfo("UCI's table: 48,842 people of a census, income above 50K or not", tabular=True),
    "bank_marketing": SetInfo("UCI's table: 45,211 calls of a bank, sold or not", tabular=True),
    "magic": SetInfo("UCI's table: 19,020 showers in a telescope, gamma or hadron", tabular=True),
    "table": SetInfo("a CSV or Parquet file of yours: data.label_column names the labels", tabular=True, own=True),
    NODES: SetInfo("real nodes' own folders, see docs/data.md; for `flwr run` only, with data.schema", own=True),
}
"""Name -> what it is; `datasets.LOADERS` has their loaders."""


@dataclass(frozen=True)
class DataConfig:
    """The data set, its location, and the part held out to choose hyper-parameters."""

    name: str = "digits"
    """A data set; `fedlabel list` names them all."""
    root: str = no_effect("data")
    """The folder of the data sets in torchvision's layout; for adult, bank_marketing and magic that of UCI's files (as
    they are or .gz), or one that has them in `[tabular/]adult`, `[tabular/]bank-marketing`, `[tabular/]magic`. For npz,
    arrays and table the file, for image_folder the folder with `train` and `test`. Not used by digits and
    breast_cancer, which come with scikit-learn. An npz file of images with another number of channels than 1 or 3 has
    an array `channel_axis`, 1 or 3."""
    download: bool = no_effect(False)
    """Whether a missing set is downloaded to `root`. Without effect on digits, npz, image_folder and tables."""
    validation_fraction: float = 0.1
    """Share of the training samples with a label that is held out for choosing hyper-parameters, in [0, 1)."""
    train_samples: int | None = None
    """Number of the other training samples that are kept, drawn uniformly from the seed; null: all."""
    positive_classes: tuple[str, ...] = ()
    """Names of classes (or their numbers from 0, if they are not named by numbers) that are merged into class 1, with
    the rest as class 0: makes a task of two classes, e.g. [ship] or [airplane, automobile, ship, truck]; empty: the
    classes as they are. Elsewhere, and in files of labels, the classes then are 0 and 1."""
    label_column: str | None = None
    """table: the column that holds the labels."""
    categorical: tuple[str, ...] | None = None
    """Tables: columns whose cells are categories, even if they are numbers, besides the columns of texts."""
    drop_columns: tuple[str, ...] | None = None
    """Tables: columns that are left out; null: none, except `duration` of bank_marketing, which reveals the label."""
    aside_columns: tuple[str, ...] = ()
    """Tables: columns that are read but are no features, such as a site that the rows are split by."""
    missing: tuple[str, ...] = ()
    """table: further marks for a missing number or label, e.g. [-999, unknown]; an empty cell, NA, N/A, NaN, null, ?
    and the like always are, and among numbers also none, - and a point."""
    decimal: str = "point"
    """table: the decimal separator of numbers in a CSV file, point or comma; 1.234,5 is read with comma."""
    test_fraction: float = 0.2
    """Tables without a test set of their own (bank_marketing, magic, breast_cancer; table without `test_file`): share
    of every class's rows that is split off as test set, in (0, 1); drawn once, whatever the seed."""
    test_file: str | None = None
    """table: a second file in the same folder, with the same columns, as test set."""
    schema: str | None = None
    """nodes: the file with the schema of all nodes' data, which `fedlabel data schema` makes; read by the server, its
    text goes to the nodes."""
    test: str | None = None
    """nodes: a folder of the server's own with labelled samples, in the form of a node's (docs/data.md), for
    evaluation.at=server."""

    def __post_init__(self) -> None:
        if self.name not in SETS:
            hint = did_you_mean(self.name, SETS)
            raise DataError(f"`data.name` (={self.name}) must be one of {', '.join(SETS)}.{hint}")
        in_unit_interval(self, "data", "validation_fraction", below_one=True)
        at_least(self, "data", 1, "train_samples", null=True)
        self._check_tables()

    def _check_tables(self) -> None:
        for key in ("positive_classes", "categorical", "drop_columns", "aside_columns", "missing"):
            value = getattr(self, key)  # YAML gives lists; this must be hashable
            object.__setattr__(self, key, None if value is None else tuple(map(str, value)))
        for key in ("categorical", "drop_columns", "aside_columns"):
            if getattr(self, key) not in (None, getattr(DataConfig, key)) and not SETS[self.name].tabular:
                raise DataError(f"`data.{key}` (={list(getattr(self, key))}) is for tables, not for {self.name}.")
        for key in ("label_column", "test_file", "missing", "decimal"):
            if getattr(self, key) != getattr(DataConfig, key) and self.name != "table":
                raise DataError(f"`data.{key}` (={getattr(self, key)}) is for data.name=table, not for {self.name}.")
        if self.name == "table" and self.label_column is None:
            raise DataError("`data.label_column` (=None) must name the column of labels for data.name=table.")
        one_of(self, "data", decimal=("point", "comma"))
        for key in ("schema", "test"):
            if getattr(self, key) is not None and self.name != NODES:
                raise DataError(f"`data.{key}` (={getattr(self, key)}) is for data.name=nodes, not for {self.name}.")
        within(self, "data", 0, 1, "test_fraction", ends="()")


def data_root(config: DataConfig) -> Path:
    """Returns `data.root` as an absolute path."""
    return Path(config.root).expanduser().resolve()
