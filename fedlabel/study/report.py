"""What a report says of a run, as a dictionary of JSON's types, from the run's folder alone.

It reads runs that have finished, that still run and that were killed; of what was not recorded it says so.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlabel.config import ExperimentConfig, Unavailable, load_recorded, to_yaml
from fedlabel.data.federation import SHOWN_CLIENTS
from fedlabel.data.sets.config import NODES
from fedlabel.errors import naming
from fedlabel.metric_tags import (
    CLIENTS,
    LEARNING,
    PSEUDO_LABELS,
    SUPERVISION,
    find_tag,
)
from fedlabel.models.own import PYTHON
from fedlabel.names import client_label, counted
from fedlabel.record.event_file import read_pictures
from fedlabel.record.files import is_locked
from fedlabel.record.json_files import read_client_names, read_metrics, read_summary
from fedlabel.record.names import (
    CONFIG_YAML,
    FAILURES_LOG,
    METRICS_JSONL,
    STAGES_JSON,
    SUMMARY_JSON,
    SUPERVISION_JSON,
)
from fedlabel.record.results import averaged_rounds, name_mean, summarize
from fedlabel.study.findings import failed, find_all, never_trained
from fedlabel.study.holdings import Facts, label_card, partition
from fedlabel.study.provenance import command_text, machine_text, versions_text
from fedlabel.study.report_metrics import Rows, charts, classes, clients, costs

FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
POINTS = 300
"""Of a curve: of more rounds, so many evenly spaced ones."""
PICTURES: Mapping[str, Sequence[str]] = {
    LEARNING: ("eval/confusion", "eval/classes"),
    PSEUDO_LABELS: (
        *("pseudo/samples", "pseudo/samples_wrong", "pseudo/samples_disputed", "pseudo/precision_coverage"),
        *("pseudo/reliability", "pseudo/samples_newly_kept", "pseudo/samples_dropped"),
    ),
    SUPERVISION: ("transition", "functions", "eval/bags"),
    CLIENTS: ("eval/clients_over_rounds",),
}
"""Page -> tags of figures that charts do not show, by importance; "transition" stands for those of annotators, too."""


def read_report(path: Path, points: int = POINTS, picture_bytes: float = math.inf) -> dict[str, Any]:
    """Returns what a report says of a run.

    Args:
        path: the run's folder.
        points: most points of a curve.
        picture_bytes: most bytes of all pictures; those that do not fit are left out, which is said.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged; the message names it.
    """
    with naming(path):
        if not (path / CONFIG_YAML).is_file():
            raise ValueError(f"{path} holds no run (no {CONFIG_YAML}): give the folder of one, e.g. runs/NAME.")
    try:
        config = load_recorded(path / CONFIG_YAML)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_YAML} is damaged, or of another version: {error}") from error
    locked = is_locked(path)  # before the files: a run that ends meanwhile has written all when they are read
    rows = read_metrics(path)
    summary = read_summary(path) if (path / SUMMARY_JSON).is_file() else None
    state = FINISHED if summary is not None else STOPPED if locked is False else RUNNING
    audit, stages = _read_json(path / SUPERVISION_JSON, {}), _read_json(path / STAGES_JSON, [])
    names = read_client_names(path)
    pictures, left_out = read_panels(path, config, picture_bytes)
    last_stage = [row for row in rows if not stages or row["round"] >= stages[-1]["first"]]
    findings = [
        *find_all(last_stage, config.num_clients),
        *filter(None, (never_trained(rows, config.num_clients), failed(rows, _failures(path)))),
    ]
    card, bubbles = label_card(audit, config.num_clients), partition(audit, config.num_clients)
    return {
        "name": path.resolve().name,
        "state": state,
        "done": rows[-1]["round"] if rows else 0,
        "num_rounds": config.num_rounds,
        "facts": run_facts(config, rows, summary, state),
        "again": commands(path, config, state),
        "config": to_yaml(config),
        "findings": [finding._asdict() for finding in findings],
        "missing": missing(config, rows, summary, state, card, bubbles, pictures, left_out),
        "card": card,
        "partition": bubbles,
        "charts": charts(rows, config.method.metrics, points),
        "stages": [[str(stage["name"]), int(stage["first"])] for stage in stages],
        "clients": clients(rows, config.num_clients),
        "client_labels": {client: client_label(client, name) for client, name in names.items()},
        "classes": classes(rows, audit),
        "costs": costs(rows),
        "pictures": pictures,
    }


def run_facts(config: ExperimentConfig, rows: Rows, summary: Mapping[str, Any] | None, state: str) -> Facts:
    """Returns what was run, on what, and what came of it."""
    done = rows[-1]["round"] if rows else 0
    told = {FINISHED: "finished", RUNNING: "still running", STOPPED: "stopped before its end (killed, or failed)"}
    facts: Facts = [
        ("method", config.method.name),
        ("data", f"{config.data.name}, evaluated on the {config.evaluation.split} split"),
        ("state", f"{told[state]}, {done} of {counted(config.num_rounds, 'round')} done"),
        ("clients", f"{config.num_clients:,}, {config.cohort_size:,} a round"),
        ("model", config.model.name),
        ("seed", str(config.seed)),
    ]
    accuracy = summarize(rows) if rows else {}
    if accuracy and math.isfinite(accuracy["last"]):
        texts = {"last": "last", "best": "best", "mean_last_tenth": name_mean(averaged_rounds(rows))}
        parts = [f"{100 * accuracy[key]:.1f} % {name}" for key, name in texts.items() if math.isfinite(accuracy[key])]
        facts.append(("accuracy", ", ".join(parts)))
    if summary is None:
        return facts
    if "privacy" in summary:
        facts.append(("privacy", f"epsilon {summary['privacy']['epsilon']:.3g}, delta {summary['privacy']['delta']:g}"))
    return [
        *facts,
        ("commit", str(summary.get("commit", "unknown"))),
        ("command", command_text(summary.get("command", []))),
        ("versions", versions_text(summary.get("versions", {}))),
        ("hardware", machine_text(summary.get("hardware", {}))),
    ]


def commands(path: Path, config: ExperimentConfig, state: str) -> list[str]:
    """Returns the shell commands that go on with a run that was stopped, and that run it again; of a run whose network
    was passed from Python, what to call there.
    """
    out = "" if path.parent == Path("runs") else f" --out {shlex.quote(str(path.parent))}"
    file = shlex.quote(str(path / CONFIG_YAML))
    if config.data.name == NODES:
        options = shlex.quote(f'configs="{path / CONFIG_YAML}"')
        return [f"flwr run . SUPERLINK --stream --run-config {options}"]
    if config.model.name.startswith(PYTHON):
        call = f"fedlabel.run({str(path / CONFIG_YAML)!r}, model=..., name={path.resolve().name + '-again'!r})"
        return [f"# in Python, with the network that it was given: {call}"]
    resume = [f"fedlabel run --resume --name {shlex.quote(path.resolve().name)}{out}"] if state == STOPPED else []
    return [*resume, f"fedlabel run {file} --name {shlex.quote(path.resolve().name + '-again')}{out}"]


def read_panels(path: Path, config: ExperimentConfig, most: float) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Returns page -> its pictures as recorded for TensorBoard, the latest of each tag, and titles of what did not fit.

    Args:
        path: the run's folder.
        config: the run's.
        most: bytes of all pictures.
    """
    read = read_pictures(path)
    found: dict[str, list[dict[str, Any]]] = {}
    left_out = []
    for page, names in PICTURES.items():
        for name in names:
            for tag in [
                name,
                *sorted(each for each in read if each.startswith("transition/") and name == "transition"),
            ]:
                if tag not in read:
                    continue
                picture, known = read[tag], find_tag(tag, config.method.metrics)
                title = known.title if known is not None else tag
                if tag.startswith("transition/"):
                    title += f" {tag.partition('/')[2]}"
                most -= len(picture.png)
                if most < 0:
                    left_out.append(title)
                    continue
                found.setdefault(page, []).append(
                    {
                        "title": title,
                        "round": picture.step,
                        "png": base64.b64encode(picture.png).decode(),
                        "width": picture.width,
                        "height": picture.height,
                    }
                )
    return found, left_out


