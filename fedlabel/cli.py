"""The command line, and the one place in the library that starts server and clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table

from fedlabel.config import ConfigError, ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.data.federation import build_federation
from fedlabel.errors import FULL, RunError, file_error, make_folder, naming
from fedlabel.experiment import open_experiment
from fedlabel.hardware import describe_hardware, resolve_device, source_commit, versions
from fedlabel.importing import add_working_directory, claim_packages
from fedlabel.progress import OnRound, run_progress, sweep_progress

if TYPE_CHECKING:
    from fedlabel.sweep import Group
    from fedlabel.workers import Tell
    from server.grids import SimulationGrid

MAX_CLIENT_ROWS = 20
"""A table has a row per client up to so many."""

app = typer.Typer(
    help="Federated learning where labels are few.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would print local variables: labels and rows of samples
)
console = Console()
error_console = Console(stderr=True)


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run left behind."""

    path: Path
    """The run's folder."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    metrics: list[dict[str, Any]]
    """One dictionary a round, as in `metrics.jsonl`."""


def run_experiment(
    config: ExperimentConfig | str | Path | Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    on_start: Callable[[ExperimentConfig, Path], None] = lambda config, path: None,
    on_round: OnRound = lambda round_number, metrics: None,
) -> RunResult:
    """See `fedlabel.run`; `on_start` and `on_round` are told of progress."""
    claim_packages()
    from fedlabel.tracking import read_metrics
    from server.server_app import default_name, run_federation
    from server.strategy import build_strategy

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resolved = _resolve(config, overrides, Path(out) / name / "config.yaml" if resume and name else None)
    if resume and name is None:
        raise ConfigError("--resume needs --name: which run folder to go on with.")
    if name is not None and (not name or Path(name).name != name):
        raise ConfigError(
            f"--name (={name}) must be the name of one folder, without a slash; --out says where it goes."
        )
    path = Path(out) / (name or default_name(resolved))
    with naming(path):
        if not resume and path.exists():
            raise ConfigError(
                f"{path} exists already; give another --name, or --resume to go on with it (in Python: name=..., "
                "resume=True)."
            )
    build_strategy(resolved.strategy)
    if any(part.module for part in resolved.supervision.parts):  # its functions may have been edited since
        open_experiment.cache_clear()
        build_federation.cache_clear()
    experiment = open_experiment(to_yaml(resolved))
    on_start(resolved, path)
    with open_grid(resolved, experiment.device.type == "cuda") as grid:
        summary = run_federation(resolved, grid, path, resume, on_round)
    return RunResult(path, summary, read_metrics(path))


@contextmanager
def open_grid(config: ExperimentConfig, use_gpu: bool) -> Iterator[SimulationGrid]:
    """Opens the grid that `grid.kind` names, over `num_clients` simulated clients."""
    from server.grids import InProcessGrid, RayGrid

    if config.grid.kind == "ray":
        with RayGrid("clients.client_app:app", config.num_clients, config.grid.num_workers, use_gpu) as ray_grid:
            yield ray_grid
    else:
        from clients.client_app import app as client_app

        yield InProcessGrid(client_app, config.num_clients)


def _resolve(
    config: ExperimentConfig | str | Path | Sequence[str | Path], overrides: Sequence[str], saved: Path | None
) -> ExperimentConfig:
    if isinstance(config, ExperimentConfig):
        return parse_config(to_yaml(config), overrides)
    paths = [config] if isinstance(config, (str, Path)) else list(config)
    if saved is None:
        return load_config(paths, overrides)
    with naming(saved):
        if not saved.is_file():
            raise ConfigError(f"{saved} does not exist: there is no such run to resume. Check --name and --out.")
    try:
        found = load_config([saved])
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{saved} is damaged: {reason} Put it back as it was, or begin a new run.") from error
    if not paths and not overrides:
        return found
    method, saved_method = load_config(paths, overrides).method.name, found.method.name
    named = any(override.startswith("method.name=") for override in overrides) or paths
    if named and method != saved_method:
        raise ConfigError(f"`method.name` (={method}) differs from the run's ({saved_method}); resume it as it was.")
    return load_config([saved, *paths], overrides)


@app.command()
def run(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml ...] [key=value ...]", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders are kept.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of run --name.")] = False,
) -> None:
    """Simulate an experiment on this machine. Without arguments: FedLabel on the embedded digits."""
    configs, overrides = _split(items)
    done: list[int] = []
    with _reported(), run_progress(console) as (on_start, on_round):

        def note(round_number: int, metrics: Mapping[str, float]) -> None:
            done.append(round_number)
            on_round(round_number, metrics)

        result = run_experiment(configs, overrides, name=name, out=out, resume=resume, on_start=on_start, on_round=note)
    if not done:
        console.print("All its rounds had been done; for more of them give num_rounds=...")
    columns = {"last": "last", "best": "best", "mean_last_10": "mean of last 10"}
    if "selected_round" in result.summary:
        columns["selected"] = f"selected ({result.summary['selected_round']})"
    table = Table(Column("metric", overflow="fold"), *columns.values(), title=str(result.path))
    for key in (
        "eval/accuracy",
        "eval/auc",
        "eval/bag_mae",
        "eval/worst_client_accuracy",
        "pseudo/coverage",
        "pseudo/accuracy",
    ):
        if key in result.summary:
            values = result.summary[key]
            table.add_row(key, *(f"{values[column]:.4f}" if column in values else "" for column in columns))
    console.print(table)
    console.print(f"{result.summary['rounds']} rounds, {result.summary['seconds']:.1f} s in rounds. Look closer:")
    console.print(f"  tensorboard --logdir {result.path.parent}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="Methods x settings x seeds; see configs/sweep/.")],
    items: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder.", show_default="runs/sweeps/<file's name>")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one run each at a time.")] = 2,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be run, and run nothing; exit status 1 if a configuration is impossible (without a "
            "look at the data).",
        ),
    ] = False,
) -> None:
    """Run many experiments, or what is left of them. key=value is added to the sweep's overrides."""
    from fedlabel.sweep import load_sweep, plan_sweep
    from fedlabel.sweep_run import finished_cells, run_sweep

    given, overrides = _split(items)
    folder = out or Path("runs") / "sweeps" / Path(file).stem
    with _reported(f"The same command goes on with what is left in {folder}."):
        if given:
            raise ConfigError(f"`{given[0]}` must have the form key=value; a sweep is one file.")
        asked = load_sweep(file, overrides)
        groups = plan_sweep(asked)
        done = finished_cells(groups, folder)
        searches = len({cell.path for group in groups for cell in group.search})
        finals = len(groups) * len(asked.seeds)
        console.print(
            f"{len(asked.methods)} methods x {len(asked.sections)} settings: {searches} runs to search, {finals} final "
            f"ones ({len(asked.seeds)} seeds), {folder}" + (f", {len(done)} of them finished" if done else ""),
            soft_wrap=True,
            highlight=False,
        )
        if dry_run:
            if not _print_plan(groups, asked.seeds, done):
                raise typer.Exit(1)
            return
        with sweep_progress(console, searches + finals) as report:
            complete = run_sweep(asked, folder, workers, run_cell, report)
    console.print(f"Compare:  fedlabel compare {folder}", soft_wrap=True, highlight=False)
    if not complete:
        error_console.print(
            "Some runs failed, see above; once the cause is mended, the same command tries these again.", style="red"
        )
        raise typer.Exit(1)


