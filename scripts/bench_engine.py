"""Seconds per round of simulated federations, beside a bare loop of the same arithmetic, pfl and Flower's runtime.

    python scripts/bench_engine.py                          # all rows, every runtime 5 times, alternating
    python scripts/bench_engine.py --only b-mlp --quick     # one row, once, 2 rounds
    python scripts/bench_engine.py --json out.json --pfl-env ~/.cache/fedlabel-bench/pfl

Rows, all on one CPU thread per process:

- a, b-cnn, b-mlp: `supervised` with all labels, IID, one local epoch, grey 28x28 images: (a) 100 clients of 600
  samples, 10 a round, batch 32; (b) 1,000 clients of 50, 50 a round, batch 10. Everyone sees clean views:
  crop and flip are off.
- fedlabel, fixmatch, ill: (a)'s clients, 15 steps of 32 per phase, default views. 10 % of the labels; ill: candidate
  sets, 0.3 of the wrong classes in each.
- digits: fedlabel's default experiment, evaluation and files included, beside the same at `--base`.
- empty, empty-million: nobody trains; 1,000 clients registered, or 1,000,000 of one sample each, and 50 a round.
- kills: a worker of the Ray grid is killed in every round with SIGKILL, in the middle of a task; how many clients
  failed, and whether the metrics are those of a run in peace.

Columns: the bare loop (bench_bare.py, one process), the in-process grid, stacked clients where the configuration knows
`grid.stack`, the Ray grid with 2 workers, its ratio to the floor (half the bare loop's seconds: two processes can do no
better), pfl 0.6 with one and two processes, Flower's runtime with two. pfl is installed into `--pfl-env`, where it
shares this environment's torch; where it cannot be installed its columns say why.

Every measurement has a process of its own. Runtimes alternate; a round is timed from the end of the one before, the
first is left out; the number is the median over repeats of each repeat's median. Images are made up: a pattern per
class and noise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
NEVER = 1_000_000_000
PFL = "0.6.0"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    clients: int = 100
    samples: int = 60_000
    cohort: int = 10
    side: int = 28
    overrides: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ("bare", "in-process", "stacked", "ray")
    peers: tuple[int, str] | None = None
    """Batch size and model of the same job in pfl and Flower's runtime."""
    rounds: int = 5
    """Timed ones."""
    default: bool = False
    """Whether it is fedlabel's default experiment, on its own data."""


CLEAN = ("augment.crop_padding=0", "augment.flip=false", "method.name=supervised", "supervision.kind=full")
EPOCH = ("training.local_epochs=1",)
FEW = ("supervision.label_rate=0.1", "training.local_steps=15", "training.batch_size=32")
EMPTY = (*CLEAN, "training.local_steps=0")
ALL = ("bare", "in-process", "stacked", "ray", "pfl-1", "pfl-2", "flower")
ROWS = {
    "a": Row("(a) 100 x 600, 10 a round, batch 32, cnn", overrides=CLEAN + EPOCH, runtimes=ALL, peers=(32, "cnn")),
    "b-cnn": Row(
        "(b) 1,000 x 50, 50 a round, batch 10, cnn",
        1000,
        50_000,
        50,
        overrides=(*CLEAN, *EPOCH, "training.batch_size=10"),
        runtimes=ALL,
        peers=(10, "cnn"),
    ),
    "b-mlp": Row(
        "(b) 1,000 x 50, 50 a round, batch 10, mlp",
        1000,
        50_000,
        50,
        overrides=(*CLEAN, *EPOCH, "training.batch_size=10", "model.name=mlp"),
        runtimes=ALL,
        peers=(10, "mlp"),
    ),
    "fedlabel": Row("FedLabel, 100 x 600, 10 a round, 15 + 15 steps of 32", overrides=("method.name=fedlabel", *FEW)),
    "fixmatch": Row("FixMatch, the same, 15 steps", overrides=("method.name=fixmatch", *FEW)),
    "ill": Row(
        "ILL, candidate sets, the same, 15 steps",
        overrides=("method.name=ill", "supervision.kind=partial", "supervision.partial_ratio=0.3", *FEW[1:]),
    ),
    "digits": Row(
        "digits, fedlabel's default experiment", rounds=15, default=True, runtimes=("base", "in-process", "ray")
    ),
    "empty": Row(
        "empty round, 1,000 registered, 50 a round",
        1000,
        1000,
        50,
        overrides=EMPTY,
        runtimes=("in-process", "ray", "flower"),
        rounds=15,
    ),
    "empty-million": Row(
        "empty round, 1,000,000 registered, 50 a round",
        1_000_000,
        1_000_000,
        50,
        8,
        overrides=EMPTY,
        runtimes=("in-process", "ray"),
        rounds=15,
    ),
    "kills": Row(
        "a worker killed in every round",
        100,
        60_000,
        10,
        overrides=CLEAN + EPOCH,
        runtimes=("peace", "kills"),
        rounds=20,
    ),
}


