"""The server: the round loop, and the Flower app that runs it under `flwr run`.

The loop is ours because Flower's `Strategy.start` can neither start at a later round nor save between rounds; sampling,
messages and aggregation are Flower's.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedlabel.config import ExperimentConfig, flatten, load_config, split_overrides, to_yaml
from fedlabel.data.federation import Federation
from fedlabel.data.supervision import KIND_NAMES
from fedlabel.errors import RunError, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.figures import partition_figure, save_png
from fedlabel.hardware import source_commit, source_hash
from fedlabel.methods.base import Method, state_to_lists
from fedlabel.methods.steps import State, StateDict
from fedlabel.tracking import (
    PARTITION_JSON,
    RunFolder,
    as_json,
    is_evaluated,
    read_metrics,
    read_summary,
    write_atomic,
)
from server.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from server.exchange import replies_to
from server.functions import FunctionWatch
from server.grids import SimulationGrid
from server.helpers import HelperPool
from server.noise import NoiseWatch
from server.replies import Refused, ReplySchema, harmless, read_identity
from server.report import OF_THE_PROCESS, log_round, select_key, summary
from server.selection import Selection
from server.strategy import (
    CannotCombine,
    aggregate,
    build_strategy,
    configure_round,
    restore_strategy,
    sample_cohort,
    strategy_state,
)
from server.tally import Asked, RoundTally

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
    config = load_config(configs, split_overrides(str(context.run_config.get("overrides", ""))))
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
    notes = federation.dataset.notes
    doubts = config.method.doubts(federation.record, federation.dataset.class_names)
    for doubt in [*notes, *federation.doubts(), *doubts]:
        logger.warning(doubt)
    for report in federation.functions:
        logger.info(
            "Labelling function %s: %d votes and %d abstentions on %d samples, %d failures, %d answers of no class, "
            "%.3g s per 1,000 samples",
            *(report.name, report.votes, report.abstained, report.asked, report.failed, report.invalid),
            report.seconds_per_1000,
        )
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
        finished = _finished(experiment, path, checkpoint)
        if finished is not None:
            return finished
    sizes = [len(rows) for rows in federation.parts]
    nodes = connect(grid, config, sizes)
    schema = ReplySchema.of(experiment, sizes)
    with closing(open_folder(experiment, path, checkpoint if resume else None)) as folder:
        _rounds(experiment, strategy, grid, nodes, schema, folder, checkpoint, on_round)
        result = summary(folder.read_metrics(), experiment, commit)
        folder.write_summary(result)
        return result


def _finished(experiment: Experiment, path: Path, checkpoint: Checkpoint) -> dict[str, object] | None:
    """Returns what `summary.json` says of a run without rounds left; None where something is to be done or mended."""
    if checkpoint.round_number < experiment.config.num_rounds:
        return None
    try:
        saved, rows = read_summary(path), read_metrics(path)
        same_keys = (path / "config.yaml").read_text() == to_yaml(experiment.config)
    except (OSError, ValueError, RecursionError):
        return None
    made = as_json(summary(rows, experiment, ""))
    if not same_keys or any(saved.get(key) != value for key, value in made.items() if key not in OF_THE_PROCESS):
        return None
    _check_same_data(path / PARTITION_JSON, experiment.federation)
    return saved


def open_folder(experiment: Experiment, path: Path, checkpoint: Checkpoint | None) -> RunFolder:
    """Makes the folder of a new run, or opens that of a resumed one at its checkpoint."""
    text = to_yaml(experiment.config)
    if checkpoint is not None:
        if checkpoint.round_number > 0:
            _check_same_data(path / PARTITION_JSON, experiment.federation)
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
        figure = partition_figure(federation.histograms(), KIND_NAMES, federation.true_classes)
        save_png(figure, folder.partition_png)
        folder.log_figure("partition", figure)
    folder.log_text("config", f"```yaml\n{to_yaml(experiment.config)}```")


def _check_same_data(path: Path, federation: Federation) -> None:
    """Raises a ValueError if the data, or who holds and knows what of them, are not those of the run's begin."""
    try:
        with naming(path):
            saved = json.loads(path.read_bytes())
        there = {"what clients hold and know": saved["sha256"], **saved.get("data", {})}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}), so nobody knows whether the data are those of the run. "
            "Put the file back, or begin a new run."
        ) from error
    here = {"what clients hold and know": federation.sha256, **federation.data_hashes}
    changed = [what for what, value in there.items() if here.get(what) != value]
    if changed:
        raise ValueError(
            f"The data are not what they were when the run began; changed: {', '.join(changed)} (hash "
            f"{here.get(changed[0], 'none')[:12]} here, {str(there[changed[0]])[:12]} in {path}). Put files, and "
            "labelling functions if there are any, back as they were, or begin a new run."
        )
    if not saved.get("data"):
        logger.warning(
            "%s is of an older version and has no hash of inputs and labels: whether they have changed since cannot be "
            "told, only that the same clients hold and know the same samples.",
            path,
        )


