"""The experiment's configuration: frozen dataclasses are schema and defaults, YAML holds differences, overrides win."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.datasets import DataConfig
from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
from fedlabel.data.skew import SkewConfig
from fedlabel.data.supervision_config import MixPart, SupervisionConfig, fill_amounts
from fedlabel.methods import method_class
from fedlabel.methods.base import Method
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.models import ModelConfig
from fedlabel.training_config import TrainingConfig

SELECT = {
    "bag_mae": "eval/bag_mae",
    "instance_auc": "eval/auc",
    "instance_accuracy": "eval/accuracy",
    "instance_loss": "eval/loss",
}
"""What `evaluation.select` may be, and the metric that it goes by."""
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def cohort_size(num_clients: int, fraction: float) -> int:
    """Returns how many clients train in a round."""
    return max(1, round(fraction * num_clients))


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names the key, the value and the fix."""


@dataclass(frozen=True)
class StrategyConfig:
    """How the server combines the clients' models."""

    name: str = "weighted_mean"
    """weighted_mean, or a Flower strategy by class name: FedAdam, FedAvgM, FedTrimmedAvg, Krum, ..."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the Flower strategy, e.g. {eta: 0.01}."""
    min_replies: int = 1
    """Replies that a round needs; with fewer usable ones the run stops, and can be resumed from its checkpoint."""
    max_update_norm: float | None = None
    """A client's model further than this from the one it was sent is refused (Euclidean distance over all its numbers
    but integers); null: any. It bounds what one client can do to a mean: weights times 1000 are else averaged in."""

    def __post_init__(self) -> None:
        if self.min_replies < 1:
            raise ValueError(f"`strategy.min_replies` (={self.min_replies}) must be at least 1.")
        if self.max_update_norm is not None and not 0 < self.max_update_norm < math.inf:
            raise ValueError(
                f"`strategy.max_update_norm` (={self.max_update_norm}) must be a positive number (or null)."
            )
        if self.name == "weighted_mean" and self.args:
            raise ValueError(f"`strategy.args` (={self.args}) must be empty for strategy.name=weighted_mean.")


