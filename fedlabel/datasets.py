"""Data of your own from Python, for `fedlabel.run(data=...)`: arrays, tables, torch and Hugging Face data sets, LEAF.

What is passed is written once into `OUT/.data`, under the hash of its content, and the run's configuration names that
file: so workers, `--resume` and others find it, and the checks are those of users' files (docs/data.md).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fedlabel.data.own_columns import name_of
from fedlabel.data.sets.cells import as_text, is_number
from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.image_files import read_header
from fedlabel.data.sets.names import listed
from fedlabel.errors import make_folder, naming
from fedlabel.names import did_you_mean
from fedlabel.record.files import write_atomic

FOLDER = ".data"
"""In the folder of runs: what was passed from Python."""
CLIENT = "client"
"""The array of an .npz file that says who owns a training sample."""

Owner = Sequence[Any] | np.ndarray | Tensor | Mapping[Any, Sequence[int]]
"""Who owns each training sample: a name or number for each, or client -> the numbers of its samples."""


@dataclass(frozen=True, eq=False)
class OwnData:
    """A data set that was made in Python."""

    content: bytes
    """Of the file."""
    suffix: str
    test: bytes | None = None
    """Of the file with the test set, where there is a second one."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the section `data`, besides the files."""
    column: str | None = None
    """What names the client of each training sample."""
    num_clients: int | None = None
    """How many different ones there are, those whose samples all go to the test or validation set included."""

    def save(self, out: Path) -> dict[str, Any]:
        """Writes what is not there yet, and returns the keys of a configuration that uses it.

        Args:
            out: the folder of runs.

        Raises:
            FileError: the system does not let us write.
        """
        make_folder(out / FOLDER)
        names = []
        for content in [self.content, *([self.test] if self.test is not None else [])]:
            path = (out / FOLDER / f"{hashlib.sha256(content).hexdigest()[:16]}{self.suffix}").absolute()
            with naming(path):
                if not path.is_file():
                    write_atomic(path, content)
            names.append(path)
        data = {**self.data, "root": str(names[0])}
        if len(names) == 2:
            data["test_file"] = names[1].name
        found: dict[str, Any] = {"data": data}
        if self.column is not None:
            found |= {"partition": {"kind": "column", "column": self.column}, "num_clients": self.num_clients}
        return found


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    class_names: Sequence[str] | None = None,
    client: Owner | None = None,
    client_test: Owner | None = None,
    images: bool | None = None,
    channel_axis: int | None = None,
) -> OwnData:
    """Returns a data set of arrays or tensors.

    Args:
        x_train: training inputs: images (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or floats in [0, 1]; or others,
            (n, a), (n, a, b) or (n, a, b, c), which are used as they are: floats should be standardised, and tokens be
            whole numbers from 0 on. A network of your own gets four dimensions, (batch, a, 1, 1) of the first.
        y_train: a label for each: a number from 0 on or a text; -1 or "" where nobody knows it.
        x_test: test inputs, likewise.
        y_test: their labels, all known.
        class_names: in the order of their numbers.
        client: who owns each training sample (natural clients); None: `partition` deals them out.
        client_test: who owns each test sample, by which clients are evaluated; None: each gets samples like its own.
        images: whether inputs are images; None: if they have three dimensions or more.
        channel_axis: 1 or 3, the axis of the channels of images that have another number of them than 1 or 3.

    Raises:
        DataError: the arrays cannot be a data set. What is in them is checked when the run begins.
    """
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    found = {key: _array(value, key) for key, value in arrays.items()}
    if images is None:
        images = found["x_train"].ndim >= 3
    if channel_axis is not None:
        if not images or channel_axis not in (1, 3):
            raise DataError(f"`channel_axis` (={channel_axis}) must be 1 or 3, and is for images.")
        found["channel_axis"] = np.array(channel_axis)
    if class_names is not None:
        found["class_names"] = np.array([str(name) for name in class_names])
    owner = None if client is None else _owner(client, len(found["x_train"]))
    if owner is not None:
        found[CLIENT] = owner
    if client_test is not None:
        if owner is None:
            raise DataError("`client_test` says who owns test samples, and `client` is None: give both.")
        found[f"{CLIENT}_test"] = _owner(client_test, len(found["x_test"]))
    content = io.BytesIO()
    np.savez(content, **found)  # type: ignore[arg-type]
    clients = None if owner is None else len(set(map(name_of, owner.tolist())))
    column = None if owner is None else CLIENT
    return OwnData(content.getvalue(), ".npz", None, {"name": "npz" if images else "arrays"}, column, clients)


