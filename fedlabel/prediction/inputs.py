"""Inputs for a trained model, from arrays, tables or files: the same checks and conversions as of training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.nodes.schema import NUMBER, Column, Schema
from fedlabel.data.own_columns import name_of
from fedlabel.data.sets.array_pixels import NEAR, TOLERANCE
from fedlabel.data.sets.cells import LARGEST, as_text, read_numbers
from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.image_files import EXTENSIONS, read_headers, read_pixels
from fedlabel.data.sets.names import listed
from fedlabel.data.sets.npz_files import read_npz
from fedlabel.data.sets.parquet_files import read_parquet
from fedlabel.names import did_you_mean
from fedlabel.prediction.card import Card
from fedlabel.shown import shown

ARRAY = "x"
"""The array of inputs in an .npz file."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a model."""

    tensor: Tensor
    """(n, ...), see `TrainedModel.forward`."""
    names: tuple[str, ...]
    """Of each input: the path below the folder, or its number from 0."""
    notes: tuple[str, ...] = ()
    """Notes for the user, a sentence each."""


def as_inputs(values: Any, card: Card, data: DataConfig | None = None) -> Inputs:
    """Returns inputs in any form that is understood as tensors.

    Args:
        values: a path (see `read_inputs`); images as array or tensor (n, channels, height, width), (n, height, width,
            channels) or, of one channel, (n, height, width): whole numbers in [0, 255] of any type, or floats of which
            none is above 1, which are multiplied by 255 and rounded, as in training; arrays as data.name=arrays has
            them; rows of a table as a pandas table, a
            mapping column -> cells, a list of mappings, or an array (n, columns), see `Cells.forward`.
        card: of the run.
        data: how the run read its table; None: marks of missing values are the usual ones.

    Raises:
        DataError: they are not of the form that the model was trained on.
    """
    schema = card.schema
    if isinstance(values, (str, Path)):
        return read_inputs(Path(values), card, data)
    if not schema.tabular:
        tensor = _tensor(_array(values), card, "`inputs`")
        return Inputs(tensor, tuple(map(str, range(len(tensor)))))
    if isinstance(values, Mapping) or hasattr(values, "columns"):
        columns = {str(name): values[name] for name in (values if isinstance(values, Mapping) else values.columns)}
        return _rows(columns, schema, data, "`inputs`")
    if isinstance(values, Sequence) and values and isinstance(values[0], Mapping):
        return _rows({name: [row.get(name) for row in values] for name in values[0]}, schema, data, "`inputs`")
    array = _array(values)
    if array.ndim != 2 or array.shape[1] != len(schema.columns) or array.dtype.kind not in "iuf":
        raise DataError(
            f"`inputs` ({array.dtype} of shape {array.shape}) must be rows of the table that the model was trained on: "
            f"a pandas table or a mapping with the columns {_names(schema)}; or an array of numbers (n, "
            f"{len(schema.columns)}) in this order, categories by their place in the schema."
        )
    return _checked_rows(array.astype(np.float64), schema, "`inputs`")


def read_inputs(path: Path, card: Card, data: DataConfig | None = None) -> Inputs:
    """Returns the inputs in files: a folder of images, at any depth; an .npz file with an array `x`; or a CSV or
    Parquet table with the columns of the schema, others of which are not read. For arguments and errors see
    `as_inputs`.
    """
    schema = card.schema
    if not path.exists():
        raise DataError(f"`inputs` (={path}): there is no such file or folder. {_wanted(schema)}")
    if schema.tabular:
        if not path.is_file() or path.suffix.lower() == ".npz":
            raise DataError(f"`inputs` (={path}) is no table. {_wanted(schema)}")
        decimal = data.decimal if data is not None else "point"
        table = read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else read_csv(path, decimal=decimal)
        return _rows(table.columns, schema, data, str(path))
    if path.is_dir() and not card.raw:
        return _image_folder(path, schema)
    if path.suffix.lower() != ".npz":
        raise DataError(f"`inputs` (={path}) is no .npz file. {_wanted(schema)}")
    arrays, names = read_npz(path, [ARRAY])
    if ARRAY not in arrays:
        raise DataError(
            f"{path} lacks the array `{ARRAY}`; it holds {listed(names) or 'nothing'}. `numpy.savez(file, {ARRAY}=...)`"
        )
    tensor = _tensor(arrays[ARRAY], card, f"{path}: `{ARRAY}`")
    return Inputs(tensor, tuple(map(str, range(len(tensor)))))