# ----------------------------------------------------------------------------------------- in a process of its own


def make_data(row: Row, folder: Path) -> Path:
    """Writes the images of a row, unless they are there: a pattern per class, and noise."""
    import numpy as np

    path = folder / f"{row.samples}x{row.side}.npz"
    if not path.exists():
        generator = np.random.default_rng(0)
        shape = (row.samples, row.side, row.side)
        labels = generator.integers(0, 10, row.samples)
        pattern = generator.integers(0, 128, (10, row.side, row.side), np.uint8)
        images = pattern[labels] + generator.integers(0, 128, shape, np.uint8)
        np.savez(path, x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    return path


def overrides_of(row: Row, data: Path | None, grid: str, further: Sequence[str]) -> list[str]:
    """Returns a row's configuration."""
    from fedlabel.config import ExperimentConfig

    chosen = ["device=cpu"]
    if not row.default:
        chosen += [
            f"num_rounds={NEVER}",  # it is stopped; the last rounds, which are all evaluated, never come
            f"num_clients={row.clients}",
            f"fraction_train={row.cohort / row.clients}",
            "data.name=npz",
            f"data.root={data}",
            "data.validation_fraction=0",
            "partition.kind=iid",
            "partition.min_samples=1",
            f"evaluation.every={NEVER}",
            "evaluation.figures=false",
            "evaluation.panel_samples=0",
            f"checkpoint.every={NEVER}",
            *row.overrides,
        ]
    stacks = hasattr(ExperimentConfig().grid, "stack")
    if grid == "stacked":
        chosen += ["grid.stack=auto"]
    elif stacks and grid == "in-process":
        chosen += ["grid.stack=off"]
    chosen += ["grid.kind=ray", "grid.num_workers=2"] if grid in ("ray", "kills", "peace") else []
    return [*chosen, *further]


class Enough(Exception):
    """Ends a run after the rounds that are timed."""


def differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def run_fedlabel(
    overrides: Sequence[str], rounds: int, after_round: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs a configuration through the public entry point; one more round comes first."""
    import torch

    from server.simulation import simulate

    ends: list[float] = []
    busy: list[float] = []
    seen: list[dict[str, float]] = []

    def on_round(number: int, metrics: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        busy.append(time.process_time())
        seen.append(dict(metrics))
        if number > rounds:
            raise Enough
        after_round()

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Enough):
        simulate((), overrides, name="run", out=out, on_round=on_round)
    return {
        "start": ends[0] - started,
        "rounds": differences(ends),
        "cpu": differences(busy),
        "inside": [metrics["system/round_seconds"] for metrics in seen[1:]],
        "metrics": seen,
    }


def kill_workers(stop: threading.Event, begun: threading.Event, killed: list[int]) -> None:
    """Kills a worker process of this process's Ray in every round, in the middle of a task, as `kill -9` would."""
    while not stop.is_set():
        if not begun.wait(0.1):
            continue
        busy = [pid for pid in descendants(os.getpid()) if command(pid).startswith("ray::Worker.run")]
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
            begun.clear()


def descendants(root: int) -> list[int]:
    """Returns the processes that `root` started, and those that they did."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, new = [], [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def measure(name: str, runtime: str, rounds: int, data: Path | None, further: Sequence[str]) -> dict[str, Any]:
    """Measures one runtime in this process."""
    row = ROWS[name]
    import torch

    torch.set_num_threads(1)
    if runtime == "bare":
        from bench_bare import BareLoop, timed

        from fedlabel.config import load_config

        started = time.perf_counter()
        loop = BareLoop(load_config((), overrides_of(row, data, "bare", ())))
        start = time.perf_counter() - started
        wall, cpu = timed(loop, rounds)
        found: dict[str, Any] = {"start": start, "rounds": wall, "cpu": cpu}
    else:
        overrides = overrides_of(row, data, runtime, further)
        stop, begun, killed = threading.Event(), threading.Event(), list[int]()
        killer = threading.Thread(target=kill_workers, args=(stop, begun, killed), daemon=True)
        if runtime == "kills":
            killer.start()
        found = run_fedlabel(overrides, rounds, begun.set)
        stop.set()
        found["killed"] = len(killed)
        if name != "kills":
            del found["metrics"]
    found["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


# ------------------------------------------------------------------------------------------------------ all of them


class NotMeasured(Exception):
    """A runtime is left out; the message says why."""


class Bench:
    """Starts the measurements.

    Args:
        arguments: of the command line.
        scratch: a folder for data.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self._pfl: Path | NotMeasured | None = None
        self._base: Path | NotMeasured | None = None

    def once(self, name: str, runtime: str) -> dict[str, Any]:
        """Measures one runtime once.

        Raises:
            NotMeasured: it is not there, took too long, or failed.
        """
        row, arguments = ROWS[name], self.arguments
        rounds = min(row.rounds, 2 if row.peers else 4) if arguments.quick and name != "kills" else row.rounds
        data = None if row.default else make_data(row, self.scratch)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            result = Path(folder) / "result.json"
            environment = self._environment(Path(folder))
            if name == "empty" and runtime == "flower":
                command = [sys.executable, str(SCRIPTS / "bench_rounds.py"), "--measure", "flower"]
                command += ["--rounds", str(rounds), "--json", str(result)]
            elif runtime == "flower" or runtime.startswith("pfl"):
                command = self._peer(row, runtime, rounds, data, Path(folder), result)
            else:
                if runtime == "stacked" and not has_stack():
                    raise NotMeasured("no `grid.stack`")
                if runtime == "base":
                    environment["PYTHONPATH"] = str(self.base())
                command = [sys.executable, __file__, "--measure", name, runtime, "--rounds", str(rounds)]
                command += ["--data", str(data)] if data else []
                command += ["--json", str(result)]
                if runtime not in ("bare", "base"):
                    command += [f"--fedlabel-override={each}" for each in arguments.fedlabel_override]
            run(command, environment, arguments.limit, folder)
            found: dict[str, Any] = json.loads(result.read_text())
            return found

    def _environment(self, folder: Path) -> dict[str, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPTS)]),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("RAY_ADDRESS", None)
        return environment

    def _peer(self, row: Row, runtime: str, rounds: int, data: Path | None, folder: Path, result: Path) -> list[str]:
        from fedlabel.learning.training_config import TrainingConfig

        assert row.peers is not None
        job = {"data": str(data), "clients": row.clients, "cohort": row.cohort, "batch": row.peers[0]}
        job |= {"model": row.peers[1], "lr": TrainingConfig().lr, "rounds": rounds}
        (folder / "job.json").write_text(json.dumps(job))
        program = [str(SCRIPTS / "bench_peers.py"), runtime.partition("-")[0], str(folder / "job.json"), str(result)]
        if runtime == "flower":
            return [sys.executable, *program]
        python = str(self.pfl() / "bin" / "python")
        if runtime == "pfl-1":
            return [python, *program]
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]

    def pfl(self) -> Path:
        """Returns pfl's environment, made if it is not there: pfl alone, on this one's torch."""
        if self._pfl is None:
            self._pfl = _attempt(lambda: install_pfl(self.arguments.pfl_env.expanduser().absolute()))
        if isinstance(self._pfl, NotMeasured):
            raise self._pfl
        return self._pfl

    def base(self) -> Path:
        """Returns a git worktree of the base commit."""
        if self._base is None:
            path = self.scratch / "base"
            self._base = _attempt(lambda: git_worktree(path, self.arguments.base))
        if isinstance(self._base, NotMeasured):
            raise self._base
        return self._base

    def close(self) -> None:
        if isinstance(self._base, Path):
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(self._base)], check=False)


