"""Settings of a run as typed keywords: what `fedlabel.run` takes in place of YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from fedlabel.config_text import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from fedlabel.attacks import AttackConfig
    from fedlabel.compression import CompressionConfig
    from fedlabel.config import CheckpointConfig, EvaluationConfig, GridConfig, TrackingConfig
    from fedlabel.data.augment import AugmentConfig
    from fedlabel.data.labels.supervision_config import SupervisionConfig
    from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
    from fedlabel.data.sets.config import DataConfig
    from fedlabel.data.skew import SkewConfig
    from fedlabel.datasets import OwnData
    from fedlabel.devices.config import DevicesConfig
    from fedlabel.learning.prior import PriorConfig
    from fedlabel.learning.training_config import TrainingConfig
    from fedlabel.methods.recipe import Method
    from fedlabel.models import ModelConfig
    from fedlabel.privacy import PrivacyConfig
    from fedlabel.server_config import PacingConfig, SamplingConfig, StrategyConfig

Keys = Mapping[str, Any]
"""Keys of a section and their values, e.g. {"lr": 0.1}; what is left out keeps its default."""


class Settings(TypedDict, total=False):
    """Keywords of `fedlabel.run`, one for each key of `ExperimentConfig`.

    A section is a mapping of some of its keys, or its dataclass, which sets all of them; `method`, `data`, `model` and
    other sections with a key `name` or `kind` also take the value of that alone. A method's class is the method with
    its defaults.
    """

    seed: int
    device: str
    num_clients: int
    num_rounds: int
    fraction_train: float
    data: str | Keys | DataConfig | OwnData
    partition: str | Keys | PartitionConfig
    labeled_partition: str | Keys | LabeledPartitionConfig | None
    supervision: str | Keys | SupervisionConfig
    skew: Keys | SkewConfig
    augment: Keys | AugmentConfig
    model: str | Keys | ModelConfig | nn.Module | Callable[..., nn.Module]
    method: str | Keys | Method | type[Method]
    training: Keys | TrainingConfig
    prior: str | Keys | PriorConfig
    sampling: str | Keys | SamplingConfig
    pacing: str | Keys | PacingConfig
    strategy: str | Keys | StrategyConfig
    privacy: str | Keys | PrivacyConfig
    attack: str | Keys | AttackConfig
    devices: str | Keys | DevicesConfig
    compression: Keys | CompressionConfig
    grid: str | Keys | GridConfig
    evaluation: Keys | EvaluationConfig
    tracking: Keys | TrackingConfig
    checkpoint: Keys | CheckpointConfig


def as_layer(settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Returns keywords as plain data, as a YAML file would hold them.

    Args:
        settings: see `Settings`.
        out: the folder of runs, into which data that were made in Python are written.

    Raises:
        ConfigError: a value cannot be part of a configuration.
    """
    from fedlabel.datasets import OwnData

    layer: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "data" and not isinstance(value, (str, Mapping, OwnData)) and not _is_config(value):
            raise ConfigError(
                f"`data` (={type(value).__name__}) must be the name of a data set, keys, or what a function of "
                "fedlabel.datasets makes, e.g. fedlabel.datasets.from_arrays(x_train, y_train, x_test, y_test)."
            )
        if isinstance(value, OwnData):
            own = value.save(out)
            continue
        if key == "model" and not isinstance(value, (str, Mapping)) and not _is_config(value):
            from fedlabel.models import pass_model

            layer[key] = {"name": pass_model(value)}
        elif key == "method" and _is_config(value):
            layer[key] = _method(value)
        elif key == "method" and isinstance(value, type):
            layer[key] = {"name": _method_name(value)}
        elif _is_config(value):
            layer[key] = asdict(value)
        elif isinstance(value, str) and key in _SHORT:
            layer[key] = {_SHORT[key]: value}
        elif isinstance(value, Mapping):
            layer[key] = dict(value)
        else:
            layer[key] = value
    return _with_own(layer, own)


def _with_own(layer: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a run with those that its own data need.

    Args:
        layer: what else is given; it wins.
        own: of `OwnData.save`.

    Raises:
        ConfigError: `partition` says that samples belong to others than those that own them.
    """
    owned, given = own.get("partition", {}), layer.get("partition", {})
    for key, value in owned.items():
        if isinstance(given, Mapping) and given.get(key, value) != value:
            raise ConfigError(
                f"`partition.{key}` (={given[key]}) contradicts `client`, by which the data say who owns each sample "
                f"(partition.{key}={value}): leave one of the two out."
            )
    mappings = {key: {**own[key], **layer[key]} for key in own if isinstance(layer.get(key), Mapping)}
    return {**own, **layer, **mappings}


_SHORT = {
    **dict.fromkeys(("data", "model", "method", "strategy"), "name"),
    **dict.fromkeys(("partition", "labeled_partition", "supervision", "prior", "sampling", "pacing"), "kind"),
    **dict.fromkeys(("privacy", "attack", "devices", "grid"), "kind"),
}
"""Section -> the key that a text stands for."""


def _is_config(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _method(method: Any) -> dict[str, Any]:
    """Returns a method's fields, under a name by which other processes find its class."""
    values = {each.name: getattr(method, each.name) for each in fields(method) if each.init}
    plain = {key: asdict(value) if _is_config(value) else value for key, value in values.items()}
    return {**plain, "name": _method_name(type(method))}


def _method_name(kind: type) -> str:
    from fedlabel.methods import METHODS

    name = next((known for known, each in METHODS.items() if each is kind), f"{kind.__module__}:{kind.__qualname__}")
    if "<" in name:
        raise ConfigError(
            f"`method` ({kind.__qualname__}) is a class inside of a function, which cannot be found by its name: "
            "define it at the top of a module or notebook."
        )
    return name
