"""The command line: parses options, prints tables and messages."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlabel.cli.progress import OutputClosed, make_console, make_table, run_progress, say, sweep_progress
from fedlabel.config_text import ConfigError
from fedlabel.errors import FULL, RunError, check_folder, file_error, is_file, make_folder
from fedlabel.importing import add_working_directory, claim_packages
from fedlabel.names import LONGEST_CLIENT_NAME, counted
from fedlabel.shown import shown

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from fedlabel.config import ExperimentConfig
    from fedlabel.data.federation import Federation
    from fedlabel.data.labels.labeling_functions import FunctionReport
    from fedlabel.experiment import Experiment
    from fedlabel.study.sweep import Group
    from fedlabel.study.workers import Tell
    from server.simulation import RunResult

DEFAULT_OUT = Path("runs")
REPORT_HTML = "report.html"
MAX_CLIENT_ROWS = 20
"""A table has a row per client up to so many."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would print local variables: labels and rows of samples
)
data_app = typer.Typer(no_args_is_help=True)
app.add_typer(data_app, name="data", help="Folders of real nodes: check one, and make the schema of a federation.")
console, error_console = make_console(), make_console(stderr=True)


def _simulate() -> Callable[..., RunResult]:
    claim_packages()
    from server.simulation import simulate

    return simulate


def _print_version(asked: bool) -> None:
    if asked:
        say(console, f"fedlabel {importlib.metadata.version('fedlabel')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated learning with few, imprecise or noisy labels."""


@app.command()
def run(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml ...] [key=value ...]", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders are kept.")] = DEFAULT_OUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of run --name.")] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Measure where a round's time goes (grid.profile=true): a table at the end, system/seconds_* in the "
            "metrics, and trace.json in the run's folder, which https://ui.perfetto.dev opens. It makes a run on a GPU "
            "slower, as each part waits for the device.",
        ),
    ] = False,
) -> None:
    """Simulate an experiment on this machine. Without arguments: FedLabel on the embedded digits."""
    from fedlabel.cli.closing import against_labels_only, next_commands, results_table
    from fedlabel.cli.opening import opening
    from fedlabel.cli.profile import profile_tables
    from fedlabel.record.names import CONFIG_YAML, TRACE_JSON

    configs, overrides = _split(items)
    overrides += ["grid.profile=true"] * profile
    done: list[int] = []
    begun: list[Path] = []
    experiments: list[Experiment] = []

    def how_to_go_on() -> str:
        if not begun or not (begun[0] / CONFIG_YAML).is_file():
            return "Nothing had begun."
        elsewhere = "" if out == DEFAULT_OUT else f" --out {shlex.quote(str(out))}"
        return (
            f"`fedlabel run --resume --name {shlex.quote(begun[0].name)}{elsewhere}` goes on from the last checkpoint."
        )

    with _reported(how_to_go_on), run_progress(console) as (on_start, on_round):

        def begin(experiment: Experiment, path: Path) -> None:
            begun.append(path)
            experiments.append(experiment)
            for line in (*opening(experiment), f"run      {path}", ""):
                say(console, line)
            on_start(experiment)

        def note(round_number: int, metrics: Mapping[str, float]) -> None:
            done.append(round_number)
            on_round(round_number, metrics)

        result = _simulate()(configs, overrides, name=name, out=out, resume=resume, on_start=begin, on_round=note)
    if not done:
        rounds = counted(result.summary["rounds"], "round")
        say(console, f"This run was finished before ({rounds}), so nothing was done. For more give num_rounds=...")
    console.print(results_table(result.summary, str(result.path)))
    rows = [row for row in result.metrics if row["round"] in done]
    for profile_table in profile_tables(rows, experiments[0].config.cohort_size):
        console.print(profile_table)
    lines, bound = against_labels_only(result.path, result.summary, experiments[0], items or [], out)
    for line in [*lines, "Next:", *next_commands(result.path, experiments[0].config, bound)]:
        say(console, line)
    if experiments[0].config.grid.profile and done:
        say(console, f"  https://ui.perfetto.dev, with {result.path / TRACE_JSON}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one without such files.")],
) -> None:
    """Write a small project of your own: a configuration, a method, labelling functions, and the commands to run."""
    from fedlabel.cli.init import make_project

    with _reported():
        written = make_project(folder)
    say(console, "\n  ".join(["Written:", *map(str, written)]))
    say(console, f"Train it:  cd {shlex.quote(str(folder))} && fedlabel run config.yaml")