def _attempt(make: Any) -> Path | NotMeasured:
    try:
        made: Path = make()
    except NotMeasured as error:
        return error
    return made


def install_pfl(path: Path) -> Path:
    import sysconfig

    site = path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (site / "pfl").exists():
        environment = dict(os.environ)
        run([sys.executable, "-m", "venv", "--without-pip", str(path)], environment, 120)
        (site / "share.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python"), "install", "-q", f"pfl=={PFL}"]
        run(pip, environment, 600)
    return path


def git_worktree(path: Path, commit: str) -> Path:
    run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(path), commit], dict(os.environ), 120)
    return path


def has_stack() -> bool:
    from fedlabel.config import GridConfig

    return hasattr(GridConfig(), "stack")


def run(command: Sequence[str], environment: dict[str, str], limit: float, folder: str | None = None) -> None:
    """Runs a command in a session of its own, all of which ends with it.

    Raises:
        NotMeasured: it failed or took longer than `limit` seconds.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"over {limit:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            output.seek(0)
            text = output.read()
            print(text[-3000:], file=sys.stderr)
            lines = [line for line in text.splitlines() if line.strip()] or ["nothing printed"]
            raise NotMeasured(f"failed: {lines[-1].strip()[:120]}")


def measure_row(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
    """Measures all runtimes of a row, alternating; returns each one's repeats, or the reason that there are none."""
    found: dict[str, Any] = {runtime: [] for runtime in ROWS[name].runtimes}
    for _ in range(repeats):
        for runtime in found:
            if isinstance(found[runtime], str):
                continue
            try:
                found[runtime].append(bench.once(name, runtime))
            except NotMeasured as error:
                found[runtime] = str(error)
            print(f"{name} {runtime}: {_shown(found[runtime])}", file=sys.stderr, flush=True)
    return found