def _wanted(schema: Schema) -> str:
    if schema.tabular:
        return f"Give a CSV or Parquet file with the columns {_names(schema)}."
    shape = "x".join(map(str, schema.shape))
    return f"Give a folder of images, or an .npz file with an array `{ARRAY}`, of shape {shape} each."


def _names(schema: Schema) -> str:
    return listed([column.name for column in schema.columns])


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype == object:
        raise DataError("`inputs` are Python objects, or arrays of several shapes: give one array of numbers.")
    return array


# --------------------------------------------------------------------------------------------------------------- images


def _tensor(array: np.ndarray, card: Card, where: str) -> Tensor:
    """Returns images or raw arrays."""
    if not card.raw:
        return _images(array, card.schema, where)
    shape = card.schema.shape
    forms = {shape, shape[:2] if shape[2] == 1 else shape, shape[:1] if shape[1:] == (1, 1) else shape}
    if array.dtype.kind not in "biuf" or array.shape[1:] not in forms or not np.isfinite(array).all():
        raise DataError(
            f"{where} ({array.dtype} of shape {array.shape}) must hold finite numbers, as x_train of the run: an array "
            f"of shape {min(forms, key=len)} for each sample."
        )
    return torch.from_numpy(array.astype(np.float32).reshape(-1, *shape))


def _images(array: np.ndarray, schema: Schema, where: str) -> Tensor:
    channels, height, width = schema.shape
    if array.shape[1:] == (channels, height, width):
        found = array
    elif array.shape[1:] == (height, width, channels):
        found = array.transpose(0, 3, 1, 2)
    elif channels == 1 and array.shape[1:] == (height, width):
        found = array[:, None]
    else:
        one = f" For a single one: `x[None]`, {(1, *array.shape)}." if array.ndim < 4 else ""
        raise DataError(
            f"{where} has shape {array.shape}; the model was trained on images of shape (n, {channels}, {height}, "
            f"{width}): n, channels, height, width.{one}"
        )
    if found.dtype.kind == "b":
        found = found.astype(np.uint8) * np.uint8(255)
    if found.dtype.kind not in "iuf":
        raise DataError(f"{where} has dtype {array.dtype}; images are uint8, or floats in [0, 1].")
    if len(found) == 0:
        return torch.zeros(0, *schema.shape, dtype=torch.uint8)
    low, high = float(found.min()), float(found.max())
    floats = found.dtype.kind == "f"
    scale = 255 if floats and high <= 1 + TOLERANCE else 1
    values = found.astype(np.float64) * scale if floats else found
    # Images in training may have any values up to 255; here others than whole numbers are taken for normalised ones.
    whole = scale == 255 or not floats or bool((np.abs(values - np.rint(values)) <= NEAR).all())
    if not -TOLERANCE <= low <= high <= 255 or not whole:  # NaN, too
        raise DataError(
            f"{where} ({array.dtype}) holds values from {low:g} to {high:g}; images are whole numbers in [0, 255], or "
            "floats in [0, 1], and not normalised: the model does that itself."
        )
    return torch.from_numpy(np.ascontiguousarray(np.rint(values).clip(0, 255) if floats else values, np.uint8))


