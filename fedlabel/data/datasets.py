"""Image data sets as plain tensors: one loader per set, one door (`load_dataset`), one error (`DataError`).

All sets end up as uint8 images (n, channels, height, width) and int64 labels (n,) in memory. Normalisation, flips and
crops are left to `fedlabel.data.augment`; what it needs to know of a set (mean, std, whether a mirrored image still
shows its class) is kept beside the images.
"""

from __future__ import annotations

import difflib
import gzip
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fedlabel.seeding import numpy_generator

DIGITS = tuple("0123456789")


class DataError(ValueError):
    """The data set is unknown, missing or not as it should be; the message says what to do."""


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

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            near = difflib.get_close_matches(self.name, DATASETS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"`data.name` (={self.name}) must be one of {', '.join(DATASETS)}.{hint}")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"`data.validation_fraction` (={self.validation_fraction}) must lie in [0, 1).")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their true labels."""

    images: Tensor
    """(n, channels, height, width) uint8."""
    labels: Tensor
    """(n,) int64."""


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

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


class Loaded(NamedTuple):
    """What a loader returns."""

    train: Split
    test: Split
    class_names: tuple[str, ...]


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
            f"`data.root` (={_root(config)}): the data set has {len(loaded.class_names)} class; at least 2 are needed."
        )
    order = torch.from_numpy(numpy_generator(seed, "validation").permutation(len(loaded.train.labels)))
    count = int(config.validation_fraction * len(order))
    train, validation = _take(loaded.train, order[count:]), _take(loaded.train, order[:count])
    mean, std = _channel_statistics(train.images)
    return Dataset(config.name, train, validation, loaded.test, loaded.class_names, mean, std, entry.allow_flip)


def _take(split: Split, indices: Tensor) -> Split:
    indices = indices.sort().values
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


# ---------------------------------------------------------------------------------------------- border: errors, checks


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().resolve()


def _missing(config: DataConfig, looked_for: str) -> DataError:
    return DataError(
        f"`data.name` (={config.name}): no complete copy in {_root(config)} (looked for {looked_for}). "
        "Set data.download=true to download it, or copy the files there (or set data.root=<folder that has them>)."
    )


def _not_downloaded(config: DataConfig, error: Exception) -> DataError:
    cause = " ".join(f"{type(error).__name__}: {error}".split())  # torchvision's messages run over several lines
    return DataError(
        f"`data.name` (={config.name}): could not be downloaded to {_root(config)} ({cause}). "
        "Try again with a network and a folder that can be written to, or copy the files there and set "
        "data.download=false (or set data.root=<folder that has them>)."
    )


def _checked_split(images: np.ndarray, labels: np.ndarray, num_classes: int, names: tuple[str, str]) -> Split:
    """Returns a split of (n, channels, height, width) images; `names` say in errors where the two arrays come from."""
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


def _load_digits(config: DataConfig) -> Loaded:
    """Handwritten digits of scikit-learn; its 80/20 test split is fixed and does not follow the experiment's seed."""
    # Imported here: scikit-learn takes a second to import, and only this set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    splits = [_checked_split(images[part], labels[part], 10, ("digits", "digits")) for part in (train, test)]
    return Loaded(splits[0], splits[1], DIGITS)


def _load_idx(
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
    raw = _root(config) / folder / "raw"
    if config.download and None in [_find_idx(raw, name) for name in names]:
        try:
            torchvision_set(root=str(_root(config)), download=True)
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
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error} Delete it and download or copy it again.") from error
    if content[:4] == bytes([0, 0, 8, dimensions]):
        start = 4 + 4 * dimensions
        shape = np.frombuffer(content[4:start], ">u4").astype(int)
        if len(shape) == dimensions and len(content) == start + shape.prod():
            return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    raise DataError(
        f"{path} is not a complete idx file of {dimensions}-dimensional uint8 values. "
        "Delete it and download or copy it again."
    )