def seconds(repeats: Any, kind: str = "rounds") -> float | None:
    """Returns the median over repeats of their medians; None if not measured. kind: "rounds", or "cpu"."""
    if isinstance(repeats, str) or not repeats:
        return None
    return statistics.median(statistics.median(each[kind]) for each in repeats)


def _shown(repeats: Any) -> str:
    value = seconds(repeats)
    return f"not measured ({repeats or 'none'})" if value is None else f"{value:.4f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{one / other:.2f}"


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns the tables, in Markdown."""
    lines = []
    trained = {name: found for name, found in results.items() if "bare" in found}
    if trained:
        columns = [*ALL, "ray / floor", "in-process / bare", "the same in CPU s", "stacked / bare", "pfl-2 / floor"]
        lines += ["| s per round | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, found in trained.items():
            value = {runtime: seconds(found.get(runtime, "not a job for it")) for runtime in ALL}
            floor = value["bare"] / 2 if value["bare"] else None
            busy = [seconds(found.get(runtime, ""), "cpu") for runtime in ("in-process", "bare")]
            cells = ["-" if value[runtime] is None else f"{value[runtime]:.3f}" for runtime in ALL]
            cells += [_ratio(value["ray"], floor), _ratio(value["in-process"], value["bare"]), _ratio(*busy)]
            cells += [_ratio(value["stacked"], value["bare"]), _ratio(value["pfl-2"], floor)]
            lines.append(f"| {ROWS[name].title} | " + " | ".join(cells) + " |")
        lines.append("")
    others = {name: found for name, found in results.items() if name not in trained and name != "kills"}
    if others:
        columns = list(dict.fromkeys(runtime for found in others.values() for runtime in found))
        lines.append("| ms per round (start-up s, MiB of the driver) | " + " | ".join(columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, found in others.items():
            cells = [_small(found[column]) if column in found else "-" for column in columns]
            lines.append(f"| {ROWS[name].title} | " + " | ".join(cells) + " |")
        if "digits" in others:
            base, ours = seconds(others["digits"]["base"]), seconds(others["digits"]["in-process"])
            lines.append(f"\ndigits: the base commit's seconds are {_ratio(base, ours)} times ours (in-process).")
        lines.append("")
    if "kills" in results:
        lines.append(report_kills(results["kills"]))
    missing = {
        f"{name} {runtime}": value
        for name, found in results.items()
        for runtime, value in found.items()
        if isinstance(value, str)
    }
    lines += [f"- not measured: {where}: {why}" for where, why in missing.items()]
    return "\n".join(lines)


def _small(repeats: Any) -> str:
    value = seconds(repeats)
    if value is None:
        return "-"
    start = statistics.median(each["start"] for each in repeats)
    memory = f", {statistics.median(each['mib'] for each in repeats):.0f}" if "mib" in repeats[0] else ""
    return f"{1000 * value:.1f} ({start:.1f}{memory})"


def report_kills(found: dict[str, Any]) -> str:
    """Returns what became of a run whose workers were killed, beside one in peace."""
    if any(isinstance(value, str) or not value for value in found.values()):
        return "kills: not measured"
    quiet, killed = found["peace"][-1], found["kills"][-1]
    failed = sum(metrics.get("system/failed_clients", 0) for metrics in killed["metrics"])
    pairs = list(zip(quiet["metrics"], killed["metrics"], strict=True))
    other = sum(_numbers(one) != _numbers(two) for one, two in pairs)
    return (
        f"kills: {killed['killed']} workers killed in {len(pairs)} rounds: {failed:g} clients failed, {other} rounds \
with another number"
    )


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(("train/", "eval/", "pseudo/"))}


def about() -> dict[str, Any]:
    import torch

    from fedlabel.hardware import describe_hardware, versions

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    load = os.getloadavg()
    return {
        "hardware": describe_hardware(torch.device("cpu")),
        "versions": versions(),
        "commit": commit.stdout.strip(),
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be given again")
    parser.add_argument("--runtime", action="append", help="a column of these rows; may be given again")
    parser.add_argument("--repeats", type=int, default=5, help="how often each runtime is started")
    parser.add_argument("--quick", action="store_true", help="once, and few rounds")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one measurement may take")
    parser.add_argument("--base", default="d704c20", help="commit that digits is compared with")
    parser.add_argument("--fedlabel-override", action="append", default=[], metavar="KEY=VALUE")
    cache = Path("~/.cache/fedlabel-bench/pfl")
    parser.add_argument("--pfl-env", type=Path, default=cache, help="environment that pfl is installed into")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "RUNTIME"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, runtime = arguments.measure
        found = measure(name, runtime, arguments.rounds, arguments.data, arguments.fedlabel_override)
        arguments.json.write_text(json.dumps(found))
        return
    results: dict[str, dict[str, Any]] = {}
    before = about()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        try:
            for name in arguments.only or ROWS:
                if arguments.runtime:
                    kept = tuple(each for each in ROWS[name].runtimes if each in arguments.runtime)
                    ROWS[name] = Row(**{**ROWS[name].__dict__, "runtimes": kept})
                repeats = 1 if arguments.quick or name == "kills" else arguments.repeats
                results[name] = measure_row(bench, name, repeats)
        finally:
            bench.close()
    print(report(results))
    hardware, installed = before["hardware"], before["versions"]
    print(
        f"\n{hardware['cpu']}, {hardware['usable_cores']} cores; load {before['load'][0]:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; commit {before['commit']}; torch {installed['torch']}, flwr "
        f"{installed['flwr']}, ray {installed['ray']}, pfl {PFL}, Python {installed['python']}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**before, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