@app.command()
def watch(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/NAME.")],
    once: Annotated[bool, typer.Option("--once", help="Print one picture of it and exit.")] = False,
) -> None:
    """See a run in the terminal: curve, clients, stage, time left, failures; while it runs or after its end."""
    from fedlabel.cli.watch import watch as show

    with _reported():
        show(path, console, once)


@app.command()
def tensorboard(
    runs: Annotated[
        Path, typer.Argument(metavar="[RUNS]", help="A run's folder, or one that holds runs.")
    ] = DEFAULT_OUT,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of this machine; if taken, another one.")] = 6006,
) -> None:
    """Start TensorBoard on runs and print its address; Ctrl-C ends it."""
    from fedlabel.cli.tensorboard import open_tensorboard

    with _reported():
        url, note = open_tensorboard(runs, port)
    if note:
        say(console, note, "yellow")
    say(console, f"TensorBoard shows {runs} at {url}  (Ctrl-C ends it)")
    say(
        console,
        "Over ssh: forward the port, e.g. ssh -L 6006:localhost:" + f"{url.rstrip('/').rpartition(':')[2]} HOST",
    )
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


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
    """Run the experiments of a sweep that are not finished. key=value is added to the sweep's overrides."""
    from fedlabel.study.sweep import load_sweep, plan_sweep
    from fedlabel.study.sweep_run import finished_cells, run_sweep

    given, overrides = _split(items)
    folder = out or Path("runs") / "sweeps" / Path(file).stem
    with _reported(lambda: f"The same command goes on with what is left in {folder}."):
        if given:
            raise ConfigError(f"`{given[0]}` must have the form key=value; a sweep is one file.")
        asked = load_sweep(file, overrides)
        groups = plan_sweep(asked)
        done = finished_cells(groups, folder)
        searches = len({cell.path for group in groups for cell in group.search})
        finals = len(groups) * len(asked.seeds)
        rows = f"{counted(len(asked.methods), 'method')} x {counted(len(asked.sections), 'setting')}"
        runs = f"{counted(searches, 'run')} to search, {finals} final ({counted(len(asked.seeds), 'seed')})"
        if not dry_run:
            check_folder(folder)
        say(console, f"{rows}: {runs}, {folder}" + (f", {len(done)} of them finished" if done else ""))
        if dry_run:
            if not _print_plan(groups, asked.seeds, done):
                raise typer.Exit(1)
            return
        with sweep_progress(console, searches + finals) as report:
            complete = run_sweep(asked, folder, workers, run_cell, report)
    say(console, f"Compare:  fedlabel compare {folder}")
    if not complete:
        text = "Some runs failed, see above; once the cause is mended, the same command tries these again."
        say(error_console, text, "red")
        raise typer.Exit(1)


def _print_plan(groups: Sequence[Group], seeds: Sequence[int], done: Collection[str]) -> bool:
    """Prints the planned runs and the impossible configurations; returns whether all are possible."""
    table = make_table("setting", "method", "searched", "seeds", "done", "impossible")
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
        say(error_console, text, "red")
    return not reasons


