"""The server: the round loop, and the Flower app that runs it under `flwr run`.

The loop is ours because Flower's `Strategy.start` can neither start at a later round nor save between rounds; sampling,
messages and aggregation are Flower's.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedlabel.config import ExperimentConfig, flatten, load_config, to_yaml
from fedlabel.data.supervision import KIND_NAMES
from fedlabel.errors import RunError, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.figures import partition_figure, save_png
from fedlabel.hardware import source_commit, source_hash
from fedlabel.methods.base import state_to_lists
from fedlabel.methods.steps import StateDict
from fedlabel.tracking import PARTITION_JSON, RunFolder, write_atomic
from server.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from server.functions import FunctionWatch
from server.grids import SimulationGrid
from server.helpers import HelperPool
from server.noise import NoiseWatch
from server.report import RoundTally, log_round, select_key, summary
from server.selection import Selection
from server.strategy import (
    aggregate,
    build_strategy,
    configure_round,
    restore_strategy,
    sample_cohort,
    strategy_state,
)

app = ServerApp()
logger = logging.getLogger("fedlabel")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs an experiment on the grid Flower gives; `run_config` holds `configs` (comma separated) and `overrides`."""
    logger.setLevel(logging.INFO)  # `flwr run --stream` and `flwr log` show what is written to stderr
    logger.addHandler(logging.StreamHandler())
    try:
        path = _run_here(grid, context)
    except Exception as error:
        # Flower logs what is raised, and its own exit status does not tell: the last line of the log has to.
        known = isinstance(error, (ValueError, RunError))
        reason = str(error).partition("\n")[0] if known else repr(error)
        failed = RunError(f"fedlabel: the run FAILED (whatever the exit status of flwr run): {reason}")
        raise failed from (None if known else error)  # a bug: show where
    logger.info("fedlabel: the run is finished. Results are in %s", path)


def _run_here(grid: Grid, context: Context) -> Path:
    configs = [path.strip() for path in str(context.run_config.get("configs", "")).split(",") if path.strip()]
    config = load_config(configs, shlex.split(str(context.run_config.get("overrides", ""))))
    path = (Path("runs") / default_name(config)).absolute()
    logger.info("Results go to %s", path)  # below the directory where the SuperLink was started
    run_federation(config, grid, path, on_round=_log_line)
    return path


def default_name(config: ExperimentConfig) -> str:
    """Returns method-dataset-seed-time, e.g. "fedlabel-digits-seed0-20260131-235959"."""
    method = config.method.name.rpartition(":")[2]
    return f"{method}-{config.data.name}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"


def run_federation(
    config: ExperimentConfig,
    grid: Grid,
    path: Path,
    resume: bool = False,
    on_round: Callable[[int, Mapping[str, float]], None] = lambda round_number, metrics: None,
) -> dict[str, object]:
    """Runs an experiment, or the rounds of it that are left, and returns what it writes into `summary.json`.

    Args:
        config: the resolved configuration.
        grid: carries the messages; simulated or real.
        path: the run's folder; made only when configuration, data, checkpoint and nodes are found sound.
        resume: go on from the newest checkpoint in `path`.
        on_round: called after every round with its metrics.

    Raises:
        ValueError: the configuration, the data, the checkpoint or the folder is not as needed.
        RunError: too few nodes, nodes with other code, or a round in which every client failed.
    """
    strategy = build_strategy(config.strategy)
    commit = source_commit()  # now: files may change while the run goes on
    experiment = open_experiment(to_yaml(config))
    torch.set_num_threads(config.grid.threads_per_worker)
    federation = experiment.federation
    for doubt in config.method.doubts(federation.record, federation.dataset.class_names):
        logger.warning(doubt)
    shared = config.method.initial_shared(experiment.federation.dataset.num_classes)
    shared = {name: value.to(experiment.device) for name, value in shared.items()}
    checkpoint = Checkpoint(0, experiment.initial_state, to_yaml(config), shared=shared)
    if resume:
        checkpoint = latest_checkpoint(path / "checkpoints", experiment, strategy)
        checkpoint.model = {name: value.to(experiment.device) for name, value in checkpoint.model.items()}
        checkpoint.previous = {name: value.to(experiment.device) for name, value in checkpoint.previous.items()}
        checkpoint.average = {name: value.to(experiment.device) for name, value in checkpoint.average.items()}
        checkpoint.selected = {name: value.to(experiment.device) for name, value in checkpoint.selected.items()}
        checkpoint.shared = {
            name: value.to(experiment.device) for name, value in {**shared, **checkpoint.shared}.items()
        }
        restore_strategy(strategy, checkpoint.strategy)
        if checkpoint.client_states:
            assert isinstance(grid, SimulationGrid)  # only they have states to save
            grid.load_states(checkpoint.client_states)
    nodes = connect(grid, config)
    with closing(open_folder(experiment, path, checkpoint if resume else None)) as folder:
        _rounds(experiment, strategy, grid, nodes, folder, checkpoint, on_round)
        result = summary(folder, experiment, commit)
        folder.write_summary(result)
        return result


