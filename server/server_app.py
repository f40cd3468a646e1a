"""The server: a run from configuration to summary, and the Flower app for `flwr run`.

The loop (`rounds.py`) is ours because Flower's `Strategy.start` can neither start at a later round nor save between
rounds; messages and aggregation are Flower's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlabel.config import ConfigError, ExperimentConfig, flatten, split_overrides, to_yaml
from fedlabel.data.federation import shown_clients
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.nodes.federation import saved_holdings, server_federation
from fedlabel.data.nodes.schema import load_schema
from fedlabel.data.sets.config import NODES
from fedlabel.errors import RunError, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.hardware import source_commit
from fedlabel.learning.task import label_warnings
from fedlabel.models.pretrained import weights_hash
from fedlabel.prediction.card import Card
from fedlabel.record.files import write_atomic
from fedlabel.record.json_files import as_json, read_metrics, read_summary
from fedlabel.record.layout import HOW_TO_READ
from fedlabel.record.names import CARD_JSON, CHECKPOINTS, CONFIG_YAML, PARTITION_JSON
from fedlabel.record.run_folder import RunFolder
from server.checkpoint import latest_checkpoint
from server.grids.base import ClientGrid
from server.grids.flower import FlowerGrid
from server.observers.functions import markdown
from server.request import check_name, default_name, resolve
from server.rounds import run_rounds
from server.server import Ended, OnRound, Server
from server.state import ServerState
from server.strategy import build_strategy, check_cohort
from server.summary import OF_THE_PROCESS, summary

app = ServerApp()
logger = logging.getLogger("fedlabel")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs an experiment on the grid Flower gives; see `[tool.flwr.app.config]` in pyproject.toml for its
    configuration.
    """
    logger.setLevel(logging.INFO)  # `flwr run --stream` and `flwr log` show what is written to stderr
    logger.addHandler(logging.StreamHandler())
    try:
        path = _run_here(grid, context)
    except Exception as error:
        # Flower logs what is raised, and its own exit status does not tell: the last line of the log has to.
        expected = isinstance(error, (ValueError, RunError))
        reason = str(error).partition("\n")[0] if expected else repr(error)
        failed = RunError(f"fedlabel: the run FAILED (whatever the exit status of flwr run): {reason}")
        raise failed from (None if expected else error)  # a bug: show where
    logger.info("fedlabel: the run is finished. Results are in %s", path)


def _run_here(grid: Grid, context: Context) -> Path:
    asked = context.run_config
    configs = [path.strip() for path in str(asked.get("configs", "")).split(",") if path.strip()]
    name, resume = str(asked.get("name", "")) or None, asked.get("resume", False)
    if type(resume) is not bool:
        raise ConfigError(f"`resume` (={resume}) must be true or false.")
    check_name(name, resume, option="")
    saved = Path("runs") / name / CONFIG_YAML if resume and name else None
    config = resolve(configs, split_overrides(str(asked.get("overrides", ""))), saved)
    path = (Path("runs") / (name or default_name(config))).absolute()
    if not resume and path.exists():
        raise ConfigError(f"{path} exists: give another name, or resume=true to go on with it.")
    logger.info("Results go to %s", path)  # below the directory where the SuperLink was started
    run_federation(config, FlowerGrid(grid), path, resume, on_round=_log_line)
    return path


def run_federation(
    config: ExperimentConfig,
    grid: ClientGrid,
    path: Path,
    resume: bool = False,
    on_round: OnRound = lambda round_number, metrics: None,
) -> dict[str, object]:
    """Runs an experiment, or its remaining rounds, and returns the content of `summary.json`; {} if `on_round` ended it
    early, as if it had been interrupted.

    Args:
        config: the resolved configuration.
        grid: carries the rounds to clients, simulated or real.
        path: the run's folder; made only when configuration, data, checkpoint and nodes are found sound.
        resume: go on from the newest checkpoint in `path`.
        on_round: called after every round with its metrics; False ends the run.

    Raises:
        ValueError: the configuration, the data, the checkpoint or the folder is not as needed.
        RunError: too few nodes, nodes with other code, or a round in which every client failed.
    """
    strategy = build_strategy(config.strategy)
    check_cohort(config.strategy, config.cohort_size)
    commit = source_commit()  # now: files may change while the run goes on
    if config.devices.kind != "none" and not grid.simulated:
        raise ConfigError(
            f"`devices.kind` (={config.devices.kind}) simulates devices, and these clients are real: set "
            "devices.kind=none."
        )
    if config.attack.kind != "none" and not grid.simulated:
        raise ConfigError(
            f"`attack.kind` (={config.attack.kind}) makes simulated clients attack, and these are real: set "
            "attack.kind=none and attack.share=0."
        )
    experiment = open_on(grid, config, path / PARTITION_JSON if resume else None)
    torch.set_num_threads(config.grid.threads_per_worker)
    federation = experiment.federation
    notes = federation.dataset.notes
    names = federation.dataset.class_names
    labels = label_warnings(config.method.name, experiment.recipe, experiment.labels, names)
    for warning in [*notes, *federation.warnings(), *labels, *experiment.notes]:
        logger.warning(warning)
    for report in federation.functions:
        logger.info(
            "Labelling function %s: %d votes and %d abstentions on %d samples, %d failures, %d answers of no class, "
            "%.3g s per 1,000 samples",
            *(report.name, report.votes, report.abstained, report.asked, report.failed, report.invalid),
            report.seconds_per_1000,
        )
    _ = experiment.devices  # a trace that cannot be read is refused before anything is written
    state = ServerState(0, experiment.initial_state, to_yaml(config), shared=experiment.recipe.shared.start())
    if resume:
        found = latest_checkpoint(path / CHECKPOINTS, experiment, strategy)
        state = replace(found, shared={**state.shared, **found.shared})
        finished = _finished(experiment, path, state)
        if finished is not None:
            return finished
    state = state.to(experiment.device)
    grid.connect(experiment)
    with closing(open_folder(experiment, path, state.round_number if resume else None)) as folder:
        try:
            run_rounds(Server(experiment, grid, folder, state, on_round), state)
        except Ended:
            return {}
        result = summary(folder.read_metrics(), experiment, commit)
        folder.write_summary(result)
        return result


