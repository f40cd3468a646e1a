"""A sweep: methods x settings x seeds from one YAML file, with equal search effort per method, resumable at any time.

OUT/sweep.json                                   what was asked, what finished, what the searches chose
OUT/<setting>/<method>/<key value>-seed<k>/      run folders (see record/run_folder.py); all that a second call goes by
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlabel.checks import one_of
from fedlabel.config import ConfigError, ExperimentConfig, find_config, load_config
from fedlabel.config_schema import build, fields_of, settled
from fedlabel.config_text import as_yaml, merged, read_mapping
from fedlabel.learning.evaluation import EVALUATED
from fedlabel.names import counted, did_you_mean

SWEEP_JSON = "sweep.json"
COLUMNS = ("last", "best", "mean_last_tenth")


@dataclass(frozen=True)
class SearchConfig:
    """One search per method and setting, or per method, over equally many values for every method."""

    key: str = "training.lr"
    """The configuration key that is searched."""
    values: list[float] = field(default_factory=list)
    """Values tried for every method."""
    per_method_values: dict[str, list[float]] = field(default_factory=dict)
    """Method -> values tried instead, for one whose scale differs; as many as `values`."""
    setting: str | None = None
    """The setting in which each method is searched, once; all settings then use the value chosen there. null: each
    setting has a search of its own."""
    seed: int = 100
    """Seed of the search's runs; must not be one of the sweep's `seeds`."""
    split: str = "validation"
    """validation: the test split is not used to choose."""
    metric: str = "eval/accuracy"
    """Metric of summary.json that decides."""
    column: str = "mean_last_tenth"
    """last | best | mean_last_tenth (of the rounds) of the metric."""

    def __post_init__(self) -> None:
        for name, values in {"values": self.values, **self.per_method_values}.items():
            key = "values" if name == "values" else f"per_method_values.{name}"
            if not values or len(set(values)) != len(values) or not all(map(math.isfinite, values)):
                raise ValueError(f"`search.{key}` (={values}) must be at least one number, each once.")
            if len(values) != len(self.values):
                raise ValueError(
                    f"`search.{key}` (={values}) has {counted(len(values), 'value')}, `search.values` "
                    f"{len(self.values)}: every method must get the same budget; give as many."
                )
        if self.split != "validation":
            raise ValueError(f"`search.split` (={self.split}) must be validation: the test split chooses nothing.")
        one_of(self, "search", metric=EVALUATED, column=COLUMNS)


@dataclass(frozen=True)
class CompareConfig:
    """The tests of `fedlabel compare`; to be set before there are results, or p values are too small."""

    baseline: str | None = None
    """Row that all others of a section are tested against. null: the first that trains on the labels alone (method
    supervised, without oracle_labels)."""
    all_pairs: bool = False
    """Whether every row is tested against every other one instead, with a correction for that many tests."""
    against: str = "round"
    """What curves are drawn over: round, virtual_seconds (see `devices`) or bytes_up."""

    def __post_init__(self) -> None:
        one_of(self, "compare", against=("round", "virtual_seconds", "bytes_up"))
        if self.all_pairs and self.baseline is not None:
            raise ValueError(
                f"`compare.baseline` (={self.baseline}) has no meaning with `compare.all_pairs` (=true): give one of "
                "them."
            )


@dataclass(frozen=True)
class SweepConfig:
    """The content of a sweep's YAML file."""

    configs: list[str] = field(default_factory=list)
    """Configuration files common to all runs."""
    overrides: list[str] = field(default_factory=list)
    """"key=value" common to all runs; a setting's override them, a method's override both."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """Row name -> overrides."""
    settings: dict[str, list[str]] = field(default_factory=dict)
    """Section name -> overrides; empty: one section, "all"."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    search: SearchConfig | None = None
    final_split: str = "test"
    """Split on which the final runs are evaluated: test, or validation for a probe."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    targets: list[float] = field(default_factory=list)
    """Accuracies in (0, 1) up to which `fedlabel compare` counts rounds and bytes."""
    published: dict[str, dict[str, str]] = field(default_factory=dict)
    """Setting -> method -> the paper's result, printed next to ours."""
    deviations: str = ""
    """Differences from the paper's setting; printed with `published`."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("`methods` must name at least one row, e.g. {FedLabel: []}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"`seeds` (={self.seeds}) must be at least one number of at least 0, each once.")
        one_of(self, "", final_split=("test", "validation"))
        if not all(0 < target < 1 for target in self.targets):
            raise ValueError(f"`targets` (={self.targets}) must lie in (0, 1).")
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError(f"`search.seed` (={self.search.seed}) must be none of `seeds` (={self.seeds}).")
        for kind, names in {"methods": self.methods, "settings": self.sections}.items():
            _check_slugs(kind, names)
        self._check_names()
        set_here = {"seed", "evaluation.split", *([self.search.key] if self.search else [])}
        layers = {"overrides": self.overrides}
        layers |= {f"methods.{name}": row for name, row in self.methods.items()}
        layers |= {f"settings.{name}": section for name, section in self.settings.items()}
        for where, overrides in layers.items():
            for override in overrides:
                if override.partition("=")[0] in set_here:
                    raise ValueError(
                        f"`{where}` sets {override}, which the sweep sets itself: use seeds, final_split and search."
                    )

    def _check_names(self) -> None:
        named = {f"published.{setting}": rows for setting, rows in self.published.items()}
        if self.search:
            named["search.per_method_values"] = dict.fromkeys(self.search.per_method_values, "")
            if self.search.setting is not None:
                named["search.setting"] = {self.search.setting: ""}
        if self.compare.baseline is not None:
            named["compare.baseline"] = {self.compare.baseline: ""}
        of_settings = ("published", "search.setting")
        for where, rows in {"published": dict.fromkeys(self.published, ""), **named}.items():
            names = list(self.sections if where in of_settings else self.methods)
            for name in rows:
                if name not in names:
                    kind = "settings" if where in of_settings else "methods"
                    raise ValueError(f"`{where}` names {name!r}, which must be one of the {kind}: {_near(name, names)}")

    @property
    def sections(self) -> dict[str, list[str]]:
        """`settings`, or the one section that a sweep without settings has."""
        return self.settings or {"all": []}

    def values(self, method: str) -> tuple[float | None, ...]:
        """Returns the values searched for `method`, lowest first; (None,) without a search."""
        if self.search is None:
            return (None,)
        return tuple(sorted(self.search.per_method_values.get(method, self.search.values)))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Returns a sweep's YAML file, with `overrides` added to the sweep's own.

    The key `extends` names another sweep's file, whose keys are the defaults of this one's: mappings are merged, a row
    or section set to null is left out.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, a value has the wrong type or range.
    """
    content = _read_sweep(path, ())
    if isinstance(content.get("overrides", []), list):
        content["overrides"] = [*content.get("overrides", []), *overrides]
    try:
        return parse_sweep(content)
    except ValueError as error:
        raise ConfigError(f"{find_config(path)}: {error}") from error