def missing(
    config: ExperimentConfig,
    rows: Rows,
    summary: Mapping[str, Any] | None,
    state: str,
    card: object,
    bubbles: object,
    pictures: Collection[str],
    left_out: Sequence[str],
) -> list[str]:
    """Returns what the report does not have, and why."""
    notes = []
    if state != FINISHED:
        notes.append(
            f"The run has not finished: all numbers are of the {counted(len(rows), 'round')} so far. Commit, command, "
            f"versions and hardware come with {SUMMARY_JSON}, at its end."
        )
    if not rows:
        notes.append(f"No round is done yet: {METRICS_JSONL} is empty, so there are no curves.")
    elif not any(row.get("eval/accuracy") is not None for row in rows):
        notes.append("The model has not been evaluated yet (evaluation.every), or is no end model yet.")
    if config.tracking.level == "off":
        notes.append(
            "tracking.level=off: no figures were recorded (confusion, samples, reliability, noise matrix); "
            "tracking.level=basic records them, full all of them."
        )
    elif not pictures and rows:
        notes.append(
            "No figures are recorded (yet): they come with the last round, and before as far as they take at most 3 % "
            "of the time; evaluation.figures=false leaves them out."
        )
    elif config.tracking.level == "basic":
        notes.append(
            "tracking.level=basic: wrong, disputed and dropped samples, and clients over the rounds, need full."
        )
    if config.data.name == NODES:
        notes.append("On real nodes nothing is compared with true labels, and samples stay where they are.")
    elif card is None or bubbles is None:
        notes.append(f"{SUPERVISION_JSON} does not say who holds which class: it is missing, or of an earlier version.")
    if isinstance(config.method, Unavailable):
        notes.append(
            f"Method {config.method.name} could not be loaded here: metrics that it declares itself are left out. Run "
            "this where its module can be imported (PYTHONPATH)."
        )
    if config.num_clients > SHOWN_CLIENTS and rows:
        notes.append(
            f"Of more than {SHOWN_CLIENTS:,} clients it is not recorded which ones took part; charts with a place for "
            f"each client show some of {SHOWN_CLIENTS:,} evenly spaced ones."
        )
    if left_out:
        notes.append(f"Left out, as the page would be too large: {'; '.join(left_out)}. TensorBoard shows them.")
    return notes


def _read_json(file: Path, without: Any) -> Any:
    """Returns the content of a JSON file of the type of `without`, or `without` if there is none."""
    with naming(file):
        if not file.is_file():
            return without
        text = file.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or move it away.") from error
    if type(content) is not type(without):
        raise ValueError(f"{file} is damaged (it holds no {type(without).__name__}): restore it, or move it away.")
    return content


def _failures(path: Path) -> list[str]:
    """Returns the first line of each failure of a client."""
    file = path / FAILURES_LOG
    with naming(file):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return [line for line in lines if line[:1].strip()]