def _print_plan(groups: Sequence[Group], seeds: Sequence[int], done: Collection[str]) -> bool:
    """Prints what a sweep would run, and what of it is impossible; returns whether all is possible."""
    table = Table("setting", "method", "searched", "seeds", "done", "impossible")
    reasons: dict[str, dict[str, None]] = {}
    for group in groups:
        cells = [*group.search, *(cell for cells in group.final.values() for cell in cells)]
        wrong = [cell for cell in cells if cell.error]
        for cell in wrong:
            name = " / ".join(filter(None, (cell.setting, cell.method, cell.choice)))
            reasons.setdefault(cell.error, {})[name] = None
        table.add_row(
            group.setting,
            group.method,
            ", ".join(cell.choice for cell in group.search),
            ", ".join(map(str, seeds)),
            str(sum(cell.path in done for cell in cells)),
            ", ".join(dict.fromkeys(cell.choice or "all" for cell in wrong)),
        )
    console.print(table)
    for reason, names in reasons.items():
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text = f"Impossible: {'; '.join(list(names)[:3])}{rest}: {reason}"
        error_console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
    return not reasons


def run_cell(job: tuple[ExperimentConfig, Path, bool], tell: Tell) -> None:
    """Runs one cell of a sweep in a worker (see `sweep_run.Work`), with one torch thread."""
    import torch

    torch.set_num_threads(1)
    config, path, resume = job
    run_experiment(
        config,
        name=path.name,
        out=path.parent,
        resume=resume,
        on_round=lambda round_number, metrics: tell((round_number, config.num_rounds)),
    )


