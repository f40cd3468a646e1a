"""One loader per kind of file: from `data.root` to uint8 images and int64 labels, or a `DataError`."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

if TYPE_CHECKING:
    from fedlabel.data.datasets import DataConfig

DIGITS = tuple("0123456789")


class DataError(ValueError):
    """The data set is unknown, missing or not as it should be; the message says what to do."""


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


# ---------------------------------------------------------------------------------------------- border: errors, checks


def data_root(config: DataConfig) -> Path:
    """Returns `data.root` as an absolute path."""
    return Path(config.root).expanduser().resolve()


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


def load_digits(config: DataConfig) -> Loaded:
    """Handwritten digits of scikit-learn; its 80/20 test split is fixed and does not follow the experiment's seed."""
    # Imported here: scikit-learn takes a second to import, and only this set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
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
    sets = _load_torchvision(config, torchvision.datasets.SVHN, splits, "train_32x32.mat and test_32x32.mat")
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


def load_npz(config: DataConfig) -> Loaded:
    """A numpy archive with x_train, y_train, x_test, y_test and, if wanted, class_names (an array of strings).

    x: uint8, (n, h, w) grey; or (n, h, w, c) or (n, c, h, w) with c = 1 or 3. Channels are last if the last size is 1
    or 3, and first otherwise. y: integers (n,) from 0; without class_names the largest of y_train is the last class.
    """
    path = data_root(config)
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


def load_image_folder(config: DataConfig) -> Loaded:
    """`<root>/train/<class>/<image>` and `<root>/test/<class>/<image>`; classes are the sorted folders of `train`.

    Files without an image's extension are passed over. All images must be of one size: resizing is a choice that
    belongs to whoever prepares the data. Grey if all images are, else converted to RGB (alpha is dropped).
    """
    root = data_root(config)
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