def open_folder(experiment: Experiment, path: Path, checkpoint: Checkpoint | None) -> RunFolder:
    """Makes the folder of a new run, or opens that of a resumed one at its checkpoint."""
    text = to_yaml(experiment.config)
    if checkpoint is not None:
        if checkpoint.round_number > 0:
            _check_same_data(path / PARTITION_JSON, experiment.federation.sha256)
        folder = RunFolder.resume(path, checkpoint.round_number)
    else:
        folder = RunFolder.create(path, text, flatten(experiment.config))
    with folder.closed_on_error():
        if checkpoint is not None:
            write_atomic(folder.config_yaml, text)  # keys that may change, such as num_rounds
            with naming(folder.summary_json):
                folder.summary_json.unlink(missing_ok=True)  # it told of a shorter run
        if checkpoint is None or checkpoint.round_number == 0:
            _describe(experiment, folder)
    return folder


def _describe(experiment: Experiment, folder: RunFolder) -> None:
    """Writes what a run begins with: who holds what, and the configuration."""
    federation = experiment.federation
    write_atomic(folder.partition_json, federation.to_json())
    write_atomic(folder.supervision_json, federation.audit_json())
    if experiment.config.evaluation.figures:
        figure = partition_figure(federation.histograms(), KIND_NAMES, federation.dataset.class_names)
        save_png(figure, folder.partition_png)
        folder.log_figure("partition", figure)
    folder.log_text("config", f"```yaml\n{to_yaml(experiment.config)}```")