def _load_cifar(config: DataConfig, *, torchvision_set: Callable[..., Any]) -> Loaded:
    looked_for = f"{torchvision_set.base_folder}/ with its files"  # type: ignore[attr-defined]
    sets = _load_torchvision(config, torchvision_set, ({"train": True}, {"train": False}), looked_for)
    names = tuple(sets[0].classes)
    splits = [
        _checked_split(part.data.transpose(0, 3, 1, 2), np.array(part.targets), len(names), (config.name,) * 2)
        for part in sets
    ]
    return Loaded(splits[0], splits[1], names)


def _load_svhn(config: DataConfig) -> Loaded:
    """The cropped digits of SVHN, without the `extra` set."""
    splits = ({"split": "train"}, {"split": "test"})
    sets = _load_torchvision(config, torchvision.datasets.SVHN, splits, "train_32x32.mat and test_32x32.mat")
    loaded = [_checked_split(part.data, part.labels, 10, (config.name,) * 2) for part in sets]
    return Loaded(loaded[0], loaded[1], DIGITS)


def _load_torchvision(
    config: DataConfig, torchvision_set: Callable[..., Any], splits: tuple[dict, dict], looked_for: str
) -> list[Any]:
    """Returns torchvision's training and test set, whose files it compares with their md5 sums."""
    try:
        return [torchvision_set(root=str(_root(config)), download=config.download, **split) for split in splits]
    except (RuntimeError, OSError, HTTPException) as error:
        if config.download:
            raise _not_downloaded(config, error) from error
        raise _missing(config, looked_for) from error


def _load_npz(config: DataConfig) -> Loaded:
    """A numpy archive with x_train, y_train, x_test, y_test and, if wanted, class_names (an array of strings).

    x: uint8, (n, h, w) grey; or (n, h, w, c) or (n, c, h, w) with c = 1 or 3. Channels are last if the last size is 1
    or 3, and first otherwise. y: integers (n,) from 0; without class_names the largest of y_train is the last class.
    """
    path = _root(config)
    if not path.is_file():
        raise DataError(
            f"`data.root` (={config.root}): there is no file {path}. Set data.root=<file.npz> that holds the keys "
            "x_train, y_train, x_test and y_test."
        )
    try:
        # Opened here, as numpy leaves a broken archive open.
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as an npz file of numbers and strings: {error} "
            "Write it again with `numpy.savez` (no object arrays)."
        ) from error
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}. "
            "The keys must be x_train, y_train, x_test, y_test and, if wanted, class_names."
        )
    for key in ("y_train", "y_test"):
        dtype, shape = arrays[key].dtype, arrays[key].shape
        if len(shape) != 1 or dtype.kind not in "iu":
            raise DataError(f"{path}: `{key}` is {dtype} of shape {shape}; it must be integers of shape (n,).")
    if "class_names" in arrays:
        class_names = tuple(str(name) for name in np.atleast_1d(arrays["class_names"]))
    else:
        class_names = tuple(str(label) for label in range(int(arrays["y_train"].max(initial=-1)) + 1))
    train, test = (
        _checked_split(
            _channels_first(arrays[f"x_{part}"], f"{path}: `x_{part}`"),
            arrays[f"y_{part}"],
            len(class_names),
            (f"{path}: `x_{part}`", f"{path}: `y_{part}`"),
        )
        for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{path}: images of `x_train` are {tuple(train.images.shape[1:])}, those of `x_test` "
            f"{tuple(test.images.shape[1:])} (channels, height, width). They must be alike."
        )
    return Loaded(train, test, class_names)


