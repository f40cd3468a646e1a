"""Seconds per round in which no client trains: what our simulation grids and Flower's own runtime cost by themselves.

Usage: python scripts/bench_rounds.py [--rounds 10] [--blocks 2] [--only NAME] [--profile] [--json PATH]

1,000 clients are registered and 50 take part in each round. The global model (the default cnn for 28x28 images) goes to
them, each answers at once with the arrays it got, and the server takes the weighted mean. Our grids run the server's
own steps: encode the model, sample, send, check every reply (server/replies.py), average, decode. Flower's runtime runs
`FedAvg.start` under `flwr.simulation.run_simulation`. It and our Ray grid get two workers of one CPU each.

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
from contextlib import ExitStack
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedlabel.config import ExperimentConfig
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.hardware import describe_hardware, versions
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.recipe import Task
from fedlabel.methods.supervised import Supervised
from fedlabel.models import ModelConfig, build_model
from server.grids.base import SimulationGrid
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from server.replies import ReplySchema
from server.strategy import WeightedMean, aggregate, configure_round, sample_cohort
from server.tally import RoundTally

CLIENT_APP = "bench_rounds:app"
"""Workers import it by this path; they find it beside this script."""
CLIENTS, COHORT = 1000, 50
WORKERS = 2
NAMES = {"in-process": "in-process grid", "ray": "Ray grid", "flower": "Flower's simulation runtime"}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with the arrays that came; the weight differs from client to client."""
    weight = 1.0 + int(context.node_config["partition-id"]) % 7
    content = RecordDict(
        {
            "arrays": message.content.array_records["arrays"],
            "metrics": MetricRecord({"num-examples": weight, "train_loss": 0.0}),
            "sums": ConfigRecord({"train/loss": [0.0, 1.0]}),
            "counts": ConfigRecord({"passes": [1.0, 1.0]}),
            "statistics": ConfigRecord({}),
        }
    )
    return Message(content, reply_to=message)


def initial_model() -> dict[str, torch.Tensor]:
    model = build_model(ModelConfig(), (1, 28, 28), 10, seed=0)
    return {name: value.detach() for name, value in model.state_dict().items()}


def check(first: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> None:
    """The mean of equal models is that model; anything else means that replies were lost or mixed."""
    for name, value in first.items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-6)


def our_rounds(grid: SimulationGrid, rounds: int) -> list[float]:
    """Runs the steps of `server.server` without evaluation and files; returns when each round was over."""
    strategy = WeightedMean(fraction_train=1.0, min_train_nodes=1, min_available_nodes=1)
    nodes = {client: client + 1 for client in range(CLIENTS)}
    first = model = initial_model()
    labels = LabelCard(100 * CLIENTS, 100 * CLIENTS, 0, 0, 0, 0, 0, 0, 0, ())
    recipe = Supervised().recipe(Task(10, rounds, labels))
    schema = ReplySchema(model, recipe, TrainingConfig(), [100] * CLIENTS, 10)
    ends = []
    for round_number in range(1, rounds + 1):
        cohort = sample_cohort(0, round_number, CLIENTS, COHORT / CLIENTS)
        messages = configure_round(strategy, round_number, ArrayRecord(model), ConfigRecord({}), nodes, cohort)
        client_of = {nodes[client]: client for client in cohort}
        tally = RoundTally(schema.of_round(round_number, {}, messages), client_of, messages)
        replies = grid.send_and_receive(messages, timeout=ExperimentConfig().grid.timeout)
        aggregated = aggregate(strategy, round_number, tally.usable(replies))
        tally.finish()
        if tally.failures or aggregated is None:
            raise RuntimeError(f"A client failed: {tally.failures[:1]}")
        model = dict(aggregated.to_torch_state_dict())
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
    client_app: ClientApp = importlib.import_module(CLIENT_APP.partition(":")[0]).app
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
            grid: SimulationGrid
            if name == "ray":
                grid = stack.enter_context(RayGrid(CLIENT_APP, CLIENTS, WORKERS, use_gpu=False))
            else:
                grid = InProcessGrid(client_app, CLIENTS)
            if profiler:
                profiler.enable()
            ends = our_rounds(grid, rounds + 1)
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
