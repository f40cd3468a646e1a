"""Seconds per round in which no client trains: what our simulation grids and Flower's own runtime cost by themselves.

Usage: python scripts/bench_rounds.py [--rounds 10] [--blocks 2] [--only NAME] [--profile] [--json PATH]

1,000 clients are registered and 50 take part in each round. The global model (the default cnn for 28x28 images) goes to
them, each answers at once with the arrays it got, and the server takes the weighted mean. Our grids run the server's
own steps: sample, send, check every result (server/schema.py), add up. Flower's runtime runs `FedAvg.start` under
`flwr.simulation.run_simulation`. It and our Ray grid get two workers of one CPU each.

Every runtime has a process of its own, with one thread for numerics. They run one after the other, and again for each
further block. A round is timed from the end of the one before; the first counts as start-up, which is measured from the
making of the grid (for Flower: the call of `run_simulation`) and leaves out the imports of this process.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import itertools
import json
import logging
import math
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.config import load_config, to_yaml
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.hardware import describe_hardware, versions
from fedlabel.methods.batch import State
from fedlabel.methods.uploads import ModelPart
from fedlabel.models import ModelConfig, build_model
from fedlabel.seeding import numpy_generator
from fedlabel.server_config import StrategyConfig
from server.blocks import cut_into_blocks, cut_into_tasks
from server.grids.base import ClientGrid, Order
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from server.sampling import History, Pool, uniform
from server.schema import ResultSchema
from server.strategy import build_strategy, combine
from server.tally import RoundTally
from server.traffic import ResultBytes

ANSWER = "bench_rounds:answer"
"""Workers import it by this path; they find it beside this script."""
CLIENTS, COHORT = 1000, 50
WORKERS = 2
NAMES = {"in-process": "in-process grid", "ray": "Ray grid", "flower": "Flower's simulation runtime"}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with the arrays that came; the weight differs from client to client."""
    weight = 1.0 + int(context.node_config["partition-id"]) % 7
    metrics = MetricRecord({"num-examples": weight})
    content = RecordDict({"arrays": message.content.array_records["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


def initial_model() -> dict[str, torch.Tensor]:
    model = build_model(ModelConfig(), (1, 28, 28), 10, seed=0)
    return {name: value.detach() for name, value in model.state_dict().items()}


def check(first: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> None:
    """The mean of equal models is that model; anything else means that replies were lost or mixed."""
    for name, value in first.items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-6)


def answer(
    experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
) -> list[ClientResult | Exception]:
    """Answers with the model that came; the weight differs from client to client."""
    sums, counts = {"train/loss": [0.0, 1.0]}, {"passes": [1.0, 1.0]}
    return [
        ClientResult(client, {"model": ModelPart(invitation.model, 1.0 + client % 7)}, sums, counts, {}, {})
        for client in clients
    ]


def opened(folder: Path) -> Experiment:
    """Returns an experiment of blank images, ten for each client."""
    rng = np.random.default_rng(0)
    blank = {"x_train": np.zeros((10 * CLIENTS, 28, 28), np.uint8), "x_test": np.zeros((100, 28, 28), np.uint8)}
    labels = {"y_train": rng.integers(0, 10, 10 * CLIENTS), "y_test": rng.integers(0, 10, 100)}
    np.savez(folder / "blank.npz", **blank, **labels)
    options = ("data.name=npz", f"data.root={folder / 'blank.npz'}", "data.validation_fraction=0", "device=cpu")
    clients = (f"num_clients={CLIENTS}", "partition.kind=iid", "method.name=supervised", "supervision.kind=full")
    return open_experiment(to_yaml(load_config(overrides=[*options, *clients])))


def our_rounds(grid: ClientGrid, experiment: Experiment, rounds: int) -> list[float]:
    """Runs the steps of `server.server` without evaluation and files; returns when each round was over."""
    strategy = build_strategy(StrategyConfig())
    first = model = experiment.initial_state
    grid.connect(experiment)
    size = ResultBytes(ResultSchema.of(experiment))
    ends = []
    for round_number in range(1, rounds + 1):
        cohort = uniform(Pool(CLIENTS, History()), COHORT, numpy_generator(0, "cohort", round_number))
        invitation = Invitation(round_number, model, {}, {})
        tally = RoundTally(invitation, cohort, size)
        tasks = cut_into_tasks(cut_into_blocks(cohort), stack=1)
        blocks = tally.watch(grid.train(Order(invitation, {}, fold=True), tasks))
        combined = combine(strategy, round_number, blocks, first)
        if tally.failures or combined is None:
            raise RuntimeError(f"A client failed: {tally.failures[:1]}")
        model = combined
        ends.append(time.perf_counter())
    check(first, model)
    return ends


def flower_rounds(client_app: ClientApp, rounds: int) -> list[float]:
    """The same rounds by Flower's strategy and simulation runtime; returns when each round was over."""
    from flwr.simulation import run_simulation

    ends: list[float] = []
    answered: list[int] = []

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: list[Message]):  # type: ignore[no-untyped-def,override]
            replies = list(replies)
            answered.append(sum(reply.has_content() for reply in replies))
            aggregated = super().aggregate_train(server_round, replies)
            ends.append(time.perf_counter())
            return aggregated

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=COHORT / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=COHORT,
            min_available_nodes=CLIENTS,
        )
        first = initial_model()
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(first), num_rounds=rounds)
        check(first, dict(result.arrays.to_torch_state_dict()))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=CLIENTS,
        backend_config={
            "init_args": {"address": "local", "num_cpus": WORKERS, "logging_level": "error", "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if answered != [COHORT] * rounds:
        raise RuntimeError(f"Flower's rounds have {answered} answers, not {COHORT} each.")
    return ends


def measure(name: str, rounds: int, profile: bool) -> dict[str, object]:
    """Runs one runtime in this process: one round that belongs to the start, then `rounds` that count."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    client_app: ClientApp = importlib.import_module("bench_rounds").app  # not this module's: Flower's workers import it
    if name == "ray":
        import ray  # noqa: F401
    if name == "flower":
        import flwr.simulation  # noqa: F401
    profiler = cProfile.Profile() if profile else None
    started = time.perf_counter()
    with ExitStack() as stack:
        if name == "flower":
            ends = flower_rounds(client_app, rounds + 1)
        else:
            experiment = opened(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            started = time.perf_counter()
            grid: ClientGrid = InProcessGrid(answer)
            if name == "ray":
                grid = stack.enter_context(RayGrid(WORKERS, use_gpu=False, train=ANSWER))
            if profiler:
                profiler.enable()
            ends = our_rounds(grid, experiment, rounds + 1)
            if profiler:
                profiler.disable()
                pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    return {"start": ends[0] - started, "rounds": seconds}


def in_own_process(name: str, rounds: int, profile: bool) -> dict[str, object]:
    """Runs `measure` in a fresh process whose Flower home is empty; raises with its last words if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, __file__, "--rounds", str(rounds), "--measure", name, "--json", str(result)]
        environment = {
            **os.environ,
            "FLWR_HOME": str(Path(scratch) / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            command + ["--profile"] * profile, env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode or not result.exists():
            raise SystemExit(f"{NAMES[name]} failed (exit code {done.returncode}):\n{done.stderr[-3000:]}")
        if profile:
            print(done.stderr)
        return json.loads(result.read_text())


def report(results: dict[str, list[dict]], json_path: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = {}
    for name, blocks in results.items():
        seconds = [value for block in blocks for value in block["rounds"]]
        rows[name] = {
            "rounds": len(seconds),
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "start_seconds": statistics.median(block["start"] for block in blocks),
        }
    flower = rows["flower"]["median_seconds"] if "flower" in rows else math.nan
    table = Table(title=f"Empty rounds: {COHORT} of {CLIENTS:,} clients, {WORKERS} workers (in-process: none)")
    table.add_column("runtime")
    for heading in ("rounds", "median s/round", "min", "max", "start-up s", "Flower's / this"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        row["ratio"] = flower / row["median_seconds"]
        times = [f"{row[key]:.3f}" for key in ("median_seconds", "min_seconds", "max_seconds")]
        ratio = "-" if math.isnan(row["ratio"]) else f"{row['ratio']:.1f}"
        table.add_row(NAMES[name], str(row["rounds"]), *times, f"{row['start_seconds']:.1f}", ratio)
    hardware, installed = describe_hardware(torch.device("cpu")), versions()
    size = sum(value.numel() for value in initial_model().values())
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"{hardware['cpu']}, {hardware['usable_cores']} cores, {hardware.get('memory_gib', '?')} GiB; "
        f"model of {size:,} numbers; flwr {installed['flwr']}, ray {installed['ray']}, Python {installed['python']}"
    )
    if json_path is not None:
        for row in rows.values():
            row["ratio"] = None if math.isnan(row["ratio"]) else row["ratio"]
        content = {"hardware": hardware, "versions": installed, "model_size": size, "summary": rows, "blocks": results}
        json_path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds per runtime and block")
    parser.add_argument("--blocks", type=int, default=2, help="how often each runtime is started")
    parser.add_argument("--only", choices=NAMES, help="leave the other runtimes out")
    parser.add_argument("--profile", action="store_true", help="print where this process spends its time (our grids)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.json.write_text(json.dumps(measure(arguments.measure, arguments.rounds, arguments.profile)))
        return
    names = [arguments.only] if arguments.only else list(NAMES)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(arguments.blocks):
        for name in names:
            results[name].append(in_own_process(name, arguments.rounds, arguments.profile))
    report(results, arguments.json)


if __name__ == "__main__":
    main()