def run_cell(job: tuple[ExperimentConfig, Path, bool], tell: Tell) -> None:
    """Runs one cell of a sweep in a worker (see `sweep_run.Work`), with one torch thread."""
    import torch

    torch.set_num_threads(1)
    config, path, resume = job
    _simulate()(
        config,
        name=path.name,
        out=path.parent,
        resume=resume,
        on_round=lambda round_number, metrics: tell((round_number, config.num_rounds)),
    )


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Of the folds' trainings only.", show_default=False),
    ] = None,
    folds: Annotated[int, typer.Option(help="Trainings, each without one fold of every client's labels.")] = 4,
    method: Annotated[
        str,
        typer.Option(help="confident, prune_by_class, prune_by_noise_rate, both (of the two), or prototypes."),
    ] = "confident",
    out: Annotated[Path | None, typer.Option(help="Folder for what is written.", show_default="RUN/audit")] = None,
    then: Annotated[
        str | None,
        typer.Option(
            help="Train RUN's configuration again, into RUN-ACTION, with the suspects' labels changed: drop, relabel, "
            "weight or candidates (see supervision.audit_action)."
        ),
    ] = None,
) -> None:
    """Find labels that are probably wrong, by models trained without them; each client's suspects go to its own file.

    The folds are trained by method supervised and otherwise as RUN was; key=value changes that.
    """
    from fedlabel.cli.audit import audit_run

    given, overrides = _split(items)
    with _reported(lambda: "The same command goes on from the last checkpoint."):
        if given:
            raise ConfigError(f"`{given[0]}` must have the form key=value; an audit is of one run.")
        audit_run(console, _simulate(), run, overrides, out or run / "audit", folds, method, then)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
) -> None:
    """Write the model of a run: weights, a torch.export program that normalises its inputs itself, and card.json."""
    with _reported():
        claim_packages()
        from fedlabel.cli.predict import export_run

        export_run(console, run, out)


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of `fedlabel export`.")],
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="INPUTS",
            help="Folder of images, .npz file with an array x, or CSV or Parquet table with the columns of the data.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="CSV file for what is written.")] = Path("predictions.csv"),
    program: Annotated[
        bool,
        typer.Option(
            "--program",
            help="Of an exported folder run the torch.export program, as a model of somebody's own code needs it. It "
            "can hold code: only of somebody whom you trust.",
        ),
    ] = False,
) -> None:
    """Write class and probabilities of each input as CSV, by the model of a run or of an exported folder."""
    with _reported():
        claim_packages()
        from fedlabel.cli.predict import predict_inputs

        predict_inputs(console, source, inputs, out, program)


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
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Row that all others are tested against; choose it before you look.",
            show_default="the sweep's compare.baseline, else the first that trains on the labels alone",
        ),
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Test every row against every other one, corrected for that many tests.")
    ] = False,
    metric: Annotated[
        str, typer.Option(help="What rows are ranked and tested by: eval/accuracy, eval/auc or eval/balanced_accuracy.")
    ] = "eval/accuracy",
    column: Annotated[
        str, typer.Option(help="And at which round: last, mean_last_tenth or selected (see evaluation.select).")
    ] = "mean_last_tenth",
    against: Annotated[
        str | None,
        typer.Option(
            help="What curves are drawn over: round, virtual_seconds (of simulated devices) or bytes_up.",
            show_default="the sweep's compare.against, else round",
        ),
    ] = None,
) -> None:
    """Tables, tests, curves and a report page from finished runs."""
    from fedlabel.study.output import overview, write_comparison
    from fedlabel.study.runs import read_comparison
    from fedlabel.study.sweep import SWEEP_JSON, CompareConfig

    with _reported():
        keys = [key.strip() for key in by.split(",") if key.strip()]
        if all_pairs and baseline is not None:
            raise ConfigError(f"`--baseline` (={baseline}) has no meaning with --all-pairs: give one of them.")
        compare = CompareConfig(baseline, all_pairs) if all_pairs or baseline is not None else None
        comparison = read_comparison(paths, keys, target or (), metric, column, compare, against)
        folder = out or (paths[0] if (paths[0] / SWEEP_JSON).is_file() else Path("comparison"))
        written = write_comparison(comparison, folder)
    for warning in comparison.warnings:
        say(console, f"warning: {warning}", "yellow")
    for name in comparison.sections:
        heads, rows = overview(comparison, name)
        table = make_table(*heads, title=name)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    say(console, "\n  ".join(map(str, ["Written:", *written])))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs: several stand side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="The file.", show_default="RUN/report.html; of several runs ./report.html")
    ] = None,
) -> None:
    """One HTML page of a run, to read and to send around: what was run, labels, curves, clients, samples, warnings.

    It needs no network, and works for runs that have finished, that still run, and that were killed.
    """
    from fedlabel.study.report_page import write_report

    file = out or (runs[0] / REPORT_HTML if len(runs) == 1 else Path(REPORT_HTML))
    with _reported():
        write_report(runs, file)
    say(console, f"Written: {file}")