def _rounds(
    experiment: Experiment,
    strategy: Strategy,
    grid: Grid,
    nodes: Mapping[int, int],
    schema: ReplySchema,
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
        tally = RoundTally(schema.of_round(round_number, shared, messages), client_of, messages)
        aggregated = _collect(tally, experiment, strategy, grid, pool, folder)
        if aggregated is not None:
            model = _like(experiment.initial_state, aggregated)
            who = f"Strategy {config.strategy.name} made"
            _check_model(experiment, model, who, round_number, "step in strategy.args")
        model = experiment.train_server(model, round_number)
        who = "The server's own training made"
        _check_model(experiment, model, who, round_number, "steps in training.server_steps")
        shared = method.server_step(shared, tally.statistics(experiment.device))
        _check_shared(method, shared, round_number)
        if aggregated is not None:
            average = _moving_average(average, model, method.averaging(round_number))
        last = round_number == config.num_rounds
        judged = {"model": model, "average": average, "previous": previous}
        judged = {name: state for name, state in judged.items() if state}
        evaluated = judged if is_evaluated(round_number, config.num_rounds, config.evaluation.every) else None
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


def _collect(
    tally: RoundTally,
    experiment: Experiment,
    strategy: Strategy,
    grid: Grid,
    pool: HelperPool | None,
    folder: RunFolder,
) -> ArrayRecord | None:
    """Sends a round's messages and returns what the strategy makes of the usable replies, see `aggregate`.

    Raises:
        RunError: too few replies are usable, the strategy cannot combine them, or the SuperLink cannot be reached.
    """
    config, messages = experiment.config, list(tally.messages.values())
    usable = tally.usable(replies_to(grid, messages, config.grid.timeout))
    if pool is not None:
        usable = pool.watch(usable, {m.metadata.dst_node_id: client for client, m in tally.messages.items()})
    unfit = ""
    try:
        aggregated = aggregate(strategy, tally.round_number, usable, config.seed)
    except CannotCombine as error:
        unfit, aggregated = f"Strategy {error}", None
    tally.finish()
    for failure in tally.failures:
        folder.log_failure(failure)
    least = config.strategy.min_replies
    if tally.num_usable >= least and not unfit:
        return aggregated
    few = f"All {len(messages)} clients failed" if len(messages) > 1 else "The only client failed"
    if tally.num_usable:
        few = unfit or f"Only {tally.num_usable} of {len(messages)} clients gave a usable reply"
        few += f", `strategy.min_replies` is {least}," * (not unfit)
    first = f" {tally.failures[0].splitlines()[0]} (all, with tracebacks: {folder.failures})" if tally.failures else ""
    if tally.failures and all(map(_diverged, tally.failures)):
        first += (
            f" Training diverged: take a smaller training.lr (={config.training.lr:g}), or cut gradients with "
            "training.max_grad_norm."
        )
    raise RunError(f"{few} in round {tally.round_number}, so the run stops; its checkpoints stay.{first}")


def _diverged(failure: str) -> bool:
    """Returns whether a client failed as its numbers grew beyond all bounds."""
    return any(sign in failure.partition("\n")[0] for sign in (" NotFinite: ", " TooLarge: ", "(=nan)", "(=inf)"))


def _check_shared(method: Method, shared: State, round_number: int) -> None:
    """Keeps a shared state that no client could work with out of checkpoints and messages."""
    wrong = [name for name, value in shared.items() if not value.isfinite().all()]
    try:
        if not wrong:
            return method.check_shared(shared)
        reason = f"{', '.join(wrong)} holds NaN or infinity"
    except ValueError as error:
        reason = str(error)
    raise RunError(
        f"Method {method.name} made a shared state to go on from no more in round {round_number}: {reason}. The last "
        "checkpoint is of a round before."
    )


def _moving_average(average: StateDict, model: StateDict, decay: float) -> StateDict:
    """Returns decay * average + (1 - decay) * model, the model itself for no average, and {} for decay 0."""
    if not decay:
        return {}
    return {
        name: torch.lerp(value, average[name], decay) if average and value.is_floating_point() else value
        for name, value in model.items()
    }


def _check_model(experiment: Experiment, model: StateDict, who: str, round_number: int, what: str) -> None:
    """Keeps a model that gives no numbers out of checkpoints and messages.

    Args:
        experiment: knows which of its arrays are variances.
        model: the global one.
        who: made it, for the message.
        round_number: of the round.
        what: of the server's may be too large, likewise.
    """
    finite = all(value.isfinite().all() for value in model.values())
    negative = [name for name in sorted(experiment.running.variances) if (model[name] < 0).any()]
    if not finite or negative:
        wrong = f"a negative variance ({negative[0]})" if finite else "NaN or infinity"
        raise RunError(
            f"{who} a model with {wrong} in round {round_number}; the last checkpoint is of a round before. "
            f"Lower the server's {what}, or training.lr."
        )


def connect(grid: Grid, config: ExperimentConfig, sizes: Sequence[int]) -> dict[int, int]:
    """Waits until all clients are there; returns client -> node id, as the nodes themselves say.

    Args:
        grid: carries the messages.
        config: the run's.
        sizes: how many samples each client holds.

    Raises:
        RunError: too few nodes in `grid.connect_timeout`, two nodes with one partition-id, a node with other code or
            data, or a SuperLink that cannot be reached.
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
    nodes, refusals = _identify(grid, config, ids, sizes)
    missing = sorted(set(range(config.num_clients)) - set(nodes))
    if missing:
        raise RunError(
            f"No node has partition-id {missing[0]} ({len(missing)} of {config.num_clients} are missing). "
            + " ".join(refusals[:3])
        )
    for refusal in refusals:
        logger.warning("Left out: %s", refusal)
    return nodes


def _identify(
    grid: Grid, config: ExperimentConfig, ids: list[int], sizes: Sequence[int]
) -> tuple[dict[int, int], list[str]]:
    """Asks every node who it is; returns client -> node id and why others are none.

    Raises:
        RunError: see `connect`.
    """
    ask = ConfigRecord({"experiment": to_yaml(config), "source-hash": source_hash()})
    queries = [Message(RecordDict({"ask": ask}), node, "query") for node in ids]
    asked = Asked(queries)
    nodes: dict[int, int] = {}
    refusals: list[str] = []
    for reply in replies_to(grid, queries, config.grid.timeout):
        query = asked.of(reply)
        if query is None:
            refusals.append(f"Node {reply.metadata.src_node_id} sent what nobody asked for.")
            continue
        node = query.metadata.dst_node_id
        if reply.has_error():
            reason = str(reply.error.reason).partition("\n")[0]
            refusals.append(f"Node {node} does not answer: {harmless(reason)}")
            continue
        try:
            found = read_identity(reply.content if reply.has_content() else RecordDict())
        except Refused as refusal:
            refusals.append(f"Node {node} does not say who it is: {refusal}.")
            continue
        if found.source_hash != source_hash():
            raise RunError(
                f"Node {node} runs other code (hash {found.source_hash}, here {source_hash()}): "
                "install the same version of fedlabel on server and clients."
            )
        if found.client in nodes:
            raise RunError(
                f"Nodes {nodes[found.client]} and {node} both have partition-id {found.client}; give each its own."
            )
        if found.client >= len(sizes):
            refusals.append(f"Node {node} has partition-id {found.client}, and `num_clients` is {len(sizes)}.")
            continue
        if found.samples != sizes[found.client]:
            raise RunError(
                f"Node {node} (partition-id {found.client}) holds {found.samples} samples, and by the configuration "
                f"{sizes[found.client]}: its data are not those of the server."
            )
        nodes[found.client] = node
    return nodes, refusals


def _like(reference: StateDict, arrays: ArrayRecord) -> StateDict:
    """Returns aggregated arrays as tensors with the device and dtype of `reference`."""
    state = arrays.to_torch_state_dict()
    return {name: state[name].to(like.device, like.dtype) for name, like in reference.items()}


def _cpu(state: StateDict) -> StateDict:
    return {name: value.cpu() for name, value in state.items()}


def _log_line(round_number: int, metrics: Mapping[str, float]) -> None:
    shown = {"loss": "train/loss", "accuracy": "eval/accuracy"}
    parts = [f"{name} {metrics[tag]:.4f}" for name, tag in shown.items() if tag in metrics]
    failed = int(metrics["system/failed_clients"])
    parts += [f"failed clients {failed}"] * (failed > 0)
    logger.info("Round %d: %s", round_number, ", ".join([*parts, f"{metrics['system/round_seconds']:.1f} s"]))