@app.command()
def compare(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="A sweep's folder, or folders that hold runs at any depth.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is written.", show_default="the sweep's, else ./comparison")
    ] = None,
    by: Annotated[str, typer.Option(help="Keys (comma separated) in which runs may differ: a section each.")] = "",
    target: Annotated[
        list[float] | None, typer.Option(help="Accuracy to which rounds and bytes are counted; may be repeated.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Row that all others are tested against.")] = None,
    metric: Annotated[
        str, typer.Option(help="What rows are ranked and tested by: eval/accuracy, eval/auc or eval/balanced_accuracy.")
    ] = "eval/accuracy",
    column: Annotated[
        str, typer.Option(help="And at which round: last, mean_last_10 or selected (see evaluation.select).")
    ] = "mean_last_10",
) -> None:
    """Tables, tests, curves and a report page from finished runs."""
    from fedlabel.comparison.output import write_comparison
    from fedlabel.comparison.runs import read_comparison
    from fedlabel.sweep import SWEEP_JSON

    with _reported():
        keys = [key.strip() for key in by.split(",") if key.strip()]
        comparison = read_comparison(paths, keys, target or (), metric, column)
        folder = out or (paths[0] if (paths[0] / SWEEP_JSON).is_file() else Path("comparison"))
        written = write_comparison(comparison, folder, baseline)
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    for name, section in comparison.sections.items():
        table = Table("method", "seeds", comparison.ranked_by, "worst client", title=name)
        for row, runs in section.items():
            scores = [(comparison.score(run), run.value("eval/worst_client_accuracy")) for run in runs]
            means = [sum(values) / len(runs) for values in zip(*scores, strict=True)]
            table.add_row(row, str(len(runs)), *(f"{100 * value:.1f}" for value in means))
        console.print(table)
    console.print("Written:", *written, sep="\n  ", soft_wrap=True, highlight=False)


@app.command()
def partition(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml ...] [key=value ...]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("partition"),
) -> None:
    """Write and plot who holds what, and what is known of it, without training."""
    from fedlabel.data.supervision import KIND_NAMES
    from fedlabel.figures import partition_figure, save_png
    from fedlabel.tracking import write_atomic

    configs, overrides = _split(items)
    with _reported():
        config = load_config(configs, overrides)
        federation = open_experiment(to_yaml(config)).federation
    counts = federation.histograms()
    with _reported():
        make_folder(out)
        write_atomic(out / "partition.json", federation.to_json())
        write_atomic(out / "supervision.json", federation.audit_json())
        save_png(partition_figure(counts, KIND_NAMES, federation.dataset.class_names), out / "partition.png")
    known, unknown = counts[1:].sum(0), counts[0]
    mixed = bool(counts[2:].any())
    names = ("known", "unknown") if mixed else ("labelled", "unlabelled")
    table = Table("", *names, "classes held", f"classes {names[0]}", title="samples per client")
    held = (counts.sum(0) > 0).sum(1)
    for row, statistic in {"smallest": "min", "mean": "mean", "largest": "max"}.items():
        columns = (known.sum(1), unknown.sum(1), held, (known > 0).sum(1))
        table.add_row(row, *(f"{getattr(column, statistic)():.4g}" for column in columns))
    console.print(table)
    if mixed:
        console.print(_kinds_table(federation.kinds(), KIND_NAMES))
    if len(federation.server_rows):
        console.print(f"The server holds {len(federation.server_rows)} labelled samples.", highlight=False)
    written = ", ".join(str(out / name) for name in ("partition.json", "partition.png", "supervision.json"))
    console.print(f"{len(federation.parts)} clients. Written: {written}", soft_wrap=True, highlight=False)


