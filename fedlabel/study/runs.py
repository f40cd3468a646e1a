"""Reads finished runs, and groups those that are comparable.

The runs of a row differ in their seed alone, the rows of a section in their method (its fields, learning rate,
proximal term and strategy) alone. A sweep names its own rows and sections; what else its rows differ in is said.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlabel.config import ExperimentConfig, flatten, keys_without_effect, load_recorded
from fedlabel.methods.supervised import Supervised
from fedlabel.names import counted, did_you_mean
from fedlabel.record.json_files import read_metrics, read_summary
from fedlabel.record.names import CONFIG_YAML, METRICS_JSONL, SECONDS, SUMMARY_JSON
from fedlabel.record.results import averaged_rounds, name_mean
from fedlabel.study.sweep import SWEEP_JSON, CompareConfig, SweepConfig, format_value, parse_sweep

ACCURACY, COLUMN = "eval/accuracy", "mean_last_tenth"
"""What rows are ranked and tested by where nothing else is asked for, of summary.json."""
METRICS = {ACCURACY: "accuracy", "eval/auc": "AUC", "eval/balanced_accuracy": "balanced accuracy"}
"""What they may be ranked and tested by, and its name."""
VIRTUAL = "virtual_seconds"
WHEN = {"last": "after the last round", COLUMN: "mean of last tenth", "selected": "at the selected round"}
"""And at which round: keys of a metric in summary.json."""
AXES = {"round": "communication round", VIRTUAL: "simulated seconds", "bytes_up": "MB up, all clients"}
"""What curves may be drawn over, and the name of that axis."""
ROW_KEYS = (
    *("method.", "training.lr", "training.prox_mu", "training.max_grad_norm", "strategy."),
    *("pacing.", "sampling."),
)
"""Keys (or groups of them) that make a row."""
MACHINE_KEYS = ("seed", "device", "grid.threads_per_worker")
"""Keys in which the runs of a row may differ, besides those without effect."""
LONGEST_VALUE = 60
"""Characters of a value in a message: a mix of kinds of label has hundreds."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    path: Path
    config: ExperimentConfig
    flat: Mapping[str, str | int | float | bool]
    """`config`, dotted key -> value."""
    summary: Mapping[str, Any]
    """The content of summary.json."""
    rounds: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""

    @property
    def averaged(self) -> str:
        """Returns which rounds its means are over."""
        return name_mean(averaged_rounds(self.rounds))

    def value(self, metric: str, column: str = COLUMN) -> float:
        """Returns a metric of summary.json; NaN where the run has none."""
        found = self.summary.get(metric)
        value = found.get(column) if isinstance(found, Mapping) else found
        return math.nan if value is None else float(value)

    def mean(self, metric: str) -> float:
        """Returns the mean of a metric over all rounds that have it, for metrics of few rounds; NaN without one."""
        found = [row[metric] for row in self.rounds if row.get(metric) is not None]
        return math.fsum(found) / len(found) if found else math.nan

    def curve(self, metric: str = ACCURACY, against: str = "round") -> tuple[list[float], list[float]]:
        """Returns the evaluated rounds and their accuracy, or another metric.

        Args:
            metric: in metrics.jsonl.
            against: one of `AXES`, in place of the rounds.
        """
        found = [(place, row[metric]) for place, row in self._along(against) if row.get(metric) is not None]
        return [each for each, _ in found], [value for _, value in found]

    def until(self, target: float, against: str) -> float:
        """Returns where on one of `AXES` an evaluation has an accuracy of at least `target` for the first time; NaN if
        none has.
        """
        reached = (place for place, row in self._along(against) if (row.get(ACCURACY) or -math.inf) >= target)
        return next(reached, math.nan)

    def _along(self, against: str) -> list[tuple[float, Mapping[str, Any]]]:
        """Returns the rounds with their place on one of `AXES`; none if the run has no simulated time."""
        if against == VIRTUAL:
            return [(row[SECONDS], row) for row in self.rounds if row.get(SECONDS) is not None]
        if against == "bytes_up":
            sizes = itertools.accumulate((row.get("comm/bytes_up") or 0.0) for row in self.rounds)
            return list(zip(sizes, self.rounds, strict=True))
        return [(float(row["round"]), row) for row in self.rounds]

    @property
    def simulated_seconds(self) -> float:
        """Returns the simulated time of the last round; NaN without a clock."""
        return max((place for place, _ in self._along(VIRTUAL)), default=math.nan)


