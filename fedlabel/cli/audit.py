"""The audit of a run's labels, and the run after it: what `fedlabel audit` does and prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlabel.cli.progress import make_table, say
from fedlabel.config import ConfigError, ExperimentConfig, load_config
from fedlabel.names import counted
from fedlabel.record.json_files import read_summary
from fedlabel.record.names import CONFIG_YAML, SUMMARY_JSON
from fedlabel.record.results import name_mean
from fedlabel.study.audit import AUDIT_JSON, audit, check_request, read_audit, read_run

if TYPE_CHECKING:
    from fedlabel.experiment import Experiment
    from fedlabel.methods.batch import Model
    from server.simulation import RunResult


def audit_run(
    console: Console,
    simulate: Callable[..., RunResult],
    run: Path,
    overrides: list[str],
    folder: Path,
    folds: int,
    method: str,
    then: str | None,
) -> None:
    """Audits a run into a folder, unless that was done before and `then` goes on from it; for the arguments see
    `fedlabel audit --help`.
    """
    from server.final_model import final_model

    def train(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
        simulate(config, name=path.name, out=path.parent, resume=path.exists())
        return final_model(path)

    check_request(folds, method, then)
    config, made = read_run(run, overrides), read_audit(folder)
    if made is not None and (then is None or (made["method"], made["folds"]) != (method, folds)):
        raise ConfigError(
            f"{folder} holds an audit already (--method {made['method']} --folds {made['folds']}): give another --out, "
            "or move it away. With --then, and the same method and folds, the audit is used as it is."
        )
    if made is None:
        rounds = counted(config.num_rounds, "round")
        audit(
            config,
            folder,
            folds,
            method,
            train,
            lambda number: say(console, f"fold {number + 1} of {folds}: {rounds} of {config.method.name} without it"),
        )
        made = read_audit(folder)
        assert made is not None
    _show(console, folder, made)
    if then is not None:
        _train_again(console, simulate, run, folder, then)


def _show(console: Console, folder: Path, made: dict[str, Any]) -> None:
    """Prints what the server knows of an audit."""
    rates = made.get("noise_rates", [None] * len(made["classes"]))
    table = make_table("class", "suspects labelled so", "estimated share labelled otherwise", title=str(folder))
    for name, pairs, rate in zip(made["classes"], made["suspects_by_given_and_suggested"], rates, strict=True):
        table.add_row(name, str(sum(pairs)), "" if rate is None else f"{rate:.3f}")
    console.print(table)
    suspects = f"{counted(made['suspects'], 'suspect')} among {counted(made['labels'], 'label')}"
    say(console, f"{suspects}. Written: {folder / AUDIT_JSON} and, for each client, {folder / 'suspects'}/client-*.csv")


def _train_again(console: Console, simulate: Callable[..., RunResult], run: Path, folder: Path, action: str) -> None:
    """Runs the run's configuration once more, after the audit, and prints both accuracies."""
    config = load_config([run / CONFIG_YAML])
    config = replace(config, supervision=replace(config.supervision, audit=str(folder), audit_action=action))
    path = run.absolute().parent / f"{run.absolute().name}-{action}"
    say(console, f"{counted(config.num_rounds, 'round')} of {config.method.name} after {action}: {path}")
    result = simulate(config, name=path.name, out=path.parent, resume=path.exists())
    before = read_summary(run) if (run / SUMMARY_JSON).is_file() else {}  # it need not be finished
    table = make_table("eval/accuracy", "last", name_mean(result.summary["last_tenth"]))
    for what, summary in {run.name: before, path.name: result.summary}.items():
        values = summary.get("eval/accuracy", {})
        table.add_row(what, *(f"{values[key]:.4f}" if key in values else "" for key in ("last", "mean_last_tenth")))
    console.print(table)