def _check_same_data(path: Path, here: str) -> None:
    try:
        with naming(path):
            there = json.loads(path.read_bytes())["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        there = None
    if not isinstance(there, str):
        raise ValueError(f"{path} is damaged: it has no hash of the data. Put it back as it was, or begin a new run.")
    if there != here:
        raise ValueError(
            f"What clients hold and know is not what it was when the run began (hash {here[:12]} here, {there[:12]} in "
            f"{path}): the data, or labelling functions, have changed. Put them back, or begin a new run."
        )


def _rounds(
    experiment: Experiment,
    strategy: Strategy,
    grid: Grid,
    nodes: Mapping[int, int],
    folder: RunFolder,
    checkpoint: Checkpoint,
    on_round: Callable[[int, Mapping[str, float]], None],
) -> None:
    config, model, shared, previous = experiment.config, checkpoint.model, checkpoint.shared, checkpoint.previous
    method, average = config.method, checkpoint.average
    pool = HelperPool(experiment, method.helpers) if method.helpers is not None else None
    if pool is not None and checkpoint.helpers:
        pool.load(checkpoint.helpers)
    watches = (NoiseWatch(experiment), FunctionWatch(experiment, folder, checkpoint.votes))
    selection = Selection(
        folder.checkpoints, select_key(experiment), method, folder.read_metrics(), checkpoint.selected
    )
    train_config = ConfigRecord({"experiment": to_yaml(config)})
    for round_number in range(checkpoint.round_number + 1, config.num_rounds + 1):
        started = time.perf_counter()
        if method.starts_stage(round_number):
            previous, average = selection.begin_stage() or average or model, {}
            model = method.begin_stage(previous, experiment.fresh_state(round_number))
            strategy = build_strategy(config.strategy)  # its momentum belongs to the stage before
        cohort = sample_cohort(config.seed, round_number, config.num_clients, config.fraction_train)
        client_of = {nodes[client]: client for client in cohort}
        messages = configure_round(strategy, round_number, ArrayRecord(model), train_config, nodes, cohort)
        for content in {id(message.content): message.content for message in messages}.values():
            content["shared"] = ConfigRecord(dict(state_to_lists(method.told(shared))))
            if previous:
                content["previous"] = ArrayRecord(previous)
        if pool is not None:
            messages = pool.attach(messages, client_of, round_number)
        states = dict(grid.states) if isinstance(grid, SimulationGrid) else None
        nobody = method.initial_memory(torch.ones(1, experiment.federation.dataset.num_classes, dtype=torch.bool))
        tally = RoundTally(round_number, client_of, messages, method.statistics({**nobody, **shared}))
        usable = tally.usable(grid.send_and_receive(messages, timeout=config.grid.timeout))
        if pool is not None:
            usable = pool.watch(usable, client_of)
        aggregated = aggregate(strategy, round_number, usable, config.seed)
        tally.finish()
        for failure in tally.failures:
            folder.log_failure(failure)
        if tally.all_failed:
            raise RunError(
                f"All {len(cohort)} clients failed in round {round_number}, so the run stops; its checkpoints stay. "
                f"{tally.failures[0].splitlines()[0]} (all of them, with tracebacks: {folder.failures})"
            )
        if aggregated is not None:
            model = _like(experiment.initial_state, aggregated)
            _check_finite(model, f"Strategy {config.strategy.name} made", round_number, "step in strategy.args")
        model = experiment.train_server(model, round_number)
        _check_finite(model, "The server's own training made", round_number, "steps in training.server_steps")
        shared = method.server_step(shared, tally.statistics(experiment.device))
        if aggregated is not None:
            average = _moving_average(average, model, method.averaging(round_number))
        last = round_number == config.num_rounds
        judged = {"model": model, "average": average, "previous": previous}
        judged = {name: state for name, state in judged.items() if state}
        evaluated = judged if last or round_number % config.evaluation.every == 0 else None
        metrics = log_round(folder, experiment, tally, evaluated, states, shared, watches, started)
        selection.see(round_number, metrics, model)
        if last or round_number % config.checkpoint.every == 0:
            kept = grid.dump_states() if isinstance(grid, SimulationGrid) else {}
            helpers = pool.dump() if pool is not None else {}
            saved = Checkpoint(
                round_number,
                _cpu(model),
                to_yaml(config),
                strategy_state(strategy),
                kept,
                _cpu(shared),
                helpers,
                _cpu(previous),
                _cpu(average),
                watches[1].dump(),
                _cpu(selection.stage_model),
            )
            save_checkpoint(folder.checkpoints, saved, config.checkpoint.keep)
            selection.settle()
        on_round(round_number, metrics)


def _moving_average(average: StateDict, model: StateDict, decay: float) -> StateDict:
    """Returns decay * average + (1 - decay) * model, the model itself for no average, and {} for decay 0."""
    if not decay:
        return {}
    return {
        name: torch.lerp(value, average[name], decay) if average and value.is_floating_point() else value
        for name, value in model.items()
    }


def _check_finite(model: StateDict, who: str, round_number: int, what: str) -> None:
    if not all(value.isfinite().all() for value in model.values()):
        raise RunError(
            f"{who} a model with NaN or infinity in round {round_number}; the last checkpoint is of a round before. "
            f"Lower the server's {what}, or training.lr."
        )


def connect(grid: Grid, config: ExperimentConfig) -> dict[int, int]:
    """Waits until all clients are there; returns client -> node id, as the nodes themselves say.

    Raises:
        RunError: too few nodes in `grid.connect_timeout`, two nodes with one partition-id, a node with other code.
    """
    deadline = time.monotonic() + config.grid.connect_timeout
    connected = -1
    while len(ids := list(grid.get_node_ids())) < config.num_clients:
        if len(ids) != connected:
            connected = len(ids)
            logger.info("Waiting for nodes: %d of num_clients=%d are connected", connected, config.num_clients)
        if time.monotonic() > deadline:
            raise RunError(
                f"Only {len(ids)} of `num_clients` (={config.num_clients}) nodes connected within "
                f"`grid.connect_timeout` (={config.grid.connect_timeout:g} s); start more SuperNodes or lower "
                "num_clients."
            )
        time.sleep(0.5)
    queries = [Message(RecordDict({"ask": ConfigRecord({})}), node, "query") for node in ids]
    nodes: dict[int, int] = {}
    for reply in grid.send_and_receive(queries, timeout=config.grid.timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise RunError(f"Node {node} does not answer: {str(reply.error.reason).splitlines()[0]}")
        identity = reply.content.config_records["identity"]
        if identity["source-hash"] != source_hash():
            raise RunError(
                f"Node {node} runs other code (hash {identity['source-hash']!s}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        client = int(identity["partition-id"])  # type: ignore[arg-type]
        if client in nodes:
            raise RunError(f"Nodes {nodes[client]} and {node} both have partition-id {client}; give each its own.")
        nodes[client] = node
    missing = sorted(set(range(config.num_clients)) - set(nodes))
    if missing:
        raise RunError(f"No node has partition-id {missing[0]} ({len(missing)} of {config.num_clients} are missing).")
    return nodes


def _like(reference: StateDict, arrays: ArrayRecord) -> StateDict:
    """Returns aggregated arrays as tensors with the device and dtype of `reference`."""
    state = arrays.to_torch_state_dict()
    return {name: state[name].to(like.device, like.dtype) for name, like in reference.items()}


def _cpu(state: StateDict) -> StateDict:
    return {name: value.cpu() for name, value in state.items()}


def _log_line(round_number: int, metrics: Mapping[str, float]) -> None:
    logger.info("round %d %s", round_number, {name: round(value, 4) for name, value in metrics.items()})