def _read_sweep(path: str | Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a file and those it extends; `extending` are the files that led here."""
    file = find_config(path)
    if file.resolve() in extending:
        raise ConfigError(f"{file} extends itself, by way of {' -> '.join(map(str, extending))}.")
    content: dict[str, Any] = settled(SweepConfig, read_mapping(file))
    base = content.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{file}: `extends` (={as_yaml(base)}) must be the name of another sweep's file.")
        content = merged(_read_sweep(base, (*extending, file.resolve())), content)
    rows = {key: value for key, value in content.items() if key in ("methods", "settings") and isinstance(value, dict)}
    content |= {key: {name: row for name, row in value.items() if row is not None} for key, value in rows.items()}
    return content


def parse_sweep(content: Mapping[Any, Any]) -> SweepConfig:
    """Returns a sweep from plain lists and dictionaries, as YAML or sweep.json holds them.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or range.
    """
    return build(SweepConfig, content, "", _unknown_key)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    setting: str
    method: str
    seed: int
    key: str
    """The searched key; "" without a search."""
    value: float | None
    """Its value; None without a search."""
    role: str
    """search | final."""
    path: str
    """The run's folder, relative to the sweep's."""
    config: ExperimentConfig | None
    """None if the configuration is impossible."""
    error: str = ""
    """Why it is impossible."""

    @property
    def name(self) -> str:
        """For messages."""
        return " / ".join(filter(None, (self.setting, self.method, self.choice, f"seed {self.seed}")))

    @property
    def choice(self) -> str:
        """For messages, e.g. "lr=0.1"; "" without a search."""
        return "" if self.value is None else f"{self.key.rpartition('.')[2]}={format_value(self.value)}"


@dataclass(frozen=True)
class Group:
    """All runs of one method in one setting."""

    setting: str
    method: str
    search: tuple[Cell, ...]
    """One per value; empty without a search. With `search.setting` they are that setting's."""
    final: dict[float | None, tuple[Cell, ...]]
    """Value -> one per seed; only those of the chosen value are run."""


def plan_sweep(sweep: SweepConfig) -> list[Group]:
    """Returns all runs of a sweep, resolved; a cell whose configuration is impossible has the error.

    Raises:
        ConfigError: every run's is, as the part common to all is wrong.
    """
    groups = []
    for setting, section in sweep.sections.items():
        for method, row in sweep.methods.items():
            search: list[Cell] = []
            final: dict[float | None, tuple[Cell, ...]] = {}
            config: ExperimentConfig | None = None
            for value in sweep.values(method):
                overrides, folder = [*sweep.overrides, *section, *row], f"{slug(setting)}/{slug(method)}/"
                key = "" if sweep.search is None else sweep.search.key
                if value is not None:
                    overrides.append(f"{key}={format_value(value)}")
                    folder += f"{key.rpartition('.')[2]}{format_value(value)}-"
                config, error = _resolve(sweep.configs, overrides, config, key, value)
                cell = Cell(setting, method, 0, key, value, "final", folder, config, error)
                if sweep.search is not None:
                    search.append(_at(cell, "search", sweep.search.seed, sweep.search.split))
                final[value] = tuple(_at(cell, "final", seed, sweep.final_split) for seed in sweep.seeds)
            groups.append(Group(setting, method, tuple(search), final))
    if sweep.search is not None and sweep.search.setting is not None:
        once = {group.method: group.search for group in groups if group.setting == sweep.search.setting}
        groups = [replace(group, search=once[group.method]) for group in groups]
    cells = [cell for group in groups for cells in group.final.values() for cell in cells]
    if all(cell.config is None for cell in cells):
        raise ConfigError(cells[0].error)
    return groups


def _resolve(
    configs: Sequence[str], overrides: Sequence[str], like: ExperimentConfig | None, key: str, value: float | None
) -> tuple[ExperimentConfig | None, str]:
    """Loads a configuration; if `like` differs only in a number, `key`, copies it instead (loading is slow)."""
    try:
        changed = None if like is None or value is None else _changed(like, key.split("."), value)
        return changed or load_config(configs, overrides), ""
    except ValueError as error:
        return None, str(error)


def _changed(part: Any, path: list[str], value: float) -> Any:
    """Returns a configuration with another number at `path`; None where there is no floating-point number."""
    old = getattr(part, path[0], None)
    new = (value if isinstance(old, float) else None) if len(path) == 1 else _changed(old, path[1:], value)
    return None if new is None else replace(part, **{path[0]: new})


def _at(cell: Cell, role: str, seed: int, split: str) -> Cell:
    """Returns a cell with the seed and the split of its role."""
    config = cell.config
    if config is not None:
        config = replace(config, seed=seed, evaluation=replace(config.evaluation, split=split))
    return replace(cell, seed=seed, role=role, path=f"{cell.path}seed{seed}", config=config)


def format_value(value: float) -> str:
    """Returns a searched value as written in overrides and names: 3 for 3.0, 0.05, 1e-05."""
    return str(int(value)) if value.is_integer() else repr(value)


def slug(name: str) -> str:
    """Returns a name as a folder's: lower case, as some file systems do not tell cases apart."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _check_slugs(kind: str, names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        folder = slug(name)
        if not folder:
            raise ValueError(f"`{kind}` has a name ({name!r}) without a letter or digit, which can name no folder.")
        if folder in seen:
            raise ValueError(
                f"`{kind}` has {seen[folder]!r} and {name!r}, whose folder would both be {folder}; rename one."
            )
        seen[folder] = name


def _near(name: str, names: Sequence[str]) -> str:
    return f"{', '.join(names)}.{did_you_mean(name, names)}"


def _unknown_key(schema: type, where: str, name: str) -> str:
    """Returns the message for a key that a sweep does not have."""
    full = f"{where}.{name}" if where else name
    names = list(fields_of(schema))
    allowed = f" Allowed here: {', '.join(names)}."
    return f"`{full}` is no key of a sweep.{did_you_mean(name, names) or allowed}"