def _channels_first(images: np.ndarray, name: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(
            f"{name} has dtype {images.dtype}; it must be uint8 with values from 0 to 255. "
            "Images in [0, 1] are converted by `(x * 255).round().astype('uint8')`."
        )
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise DataError(f"{name} has shape {images.shape}; it must be (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3.")


def _load_image_folder(config: DataConfig) -> Loaded:
    """`<root>/train/<class>/<image>` and `<root>/test/<class>/<image>`; classes are the sorted folders of `train`.

    Files without an image's extension are passed over. All images must be of one size: resizing is a choice that
    belongs to whoever prepares the data. Grey if all images are, else converted to RGB (alpha is dropped).
    """
    root = _root(config)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise DataError(
                f"`data.root` (={config.root}): there is no folder {root / part}. Set data.root=<folder> that holds "
                "train/<class>/<image> and test/<class>/<image>."
            )
    class_names = tuple(_visible_folders(root / "train"))
    unknown = sorted(set(_visible_folders(root / "test")) - set(class_names))
    if unknown:
        raise DataError(
            f"{root / 'test'} has the class {unknown[0]}, which {root / 'train'} has not. "
            "Every class of the test set must be in the training set."
        )
    files = {
        part: [
            (path, label)
            for label, name in enumerate(class_names)
            for path in sorted((root / part / name).glob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS
        ]
        for part in ("train", "test")
    }
    everything = [path for part in files.values() for path, _ in part]
    mode = _common_mode(everything)
    train, test = (
        _checked_split(
            np.stack([_read_image(path, mode) for path, _ in part]) if part else np.empty((0, 1, 0, 0), np.uint8),
            np.array([label for _, label in part]),
            len(class_names),
            (str(root / name),) * 2,
        )
        for name, part in files.items()
    )
    return Loaded(train, test, class_names)


def _visible_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _common_mode(paths: list[Path]) -> str:
    """Returns "L" or "RGB", having read the headers only; raises DataError if the sizes differ."""
    mode, first_size = "L", None
    for path in paths:
        with _open_image(path) as image:
            first_size = first_size or image.size
            if image.size != first_size:
                raise DataError(
                    f"{path} is {image.size[0]}x{image.size[1]} pixels, but {paths[0]} is "
                    f"{first_size[0]}x{first_size[1]}. All images must be of one size: resize them first."
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a pixel (mode {image.mode}). Convert it to 8 bits first.")
            mode = mode if image.mode in ("1", "L") else "RGB"
    return mode


def _open_image(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as an image: {error} Replace or delete it.") from error


def _read_image(path: Path, mode: str) -> np.ndarray:
    """Returns (channels, height, width) uint8."""
    with _open_image(path) as image:
        try:
            pixels = np.asarray(image.convert(mode))
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path} cannot be read as an image: {error} Replace or delete it.") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1)


_TORCHVISION = torchvision.datasets

DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry("scikit-learn's digits: 1,797 grey 8x8, 10 classes, no download", _load_digits, False),
    "fashion_mnist": DatasetEntry(
        "Fashion-MNIST: 70,000 grey 28x28, 10 kinds of clothes",
        partial(
            _load_idx,
            torchvision_set=_TORCHVISION.FashionMNIST,
            folder="FashionMNIST",
            class_names=tuple(_TORCHVISION.FashionMNIST.classes),
        ),
        True,
    ),
    "mnist": DatasetEntry(
        "MNIST: 70,000 grey 28x28, 10 digits",
        partial(_load_idx, torchvision_set=_TORCHVISION.MNIST, folder="MNIST", class_names=DIGITS),
        False,
    ),
    "emnist": DatasetEntry(
        "EMNIST byclass: 814,255 grey 28x28, 62 digits and letters",
        partial(
            _load_idx,
            torchvision_set=partial(_TORCHVISION.EMNIST, split="byclass"),
            folder="EMNIST",
            class_names=tuple(_TORCHVISION.EMNIST.classes_split_dict["byclass"]),
            prefixes=("emnist-byclass-train", "emnist-byclass-test"),
            transposed=True,  # EMNIST's files hold columns where MNIST's hold rows.
        ),
        False,
    ),
    "cifar10": DatasetEntry(
        "CIFAR-10: 60,000 colour 32x32, 10 classes", partial(_load_cifar, torchvision_set=_TORCHVISION.CIFAR10), True
    ),
    "cifar100": DatasetEntry(
        "CIFAR-100: 60,000 colour 32x32, 100 classes",
        partial(_load_cifar, torchvision_set=_TORCHVISION.CIFAR100),
        True,
    ),
    "svhn": DatasetEntry("SVHN, cropped: 99,289 colour 32x32, 10 digits", _load_svhn, False),
    "image_folder": DatasetEntry("a folder of yours: train/<class>/* and test/<class>/*", _load_image_folder, True),
    "npz": DatasetEntry("a numpy file of yours: x_train, y_train, x_test, y_test", _load_npz, False),
}
"""Name -> description, loader, whether images may be mirrored."""