@dataclass(frozen=True)
class GridConfig:
    """What carries messages to the clients."""

    kind: str = "in_process"
    """in_process | ray. Under `flwr run` Flower's own grid is used and this key is ignored."""
    num_workers: int = 2
    """Ray: number of worker processes."""
    threads_per_worker: int = 1
    """Torch threads that train one client, on every grid (results can depend on it in the last bit)."""
    timeout: float = 3600.0
    """Seconds after which a client that has not answered is counted as failed; without effect in_process."""
    connect_timeout: float = 120.0
    """Seconds that the server waits at the start until `num_clients` nodes are connected (Flower's grid)."""

    def __post_init__(self) -> None:
        if self.kind not in ("in_process", "ray"):
            raise ValueError(f"`grid.kind` (={self.kind}) must be one of in_process, ray.")
        for key in ("num_workers", "threads_per_worker"):
            if getattr(self, key) < 1:
                raise ValueError(f"`grid.{key}` (={getattr(self, key)}) must be at least 1.")
        for key in ("timeout", "connect_timeout"):
            if not getattr(self, key) > 0:
                raise ValueError(f"`grid.{key}` (={getattr(self, key)}) must be positive (seconds).")


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what the global model is evaluated."""

    every: int = 1
    """Rounds between evaluations. Over the last tenth of the rounds (at least 5) each one is evaluated, as results are
    averaged over these."""
    split: str = "test"
    """test | validation: use validation to choose hyper-parameters, test only to report."""
    select: str | None = None
    """Which round's model the run puts forward, beside the last: of each `every`-th round and the last one the best on
    the validation split.
    bag_mae goes by the counts of bags alone; instance_auc, instance_accuracy and instance_loss look at single labels of
    that split. summary.json has each metric at that round as `selected`, checkpoints/selected_ROUND.pt the weights;
    where a method has stages (llp_bp) the next one gets the best model of the one before. null: none."""
    figures: bool = True
    """Whether pictures are drawn (partition.png and TensorBoard's images): about a second a run. For sweeps of hundreds
    of short runs: false."""
    panel_samples: int = 16
    """Unlabelled samples shown with pseudo-label and expert in TensorBoard at the last and each 10 * `every`-th round;
    0 = no panel (tables have none). Made in the server's process from its own copy of a simulated client; nothing is
    asked of clients."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`evaluation.every` (={self.every}) must be at least 1.")
        if self.split not in ("test", "validation"):
            raise ValueError(f"`evaluation.split` (={self.split}) must be one of test, validation.")
        if self.select is not None and self.select not in SELECT:
            raise ValueError(f"`evaluation.select` (={self.select}) must be null or one of {', '.join(SELECT)}.")
        if not 0 <= self.panel_samples <= 32:
            raise ValueError(f"`evaluation.panel_samples` (={self.panel_samples}) must lie in [0, 32].")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run can be resumed from."""

    every: int = 1
    """Rounds between checkpoints; the last round always leaves one. Resuming repeats the rounds since the newest."""
    keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"`checkpoint.{key}` (={getattr(self, key)}) must be at least 1.")


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on."""

    seed: int = 0
    """Root of all random numbers: partition, labels, initial weights, cohorts, batches, augmentation."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    num_clients: int = 20
    """Clients in the federation."""
    num_rounds: int = 40
    """Communication rounds."""
    fraction_train: float = 0.25
    """Share of the clients drawn (without replacement) to train in a round; at least one client."""
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    labeled_partition: LabeledPartitionConfig | None = None
    """A law of their own for the labelled samples: chosen over the whole training set, they are spread by it, the
    others by `partition`; a client holds both. null: labels are chosen among what the clients hold."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    skew: SkewConfig = field(default_factory=SkewConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = field(default_factory=FedLabel)
    """A method's dataclass: `method.name` picks it, the other keys are its fields."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"`seed` (={self.seed}) must be at least 0.")
        for key in ("num_clients", "num_rounds"):
            if getattr(self, key) < 1:
                raise ValueError(f"`{key}` (={getattr(self, key)}) must be at least 1.")
        if not 0 < self.fraction_train <= 1:
            raise ValueError(f"`fraction_train` (={self.fraction_train}) must lie in (0, 1].")
        if self.strategy.min_replies > self.cohort_size:
            raise ValueError(
                f"`strategy.min_replies` (={self.strategy.min_replies}) must be at most the {self.cohort_size} clients "
                f"that train in a round: `fraction_train` (={self.fraction_train:g}) of `num_clients` "
                f"(={self.num_clients})."
            )
        self._check_labels()
        averages = ("weighted_mean", "FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
        if self.model.norm == "batch" and self.strategy.name not in averages:
            raise ValueError(
                f"`strategy.name` (={self.strategy.name}) would apply its optimiser or noise to BatchNorm's running "
                f"statistics (`model.norm` =batch); use model.norm=group, or one of {', '.join(averages)}."
            )
        self.method.check_rounds(self.num_rounds)
        noisy = [part.count_epsilon for part in self.supervision.parts if part.count_epsilon is not None]
        if noisy and getattr(self.method, "lambda_bag", 0.0) == math.inf:
            raise ValueError(
                f"`method.lambda_bag` (=inf) takes counts for exact, and those of `supervision.count_epsilon` "
                f"(={noisy[0]}) are not: take a number, e.g. method.lambda_bag=1."
            )
        merge = getattr(self.method, "merge", "sum")
        if merge == "mean" and self.strategy.name != "weighted_mean":
            raise ValueError(
                f"`method.merge` (=mean) sends two models with separate weights, which `strategy.name` "
                f"(={self.strategy.name}) cannot combine; use strategy.name=weighted_mean or method.merge=sum."
            )

    @property
    def cohort_size(self) -> int:
        """How many clients train in a round."""
        return cohort_size(self.num_clients, self.fraction_train)

    def _check_labels(self) -> None:
        supervision = self.supervision
        if supervision.labeled_clients is not None and supervision.labeled_clients > self.num_clients:
            raise ValueError(
                f"`supervision.labeled_clients` (={supervision.labeled_clients}) must not exceed `num_clients` "
                f"(={self.num_clients})."
            )
        hidden = self.skew.unlabeled_only_classes
        if hidden and any(part.classless for part in supervision.parts):
            raise ValueError(
                f"`skew.unlabeled_only_classes` (=[{', '.join(hidden)}]) chooses samples by their class, which nobody "
                "knows with supervision.kind=bags and labeling_functions: leave it out."
            )
        if self.labeled_partition is None:
            return
        if supervision.mix:
            raise ValueError(
                "`labeled_partition` has no place beside supervision.mix, whose kinds of label are handed out among "
                "what the clients hold: set labeled_partition=null, or give one kind of label."
            )
        if supervision.labels_at != "clients":
            raise ValueError(
                f"`supervision.labels_at` (={supervision.labels_at}) says by itself who holds the labelled samples: "
                "take supervision.labels_at=clients, or labeled_partition=null."
            )
        if supervision.labels_per_client is not None:
            raise ValueError(
                f"`supervision.labels_per_client` (={supervision.labels_per_client}) contradicts labeled_partition, "
                "which says how many labelled samples a client has: take labels_per_class, labels_total or label_rate."
            )
        if supervision.everything and not self.skew.unlabeled_only_classes:
            raise ValueError(
                f"`supervision.kind` (={supervision.kind}) and `supervision.label_rate` (={supervision.label_rate}) "
                "label all samples, so `labeled_partition` would leave none to `partition`: set labeled_partition=null."
            )


def find_config(path: str | Path) -> Path:
    """Returns the YAML file named: as given, or below `configs/` of the project.

    Raises:
        ConfigError: there is none.
    """
    candidates = [Path(path), PROJECT_ROOT / "configs" / path, PROJECT_ROOT / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = dict.fromkeys(str(candidate.absolute()) for candidate in candidates)
    raise ConfigError(f"Configuration file {path} does not exist: looked at {', '.join(places)}.")


def load_config(paths: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Returns the resolved configuration.

    Args:
        paths: YAML files of differences from the defaults, later ones win; relative to the working directory or to
            the project's `configs/`.
        overrides: "key=value" strings, e.g. "training.lr=0.1"; they win over the files.

    Raises:
        ConfigError: a file is missing or is no YAML mapping, a key is unknown, a value has the wrong type or range.
    """
    return _resolve([*(_load_yaml(find_config(path)) for path in paths), *_parse_overrides(overrides)])