Section = dict[str, list[Run]]
"""Row name -> its runs, by seed."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The runs of a comparison and its settings."""

    title: str
    sections: dict[str, Section]
    targets: Sequence[float] = ()
    """Accuracies up to which rounds and bytes are counted."""
    warnings: Sequence[str] = ()
    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Section -> row -> the paper's published result."""
    deviations: str = ""
    """What differs from the paper's setting."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Row name -> its description; for a sweep."""
    protocol: str = ""
    """How hyper-parameters were chosen; for a sweep."""
    metric: str = ACCURACY
    """Metric of ranking and tests, one of `METRICS`."""
    column: str = COLUMN
    """One of `WHEN`."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """Baseline of the tests, as requested."""
    against: str = "round"
    """What curves are drawn over, one of `AXES`."""
    asked_by: str = ""
    """Who chose the baseline; "" for the default."""

    def score(self, run: Run) -> float:
        """Returns the ranking score of a run."""
        return run.value(self.metric, self.column)

    @property
    def ranked_by(self) -> str:
        """Returns the name of the ranking score."""
        return f"{METRICS[self.metric]}, {WHEN[self.column]}"

    def ranked_in(self, name: str) -> str:
        """Returns the name of the ranking score of a section, with the rounds of a mean."""
        if self.column != COLUMN:
            return self.ranked_by
        means = dict.fromkeys(run.averaged for runs in self.sections[name].values() for run in runs)
        return f"{METRICS[self.metric]}, {' or '.join(means)}"

    def baseline(self, name: str) -> str:
        """Returns the row that all others of a section are tested against; "": all pairs are tested."""
        section = self.sections[name]
        wanted = labels_only(section) if self.compare.baseline is None else self.compare.baseline
        return wanted if wanted in section and not self.compare.all_pairs else ""

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for section in self.sections.values() for runs in section.values() for run in runs]


def read_comparison(
    paths: Sequence[Path],
    by: Sequence[str] = (),
    targets: Sequence[float] = (),
    metric: str = ACCURACY,
    column: str = COLUMN,
    compare: CompareConfig | None = None,
    against: str | None = None,
) -> Comparison:
    """Returns the comparison of a sweep's folder, or of run folders and folders of them.

    Args:
        paths: one sweep's folder, or any number of folders that hold runs at any depth.
        by: keys of which every combination of values is a section; not for a sweep, which has its settings.
        targets: accuracies; default: the sweep's.
        metric: what rows are ranked and tested by, one of `METRICS`.
        column: of that metric, one of `WHEN`.
        compare: what rows are tested against, in place of what the sweep's file says.
        against: what curves are drawn over, one of `AXES`; None: what the sweep's file says.

    Raises:
        ValueError: there is no finished run, a run is damaged, runs are not comparable, or no row is called as the
            baseline.
    """
    for target in targets:
        if not 0 < target < 1:
            raise ValueError(f"`--target` (={target:g}) must lie in (0, 1): an accuracy, e.g. 0.6.")
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give run folders, folders that hold some, or a sweep's folder.")
    if metric not in METRICS:
        raise ValueError(f"`--metric` (={metric}) must be one of {', '.join(METRICS)}.")
    if column not in WHEN:
        raise ValueError(f"`--column` (={column}) must be one of {', '.join(WHEN)}.")
    if against is not None and against not in AXES:
        raise ValueError(f"`--against` (={against}) must be one of {', '.join(AXES)}.")
    comparison = _read(paths, by, targets)
    comparison = replace(comparison, metric=metric, column=column, against=against or comparison.compare.against)
    if comparison.against == VIRTUAL and any(math.isnan(run.simulated_seconds) for run in comparison.runs):
        raise ValueError(
            f"`--against` (={VIRTUAL}) needs runs with a simulated clock, and some have none: set devices.kind "
            "(docs/devices.md), or take --against round."
        )
    if compare is not None:
        _check_row(comparison, compare.baseline)
        comparison = replace(comparison, compare=compare, asked_by="--baseline")
    warnings = [*comparison.warnings, *_without_baseline(comparison), *_less_evaluated(comparison)]
    comparison = replace(comparison, warnings=warnings)
    lacking = [str(run.path) for run in comparison.runs if math.isnan(comparison.score(run))]
    if lacking:
        raise ValueError(
            f"`--metric` (={metric}) with `--column` (={column}) is not in the summary of "
            f"{counted(len(lacking), 'run')}, e.g. {lacking[0]}: rank by something that all have (selected needs "
            "evaluation.select)."
        )
    return comparison


def _check_row(comparison: Comparison, baseline: str | None) -> None:
    rows = list(dict.fromkeys(row for section in comparison.sections.values() for row in section))
    if baseline is not None and baseline not in rows:
        raise ValueError(
            f"`--baseline` (={baseline}) must be one of the rows: {'; '.join(rows)}.{did_you_mean(baseline, rows)}"
        )


def _without_baseline(comparison: Comparison) -> list[str]:
    """Returns a warning about sections that lack the baseline row."""
    lacking = [
        name
        for name, section in comparison.sections.items()
        if not comparison.baseline(name)
        and sum(not runs[0].config.method.oracle_labels for runs in section.values()) > 1
    ]
    if comparison.compare.all_pairs or not lacking:
        return []
    row = comparison.compare.baseline
    missing = f"there is no row {row}" if row else "no row trains on the labels alone (method supervised)"
    where = "; ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    return [
        f"{where}: {missing}, so all pairs of rows are tested. compare.baseline in the sweep's file, or --baseline, "
        "names a row to test all others against."
    ]


def _less_evaluated(comparison: Comparison) -> list[str]:
    """Returns a warning about runs that lack an evaluation in the averaged rounds."""
    averaged = {run: averaged_rounds(run.rounds) for run in comparison.runs}
    lacking = [run for run, rounds in averaged.items() if rounds["count"] <= rounds["last"] - rounds["first"]]
    if not lacking:
        return []
    return [
        f"{counted(len(lacking), 'run')} without an evaluation in some of the rounds that are averaged, as after "
        f"--resume with another num_rounds, e.g. {lacking[0].path}: {lacking[0].averaged}."
    ]


def labels_only(section: Section) -> str:
    """Returns the first row that trains on labels alone: method supervised, without oracle_labels.

    "" without one.
    """
    methods = {row: runs[0].config.method for row, runs in section.items()}
    return next((row for row, each in methods.items() if each.name == Supervised.name and not each.oracle_labels), "")


def _read(paths: Sequence[Path], by: Sequence[str], targets: Sequence[float]) -> Comparison:
    sweeps = [path for path in paths if (path / SWEEP_JSON).is_file()]
    if not sweeps:
        return _read_folders(paths, by, targets)
    if len(paths) > 1 or by:
        raise ValueError(
            f"{sweeps[0]} is a sweep's folder, which has its own rows and settings: it must be the only path, without "
            "--by. To compare some of its runs with others, give folders below it."
        )
    return _read_sweep(paths[0], targets)


def read_run(path: Path) -> Run | None:
    """Returns a run, or None if it has not finished.

    Raises:
        ValueError: a file of the run is damaged; the message names it.
    """
    try:
        config = load_recorded(path / CONFIG_YAML)
    except ValueError as error:
        raise ValueError(f"{path / 'config.yaml'} is damaged, or of another version: {error}") from error
    file = path / SUMMARY_JSON
    if not file.is_file():
        return None
    try:
        summary = read_summary(path)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, or leave it out.") from error
    accuracy = summary.get(ACCURACY)
    if not isinstance(accuracy, dict) or any(
        type(accuracy.get(c)) not in (int, float) for c in ("last", "best", COLUMN)
    ):
        raise ValueError(f"{file} is damaged: it holds no {ACCURACY}. Run it again, or leave {path} out.")
    return Run(path, config, flatten(config), summary, read_metrics(path))


def _read_folders(paths: Sequence[Path], by: Sequence[str], targets: Sequence[float]) -> Comparison:
    folders = sorted({file.parent for path in paths for file in path.rglob(CONFIG_YAML)})
    folders = [folder for folder in folders if (folder / METRICS_JSONL).is_file()]
    if not folders:
        raise ValueError(
            f"No run (a folder with config.yaml and metrics.jsonl) is in {', '.join(map(str, paths))}; check the path."
        )
    read = {folder: read_run(folder) for folder in folders}
    warnings = [f"{folder} has not finished and is left out." for folder, run in read.items() if run is None]
    runs = [run for run in read.values() if run is not None]
    if not runs:
        raise ValueError(f"{counted(len(folders), 'run')}, none of which has finished: {', '.join(map(str, folders))}.")
    sections = {name: name_rows(members, by, runs) for name, members in split_sections(runs, by).items()}
    title = ", ".join(dict.fromkeys(path.resolve().name for path in paths))
    return Comparison(title, sections, targets, [*warnings, *_uneven(sections)])


def split_sections(runs: Iterable[Run], by: Sequence[str]) -> dict[str, list[Run]]:
    """Returns section name -> comparable runs: those with equal values of the keys `by`.

    Raises:
        ValueError: a key of `by` does not exist, or runs of a section differ in more than method, rate and seed.
    """
    runs = list(runs)
    keys = {key for run in runs for key in run.flat}
    for key in by:
        if key not in keys:
            hint = did_you_mean(key, sorted(keys))
            raise ValueError(f"`--by` names {key}, which is no configuration key.{hint}")
    sections: dict[str, list[Run]] = {}
    for run in runs:
        name = ", ".join(f"{key}={run.flat.get(key)}" for key in by) or "all"
        sections.setdefault(name, []).append(run)
    for members in sections.values():
        differing = differing_keys(members, without=(*ROW_KEYS, *MACHINE_KEYS, *keys_without_effect(), *by))
        if differing:
            described = "; ".join(f"{key} ({_by_value(members, key)})" for key in differing)
            raise ValueError(
                f"The runs differ in {described}; compare like with like, or add --by {','.join([*by, *differing])} "
                "for one section each."
            )
    return sections


def differing_keys(runs: Sequence[Run], without: Collection[str] = ()) -> list[str]:
    """Returns the keys that have more than one value among `runs`; a name in `without` that ends in "." is a group."""
    keys = dict.fromkeys(key for run in runs for key in run.flat)
    return [
        key for key in keys if not _is_among(key, without) and len({json.dumps(run.flat.get(key)) for run in runs}) > 1
    ]


def name_rows(runs: Sequence[Run], by: Sequence[str], everywhere: Sequence[Run]) -> Section:
    """Returns row name -> its runs by seed: the method, and the keys in which its runs differ, in any section.

    Args:
        runs: of one section.
        by: keys that make the sections.
        everywhere: the runs of all sections.

    Raises:
        ValueError: two runs of a row have the same seed.
    """
    section: Section = {}
    for method in dict.fromkeys(run.config.method.name for run in runs):
        members = [run for run in runs if run.config.method.name == method]
        same_method = [run for run in everywhere if run.config.method.name == method]
        keys = [key for key in differing_keys(same_method, without=by) if _is_among(key, ROW_KEYS)]
        for run in members:
            parts = [f"{_short(key)}={plain(run.flat[key])}" for key in keys if key in run.flat]
            section.setdefault(", ".join([method, *parts]), []).append(run)
    for name, members in section.items():
        members.sort(key=lambda run: run.config.seed)
        for first, second in itertools.pairwise(members):
            if first.config.seed == second.config.seed:
                raise ValueError(
                    f"{first.path} and {second.path} are the same row ({name}) with the same seed "
                    f"({first.config.seed}); leave one out."
                )
    return section


def _read_sweep(out: Path, targets: Sequence[float]) -> Comparison:
    file = out / SWEEP_JSON
    try:
        content = json.loads(file.read_text())
        sweep = parse_sweep(content["sweep"])
        finals = [row for row in content["runs"] if row["role"] == "final"]
        found = {(row["setting"], row["method"], row["seed"]): row for row in finals}
        chosen = list(content["chosen"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged, or of an earlier version ({error!r}): run the sweep again, which goes on with what is "
            "there."
        ) from error
    sections: dict[str, Section] = {}
    warnings = [f"{row['setting']} / {row['method']}: {row['warning']}" for row in chosen if row["warning"]]
    for setting in sweep.sections:
        for method in sweep.methods:
            unfinished = []
            for seed in sorted(sweep.seeds):
                row = found.get((setting, method, seed), {"status": "unfinished"})
                run = read_run(out / row["path"]) if row["status"] == "done" else None
                if run is not None:
                    sections.setdefault(setting, {}).setdefault(method, []).append(run)
                elif row["status"] == "failed":
                    why = row["error"].strip().splitlines()[-1].rstrip(".")
                    warnings.append(f"{setting} / {method}: seed {seed} failed and is left out: {why}.")
                else:
                    unfinished.append(str(seed))
            if unfinished:
                warnings.append(f"{setting} / {method}: not finished and left out: seed {', '.join(unfinished)}.")
    for setting, section in sections.items():
        members = [run for runs in section.values() for run in runs]
        for key in differing_keys(members, without=(*ROW_KEYS, *MACHINE_KEYS, *keys_without_effect())):
            warnings.append(f"{setting}: the sweep's rows differ in {key}, too ({_by_row(section, key)}).")
    if not sections:
        failed = " ".join(warning for warning in warnings if "failed" in warning)
        raise ValueError(
            f"No final run of the sweep in {out} is done; `fedlabel sweep` goes on with it. {failed}".strip()
        )
    return Comparison(
        title=out.resolve().name,
        sections=sections,
        targets=targets or sweep.targets,
        warnings=[*warnings, *_uneven(sections)],
        published=sweep.published,
        deviations=sweep.deviations,
        rows={method: " ".join(row) or "the configuration as it is" for method, row in sweep.methods.items()},
        protocol=_protocol(sweep),
        compare=sweep.compare,
        asked_by="" if replace(sweep.compare, against="round") == CompareConfig() else "compare.baseline",
    )


def _protocol(sweep: SweepConfig) -> str:
    search = sweep.search
    if search is None:
        return ""
    where = "and setting alike" if search.setting is None else f"alike in setting {search.setting}, for all settings"
    text = (
        f"{search.key} was searched for every method {where}, over "
        f"{', '.join(map(format_value, search.values))} with seed {search.seed} on the {search.split} split, by "
        f"{search.metric} ({search.column}); a tie goes to the smaller."
    )
    for method, values in search.per_method_values.items():
        text += f" For {method} over {', '.join(map(format_value, values))}."
    return text


def _uneven(sections: Mapping[str, Section]) -> list[str]:
    """Returns a warning for every section whose rows have different seeds."""
    warnings = []
    for name, section in sections.items():
        seeds = {row: ", ".join(str(run.config.seed) for run in runs) for row, runs in section.items()}
        if len(set(seeds.values())) > 1:
            described = "; ".join(f"{row}: {text}" for row, text in seeds.items())
            warnings.append(f"{name}: the rows have different seeds ({described}). Tests use the common ones.")
    return warnings


def _is_among(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of `names`, or in one that ends in "."."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def _short(key: str) -> str:
    return key.removeprefix("method.").removeprefix("training.")


def plain(value: object) -> str:
    """Returns a configuration value as written on the command line."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _by_row(section: Section, key: str) -> str:
    """Returns "10: A, B; 20: C" for a warning."""
    found: dict[str, list[str]] = {}
    for row, runs in section.items():
        found.setdefault(plain(runs[0].flat.get(key)), []).append(row)
    return "; ".join(f"{value}: {', '.join(rows)}" for value, rows in found.items())


def _by_value(runs: Sequence[Run], key: str) -> str:
    """Returns "20: runA; 40: runB, runC" for an error message; of long values the part that differs."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(plain(run.flat.get(key)), []).append(run.path.name)

    def part(value: str) -> str:
        if len(value) <= LONGEST_VALUE:
            return value
        common = max((_common_start(value, other) for other in found if other != value), default=0)
        begin = max(0, common - LONGEST_VALUE // 2)
        end = begin + LONGEST_VALUE
        return f"{'...' if begin else ''}{value[begin:end]}{'...' if len(value) > end else ''}"

    return "; ".join(
        f"{part(value)}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for value, names in found.items()
    )


def _common_start(first: str, second: str) -> int:
    """Returns the length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