def open_on(grid: ClientGrid, config: ExperimentConfig, saved: Path | None = None) -> Experiment:
    """Returns the experiment of a configuration; real nodes with data of their own are asked what they hold.

    Args:
        grid: carries the rounds to clients.
        config: the configuration.
        saved: the partition.json of the run that is resumed; None: it begins.
    """
    if config.data.name != NODES:
        return open_experiment(to_yaml(config))
    if config.data.schema is None:
        raise ConfigError(
            "`data.schema` (=None) must name the file with the schema of the nodes' data; `fedlabel data schema` makes "
            "it (see docs/data.md)."
        )
    if config.evaluation.at == "server" and config.data.test is None:
        raise ConfigError(
            "`evaluation.at` (=server) needs a labelled folder of the server's own: set data.test to it, or "
            "evaluation.at=nodes (on what nodes hold out) or none."
        )
    if config.evaluation.at != "server" and config.data.test is not None:
        raise ConfigError(
            f"`data.test` (={config.data.test}) is used with evaluation.at=server, and that is {config.evaluation.at}: "
            "leave one of them out."
        )
    schema, test = load_schema(Path(config.data.schema)), config.data.test
    known = saved_holdings(saved, schema) if saved is not None and saved.exists() else ()
    holdings = grid.holdings(config, known if len(known) == config.num_clients else ())
    return Experiment(config, server_federation(schema, holdings, None if test is None else Path(test)))


def _finished(experiment: Experiment, path: Path, state: ServerState) -> dict[str, object] | None:
    """Returns the content of `summary.json` of a run without remaining rounds; None if something is to be done or
    repaired.
    """
    if state.round_number < experiment.config.num_rounds:
        return None
    try:
        saved, rows = read_summary(path), read_metrics(path)
        same_keys = (path / CONFIG_YAML).read_text() == _saved_text(experiment.config)
    except (OSError, ValueError, RecursionError):
        return None
    made = as_json(summary(rows, experiment, ""))
    if not same_keys or any(saved.get(key) != value for key, value in made.items() if key not in OF_THE_PROCESS):
        return None
    _check_same_data(path / PARTITION_JSON, experiment)
    return saved


def open_folder(experiment: Experiment, path: Path, done: int | None) -> RunFolder:
    """Creates the folder of a new run, or opens that of a resumed one after its completed rounds; None: a new one."""
    text, config = _saved_text(experiment.config), experiment.config
    events, own = config.tracking.level != "off", config.method.metrics
    if done is not None:
        if done > 0:
            _check_same_data(path / PARTITION_JSON, experiment)
        folder = RunFolder.resume(path, done, events, own)
    else:
        folder = RunFolder.create(path, text, flatten(config), events, own)
    with folder.closed_on_error():
        if done is not None:
            write_atomic(folder.config_yaml, text)  # keys that may change, such as num_rounds
            with naming(folder.summary_json):
                folder.summary_json.unlink(missing_ok=True)  # it told of a shorter run
        if len(experiment.recipe.stages) > 1:
            write_atomic(folder.stages_json, json.dumps(_stages(experiment)) + "\n")
        write_atomic(folder.path / CARD_JSON, Card.of(experiment.federation, experiment.labels).text)
        if not done:
            _describe(experiment, folder)
    return folder


def _saved_text(config: ExperimentConfig) -> str:
    """Returns the text of config.yaml, without `grid.profile`: whether somebody looked at the clock is no part of an
    experiment, and who resumes the run would not expect to.
    """
    return to_yaml(replace(config, grid=replace(config.grid, profile=False)))


