"""A trained model as a folder to give away, and reading it back: weights, an exported program, a card."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlabel.config import ExperimentConfig, parse_config, to_yaml
from fedlabel.config_text import ConfigError, parse_yaml
from fedlabel.data.sets.config import DataConfig
from fedlabel.errors import make_folder, naming
from fedlabel.methods import METHODS
from fedlabel.models import is_foreign
from fedlabel.prediction.card import Card, parse_card, read_json
from fedlabel.prediction.module import TrainedModel, trained_model
from fedlabel.record.files import write_atomic
from fedlabel.record.json_files import as_json
from fedlabel.record.names import CARD_JSON
from fedlabel.shown import shown

WEIGHTS, PROGRAM = "weights.pt", "model.pt2"
HOW_TO_USE = {
    "weights": f"torch.load('{WEIGHTS}', weights_only=True): the network's state dict; inputs must be normalised first",
    "program": f"torch.export.load('{PROGRAM}').module()(inputs): inputs as `input` says, normalised inside; logits",
}


Loaded = tuple[nn.Module, Card, DataConfig]
"""A model, its card, and how its run read the data."""


@dataclass(frozen=True, eq=False)
class Exported:
    """What was written, or read."""

    path: Path
    files: tuple[str, ...]
    """Their names."""
    problem: str
    """Why there is no program; "" if there is one."""


def export_model(
    model: TrainedModel, config: ExperimentConfig, card: Card, path: Path, about: Mapping[str, Any]
) -> Exported:
    """Writes weights, program and card into a folder; the card last, so that a folder with a card is complete.

    Args:
        model: of a run.
        config: of the run.
        card: of the run; numbers of labels are left out.
        path: a new or empty folder.
        about: what else the card says: metrics, rounds.

    Raises:
        ValueError: there is something in the folder.
        FileError: the system does not let us write.
    """
    make_folder(path)
    with naming(path):
        if any(path.iterdir()):
            raise ValueError(f"`--out` (={path}): the folder is not empty. Give a new one.")
    weights = io.BytesIO()
    torch.save(model.network.state_dict(), weights)
    write_atomic(path / WEIGHTS, weights.getbuffer())
    program, problem = _program(model)
    if program is not None:
        write_atomic(path / PROGRAM, program.getbuffer())
    files = [WEIGHTS, *[PROGRAM] * (program is not None), CARD_JSON]
    schema, example = card.schema, model.example()
    about = {
        **card.without_counts().fields(),
        "input": {
            "dtype": str(example.dtype).removeprefix("torch."),
            "shape": ["batch", *example.shape[1:]],
            **({"columns": [column.name for column in schema.columns]} if schema.tabular else {}),
            **({} if schema.tabular or card.raw else {"values": "0 to 255"}),
        },
        "output": {"dtype": "float32", "shape": ["batch", len(schema.classes)], "values": "logits"},
        "how_to_use": {name: text for name, text in HOW_TO_USE.items() if name == "weights" or program is not None},
        **({"no_program": problem} if problem else {}),
        "parameters": sum(value.numel() for value in model.network.parameters()),
        **about,
        "config": to_yaml(config),
    }
    write_atomic(path / CARD_JSON, json.dumps(as_json(about), indent=1, ensure_ascii=False) + "\n")
    return Exported(path, tuple(files), problem)


def _program(model: TrainedModel) -> tuple[io.BytesIO | None, str]:
    """Returns the exported program, for any number of inputs; or None and why there is none."""
    example, content = model.example(), io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of its own parts
            exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
            torch.export.save(exported, content)
            content.seek(0)
            again = torch.export.load(content).module()
        with torch.no_grad():
            same = torch.allclose(again(example), model(example), atol=1e-5)
    except Exception as error:  # a network of the user's own may hold anything that torch.export cannot follow
        return None, f"torch.export cannot follow this network: {' '.join(str(error).split())[:300]}"
    return (content, "") if same else (None, "the program that torch.export made gives other logits")


def load_exported(path: Path, program: bool = False) -> Loaded:
    """Returns the model in a folder of `export_model`, its card, and how its run read the data.

    Args:
        path: the folder.
        program: whether to run the exported program. Otherwise the network is built by this version's own code and
            filled with the weights, and nothing in the folder is executed.

    Raises:
        ValueError: a file is missing or damaged; or network or method are none of ours, and `program` is False.
    """
    content = read_json(path / CARD_JSON)
    card = parse_card(content, path / CARD_JSON)
    names, data = _named(content.get("config"), path / CARD_JSON)
    if program:
        if not (path / PROGRAM).is_file():
            raise ValueError(f"{path / PROGRAM} does not exist: {content.get('no_program', 'export the run again')}.")
        try:
            with warnings.catch_warnings(action="ignore"):
                return torch.export.load(path / PROGRAM).module(), card, data
        except Exception as error:  # torch's reader has many ways to fail
            raise ValueError(f"{path / PROGRAM} is damaged ({type(error).__name__}): export the run again.") from error
    for section, name in names.items():  # before the configuration is read as a whole, which imports the method
        if is_foreign(name) if section == "model" else name not in METHODS:
            raise ValueError(
                f"`{section}.name` (={shown(name, 200)}) of {path} is code that is not fedlabel's, and is not imported "
                f"from here. --program runs {PROGRAM} instead, which can hold code, too: only of somebody whom you "
                "trust."
            )
    try:
        config = parse_config(content["config"])
    except ConfigError as error:
        raise _unreadable(path / CARD_JSON, error) from error
    try:
        with naming(path / WEIGHTS), open(path / WEIGHTS, "rb") as file, warnings.catch_warnings(action="ignore"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            _ = {name: value.shape for name, value in state.items()}
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path / WEIGHTS} is damaged ({type(error).__name__}): export the run again.") from error
    return trained_model(config, card, state, str(path)), card, data


def _named(text: Any, where: Path) -> tuple[dict[str, str], DataConfig]:
    """Returns the names of model and method in a configuration, and its section `data`; imports nothing that it names.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if not isinstance(text, str):
            raise ConfigError("it is no text")
        content = parse_yaml(text, "The configuration")
        if not isinstance(content, dict) or not all(isinstance(each, str) for each in content):
            raise ConfigError("it is no mapping")
        names = {}
        for section in ("model", "method"):
            found = content.get(section)
            name = found.get("name") if isinstance(found, dict) else None
            if not isinstance(name, str):
                raise ConfigError(f"`{section}.name` is no text")
            names[section] = name
        return names, parse_config("{}", settings={"data": content.get("data", {})}).data
    except ConfigError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"{where}: its `config` cannot be read ({reason}). Use the version that wrote it.")
