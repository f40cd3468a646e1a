"""The schema that the nodes of a federation agree on before a run: classes, inputs, normalisation, label sources.

It is a YAML file (see docs/data.md) that one of them makes, of its own folder or of the summed statistics of all (see
`statistics.py`); it travels with the run as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fedlabel.config_text import ConfigError, Plain, parse_yaml
from fedlabel.data.sets.config import DataError
from fedlabel.errors import naming
from fedlabel.shown import shown

VERSION = 1
SEPARATOR = ";"
"""Between the classes of a candidate set."""
MAX_SIDE, MAX_NAMES = 1 << 14, 10_000
"""Largest height or width of an image, and number of classes, columns, categories, annotators or functions."""
NUMBER, CATEGORY = "number", "category"


@dataclass(frozen=True)
class Column:
    """A column of a table and how its cells become features."""

    name: str
    kind: str
    """"number": one feature, (cell - mean) / std; "category": a feature for each of `categories`, 0 or 1."""
    missing: float = 0.0
    """What stands for a number that is missing."""
    mean: float = 0.0
    std: float = 1.0
    """Above 0."""
    categories: tuple[str, ...] = ()
    """Sorted; a cell with another text is 0 in all features."""

    @property
    def width(self) -> int:
        """The number of features."""
        return 1 if self.kind == NUMBER else len(self.categories)


@dataclass(frozen=True)
class Schema:
    """The form of the data of all nodes. It holds no sample and no label."""

    classes: tuple[str, ...]
    """Names, in the order of their numbers."""
    shape: tuple[int, int, int]
    """(channels, height, width) of an image; (features, 1, 1) of a row of a table."""
    mean: tuple[float, ...] = ()
    """Per channel, with pixels in [0, 1]; empty for tables, whose columns have their own."""
    std: tuple[float, ...] = ()
    """Likewise; above 0."""
    allow_flip: bool = False
    """Whether an image mirrored left to right still shows its class."""
    columns: tuple[Column, ...] = ()
    """Of a table, those with numbers first; empty for images."""
    annotators: tuple[str, ...] = ()
    """Who may have given noisy labels, besides the columns `noisy_label` and `noisy_candidates`."""
    functions: tuple[str, ...] = ()
    """Labelling functions whose votes a node may hold."""
    label_epsilon: float | None = None
    """Privacy budget of the noisy labels, if all are randomised responses with this one."""

    @property
    def tabular(self) -> bool:
        """Whether the samples are rows of a table."""
        return bool(self.columns)

    @property
    def text(self) -> str:
        """The schema as YAML; `parse_schema` reads it back."""
        found: dict[str, Any] = {"version": VERSION, "classes": list(self.classes)}
        if self.tabular:
            found["columns"] = [_column_fields(column) for column in self.columns]
        else:
            found |= {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}
            found |= {"allow_flip": self.allow_flip}
        found |= {name: list(value) for name in ("annotators", "functions") if (value := getattr(self, name))}
        found |= {"label_epsilon": self.label_epsilon} if self.label_epsilon is not None else {}
        return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120))

    @property
    def hash(self) -> str:
        """A hash (BLAKE2b, 128 bits) of all of it."""
        return blake2b(self.text.encode(), digest_size=16).hexdigest()

    def features(self, numbers: Sequence[np.ndarray], categories: Sequence[Sequence[str]]) -> Tensor:
        """Returns the features of rows, (n, features, 1, 1) float32.

        Args:
            numbers: per column of numbers, (n,) float64, NaN = missing.
            categories: per column of categories, n texts.
        """
        made: list[np.ndarray] = []
        remaining = iter(categories)
        for column, cells in zip(self.columns, [*numbers, *categories], strict=True):
            if column.kind == NUMBER:
                values = np.where(np.isnan(cells), column.missing, cells)  # type: ignore[call-overload]
                with np.errstate(over="ignore"):
                    made.append(((values - column.mean) / column.std).astype(np.float32)[:, None])
            else:
                place = {name: number for number, name in enumerate(column.categories)}
                found = np.array([place.get(text, -1) for text in next(remaining)], dtype=np.int64)
                made.append((found[:, None] == np.arange(column.width)).astype(np.float32))
        return torch.from_numpy(np.concatenate(made, 1))[:, :, None, None]


def _column_fields(column: Column) -> dict[str, Any]:
    kept = ("name", "kind", "missing", "mean", "std") if column.kind == NUMBER else ("name", "kind", "categories")
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(column).items() if key in kept
    }


def load_schema(path: Path) -> Schema:
    """Returns the schema in a YAML file.

    Raises:
        DataError: there is no such file, or it is no schema.
        FileError: the system does not let us read it.
    """
    if not path.is_file():
        raise DataError(
            f"`schema` (={path}): there is no such file. `fedlabel data schema FOLDER --out schema.yaml` makes one."
        )
    with naming(path):
        data = path.read_bytes()
    try:
        return parse_schema(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no schema: it is no UTF-8.") from error


def parse_schema(text: str, where: str) -> Schema:
    """Returns the schema in a text.

    Args:
        text: YAML.
        where: it comes from, for messages.

    Raises:
        DataError: it is no schema.
    """
    try:
        return _checked(_read(parse_yaml(text, where)))
    except (ConfigError, _Wrong) as error:
        raise DataError(f"{where} is no schema: {error} See docs/data.md.") from error


class _Wrong(ValueError):
    """What is wrong with a schema, as a sentence."""


def _read(content: object) -> Schema:
    if not isinstance(content, dict):
        raise _Wrong("it must be a mapping of keys.")
    known = {"version", *(each.name for each in fields(Schema))}
    if further := [key for key in content if key not in known]:
        raise _Wrong(f"it has the key `{shown(further[0])}`, which is none of {', '.join(sorted(known))}.")
    if _number(content, "version") != VERSION:
        raise _Wrong(f"its `version` (={shown(_text(content.get('version')))}) must be {VERSION}.")
    columns = tuple(_read_column(each) for each in _list(content, "columns"))
    if columns:
        if given := [key for key in ("shape", "mean", "std", "allow_flip") if key in content]:
            raise _Wrong(f"`{given[0]}` is for images, and it has `columns` of a table: leave one of them out.")
        shape = (sum(column.width for column in columns), 1, 1)
    else:
        sides = [_whole(each, "shape") for each in _list(content, "shape")]
        if len(sides) != 3 or sides[0] not in (1, 3) or not all(2 <= side <= MAX_SIDE for side in sides[1:]):
            raise _Wrong(f"`shape` (={sides}) must be [channels, height, width] with 1 or 3 channels.")
        shape = (sides[0], sides[1], sides[2])
    flip = content.get("allow_flip", False)
    flip = flip.value if isinstance(flip, Plain) else flip
    if not isinstance(flip, bool):
        raise _Wrong(f"`allow_flip` (={shown(flip)}) must be true or false.")
    return Schema(
        classes=_names(content, "classes"),
        shape=shape,
        mean=_floats(content, "mean"),
        std=_floats(content, "std"),
        allow_flip=flip,
        columns=columns,
        annotators=_names(content, "annotators"),
        functions=_names(content, "functions"),
        label_epsilon=_number(content, "label_epsilon") if "label_epsilon" in content else None,
    )


def _read_column(content: object) -> Column:
    if not isinstance(content, dict) or "name" not in content:
        raise _Wrong("each of `columns` must be a mapping with `name` and `kind`.")
    name, kind = _text(content["name"]), _text(content.get("kind"))
    allowed = {NUMBER: {"name", "kind", "missing", "mean", "std"}, CATEGORY: {"name", "kind", "categories"}}
    if kind not in allowed:
        raise _Wrong(f"`kind` (={shown(kind)}) of column {shown(name)} must be {NUMBER} or {CATEGORY}.")
    if set(content) != allowed[kind]:
        raise _Wrong(f"column {shown(name)} of kind {kind} must have the keys {', '.join(sorted(allowed[kind]))}.")
    if kind == CATEGORY:
        return Column(name, kind, categories=_names(content, "categories", empty=True))
    return Column(name, kind, _number(content, "missing"), _number(content, "mean"), _number(content, "std"))


def _checked(schema: Schema) -> Schema:
    for key in ("classes", "annotators", "functions"):
        _check_names(key, getattr(schema, key))
    _check_names("columns", [column.name for column in schema.columns])
    if schema.label_epsilon is not None and schema.label_epsilon <= 0:
        raise _Wrong(f"`label_epsilon` (={schema.label_epsilon}) must be above 0.")
    if len(schema.classes) < 2:
        raise _Wrong(f"`classes` (={list(schema.classes)}) must name at least 2 classes.")
    if apart := [name for name in schema.classes if SEPARATOR in name]:
        raise _Wrong(f"the class {shown(apart[0])} has a `{SEPARATOR}` in its name, which stands between classes.")
    kinds = [column.kind for column in schema.columns]
    if kinds != sorted(kinds, key=(NUMBER, CATEGORY).index):
        raise _Wrong("in `columns`, those of numbers must come first.")
    for column in schema.columns:
        if not column.std > 0:
            raise _Wrong(f"`std` (={column.std}) of column {shown(column.name)} must be above 0.")
        if len(set(column.categories)) < len(column.categories):
            raise _Wrong(f"column {shown(column.name)} has a category twice.")
    if schema.tabular:
        if not schema.shape[0]:
            raise _Wrong("its columns make no feature.")
        return schema
    for key in ("mean", "std"):
        values = getattr(schema, key)
        if len(values) != schema.shape[0] or (key == "std" and min(values) <= 0):
            above = ", each above 0" if key == "std" else ""
            raise _Wrong(f"`{key}` (={list(values)}) must have a number for each of {schema.shape[0]} channels{above}.")
    return schema


def _check_names(key: str, names: Sequence[str]) -> None:
    if len(names) > MAX_NAMES:
        raise _Wrong(f"`{key}` has {len(names)} names; at most {MAX_NAMES:,} are possible.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise _Wrong(f"`{key}` has {shown(twice[0])} twice.")
    if odd := [name for name in names if not name.strip() or not name.isprintable() or name != name.strip()]:
        raise _Wrong(f"`{key}` has a name that is empty, cannot be shown or has blanks around it: {odd[0]!r}.")


def _text(value: object) -> str:
    return value.text if isinstance(value, Plain) else "" if value is None else str(value)


def _list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise _Wrong(f"`{key}` must be a list.")
    return value


def _names(content: dict[str, Any], key: str, empty: bool = False) -> tuple[str, ...]:
    """Returns a list of texts; empty: whether one of them may be empty."""
    values = _list(content, key)
    if wrong := [value for value in values if isinstance(value, (list, dict)) or (value is None and not empty)]:
        raise _Wrong(f"`{key}` must be a list of names, and has {shown(wrong[0])}.")
    return tuple(map(_text, values))


def _number(content: dict[str, Any], key: str) -> float:
    return _float(content.get(key), key)


def _floats(content: dict[str, Any], key: str) -> tuple[float, ...]:
    return tuple(_float(value, key) for value in _list(content, key))


def _float(value: object, key: str) -> float:
    found = value.value if isinstance(value, Plain) else value
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise _Wrong(f"`{key}` (={shown(_text(value))}) must be a finite number.")
    return float(found)


def _whole(value: object, key: str) -> int:
    found = _float(value, key)
    if not found.is_integer():
        raise _Wrong(f"`{key}` (={shown(found)}) must be a whole number.")
    return int(found)
