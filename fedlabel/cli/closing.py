"""What a run says at its end: a table of results, the labelled-only bound, and what to do next."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from fedlabel.cli.progress import make_table
from fedlabel.config import ConfigError, ExperimentConfig, flatten, keys_without_effect, load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.supervised import Supervised
from fedlabel.metric_tags import find_tag
from fedlabel.names import counted
from fedlabel.record.json_files import read_summary
from fedlabel.record.names import CONFIG_YAML, PARTITION_JSON, SUMMARY_JSON
from fedlabel.record.results import name_mean

DEFAULT_OUT = Path("runs")
SHOWN = (
    "eval/accuracy",
    "eval/auc",
    "eval/bag_mae",
    "eval/worst_client_accuracy",
    "pseudo/coverage",
    "pseudo/accuracy",
)
"""Metrics of the table, as far as a run has them."""
SEARCHED = 1000
"""Folders beside the run that are looked at for a labelled-only one, the newest first."""


class Bound(NamedTuple):
    """A finished labelled-only run in the setting of another run."""

    path: Path
    accuracy: float
    """Mean over the last tenth of its rounds."""


def results_table(summary: Mapping[str, Any], title: str) -> Table:
    """Returns the results of a run: last, best and mean of each metric, then what it took."""
    columns = {"last": "last", "best": "best", "mean_last_tenth": name_mean(summary["last_tenth"])}
    if "selected_round" in summary:
        columns["selected"] = f"selected ({summary['selected_round']})"
    table = make_table("", *columns.values(), title=title)
    for key in SHOWN:
        if key in summary:
            tag, values = find_tag(key), summary[key]
            name = tag.title if tag is not None else key
            table.add_row(name, *(f"{values[column]:.4f}" if column in values else "" for column in columns))
    table.add_row("seconds in rounds", f"{summary['seconds']:.1f}")
    table.add_row("MB from clients", f"{summary['comm/bytes_up'] / 1e6:.2f}")
    table.add_row("MB to clients", f"{summary['comm/bytes_down'] / 1e6:.2f}")
    return table


def against_labels_only(
    path: Path, summary: Mapping[str, Any], experiment: Experiment, items: Sequence[str], out: Path
) -> tuple[list[str], Path | None]:
    """Returns whether a run is better than training on the labels alone, in lines of text, and that other run.

    Args:
        path: the run's folder.
        summary: of the run.
        experiment: of the run.
        items: configuration files and overrides that it was started with; of a resumed run there may be none.
        out: where run folders are kept.
    """
    config, card = experiment.config, experiment.labels
    if config.method.name == Supervised.name:
        whose = "all labels: an upper bound" if config.method.oracle_labels else "the labels alone: the lower bound"
        return [f"This is training on {whose} for other methods in this setting."], None
    if not (card.true or card.noisy or len(experiment.federation.server_rows)):
        return ["No sample has a label of its own, so there is no labelled-only run to compare with."], None
    accuracy = summary.get("eval/accuracy", {}).get("mean_last_tenth")
    bound = find_bound(path, config)
    if bound is None or accuracy is None:
        command = bound_command(config, items, out)
        return ["Is it better than training on the labels alone? This tells:", f"    {command}"], None
    points = 100 * (accuracy - bound.accuracy)
    side = "as good as" if abs(points) < 0.05 else f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
    return [
        f"Labels alone: {bound.accuracy:.4f} ({bound.path}). This run: {accuracy:.4f}, {side} it,",
        "by the mean over the last rounds. It is one seed: more (seed=1, seed=2) tell what is chance.",
    ], bound.path


def find_bound(path: Path, config: ExperimentConfig) -> Bound | None:
    """Returns the newest finished labelled-only run beside a run that differs in its method alone, on the same samples
    and labels at the same clients; None without one.

    Folders that hold no run, or a damaged one, are passed over.
    """
    wanted = _setting(config)
    data = _data(path)
    beside = sorted(
        (each for each in path.parent.iterdir() if each != path and (each / SUMMARY_JSON).is_file()),
        key=lambda each: (each / SUMMARY_JSON).stat().st_mtime,
        reverse=True,
    )
    for folder in beside[:SEARCHED]:
        try:
            summary = read_summary(folder)
            if summary["method"] != Supervised.name or summary["seed"] != config.seed:
                continue
            other = load_config([folder / CONFIG_YAML])
            if other.method.oracle_labels or _setting(other) != wanted or _data(folder) != data:
                continue
            return Bound(folder, float(summary["eval/accuracy"]["mean_last_tenth"]))
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return None


def _data(folder: Path) -> tuple[Any, Any]:
    """Returns the hashes of a run's partition, supervision and samples: a path says nothing of what it holds."""
    found = json.loads((folder / PARTITION_JSON).read_bytes())
    return found["sha256"], found["data"]


def _setting(config: ExperimentConfig) -> dict[str, str | int | float | bool]:
    """Returns all keys that make a difference, but those of the method."""
    left_out = keys_without_effect()
    return {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith("method.") and key not in left_out and key not in ("device", "grid.threads_per_worker")
    }


def bound_command(config: ExperimentConfig, items: Sequence[str], out: Path) -> str:
    """Returns the command that trains on the labels alone, with all else equal.

    It is the run's own with another method or, where the files say more of the method than its name, one that gives
    each key that is not the default.
    """
    wanted = dataclasses.replace(config, method=Supervised())
    files = [item for item in items if "=" not in item]
    overrides = [item for item in items if "=" in item and not item.startswith("method.")]
    overrides.append(f"method.name={Supervised.name}")
    if not items or not _gives(wanted, files, overrides):
        files = []
        default = flatten(ExperimentConfig())
        overrides = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in flatten(wanted).items()
            if default.get(key) != value and key != "method.oracle_labels"
        ]
    return shlex.join(["fedlabel", "run", *files, *overrides, *_elsewhere(out)])


def _gives(wanted: ExperimentConfig, files: Sequence[str], overrides: Sequence[str]) -> bool:
    try:
        return load_config(files, overrides) == wanted
    except ConfigError:
        return False


def _elsewhere(out: Path) -> list[str]:
    return [] if out == DEFAULT_OUT else ["--out", str(out)]


def next_commands(path: Path, config: ExperimentConfig, bound: Path | None) -> list[str]:
    """Returns lines with the commands that go on from a finished run, and what each does.

    Args:
        path: the run's folder.
        config: of the run.
        bound: folder of a labelled-only run in the same setting.
    """
    first = ["fedlabel", "compare", str(path), str(bound)] if bound else ["fedlabel", "watch", str(path)]
    more = [f"num_rounds={2 * config.num_rounds}", "--resume", "--name", path.name, *_elsewhere(path.parent)]
    commands = {
        "tables and curves of both" if bound else "its curve and its clients": first,
        "one page of all that matters, to read and to send around": ["fedlabel", "report", str(path)],
        "all that was recorded, in a browser": ["fedlabel", "tensorboard", str(path.parent)],
        f"go on to {counted(2 * config.num_rounds, 'round')}": ["fedlabel", "run", *more],
    }
    return [line for what, command in commands.items() for line in (f"  {what}:", f"    {shlex.join(command)}")]