def parse_config(text: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Returns the configuration that `to_yaml` wrote as `text`, changed by `overrides` (see `load_config`)."""
    loaded = OmegaConf.create(text)
    assert isinstance(loaded, DictConfig)
    return _resolve([loaded, *_parse_overrides(overrides)])


def _parse_overrides(overrides: Sequence[str]) -> list[DictConfig]:
    layers = []
    for override in overrides:
        if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", override, re.DOTALL):
            raise ConfigError(f"Override `{override}` must have the form key=value, e.g. training.lr=0.1.")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"Override `{override}` has no readable value: {error}") from error
    return layers


def to_yaml(config: ExperimentConfig) -> str:
    """Returns the resolved configuration as YAML text; `parse_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: ExperimentConfig) -> dict[str, str | int | float | bool]:
    """Returns dotted key -> scalar (lists and mappings as JSON), for comparing runs and for TensorBoard's hparams."""
    flat: dict[str, str | int | float | bool] = {}

    def visit(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value)

    visit("", OmegaConf.to_container(OmegaConf.structured(config)))
    return flat


def _load_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not a list.")
    return loaded


def _resolve(layers: Sequence[DictConfig]) -> ExperimentConfig:
    try:
        user = _merged(layers)
        base = OmegaConf.structured(ExperimentConfig)
        for key, value in user.items():
            if key == "labeled_partition" and value is None:
                continue
            node = OmegaConf.structured(LabeledPartitionConfig) if key == "labeled_partition" else base.get(key)
            if isinstance(node, DictConfig) and not isinstance(value, dict):
                raise ConfigError(
                    f"`{key!s}` (={value!s}) must be a mapping of keys; set one of its keys, e.g. {key!s}."
                    f"{next(iter(node))!s}=..."
                )
        # Giving one of two ways to say the same replaces the default of the other.
        training, supervision = user.get("training", {}), user.get("supervision", {})
        if training.get("local_epochs") is not None:
            training.setdefault("local_steps", None)
        fill_amounts(supervision)
        _check_names(supervision, "supervision")
        if "mix" in supervision:
            supervision["mix"] = _mix_parts(supervision["mix"])
        for law in (user.get("partition"), user.get("labeled_partition")):
            if law and isinstance(law.get("partitioner_args"), dict):  # a mapping in YAML or on the command line
                law["partitioner_args"] = json.dumps(law["partitioner_args"])  # kept as JSON text
        _check_lists(user)
        schema = method_class(user.get("method", {}).get("name", FedLabel.name))
        # The schema node replaces the default method: another method has other fields.
        OmegaConf.set_readonly(base, False)
        base.method = None
        base = OmegaConf.merge(base, {"method": OmegaConf.structured(schema)})
        resolved = OmegaConf.to_object(OmegaConf.merge(base, user))
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert isinstance(resolved, ExperimentConfig)
    assert isinstance(resolved.method, Method)
    return resolved


def _merged(layers: Sequence[DictConfig]) -> dict[Any, Any]:
    """Returns what the user's files and overrides say together."""
    merged = OmegaConf.create({})
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)  # type: ignore[assignment]
        except TypeError as error:  # a mapping where a list was, or the other way round
            raise ConfigError(
                f"`{', '.join(map(str, layer))}`: {OmegaConf.to_container(layer)} does not fit what was said before. "
                "A list is replaced as a whole, e.g. supervision.mix=[{share: 0.5, kind: full}], a mapping key by key."
            ) from error
    user = OmegaConf.to_container(merged)
    assert isinstance(user, dict)
    return user


def _mix_parts(value: Any) -> list[MixPart]:
    """Returns the parts of a mix; OmegaConf would leave them as mappings, and its messages would not say of which."""
    example = "e.g. supervision.mix=[{share: 0.5, kind: full}, {share: 0.5, kind: partial, partial_ratio: 0.3}]"
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ConfigError(f"`supervision.mix` (={value}) must be a list of mappings, {example}.")
    parts = []
    for place, part in enumerate(value):
        where = f"supervision.mix[{place}]"
        _check_names(part, where)
        try:
            parts.append(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MixPart), part)))
        except OmegaConfBaseException as error:
            raise ConfigError(_describe(error, MixPart, f"{where}.")) from error
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    return parts  # type: ignore[return-value]


def _check_names(kind: Mapping[str, Any], where: str) -> None:
    """OmegaConf's own message would not name the value."""
    value = kind.get("labels_keys", [])
    if not isinstance(value, list):
        raise ConfigError(f"`{where}.labels_keys` (={value}) must be a list of names, e.g. [{value}].")


def _check_lists(user: Mapping[str, Any]) -> None:
    """OmegaConf's own message would not name the value."""
    for section, key, types, what in (
        ("data", "positive_classes", (str, int), "names or numbers of classes, e.g. [ship,truck]"),
        ("skew", "unlabeled_only_classes", (str, int), "names or numbers of classes, e.g. [8,9]"),
        ("data", "categorical", (str,), "names of columns, e.g. [month,job]"),
        ("data", "drop_columns", (str,), "names of columns, e.g. [month,job]"),
        ("model", "hidden_layers", (int,), "widths, e.g. [256,128,64]"),
    ):
        value = user.get(section, {}).get(key)
        if value is not None and not (isinstance(value, list) and all(type(each) in types for each in value)):
            raise ConfigError(f"`{section}.{key}` (={value}) must be a list of {what}.")
    matrix = user.get("method", {}).get("matrix")
    rows = matrix if isinstance(matrix, list) and all(isinstance(row, list) for row in matrix) else None
    if matrix is not None and (rows is None or not all(type(each) in (int, float) for row in rows for each in row)):
        raise ConfigError(f"`method.matrix` (={matrix}) must be a list of rows of numbers, e.g. [[0.9,0.1],[0.2,0.8]].")


def _describe(error: OmegaConfBaseException, schema: type = ExperimentConfig, prefix: str = "") -> str:
    """Returns OmegaConf's message in one line, with the full key: `prefix` and what it is in `schema`."""
    message = str(error.msg or error).split("\n")[0]
    key = error.full_key
    if "not in '" in message:
        hint = message.partition("Did you mean:")[2].strip()
        allowed = ""
        if error.object_type is not None and hasattr(error.object_type, "__dataclass_fields__"):
            allowed = " Allowed here: " + ", ".join(f.name for f in fields(error.object_type)) + "."
        suggestion = f" Did you mean {hint}?" if hint else ""
        return f"`{prefix}{key}` is not a configuration key.{suggestion.replace('??', '?')}{allowed}"
    if not key:
        return message
    default = OmegaConf.select(OmegaConf.structured(schema), str(key))
    return f"`{prefix}{key}`: {message}; its default is {default}."