def from_table(
    train: Any,
    *,
    label: str,
    test: Any = None,
    client: str | None = None,
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> OwnData:
    """Returns a data set of a table: a pandas table, or a mapping column -> cells.

    Args:
        train: the table. A column of texts holds categories, even if these look like numbers.
        label: its column of labels; an empty cell: nobody knows the class.
        test: another table as test set; None: `data.test_fraction` of the rows are split off.
        client: the column that says who owns a row (natural clients); it is no feature.
        categorical: further columns of categories, such as codes.
        drop: columns that are left out.

    Raises:
        DataError: there is no such column. What is in them is checked when the run begins.
    """
    columns = _columns(train, "train")
    for key, name in (("label", label), *((("client", client),) if client is not None else ())):
        if name not in columns:
            known = list(columns)
            raise DataError(f"`{key}` (={name}) is no column of the table: {listed(known)}.{did_you_mean(name, known)}")
    texts = {name: [as_text(cell) for cell in cells] for name, cells in columns.items()}
    coded = [
        name
        for name, cells in columns.items()
        if name not in (label, client, *drop)
        and any(isinstance(cell, (str, bool)) for cell in cells)
        and all(text == "" or is_number(text) for text in texts[name])
    ]
    data: dict[str, Any] = {"name": "table", "label_column": label}
    if names := list(dict.fromkeys([*categorical, *coded])):
        data["categorical"] = names
    if drop:
        data["drop_columns"] = list(drop)
    clients = None if client is None else len({name_of(text) for text in texts[client]} - {""})
    second = None if test is None else _csv({n: [as_text(c) for c in v] for n, v in _columns(test, "test").items()})
    return OwnData(_csv(texts), ".csv", second, data, client, clients)


def from_torch(
    train: Any,
    test: Any,
    *,
    class_names: Sequence[str] | None = None,
    client: Owner | None = None,
    images: bool | None = None,
) -> OwnData:
    """Returns a data set of two `torch.utils.data.Dataset` of pairs (input, label), all of which are read once.

    Args:
        train: the training set. Leave random augmentation and normalisation out of its transform: `augment` does the
            one, and the model the other. Tensors of images are (c, h, w).
        test: the test set.
        class_names: None: the `classes` of `train`, if it has such.
        client: see `from_arrays`.
        images: see `from_arrays`.

    Raises:
        DataError: items are no pairs, or their inputs have different shapes.
    """
    pairs = [_stacked(part, name) for part, name in ((train, "train"), (test, "test"))]
    names = class_names if class_names is not None else getattr(train, "classes", None)
    as_tensors = isinstance(train[0][0], Tensor)
    x_train = pairs[0][0]
    many = x_train.ndim == 4 and images is not False and x_train.shape[1] not in (1, 3) and as_tensors
    return from_arrays(
        *(*pairs[0], *pairs[1]), class_names=names, client=client, images=images, channel_axis=1 if many else None
    )


def from_huggingface(
    source: Any,
    *,
    inputs: str = "image",
    label: str = "label",
    client: str | None = None,
    train: str = "train",
    test: str = "test",
) -> OwnData:
    """Returns a data set of Hugging Face's `datasets`, as `save_to_disk` wrote it.

    Args:
        source: the folder, or what `datasets.load_from_disk` returned; it has two splits.
        inputs: the column of images, or of lists of numbers of one length, such as tokens.
        label: the column of labels; its names become those of the classes.
        client: the column that says who owns a sample (natural clients).
        train: name of the training split.
        test: name of the test split.

    Raises:
        DataError: the package is missing, or there is no such split or column.
    """
    if isinstance(source, (str, Path)):
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise DataError(
                f"`source` (={source}) is read by the package datasets, which is not installed: pip install datasets."
            ) from error
        source = load_from_disk(str(source))
    if absent := [name for name in (train, test) if name not in source]:
        raise DataError(f"There is no split {absent[0]}, only {listed(list(source))}: say train=... and test=....")
    for name in (train, test):
        columns = list(source[name].column_names)
        for wanted in (inputs, label, *([client] if client is not None and name == train else [])):
            if wanted not in columns:
                raise DataError(
                    f"The split {name} has no column {wanted}, only {listed(columns)}.{did_you_mean(wanted, columns)}"
                )
    x_train, x_test = (_stack(list(source[name][inputs]), f"{name}: {inputs}") for name in (train, test))
    names = getattr(source[train].features.get(label), "names", None)
    return from_arrays(
        x_train,
        list(source[train][label]),
        x_test,
        list(source[test][label]),
        class_names=names,
        client=None if client is None else list(source[train][client]),
    )


def from_leaf(train: str | Path, test: str | Path, *, shape: Sequence[int] | None = None) -> OwnData:
    """Returns a data set in LEAF's JSON (Caldas et al., 2018, https://arxiv.org/abs/1812.01097); its users are clients.

    Args:
        train: a .json file, or a folder of such: {"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}.
        test: likewise.
        shape: of an input that is written as a flat list, e.g. (28, 28) of FEMNIST; None: as it is written.

    Raises:
        DataError: a file is missing, or of another form.
    """
    parts = [_leaf(Path(path)) for path in (train, test)]
    inputs = [_stack(x, str(path)) for (x, _, _), path in zip(parts, (train, test), strict=True)]
    if shape is not None:
        try:
            inputs = [array.reshape(-1, *shape) for array in inputs]
        except ValueError as error:
            raise DataError(f"`shape` (={tuple(shape)}) does not fit inputs of shape {inputs[0].shape[1:]}.") from error
    return from_arrays(inputs[0], parts[0][1], inputs[1], parts[1][1], client=parts[0][2], client_test=parts[1][2])


# -------------------------------------------------------------------------------------------------------------- helpers


def _array(value: Any, name: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype == object:
        if name.startswith("x") or not all(isinstance(each, str) for each in array.flat):
            raise DataError(f"`{name}` holds Python objects, or arrays of several shapes: give one array of numbers.")
        array = array.astype(str)
    if array.ndim == 0:
        raise DataError(f"`{name}` is a single {type(value).__name__}; it must be an array with a row per sample.")
    return array


def _owner(client: Owner, size: int) -> np.ndarray:
    if not isinstance(client, Mapping):
        owner = _array(client, "client")
        if owner.shape != (size,):
            raise DataError(
                f"`client` has shape {owner.shape}; it must name the owner of each training sample, ({size},)."
            )
        return owner
    found = np.full(size, "", dtype=object)
    for name, rows in client.items():
        for row in np.asarray(rows, dtype=np.int64).tolist():
            if not 0 <= row < size:
                raise DataError(f"`client`: {name} owns sample {row}, and there are {size}: number them from 0 on.")
            if found[row] != "":
                raise DataError(f"`client`: sample {row} is owned by {found[row]} and by {name}.")
            found[row] = str(name)
    if len(without := np.flatnonzero(found == "")):
        raise DataError(f"`client` says nothing of {len(without)} of {size} samples, e.g. {without[0]}.")
    return found.astype(str)


def _columns(table: Any, name: str) -> dict[str, list[Any]]:
    if not isinstance(table, Mapping) and not hasattr(table, "columns"):
        raise DataError(f"`{name}` is {type(table).__name__}; it must be a pandas table, or a mapping column -> cells.")
    keys: Iterable[Any] = table if isinstance(table, Mapping) else table.columns
    columns = {str(key): list(table[key]) for key in keys}
    if len(set(map(len, columns.values()))) != 1:
        raise DataError(f"`{name}` must have columns of one length, at least one.")
    return columns


def _csv(columns: Mapping[str, Sequence[str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _stacked(part: Any, name: str) -> tuple[np.ndarray, list[Any]]:
    inputs, labels = [], []
    for place in range(len(part)):
        try:
            x, y = part[place]
        except (TypeError, ValueError) as error:
            raise DataError(f"`{name}`: item {place} must be a pair (input, label).") from error
        inputs.append(x)
        labels.append(y.item() if isinstance(y, (Tensor, np.generic)) else y)
    return _stack(inputs, f"`{name}`"), labels


def _stack(values: Sequence[Any], where: str) -> np.ndarray:
    if not values:
        raise DataError(f"{where} holds no sample. At least one is needed.")
    arrays = (
        _pictures(values, where)
        if all(isinstance(value, Image.Image) for value in values)
        else [value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in values]
    )
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:3]))
        raise DataError(f"{where} has inputs of {len(shapes)} shapes ({some}): resize, crop or pad them to one first.")
    return np.stack(arrays)


def _pictures(images: Sequence[Image.Image], where: str) -> list[np.ndarray]:
    """Returns Pillow's images as grey ones if all are, else in colour: the values of a palette are none of pixels."""
    headers = [read_header(image) for image in images]
    if deep := [place for place, header in enumerate(headers) if header.mode.startswith(("I", "F"))]:
        raise DataError(
            f"{where}: image {deep[0]} has more than 8 bits a pixel; {len(deep)} of {len(images)} have. Convert them "
            "to 8 bits first, all on one scale."
        )
    mode = "L" if all(header.grey for header in headers) else "RGB"
    return [np.asarray(image.convert(mode)) for image in images]


def _leaf(path: Path) -> tuple[list[Any], list[Any], list[str]]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"There is no .json file at {path}.")
    x: list[Any] = []
    y: list[Any] = []
    owners: list[str] = []
    for file in files:
        with naming(file):
            text = file.read_bytes()
        try:
            content = json.loads(text)
            for user in content["users"]:
                own = content["user_data"][user]
                if len(own["x"]) != len(own["y"]):
                    raise DataError(f"{file}: user {user} has {len(own['x'])} inputs and {len(own['y'])} labels.")
                x += own["x"]
                y += own["y"]
                owners += [str(user)] * len(own["y"])
        except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f'{file} is not in LEAF\'s form, {{"users": [...], "user_data": {{user: {{"x": [...], "y": [...]}}}}}} '
                f"({type(error).__name__}: {error})."
            ) from error
    return x, y, owners