def _image_folder(path: Path, schema: Schema) -> Inputs:
    paths = sorted(each for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS and each.name[0] != ".")
    if not paths:
        raise DataError(f"{path} holds no image. {_wanted(schema)}")
    headers, _ = read_headers(paths)
    channels, height, width = schema.shape
    if headers[0].size != (width, height) or channels not in (1, 3):
        raise DataError(
            f"{path}: images are {headers[0].size[0]}x{headers[0].size[1]} (width x height), and the model was trained "
            f"on {width}x{height} with {channels} channels. Resize or crop them as the training images were."
        )
    pixels = read_pixels(paths, "RGB" if channels == 3 else "L", headers[0].size)
    coloured = sum(not header.grey for header in headers) if channels == 1 else 0
    notes = (f"{path}: {coloured} of {len(paths)} images are in colour and read as grey.",) if coloured else ()
    return Inputs(torch.from_numpy(pixels), tuple(each.relative_to(path).as_posix() for each in paths), notes)


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows(columns: Mapping[str, Iterable[Any]], schema: Schema, data: DataConfig | None, where: str) -> Inputs:
    absent = [column.name for column in schema.columns if column.name not in columns]
    if absent:
        raise DataError(
            f"{where} lacks the columns {listed(absent)} of the table that the model was trained on; it has "
            f"{listed(list(columns))}.{did_you_mean(absent[0], list(columns))}"
        )
    marks = frozenset(mark.casefold() for mark in data.missing) if data is not None else frozenset()
    decimal = data.decimal if data is not None else "point"
    made, notes = [], []
    for column in schema.columns:
        cells = list(columns[column.name])
        if column.kind == NUMBER:
            made.append(_numbers(cells, column.name, marks, decimal, where))
        else:
            found = _categories(cells, column)
            if unknown := int((found < 0).sum()):
                notes.append(
                    f"{where}: {unknown} of {len(cells)} cells of column {shown(column.name)} hold none of the "
                    "categories of the training rows."
                )
            made.append(found)
    sizes = {len(each) for each in made}
    if len(sizes) > 1:
        raise DataError(f"{where}: columns have {' and '.join(map(str, sorted(sizes)))} cells; all must have as many.")
    return _checked_rows(np.stack(made, 1), schema, where, tuple(notes))


def _checked_rows(rows: np.ndarray, schema: Schema, where: str, notes: tuple[str, ...] = ()) -> Inputs:
    """Returns rows (n, columns) float64 as inputs; raises a DataError if they make no finite features."""
    for cells, column in zip(rows.T, schema.columns, strict=True):
        if column.kind == NUMBER:
            with np.errstate(over="ignore"):
                features = ((cells - column.mean) / column.std).astype(np.float32)
            wrong = ~np.isnan(cells) & ~((np.abs(cells) <= LARGEST) & np.isfinite(features))
            needed = (
                f"a finite number, at most {LARGEST:g} in size and no outlier beyond single precision; NaN is missing"
            )
        else:
            wrong = ~(np.isin(cells, np.arange(-1, column.width)))
            needed = f"the place of a category, a whole number from 0 to {column.width - 1}, or -1 for none of them"
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(
                f"{where}: column {shown(column.name)}, data row {place + 1}: {cells[place]:g} must be {needed}."
            )
    return Inputs(torch.from_numpy(rows), tuple(map(str, range(len(rows)))), notes)


def _numbers(cells: list[Any], name: str, marks: frozenset[str], decimal: str, where: str) -> np.ndarray:
    if all(isinstance(cell, (int, float, np.number)) for cell in cells):
        return np.array(cells, dtype=np.float64)
    texts = list(map(as_text, cells))
    typed = not all(isinstance(cell, str) for cell in cells)  # Python's own numbers have a decimal point
    found = read_numbers(texts, marks, "point" if typed else decimal)
    if found.odd:
        place = next(place for place, text in enumerate(texts) if text in found.odd)
        raise DataError(
            f"{where}: column {shown(name)}, data row {place + 1}: {shown(texts[place])} is no number, and the column "
            "holds numbers. Correct it, or leave it empty."
        )
    return found.values


def _categories(cells: list[Any], column: Column) -> np.ndarray:
    place = {name: number for number, name in enumerate(column.categories)}
    texts = list(map(as_text, cells))
    return np.array([place.get(text, place.get(name_of(text), -1)) for text in texts], dtype=np.float64)