def _describe(experiment: Experiment, folder: RunFolder) -> None:
    """Writes the initial records of a run: partition, labels and configuration."""
    federation = experiment.federation
    shown, clients = shown_clients(experiment.config.num_clients), experiment.config.num_clients
    if len(shown) < clients:
        some = ", ".join(map(str, shown[:3].tolist()))
        text = (
            f"Lists with a number per client, here and in metrics.jsonl, and the figure of the partition show "
            f"{len(shown):,} of {clients:,} clients, evenly spaced ({some}, ..., {shown[-1]}); lists of pseudo-labels "
            "show clients that trained in the round, in their order. Metrics are of all clients."
        )
        folder.log_text("clients", text)
    write_atomic(folder.partition_json, federation.to_json(_file_hashes(experiment)))
    write_atomic(folder.supervision_json, federation.audit_json())
    if experiment.config.draws_figures:
        from fedlabel.record.figures import partition_figure, save_png  # here: matplotlib takes a while to import

        histograms = federation.histograms(shown)
        labels = federation.client_labels(shown)
        figure = partition_figure(histograms, KIND_NAMES, federation.true_classes, shown, clients, labels)
        save_png(figure, folder.partition_png)
        folder.log_figure("partition", figure)
    folder.log_text("config", f"```yaml\n{to_yaml(experiment.config)}```")
    folder.log_text("about/label_card", _label_card(experiment))
    for page, text in HOW_TO_READ.items():
        folder.log_text(f"about/how_to_read_{page.lower()}", text)


def _stages(experiment: Experiment) -> list[dict[str, object]]:
    """Returns name, first and last round of each stage that the run comes to."""
    rounds, recipe = experiment.config.num_rounds, experiment.recipe
    found: list[dict[str, object]] = []
    first = 1
    while first <= rounds:
        place = recipe.place(first)
        is_last = place.stage.rounds is None or place.number == len(recipe.stages) - 1
        last = rounds if is_last else min(rounds, first + int(place.stage.rounds or 1) - 1)
        found.append({"name": place.stage.name or f"stage {place.number + 1}", "first": first, "last": last})
        first = last + 1
    return found


def _label_card(experiment: Experiment) -> str:
    """Returns which kinds of label the federation holds, as Markdown."""
    card, kinds, clients = experiment.labels, experiment.federation.kinds(), experiment.config.num_clients
    rows: list[dict[str, object]] = [
        {
            "kind of label": name,
            "samples": int(held.sum()),
            "share": float(held.sum() / max(1, kinds.sum())),
            "clients that have it": int((held > 0).sum()),
            "per client: least": int(held.min()),
            "mean": float(held.mean()),
            "most": int(held.max()),
        }
        for name, held in zip(KIND_NAMES, kinds.T, strict=True)
        if held.any()
    ]
    further = {
        "at the server": len(experiment.federation.server_rows),
        "bags": card.bags,
        "annotators of a sample, at most": card.annotators,
        "labelling functions": card.functions,
    }
    notes = [f"- {what}: {number:,}" for what, number in further.items() if number]
    return "\n".join([f"**{kinds.sum():,} samples at {clients:,} clients**", "", markdown(rows), "", *notes])


def _file_hashes(experiment: Experiment) -> dict[str, str]:
    """Returns hashes of the files besides the data that a run depends on, by the key that names them: the devices'
    trace, pretrained weights.
    """
    trace = experiment.devices.summary().get("trace") if experiment.devices is not None else None
    weights = experiment.config.model.weights
    return {
        **({"devices.trace": trace["sha256"]} if trace else {}),
        **({"model.weights": weights_hash(Path(weights))} if weights is not None else {}),
    }


def _check_same_data(path: Path, experiment: Experiment) -> None:
    """Raises a ValueError if the data, the partition, the supervision, the devices' trace or pretrained weights differ
    from those at the start of the run.
    """
    federation = experiment.federation
    try:
        with naming(path):
            saved = json.loads(path.read_bytes())
        there = {"partition and supervision": saved["sha256"], **saved.get("data", {})}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}), so it is unknown whether the data are those of the run. "
            "Put the file back, or begin a new run."
        ) from error
    here = {"partition and supervision": federation.sha256, **federation.data_hashes, **_file_hashes(experiment)}
    changed = [what for what, value in there.items() if here.get(what) != value]
    if changed:
        raise ValueError(
            f"The data are not what they were when the run began; changed: {', '.join(changed)} (hash "
            f"{here.get(changed[0], 'none')[:12]} here, {str(there[changed[0]])[:12]} in {path}). Put files, and "
            "labelling functions if there are any, back as they were, or begin a new run."
        )
    if not saved.get("data"):
        logger.warning(
            "%s is of an older version and has no hash of inputs and labels: whether these have changed is unknown; "
            "partition and supervision are the same.",
            path,
        )


def _log_line(round_number: int, metrics: Mapping[str, float]) -> None:
    shown = {"loss": "train/loss", "accuracy": "eval/accuracy"}
    parts = [f"{name} {metrics[tag]:.4f}" for name, tag in shown.items() if tag in metrics]
    failed = int(metrics["system/failed_clients"])
    parts += [f"failed clients {failed}"] * (failed > 0)
    logger.info("Round %d: %s", round_number, ", ".join([*parts, f"{metrics['system/round_seconds']:.1f} s"]))