@app.command()
def partition(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml ...] [key=value ...]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("partition"),
    export: Annotated[
        Path | None,
        typer.Option(
            help="New folder for a folder of each client, as a real node has it (docs/data.md), their schema, and a "
            "configuration with which `flwr run` does with them what `fedlabel run` simulates.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="With --export: clients share the test set, each to evaluate on (evaluation.at=nodes)."
        ),
    ] = False,
) -> None:
    """Write and plot each client's samples and labels, without training."""
    from fedlabel.cli.data import export_experiment
    from fedlabel.data.federation import shown_clients
    from fedlabel.data.labels.supervision import KIND_NAMES
    from fedlabel.record.figures import partition_figure, save_png
    from fedlabel.record.files import write_atomic

    configs, overrides = _split(items)
    with _reported():
        from fedlabel.config import load_config, to_yaml
        from fedlabel.experiment import open_experiment, open_federation

        if held_out and export is None:
            raise ConfigError("`--held-out` is for --export: give a folder to write to.")
        config = load_config(configs, overrides)
        federation = open_federation(config, config.evaluation.split)
        if export is not None:  # which a run of nodes is to start from, so that all of it must fit the data
            export_experiment(open_experiment(to_yaml(config)), export, held_out)
            say(console, f"Folders of {counted(len(federation.parts), 'node')}, and how to start them: {export}")
    drawn = shown_clients(len(federation.parts))
    with _reported():
        make_folder(out)
        write_atomic(out / "partition.json", federation.to_json())
        write_atomic(out / "supervision.json", federation.audit_json())
        histograms, names = federation.histograms(drawn), federation.true_classes
        labels = federation.client_labels(drawn)
        figure = partition_figure(histograms, KIND_NAMES, names, drawn, len(federation.parts), labels)
        save_png(figure, out / "partition.png")
    kind = federation.record.kind.numpy()
    supervised, unsupervised = federation.class_counts(kind > 0), federation.class_counts(kind == 0)
    kinds = federation.kinds()
    mixed = bool(kinds[:, 2:].any())
    columns = ("supervised", "unsupervised") if mixed else ("labelled", "unlabelled")
    table = make_table("", *columns, "classes held", f"classes {columns[0]}", title="samples per client")
    classes = federation.dataset.num_classes
    held, classes_supervised = ((each[:, :classes] > 0).sum(1) for each in (supervised + unsupervised, supervised))
    for row, statistic in {"smallest": "min", "mean": "mean", "largest": "max"}.items():
        values = (supervised.sum(1), unsupervised.sum(1), held, classes_supervised)
        table.add_row(row, *(f"{getattr(value, statistic)():.4g}" for value in values))
    console.print(table)
    if len(federation.parts) <= MAX_CLIENT_ROWS:
        console.print(_clients_table(federation))
    if mixed:
        console.print(_kinds_table(kinds, KIND_NAMES))
    if federation.functions:
        console.print(_functions_table(federation.functions))
    for note in (*federation.dataset.notes, *federation.warnings()):
        say(console, f"note: {note}", "yellow")
    if len(federation.server_rows):
        say(console, f"The server holds {counted(len(federation.server_rows), 'labelled sample')}.")
    written = ", ".join(str(out / name) for name in ("partition.json", "partition.png", "supervision.json"))
    say(console, f"{counted(len(federation.parts), 'client')}. Written: {written}")


def _clients_table(federation: Federation) -> Table:
    """Returns a table with each client's name, if it has one, samples and how many of them have supervision."""
    columns = ("samples", "labelled") if not federation.kinds()[:, 2:].any() else ("samples", "supervised")
    table = make_table("client", *(["name"] if federation.names else []), *columns, title="clients")
    sizes, labelled = federation.parts.lengths, federation.parts.sums(federation.labeled[federation.parts.rows])
    for client, counts in enumerate(zip(sizes.tolist(), labelled.tolist(), strict=True)):
        name = [shown(federation.names[client], LONGEST_CLIENT_NAME)] if federation.names else []
        table.add_row(str(client), *name, *map(str, counts))
    return table


