"""The model card of a run: what rebuilding its network and preparing its inputs needs, without the data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlabel.data.federation import Federation
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.data.nodes.export import dataset_schema
from fedlabel.data.nodes.federation import NodesFederation
from fedlabel.data.nodes.schema import CATEGORY, NUMBER, Column, Schema
from fedlabel.errors import naming
from fedlabel.shown import shown

VERSION = 1
_COUNTS = ("samples", "true", "noisy", "sets", "noisy_sets", "annotated", "bags", "asked")


@dataclass(frozen=True)
class Card:
    """Classes, inputs and normalisation of a run, and how many labels of each kind it learnt from. Holds no sample."""

    schema: Schema
    labels: LabelCard
    """Methods build their network by it."""
    raw: bool = False
    """Whether inputs are arrays that are used as they are, of the shape in the schema: neither images nor a table."""

    @classmethod
    def of(cls, federation: Federation, labels: LabelCard) -> Card:
        """Returns the card of a federation whose label card is `labels`."""
        if isinstance(federation, NodesFederation):
            return cls(federation.schema, labels)
        dataset = federation.dataset
        return cls(dataset_schema(dataset), labels, raw=dataset.tabular and not dataset.tables)

    def fields(self) -> dict[str, Any]:
        """Returns the card in JSON's types; `parse_card` reads them back."""
        schema = asdict(self.schema)
        return {"version": VERSION, "schema": schema, "raw": self.raw, "labels": self.labels._asdict()}

    def without_counts(self) -> Card:
        """Returns the card with 1 in place of every number of labels, for giving the model to others."""
        found = self.labels._asdict()
        found |= {name: min(1, found[name]) for name in _COUNTS}
        found["votes"] = tuple(tuple(min(1, count) for count in row) for row in self.labels.votes)
        return Card(self.schema, LabelCard(**found), self.raw)

    @property
    def text(self) -> str:
        """The card as JSON."""
        return json.dumps(self.fields(), indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: it is damaged.
        FileError: the system does not let us read it.
    """
    with naming(path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): put it back as it was.") from error


def parse_card(content: Any, where: Path) -> Card:
    """Returns the card that `Card.fields` gave.

    Args:
        content: in JSON's types.
        where: it comes from, for messages.

    Raises:
        ValueError: it is none, or damaged, or of another version.
    """
    try:
        version, schema, labels = content["version"], dict(content["schema"]), dict(content["labels"])
        if version != VERSION:
            raise ValueError(
                f"{where} is of another version of fedlabel (its `version` is {version}, this one's {VERSION}): use "
                "the version that wrote it."
            )
        columns = tuple(
            Column(**{**column, "categories": tuple(map(str, column["categories"]))}) for column in schema["columns"]
        )
        lists = {name: tuple(schema[name]) for name in ("classes", "shape", "mean", "std", "annotators", "functions")}
        votes = tuple(map(tuple, labels.pop("votes")))
        card = Card(
            Schema(**{**schema, **lists, "columns": columns}), LabelCard(**labels, votes=votes), content["raw"] is True
        )
        wrong = _wrong(card)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no model card ({type(error).__name__}): put it back as it was.") from error
    if wrong:
        raise ValueError(f"{where} is no model card: {wrong}. Put it back as it was.")
    return card


def _wrong(card: Card) -> str:
    """Returns what of a card describes no inputs or classes, "" if all is well."""
    schema = card.schema
    if len(schema.classes) < 2 or not all(isinstance(name, str) for name in schema.classes):
        return f"`classes` (={shown(list(schema.classes))}) must be the names of two or more classes"
    sides = list(schema.shape)
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        return f"`shape` (={shown(sides)}) must be three whole numbers above 0: channels, height, width"
    for column in schema.columns:
        scale = [column.missing, column.mean, column.std]
        if column.kind not in (NUMBER, CATEGORY) or not all(map(math.isfinite, scale)) or column.std <= 0:
            return f"column {shown(column.name)} must have a kind, and finite numbers, of which `std` is above 0"
    if schema.tabular:
        width = sum(column.width for column in schema.columns)
        return f"`shape` (={shown(sides)}) must be [{width}, 1, 1] by its columns" if sides != [width, 1, 1] else ""
    for key in () if card.raw else ("mean", "std"):
        values = list(getattr(schema, key))
        if len(values) != sides[0] or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            above = ", each above 0" if key == "std" else ""
            return f"`{key}` (={shown(values)}) must have a finite number for each of {sides[0]} channels{above}"
    return ""
