"""The experiment's configuration: frozen dataclasses are schema and defaults, YAML holds differences, overrides win."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache, partial, reduce
from keyword import iskeyword
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlabel.attacks import AttackConfig
from fedlabel.checks import at_least, no_effect, one_of, within
from fedlabel.compression import CompressionConfig
from fedlabel.config_names import unknown_key
from fedlabel.config_schema import HOLDS, Unknown, build, hints, parts, settled
from fedlabel.config_text import (
    ConfigError,
    Plain,
    as_written,
    as_yaml,
    merged,
    parse_value,
    parse_yaml,
    plain,
    read_mapping,
)
from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig, fill_amounts
from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
from fedlabel.data.sets.config import NODES, DataConfig
from fedlabel.data.skew import SkewConfig
from fedlabel.devices.config import DevicesConfig, PopulationPart
from fedlabel.errors import is_file
from fedlabel.importing import describe_error
from fedlabel.learning.prior import PriorConfig
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods import METHODS, method_class
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.recipe import Method
from fedlabel.models import ModelConfig
from fedlabel.privacy import PrivacyConfig
from fedlabel.server_config import TIERS, TIMED, PacingConfig, SamplingConfig, StrategyConfig
from fedlabel.shipped import CONFIGS

SELECT = {
    "bag_mae": "eval/bag_mae",
    "instance_auc": "eval/auc",
    "instance_accuracy": "eval/accuracy",
    "instance_loss": "eval/loss",
}
"""What `evaluation.select` may be, and the metric that it goes by."""
MAX_WORKERS, MAX_SECONDS, MAX_STACK = 1024, 1e9, 1024
"""Of `grid`: more processes or threads no machine has, and no system call waits longer."""
_KEY = r"[^\W\d]\w*(?:\.\w+)*"


def cohort_size(num_clients: int, fraction: float) -> int:
    """Returns the number of clients that train in a round."""
    return max(1, round(fraction * num_clients))


@dataclass(frozen=True)
class GridConfig:
    """Transport of messages to the clients."""

    kind: str = no_effect("in_process")
    """in_process | ray. Under `flwr run` Flower's own grid is used and this key is ignored."""
    num_workers: int | None = no_effect(None)
    """Ray: number of worker processes; null: one for each core that this process may use, on a GPU one. The results do
    not depend on it."""
    threads_per_worker: int = 1
    """Torch threads that train one client, on every grid (results can depend on it in the last bit)."""
    stack: str = "auto"
    """auto | off | a number: about how many clients of a simulation train as one stack, in one program, where the
    shapes of their steps are the same; the others train one by one. auto: by network and device (small networks; on a
    CPU only those without convolutions). Results differ in the last bits."""
    cuda_graphs: bool = True
    """Whether local steps on a GPU are captured as CUDA graphs, where the method and the optimiser (sgd) allow it."""
    timeout: float = no_effect(3600.0)
    """Seconds after which a client that has not answered is counted as failed; no effect with in_process."""
    profile: bool = no_effect(False)
    """Whether to measure where a round's time goes: `system/seconds_*` in the metrics, and trace.json, for Perfetto. On
    a GPU it waits for the device after each part of a step, which makes rounds slower. Of real nodes only the server is
    measured. Not kept in a run's config.yaml: a run is profiled, or resumed, with it or without."""
    connect_timeout: float = no_effect(120.0)
    """Seconds that the server waits until nodes are connected: at the start until `num_clients` are there, or when the
    time is up `min_nodes`; in a round, if there are fewer than `min_nodes`, until clients return whose node was lost
    (Flower's grid)."""
    min_nodes: int | None = no_effect(None)
    """Real nodes without which a run does not start, and for whose return a round waits; null: `num_clients`. As long
    as so many are there, rounds go on with those, and nodes join and return at any time. With data.name=nodes a new run
    starts with all, as the labels of all decide how the method is built; a resumed one with these."""

    def __post_init__(self) -> None:
        one_of(self, "grid", kind=("in_process", "ray"))
        counts = ("threads_per_worker",) if self.num_workers is None else ("num_workers", "threads_per_worker")
        within(self, "grid", 1, MAX_WORKERS, *counts)
        at_least(self, "grid", 1, "min_nodes", null=True)
        if self.stack not in ("auto", "off") and not (self.stack.isdecimal() and 1 <= int(self.stack) <= MAX_STACK):
            raise ValueError(
                f"`grid.stack` (={self.stack}) must be auto, off, or a number of clients in [1, {MAX_STACK}]."
            )
        within(self, "grid", 0, MAX_SECONDS, "timeout", "connect_timeout", ends="(]", hint="it is in seconds")

    @property
    def clients_in_stack(self) -> int | None:
        """`stack` as a number, 1 for off; None for auto."""
        return None if self.stack == "auto" else 1 if self.stack == "off" else int(self.stack)


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what the global model is evaluated."""

    every: int = 1
    """Rounds between evaluations. Over the last tenth of the rounds (at least 5) each one is evaluated, as results are
    averaged over these."""
    at: str = "server"
    """server | nodes | none: who evaluates. With data.name=nodes, server needs a labelled folder of its own
    (`data.test`); nodes: each on its held-out samples, whose confusion counts, losses and calibration bins the server
    adds up; none: nobody."""
    split: str = "test"
    """test | validation: use validation to choose hyper-parameters, test only to report."""
    select: str | None = None
    """Criterion that selects the round whose model the run reports in addition to the last: of each `every`-th round
    and the last one the best on the validation split. bag_mae uses only the class counts of bags; instance_auc,
    instance_accuracy and instance_loss use the labels of that split. summary.json has each metric at that round as
    `selected`, checkpoints/selected_ROUND.pt the weights; if a method has stages (llp_bp) each stage gets the best
    model of the previous one. null: no selection."""
    figures: bool = no_effect(True)
    """Whether figures are drawn (partition.png and TensorBoard's images): about a second per run. For sweeps of
    hundreds of short runs: false."""
    panel_samples: int = no_effect(16)
    """Unlabelled samples shown with pseudo-label and expert in TensorBoard, with the figures; 0 = no panel (tables have
    none). Made in the server's process from its own copy of a simulated client; clients receive no request."""

    def __post_init__(self) -> None:
        at_least(self, "evaluation", 1, "every")
        one_of(self, "evaluation", split=("test", "validation"), select=(None, *SELECT), at=("server", "nodes", "none"))
        within(self, "evaluation", 0, 32, "panel_samples")


LEVELS = ("off", "basic", "full")


@dataclass(frozen=True)
class TrackingConfig:
    """What a run writes for TensorBoard; metrics.jsonl and summary.json are always written."""

    level: str = no_effect("basic")
    """off | basic | full. off: nothing, and no figures. basic: all metrics on the pages of the Custom Scalars tab, with
    texts, and the figures that take little time. full: also clients and classes over the rounds, panels of samples by
    what is remarkable of them, and the embeddings of a fixed sample for the projector (the last three know the truth,
    so only in a simulation). Pictures are made at the last round, and at each 10 * `evaluation.every`-th one as long as
    all of them take at most 3 % of the run's time; evaluation.figures=false leaves all of them out."""

    def __post_init__(self) -> None:
        one_of(self, "tracking", level=LEVELS)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = no_effect(1)
    """Rounds between checkpoints; the last round always writes one. Resuming repeats the rounds since the newest."""
    keep: int = no_effect(2)
    """Number of newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        at_least(self, "checkpoint", 1, "every", "keep")


@dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run."""

    seed: int = 0
    """Root of all random numbers: partition, labels, initial weights, cohorts, batches, augmentation."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N: where this machine computes. The clients' simulated devices are in `devices`."""
    num_clients: int = 20
    """Clients in the federation."""
    num_rounds: int = 40
    """Communication rounds."""
    fraction_train: float = 0.25
    """Share of the clients drawn (without replacement) to train in a round; at least one client."""
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    labeled_partition: LabeledPartitionConfig | None = None
    """A separate partition for the labelled samples: they are chosen over the whole training set and spread by it, the
    others by `partition`; a client holds both. null: labels are chosen among each client's samples."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    skew: SkewConfig = field(default_factory=SkewConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = field(default_factory=FedLabel)
    """A method's dataclass: `method.name` picks it, the other keys are its fields."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pacing: PacingConfig = field(default_factory=PacingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        at_least(self, "", 0, "seed")
        at_least(self, "", 1, "num_clients", "num_rounds")
        within(self, "", 0, 1, "fraction_train", ends="(]")
        if self.strategy.min_replies > self.cohort_size:
            raise ValueError(
                f"`strategy.min_replies` (={self.strategy.min_replies}) must be at most the {self.cohort_size} clients "
                f"that train in a round: `fraction_train` (={self.fraction_train:g}) of `num_clients` "
                f"(={self.num_clients})."
            )
        self._check_server()
        self._check_privacy()
        self._check_labels()
        self._check_nodes()
        if self.prior.kind != "none" and self.method.corrects_class_prior:
            raise ValueError(
                f"`prior.kind` (={self.prior.kind}) corrects for a client's classes, and so does the loss of "
                f"`method.name` (={self.method.name}): take prior.kind=none, or method.name=supervised with the prior."
            )
        if self.privacy.min_count > 1 and self.strategy.name == "QFedAvg":
            raise ValueError(
                f"`strategy.name` (=QFedAvg) goes by clients' losses, which `privacy.min_count` "
                f"(={self.privacy.min_count}) may leave out: take another strategy."
            )
        self.method.check_rounds(self.num_rounds)

    @property
    def cohort_size(self) -> int:
        """The number of clients that train in a round."""
        return cohort_size(self.num_clients, self.fraction_train)

    @property
    def draws_figures(self) -> bool:
        """Whether figures are drawn."""
        return self.evaluation.figures and self.tracking.level != "off"

    def _check_server(self) -> None:
        pacing, sampling, size = self.pacing, self.sampling, self.cohort_size
        for key, kind, free in (("pacing", pacing.kind, "synchronous"), ("sampling", sampling.kind, "uniform")):
            if self.devices.kind == "none" and kind in TIMED:
                raise ValueError(
                    f"`{key}.kind` (={kind}) goes by simulated devices, and `devices.kind` is none: describe them, "
                    f"e.g. with configs/devices/phones.yaml, or take {key}.kind={free}."
                )
        if pacing.buffer is not None and pacing.buffer > size:
            raise ValueError(
                f"`pacing.buffer` (={pacing.buffer}) must be at most the {size} clients that train at a time: "
                f"`fraction_train` (={self.fraction_train:g}) of `num_clients` (={self.num_clients})."
            )
        if pacing.kind == "tiers" and self.num_clients < size * (pacing.tiers or TIERS):
            raise ValueError(
                f"`pacing.tiers` (={pacing.tiers or TIERS}) groups of `num_clients` (={self.num_clients}) clients "
                f"would have fewer than the {size} of a cohort: take fewer tiers, or a smaller fraction_train."
            )
        if pacing.kind == "tiers" and sampling.kind != "uniform":
            raise ValueError(
                f"`sampling.kind` (={sampling.kind}) must be uniform with pacing.kind=tiers, which draws from one tier."
            )
        if sampling.candidates is not None and not size <= sampling.candidates <= self.num_clients:
            raise ValueError(
                f"`sampling.candidates` (={sampling.candidates}) must lie between the cohort's {size} clients and "
                f"`num_clients` (={self.num_clients})."
            )
        if pacing.kind == "fedasync" and self.strategy.name != "weighted_mean":
            raise ValueError(
                f"`strategy.name` (={self.strategy.name}) combines several models, and pacing.kind=fedasync takes one "
                "after the other: take strategy.name=weighted_mean, or pacing.kind=fedbuff."
            )
        if self.compression.error_feedback and (pacing.kind not in ("synchronous", "tiers") or self.devices.may_lose):
            raise ValueError(
                "`compression.error_feedback` (=True) keeps what a reply left out, and a client cannot know whether "
                f"its reply was used with `pacing.kind` (={pacing.kind}) and devices that may leave: take "
                "error_feedback=false, or pacing.kind=synchronous with devices.available=1 and without dropout."
            )
        if pacing.is_asynchronous and self.strategy.normalize_steps:
            raise ValueError(
                "`strategy.normalize_steps` (=True) is for rounds in which all start from one model: not with "
                f"pacing.kind={pacing.kind}."
            )

    def _check_privacy(self) -> None:
        """Refuses what would make results, or who gives them, depend on data in a way that epsilon does not cover."""
        privacy, strategy = self.privacy, self.strategy
        if not privacy.is_on:
            return
        if privacy.spent_at >= 1 / self.num_clients:
            raise ValueError(
                f"`privacy.delta` (={privacy.spent_at:g}) must be below 1 / `num_clients` (={self.num_clients}): at "
                "that delta one client could be published as it is."
            )
        for key, value, needed, why in (
            (
                "training.weight_by",
                self.training.weight_by,
                "uniform",
                "weights would tell how many samples clients hold",
            ),
            ("sampling.kind", self.sampling.kind, "uniform", "epsilon is that of cohorts drawn uniformly"),
            ("pacing.kind", self.pacing.kind, "synchronous", "who is in time depends on how much data it has"),
            ("devices.kind", self.devices.kind, "none", "simulated time depends on how much data clients have"),
            ("compression.up", self.compression.up, "none", "it would lengthen clipped updates"),
            ("strategy.normalize_steps", strategy.normalize_steps, False, "the number of steps depends on the data"),
            ("strategy.max_update_norm", strategy.max_update_norm, None, "privacy.clipping_norm bounds updates"),
            ("strategy.clip_update_norm", strategy.clip_update_norm, None, "privacy.clipping_norm bounds updates"),
        ):
            if value != needed:
                raise ValueError(
                    f"`{key}` (={value}) must be {'null' if needed is None else needed} with "
                    f"privacy.kind={privacy.kind}: {why}."
                )
        if privacy.kind == "server" and strategy.name != "weighted_mean":
            raise ValueError(
                f"`strategy.name` (={strategy.name}) must be weighted_mean with privacy.kind=server, whose noise is "
                "made for a mean."
            )
        if strategy.name == "QFedAvg":
            raise ValueError(
                f"`strategy.name` (=QFedAvg) goes by clients' losses, which are not sent with privacy.kind="
                f"{privacy.kind}: take strategy.name=weighted_mean."
            )

    def _check_nodes(self) -> None:
        """Checks that keys of a simulated federation are not given beside real nodes' own data, nor the other way."""
        if self.data.name != NODES:
            if self.evaluation.at != "server":
                raise ValueError(
                    f"`evaluation.at` (={self.evaluation.at}) is for data.name=nodes; the test set of "
                    f"`data.name` (={self.data.name}) is at the server: take evaluation.at=server."
                )
            return
        simulated = (
            *(("partition", PartitionConfig()), ("supervision", SupervisionConfig()), ("skew", SkewConfig())),
            *((f"data.{key}", getattr(DataConfig, key)) for key in ("train_samples", "positive_classes", "root")),
            *(
                (f"data.{key}", getattr(DataConfig, key))
                for key in ("validation_fraction", "test_fraction", "download")
            ),
            *(("labeled_partition", None), ("evaluation.split", "test"), ("evaluation.select", None)),
        )
        for key, default in simulated:
            value = reduce(getattr, key.split("."), self)
            if value != default:
                given = f" (={value})" if isinstance(value, (str, int, float)) else ""
                raise ValueError(
                    f"`{key}`{given} describes a simulated federation; with data.name=nodes samples and labels are "
                    "what the nodes' folders hold: leave it out."
                )
        if self.privacy.is_on:
            raise ValueError(
                f"`privacy.kind` (={self.privacy.kind}) does not cover the counts of labels that nodes with data of "
                "their own send before the first round, see docs/data.md: set privacy.kind=none, or take a named data "
                "set."
            )
        if self.method.oracle_labels:
            raise ValueError(
                "`method.oracle_labels` (=True) reveals all true labels, which real nodes have not: take "
                "method.oracle_labels=false, to learn from those that there are."
            )

    def _check_labels(self) -> None:
        supervision = self.supervision
        if supervision.labeled_clients is not None and supervision.labeled_clients > self.num_clients:
            raise ValueError(
                f"`supervision.labeled_clients` (={supervision.labeled_clients}) must not exceed `num_clients` "
                f"(={self.num_clients})."
            )
        hidden = self.skew.unlabeled_only_classes
        if hidden and any(part.hides_classes for part in supervision.parts):
            raise ValueError(
                f"`skew.unlabeled_only_classes` (=[{', '.join(hidden)}]) chooses samples by their class, which is "
                "unknown with supervision.kind=bags and labeling_functions: leave it out."
            )
        if self.labeled_partition is None:
            return
        if supervision.mix:
            raise ValueError(
                "`labeled_partition` cannot be combined with supervision.mix, whose kinds of label are distributed "
                "over the clients' samples: set labeled_partition=null, or give one kind of label."
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
    """Returns the path of the YAML file: as given, or of a configuration that comes with fedlabel.

    Raises:
        ConfigError: there is none.
    """
    candidates = [Path(path), CONFIGS / path, CONFIGS.parent / path]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    name = str(path)
    if re.fullmatch(rf"[-+~]*({_KEY})", name) and not name.endswith((".yaml", ".yml")):
        key = name.lstrip("-+~")
        raise ConfigError(
            f"`{as_yaml(name)}` is neither a configuration file nor an override, which has the form key=value, e.g. "
            f"{as_yaml(key)}=...: no space around the `=`, no + or ~ before the key; null takes a value away."
        )
    places = dict.fromkeys(str(candidate.absolute()) for candidate in candidates)
    raise ConfigError(
        f"Configuration file {as_yaml(name)} does not exist: looked at {', '.join(map(as_yaml, places))}."
    )


def load_config(
    paths: Sequence[str | Path] = (), overrides: Sequence[str] = (), settings: Mapping[str, Any] = MappingProxyType({})
) -> ExperimentConfig:
    """Returns the resolved configuration.

    Args:
        paths: YAML files of differences from the defaults, later ones win; relative to the working directory or to
            the `configs/` that come with fedlabel.
        overrides: "key=value" strings, e.g. "training.lr=0.1"; they win over the files and settings.
        settings: keys as a YAML file would hold them; they win over the files.

    Raises:
        ConfigError: a file is missing or is no YAML mapping, a key is unknown, a value has the wrong type or range.
    """
    files = [read_mapping(find_config(path)) for path in paths]
    return _resolve([*files, settings, *map(_parse_override, overrides)])


def parse_config(
    text: str, overrides: Sequence[str] = (), settings: Mapping[str, Any] = MappingProxyType({})
) -> ExperimentConfig:
    """Returns the configuration that `to_yaml` wrote as `text`, with settings and overrides (see `load_config`)."""
    return _resolve([parse_yaml(text, "The configuration"), settings, *map(_parse_override, overrides)])


def load_recorded(path: Path) -> ExperimentConfig:
    """Returns the configuration of a run that is only read, from its config.yaml.

    A method of the user's own that cannot be loaded here (its module is elsewhere, or has changed since) is replaced by
    its name and keys as recorded, an `Unavailable`.

    Raises:
        ConfigError: the file is damaged, or of another version.
    """
    saved = read_mapping(path)
    try:
        return _resolve([saved])
    except ConfigError:
        method = plain(saved.get("method"))
        if not isinstance(method, dict) or ":" not in str(method.get("name")):
            raise
        names = [key for key in method if key.isidentifier() and not iskeyword(key)]
        keys = [(key, Any, field(default=None)) for key in names if key == "oracle_labels" or not hasattr(Method, key)]
        return _resolve([saved], make_dataclass("Recorded", keys, bases=(Unavailable,), frozen=True))


@dataclass(frozen=True)
class Unavailable(Method):
    """The name and the keys of a method whose class cannot be loaded, see `load_recorded`."""


def split_overrides(text: str) -> list[str]:
    """Returns the overrides in one text, separated by spaces; quotes hold one together, as in a shell.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"The overrides `{as_yaml(text)}` have a quote that is not closed, or a backslash at their end: mend it."
        ) from error


def _parse_override(override: str) -> dict[str, Any]:
    """Returns "a.b=value" as {"a": {"b": value}}."""
    if not re.fullmatch(rf"{_KEY}=.*", override, re.DOTALL):
        listed = re.match(rf"{_KEY}\[\d+\]|{_KEY}\.\d+=", override)
        hint = " A list is given as a whole, e.g. supervision.mix=[{share: 0.5, kind: full}]." if listed else ""
        hint = hint or " No space stands before the `=`, no + or ~ before the key; null takes a value away."
        raise ConfigError(f"Override `{as_yaml(override)}` must have the form key=value, e.g. training.lr=0.1.{hint}")
    key, _, text = override.partition("=")
    value = parse_value(text, f"The value of the override `{as_yaml(override)}`")
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def to_yaml(config: ExperimentConfig) -> str:
    """Returns the resolved configuration as YAML text; `parse_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@cache
def keys_without_effect() -> frozenset[str]:
    """Returns the dotted keys that do not change what a run computes, as their fields declare (`checks.no_effect`)."""
    sections = {"": ExperimentConfig, **{f"{name}.": kind for name, kind in hints(ExperimentConfig).items()}}
    return frozenset(
        prefix + each.name
        for prefix, kind in sections.items()
        if is_dataclass(kind)
        for each in fields(kind)
        if each.metadata.get("no_effect")
    )


def flatten(config: ExperimentConfig) -> dict[str, str | int | float | bool]:
    """Returns dotted key -> scalar (lists and mappings as JSON), for comparing runs and for TensorBoard's hparams."""
    flat: dict[str, str | int | float | bool] = {}

    def visit(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value)

    visit("", OmegaConf.to_container(OmegaConf.structured(config)))  # type: ignore[arg-type]
    return flat


def _resolve(layers: Sequence[Mapping[str, Any]], schema: type[Method] | None = None) -> ExperimentConfig:
    """Returns the configuration of layers, later ones win; schema: in place of the method's own class."""
    try:
        return _resolved(layers, schema)
    except ConfigError as error:
        raise ConfigError(as_written(str(error), layers)) from error


def _resolved(layers: Sequence[Mapping[str, Any]], schema: type[Method] | None) -> ExperimentConfig:
    name = _method_name(layers)
    schema = _method_class(name) if schema is None else schema
    unknown = partial(unknown_key, ExperimentConfig, schema, name)
    kinds = {**hints(ExperimentConfig), "method": schema}
    user = merged(*({key: settled(kinds.get(key, Any), layer[key], key) for key in layer} for layer in layers))
    for key in user:
        if key not in kinds:
            raise ConfigError(unknown(ExperimentConfig, "", key))
    if isinstance(user.get("device"), dict):
        first = next(iter(user["device"]), "kind")
        raise ConfigError(
            f"`device` (={as_yaml(user['device'])}) is where this machine computes, e.g. cuda; the clients' simulated "
            f"devices are in `devices`: write devices.{first}."
        )
    # Giving one of two ways to say the same replaces the default of the other.
    training, supervision = user.get("training"), user.get("supervision")
    if isinstance(training, dict) and training.get("local_epochs") is not None:
        training.setdefault("local_steps", None)
    if isinstance(supervision, dict):
        fill_amounts(supervision)
        if "mix" in supervision:
            supervision["mix"] = parts(tuple[MixPart, ...], supervision["mix"], "supervision.mix", unknown)
    devices = user.get("devices")
    if isinstance(devices, dict) and "population" in devices:
        devices["population"] = parts(tuple[PopulationPart, ...], devices["population"], "devices.population", unknown)
    for law in (user.get("partition"), user.get("labeled_partition")):
        if isinstance(law, dict) and isinstance(law.get("partitioner_args"), dict):  # in YAML or on the command line
            law["partitioner_args"] = json.dumps(law["partitioner_args"])  # kept as JSON text
    base = OmegaConf.structured(ExperimentConfig)
    OmegaConf.set_readonly(base, False)
    base.method = None  # another method has other fields
    base.method = OmegaConf.structured(_build_method(schema, {**user.pop("method", {}), "name": name}, unknown))
    return build(ExperimentConfig, user, "", unknown, base)


def _method_name(layers: Sequence[Mapping[str, Any]]) -> str:
    name: Any = FedLabel.name
    for layer in layers:
        given = layer.get("method", {})
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"`method` (={as_yaml(given)}) must be a mapping of keys: set one of its keys, e.g. "
                f"method.name={FedLabel.name}."
            )
        name = given.get("name", name)
    if isinstance(name, Plain):
        name = name.text
    if not isinstance(name, str):
        raise ConfigError(f"`method.name` (={as_yaml(name)}) must be a text, e.g. method.name={FedLabel.name}.")
    return name


def _method_class(name: str) -> type[Method]:
    try:
        return method_class(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _build_method(schema: type[Method], values: Mapping[str, Any], unknown: Unknown) -> Method:
    """Returns the method; if a user's own class cannot be constructed, the message has its error and location."""
    name = values["name"]
    if inspect.isabstract(schema):
        missing = ", ".join(sorted(getattr(schema, "__abstractmethods__", ())))
        raise ConfigError(f"`method.name` (={name}) is abstract: its class must define {missing}.")
    try:
        method = build(schema, values, "method", unknown)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"`method.name` (={name}) has a field of a type that a configuration cannot hold: {HOLDS} "
            f"({describe_error(error)})."
        ) from error
    except Exception as error:
        if name in METHODS:  # a bug of ours: show where
            raise
        raise ConfigError(f"`method.name` (={name}) cannot be made of its fields: {describe_error(error)}.") from error
    return method