def _kinds_table(kinds: np.ndarray, names: Sequence[str]) -> Table:
    """Returns a table of how many samples of each kind of label every client has, or how many clients in short.

    Args:
        kinds: (clients, names); kinds that no client has are left out.
        names: of the kinds.
    """
    used = np.flatnonzero(kinds.any(0)).tolist()
    counts = kinds[:, used]
    table = Table("client", *(names[kind] for kind in used), title="kinds of label per client")
    if len(kinds) <= MAX_CLIENT_ROWS:
        for client, row in enumerate(counts.tolist()):
            table.add_row(str(client), *map(str, row))
        return table
    table.columns[0].header = ""
    for name, values in {"smallest": counts.min(0), "mean": counts.mean(0), "largest": counts.max(0)}.items():
        table.add_row(name, *(f"{value:.4g}" for value in values))
    return table


@app.command("list")
def list_all() -> None:
    """List methods, data sets, models and strategies."""
    from fedlabel.data.datasets import DATASETS
    from fedlabel.methods import METHODS
    from fedlabel.models import MODELS
    from server.strategy import strategy_names

    sections: dict[str, dict[str, str]] = {
        "method.name": {name: method.description for name, method in METHODS.items()},
        "data.name": {name: entry.description for name, entry in DATASETS.items()},
        "model.name": {name: entry.description for name, entry in MODELS.items()},
        "strategy.name": {"weighted_mean": "weighted mean of the clients' models (default)"}
        | dict.fromkeys(strategy_names()[1:], "Flower's"),
    }
    for key, rows in sections.items():
        table = Table(Column(key, no_wrap=True, min_width=max(map(len, rows))), "what")
        for name, description in rows.items():
            table.add_row(name, description)
        console.print(table)


@app.command()
def doctor() -> None:
    """Show versions, devices, memory and what a run would use."""
    table = Table("what", "value")
    device = resolve_device("auto")
    for key, value in {**versions(), "commit": source_commit(), **describe_hardware(device)}.items():
        table.add_row(key, str(value))
    table.add_row("device=auto gives", str(device))
    table.add_row("grid.num_workers (default)", str(ExperimentConfig().grid.num_workers))
    console.print(table)


def _split(items: list[str] | None) -> tuple[list[str], list[str]]:
    """Separates configuration files from key=value overrides."""
    given = items or []
    return [item for item in given if "=" not in item], [item for item in given if "=" in item]


@contextmanager
def _reported(again: str = "`--resume --name NAME` goes on from the last checkpoint.") -> Iterator[None]:
    """Turns a user's error into one message and exit status 2, a failed run into status 1; `again`: after Ctrl-C."""
    try:
        yield
    except ValueError as error:
        error_console.print(f"Error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from error
    except OSError as error:
        if error.filename is None and error.errno not in FULL:  # a bug: show where
            raise
        text = f"Error: {file_error(error)}"
        error_console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from error
    except RunError as error:
        error_console.print(f"Stopped: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        error_console.print(f"Interrupted. {again}", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from error


def main() -> None:
    """Entry point of the `fedlabel` command."""
    claim_packages()
    add_working_directory()  # a method of the user's own: method.name=my_module:MyMethod
    app()