def _kinds_table(kinds: np.ndarray, names: Sequence[str]) -> Table:
    """Returns a table with the number of samples per kind of label, for each client or, with many clients, summarised.

    Args:
        kinds: (clients, names); kinds that no client has are left out.
        names: of the kinds.
    """
    used = [place for place in range(kinds.shape[1]) if kinds[:, place].any()]
    counts = kinds[:, used]
    table = make_table("client", *(names[kind] for kind in used), title="kinds of label per client")
    if len(kinds) <= MAX_CLIENT_ROWS:
        for client, row in enumerate(counts.tolist()):
            table.add_row(str(client), *map(str, row))
        return table
    table.columns[0].header = ""
    for name, values in {"smallest": counts.min(0), "mean": counts.mean(0), "largest": counts.max(0)}.items():
        table.add_row(name, *(f"{value:.4g}" for value in values))
    return table


def _functions_table(reports: Sequence[FunctionReport]) -> Table:
    """Returns a table of how the labelling functions answered: votes, abstentions, failures."""
    table = make_table(
        "function", "samples", "votes", "abstains", "fails", "no class", "s / 1,000", title="labelling functions"
    )
    for report in reports:
        counts = (report.asked, report.votes, report.abstained, report.failed, report.invalid)
        table.add_row(report.name, *map(str, counts), f"{report.seconds_per_1000:.3g}")
    return table


@data_app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    schema: Annotated[
        Path | None, typer.Option(help="The federation's schema.", show_default="made of this folder alone")
    ] = None,
) -> None:
    """Check a node's folder and print its label card; exit status 2 and all defects, by file and row, if it has any."""
    from fedlabel.cli.data import card_tables, schema_of

    with _reported():
        from fedlabel.data.nodes.folder import read_node_folder
        from fedlabel.data.nodes.schema import load_schema

        agreed = schema_of([folder], "", "", False) if schema is None else load_schema(schema)
        data = read_node_folder(folder, agreed)
    for table in card_tables(data, agreed):
        console.print(table)
    say(console, f"{folder}: {counted(len(data.inputs), 'training sample')}, no defects.")


@data_app.command()
def votes(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    module: Annotated[str, typer.Argument(help="Labelling functions: a .py file, or a module that Python finds.")],
    classes: Annotated[str, typer.Option(help="Names of all classes (comma separated).", show_default=False)] = "",
    schema: Annotated[Path | None, typer.Option(help="Or the federation's schema, which names them.")] = None,
) -> None:
    """Apply labelling functions of your own to a node's folder, and write votes.csv: runs read votes, never code."""
    from fedlabel.cli.data import names_in

    with _reported():
        from fedlabel.config_text import ConfigError
        from fedlabel.data.nodes.schema import load_schema
        from fedlabel.data.nodes.votes import write_votes

        if bool(classes) == (schema is not None):
            raise ConfigError("give the names of the classes: either --classes a,b,c or --schema schema.yaml.")
        names = names_in(classes) if schema is None else list(load_schema(schema).classes)
        reports = write_votes(folder, module, names)
    console.print(_functions_table(reports))
    for report in reports:
        if warning := report.warning():
            say(console, f"note: {warning}", "yellow")
    say(console, f"Written: {folder / 'votes.csv'}")


@data_app.command()
def statistics(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    out: Annotated[Path, typer.Option(help="File for what is written.")] = Path("statistics.json"),
    categorical: Annotated[
        str, typer.Option(help="Columns of a table (comma separated) that hold categories, even if these are numbers.")
    ] = "",
    min_count: Annotated[
        int, typer.Option(min=1, help="Leave out sums of fewer cells, and names of classes or categories in fewer.")
    ] = 1,
) -> None:
    """Write the sums over a node's folder from which `fedlabel data schema` makes the federation's schema."""
    from fedlabel.cli.data import names_in
    from fedlabel.record.files import write_atomic

    with _reported():
        from fedlabel.data.nodes.statistics import folder_statistics

        write_atomic(out, folder_statistics(folder, names_in(categorical), min_count).to_json())
    say(console, f"Counts, sums and names of {folder}, and no row of it: {out}. Look into it before you send it.")


@data_app.command("schema")
def make_data_schema(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Folders of nodes, or files of `fedlabel data statistics`.")
    ],
    out: Annotated[Path, typer.Option(help="File for what is written.")] = Path("schema.yaml"),
    classes: Annotated[
        str, typer.Option(help="Names of all classes (comma separated), in order.", show_default="those that occur")
    ] = "",
    categorical: Annotated[
        str, typer.Option(help="Columns of a table (comma separated) that hold categories, even if these are numbers.")
    ] = "",
    flip: Annotated[bool, typer.Option("--flip", help="A mirrored image still shows its class.")] = False,
) -> None:
    """Make the schema of a federation: class names, inputs, normalisation, annotators and labelling functions."""
    from fedlabel.cli.data import schema_of
    from fedlabel.data.sets.names import alike
    from fedlabel.record.files import write_atomic

    with _reported():
        schema = schema_of(paths, classes, categorical, flip)
        write_atomic(out, schema.text)
    for group in alike(schema.classes):
        say(console, f"note: the classes {' and '.join(f'`{name}`' for name in group)} look the same.", "yellow")
    say(console, f"{len(schema.classes)} classes: {', '.join(schema.classes[:20])}. Written: {out}")


@app.command("list")
def list_all(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[METHOD|SECTION]", help="Show its keys, with defaults.", show_default=False),
    ] = None,
) -> None:
    """List the available choices, or the keys of a method or of a section such as training."""
    from fedlabel.cli.listing import SECTIONS, about, choices
    from server.strategy import strategy_names

    if name is not None:
        with _reported():
            for line in about(name, min(console.width, 120), strategy_names()):
                say(console, line)
        return
    for key, rows in choices(strategy_names()).items():
        table = make_table(key, "what")
        for row, description in rows.items():
            table.add_row(row, description)
        console.print(table)
    say(console, f"The keys of a method, or of a section: fedlabel list NAME. Sections: {', '.join(SECTIONS)}.")


@app.command()
def doctor() -> None:
    """Show versions, devices, memory and the device that a run would use."""
    from fedlabel.hardware import describe_hardware, resolve_device, source_commit, usable_cores, versions

    table = make_table("what", "value")
    device = resolve_device("auto")
    for key, value in {**versions(), "commit": source_commit(), **describe_hardware(device)}.items():
        table.add_row(key, str(value))
    table.add_row("device=auto gives", str(device))
    table.add_row("grid.num_workers (default)", str(1 if device.type == "cuda" else usable_cores()))
    console.print(table)


def _split(items: list[str] | None) -> tuple[list[str], list[str]]:
    """Separates configuration files from key=value overrides."""
    given = items or []
    files = {item for item in given if "=" not in item or is_file(item)}
    return [item for item in given if item in files], [item for item in given if item not in files]


@contextmanager
def _reported(again: Callable[[], str] = str) -> Iterator[None]:
    """Turns a user's error into one message and status 2, a failed run into status 1; `again`: the hint after Ctrl-C,
    or where a pipe that reads the output was closed.
    """
    try:
        yield
    except ValueError as error:
        say(error_console, f"Error: {error}", "red")
        raise typer.Exit(2) from error
    except OSError as error:
        if error.filename is None and error.errno not in FULL:  # a bug: show where
            raise
        text = f"Error: {file_error(error)}"
        say(error_console, text, "red")
        raise typer.Exit(2) from error
    except RunError as error:
        say(error_console, f"Stopped: {error}", "red")
        raise typer.Exit(1) from error
    except OutputClosed as error:
        say(error_console, f"Stopped: nobody reads the output any more (a pipe that was closed). {again()}".rstrip())
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        say(error_console, f"Interrupted. {again()}".rstrip())
        raise typer.Exit(130) from error


def main() -> None:
    """Entry point of the `fedlabel` command."""
    claim_packages()
    add_working_directory()  # a method of the user's own: method.name=my_module:MyMethod
    try:
        app()
    except OutputClosed:  # by `| head`, say, of a table
        sys.exit(1)
