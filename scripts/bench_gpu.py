"""What the runtime does on one GPU, in eight minutes on a machine that has torch and little else.

    python scripts/bench_gpu.py --wheels wheels             # all parts; JSON to $OUT, or --out
    python scripts/bench_gpu.py --quick --device cpu        # tiny sizes: whether the script itself works
    python scripts/bench_gpu.py --only cifar --extra "stacks of 10:grid.stack=10"

Parts, each in processes of its own, with a time limit each; one that fails is reported and the others go on:

- card: name, memory, versions; what a product of large matrices reaches in fp32, tf32 and bf16 ("peak" below).
- cifar: pfl's CIFAR10 job: 1,000 users of 50 images, cohort 50, batch 10, one local epoch, its simple CNN (two 3x3
  convolutions of 32 and 64 channels, max-pooling, 128 hidden units) without its dropout, expressed as a model of
  fedlabel. s per round of a bare loop, of clients one by one and stacked, with CUDA graphs and without, of pfl itself.
- fedlabel: FedLabel's setting: 100 clients, 10 a round, ResNet-18 with BatchNorm, 30 + 10 steps of 64, 20 % labels: s
  per round in fp32, tf32 and bf16, with CUDA graphs and without, and the share of the measured peak.
- belief: belief propagation over a million samples in bags of 32, 256 and 2048 with five neighbours each, and the
  seconds of an iteration when bags are stacked as for a core's cache.
- masked: steps that are taken and taken back on the device give the metrics of steps that are left out; stacked clients
  those of clients one by one; captured steps those of others.
- tests: the tests of inference that need a GPU.

Images are made up: a pattern per class and noise. The machine needs Python 3.12 and torch; `--wheels` names a folder of
wheels for what it lacks, which are unpacked and put first on the path. Without network beforehand, elsewhere:

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d wheels \\
        flwr==1.41.0 iterators==0.0.2 omegaconf==2.4.0 protobuf==6.33.6 grpcio==1.85.1 grpcio-health-checking==1.85.1 \\
        cryptography==50.0.2 cffi pycparser pycryptodome mako sqlalchemy alembic annotated-types annotated-doc \\
        fastapi==0.138.0 pydantic pydantic-core starlette typing-inspection \\
        pfl==0.6.0 dp-accounting==0.5.1 multiprocess dill prv-accountant dm-tree attrs wrapt

(27 MB; the last line is for pfl). It further needs numpy, scipy, scikit-learn, matplotlib, tensorboard, torchvision,
typer, rich, click, requests, httpx, pyyaml, jinja2, absl-py and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
TOTAL = 480.0
"""Seconds for everything."""
NEVER = 1_000_000_000


# ------------------------------------------------------------------------------------ parts, in their own processes


def card(device: str, quick: bool) -> dict[str, Any]:
    import torch

    from fedlabel.hardware import describe_hardware, versions

    found = {"hardware": describe_hardware(torch.device(device)), "versions": versions()}
    found["torch"] = torch.__version__
    size, repeats = (512, 3) if quick else (8192, 20)
    for name in ("fp32", "tf32", "bf16"):
        with precision(name):
            kind = torch.bfloat16 if name == "bf16" else torch.float32
            a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
            for _ in range(3):
                a @ b
            wait(device)
            started = time.perf_counter()
            for _ in range(repeats):
                a @ b
            wait(device)
            found[f"{name} TFLOP/s"] = 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12
    return found


def wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Allows TF32 inside the context, unless it is fp32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    yield


def made_up(folder: Path, samples: int, side: int = 32) -> Path:
    """Writes colour images: a pattern per class, and noise."""
    import numpy as np

    path = folder / f"{samples}x{side}.npz"
    if not path.exists():
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 10, samples)
        pattern = generator.integers(0, 128, (10, side, side, 3), np.uint8)
        images = pattern[labels] + generator.integers(0, 128, (samples, side, side, 3), np.uint8)
        np.savez(path, x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    return path


def common(data: Path, device: str, clients: int, cohort: int) -> list[str]:
    return [
        f"device={device}",
        f"num_rounds={NEVER}",
        f"num_clients={clients}",
        f"fraction_train={cohort / clients}",
        "data.name=npz",
        f"data.root={data}",
        "data.validation_fraction=0",
        "partition.kind=iid",
        f"evaluation.every={NEVER}",
        "evaluation.figures=false",
        "evaluation.panel_samples=0",
        f"checkpoint.every={NEVER}",
    ]


def ways(extra: Sequence[str]) -> dict[str, list[str]]:
    """Returns the ways to run clients: name -> overrides."""
    graphs, eager = "grid.cuda_graphs=true", "grid.cuda_graphs=false"
    found = {
        "one by one": ["grid.stack=off", eager],
        "one by one + graphs": ["grid.stack=off", graphs],
        "stacked": ["grid.stack=auto", eager],
        "stacked + graphs": ["grid.stack=auto", graphs],
    }
    for each in extra:
        name, _, overrides = each.partition(":")
        found[name] = overrides.split(",")
    return found


def rounds_of(overrides: Sequence[str], rounds: int, device: str) -> dict[str, float]:
    """Runs fedlabel; returns the median seconds per round, the first left out, and GiB of the card."""
    import torch
    from bench_engine import run_fedlabel

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = run_fedlabel(overrides, rounds)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan
    return {"s per round": statistics.median(found["rounds"]), "start s": found["start"], "GiB": memory}


def flops(net: Any, shape: tuple[int, ...], backward: bool) -> float:
    """Returns the operations of a pass of one sample."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        outputs = net(torch.randn(2, *shape))
        if backward:
            outputs.sum().backward()
    return counter.get_total_flops() / 2


def cifar(device: str, quick: bool, way: str, extra: Sequence[str], folder: Path) -> dict[str, Any]:
    import torch
    from bench_peers import Job, network, register, run_pfl

    register()
    users, each, cohort = (20, 20, 5) if quick else (1000, 50, 50)
    rounds = 2 if quick else 8
    data = made_up(folder, users * each)
    job = Job(str(data), users, cohort, 10, "pfl_cnn", 0.1, rounds, device)
    if way == "pfl":
        return {"s per round": statistics.median(run_pfl(job)["rounds"])}
    overrides = [
        *common(data, device, users, cohort),
        "method.name=supervised",
        "supervision.kind=full",
        "training.local_epochs=1",
        "training.batch_size=10",
        "augment.crop_padding=0",
        "augment.flip=false",
        "model.name=pfl_cnn",
    ]
    if way == "bare loop":
        from bench_bare import BareLoop, timed

        from fedlabel.config import load_config

        found = {"s per round": statistics.median(timed(BareLoop(load_config((), overrides)), rounds)[0])}
    else:
        found = rounds_of([*overrides, *ways(extra)[way]], rounds, device)
    torch.manual_seed(0)
    steps = cohort * -(-each // 10) * 10
    found["TFLOP per round"] = steps * flops(network(job, (3, 32, 32)), (3, 32, 32), backward=True) / 1e12
    return found


def fedlabel(device: str, quick: bool, way: str, extra: Sequence[str], folder: Path) -> dict[str, Any]:
    from fedlabel.models import ModelConfig, build_model

    way, _, kind = way.partition(", ")
    clients, each, cohort = (6, 60, 2) if quick else (100, 500, 10)
    steps, further, batch = (2, 1, 8) if quick else (30, 10, 64)
    model = "resnet8" if quick else "resnet18"
    overrides = [
        *common(made_up(folder, clients * each), device, clients, cohort),
        "method.name=fedlabel",
        "supervision.label_rate=0.2",
        f"training.local_steps={steps}",
        f"method.unlabeled_steps={further}",
        f"training.batch_size={batch}",
        "training.lr=0.01",
        f"model.name={model}",
        "model.norm=batch",
        f"training.precision={'bfloat16' if kind == 'bf16' else 'float32'}",
    ]
    with precision(kind):
        found: dict[str, Any] = rounds_of([*overrides, *ways(extra)[way]], 1 if quick else 4, device)
    net = build_model(ModelConfig(name=model, norm="batch"), (3, 32, 32), 10, seed=0)
    forward, both = (flops(net, (3, 32, 32), backward) for backward in (False, True))
    # Labels: a pass with gradient. Then student on two views, and both teachers on one.
    found["TFLOP per round"] = cohort * batch * (steps * both + further * (2 * both + 2 * forward)) / 1e12
    return found


def near(x: Any, neighbors: int = 5, cell: int = 2048) -> tuple[Any, Any]:
    """Returns a graph (e, 2) of the nearest by cosine, searched among `cell` rows with a similar sum of the first two
    features, and weights (e,); as `neighbor_graph`, which takes minutes for a million rows.
    """
    import torch

    order, n = x[:, :2].sum(1).argsort(), len(x)
    directions, pairs = torch.nn.functional.normalize(x, dim=1), []
    for rows in order.split(cell):
        similar = directions[rows] @ directions[rows].T
        nearest = similar.fill_diagonal_(-2).topk(min(neighbors, len(rows) - 1), 1).indices
        pairs.append(torch.stack([rows[:, None].expand_as(nearest), rows[nearest]], -1).flatten(0, 1))
    both = torch.cat(pairs).sort(1).values
    key = (both[:, 0] * n + both[:, 1]).unique()
    edges = torch.stack([key // n, key % n], 1)
    length = (x[edges[:, 0]] - x[edges[:, 1]]).norm(dim=1)
    return edges, (-length / length.median()).exp()


def belief(device: str, quick: bool, size: int) -> dict[str, Any]:
    import torch

    import fedlabel.inference.belief as module
    import fedlabel.inference.cardinality as cardinality

    n = 20_000 // size * size if quick else 1_000_000 // size * size
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, generator=generator) < 0.3).long()
    x = torch.randn(n, 16, generator=generator)
    x[:, :2] += 4 * labels[:, None] - 2.0
    edges, weight = near(x.to(device))
    bag = torch.arange(n) // size
    counts = torch.bincount(bag[labels == 1], minlength=n // size)
    given = [each.to(device) for each in (torch.zeros(n), bag, counts)] + [edges, weight]

    def timed(iterations: int) -> tuple[float, Any]:
        wait(device)
        started = time.perf_counter()
        beliefs = module.marginals(*given, max_iterations=iterations)
        wait(device)
        return time.perf_counter() - started, beliefs

    timed(2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, beliefs = timed(200)
    found = {"s": seconds, "iterations": beliefs.iterations, "converged": beliefs.converged, "edges": len(edges)}
    found["s per iteration"] = seconds / beliefs.iterations
    found["GiB"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan
    found["same bits again"] = bool(torch.equal(beliefs.probability, timed(200)[1].probability))
    if hasattr(cardinality, "wants_large_blocks"):
        for each in (module, cardinality):
            each.wants_large_blocks = lambda values: False  # type: ignore[attr-defined]
        timed(1)
        found["s per iteration, small stacks"] = (timed(6)[0] - timed(2)[0]) / 4
    return found


def masked(device: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Returns the largest relative difference of metrics of two rounds, per method and comparison."""
    from bench_bare import METHODS
    from bench_engine import run_fedlabel

    import fedlabel.learning.step as module

    overrides = [*common(made_up(folder, 200), device, 4, 2), "training.local_steps=3", "training.batch_size=8"]
    original = module.Stepper.of if hasattr(module, "Stepper") and hasattr(module.Stepper, "of") else None

    def run(further: Sequence[str], forced: bool | None) -> list[dict[str, float]]:
        if forced is not None:
            assert original is not None

            def of(*given: Any, **named: Any) -> Any:
                return original(*given, **{**named, "masked": forced})

            module.Stepper.of = of  # type: ignore[method-assign]
        try:
            metrics: list[dict[str, float]] = run_fedlabel([*overrides, *further], 2)["metrics"]
        finally:
            if original is not None:
                module.Stepper.of = original  # type: ignore[method-assign]
        return metrics

    found: dict[str, Any] = {}
    names = ["supervised", "fedlabel"] if quick else list(METHODS)
    for name in names:
        chosen = [f"method.name={name}", *METHODS[name]]
        if original is not None:
            found[f"{name}: masked - branch"] = apart(run(chosen, True), run(chosen, False))
        one, many = (run([*chosen, f"grid.stack={way}"], None) for way in ("off", "2"))
        found[f"{name}: stacked - one by one"] = apart(one, many)
        captured, eager = (run([*chosen, f"grid.cuda_graphs={way}"], None) for way in ("true", "false"))
        found[f"{name}: graphs - none"] = apart(captured, eager)
    return found


def apart(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float:
    """Returns the largest relative difference of two runs' `train/*` metrics."""
    pairs = [
        (first[name], second[name])
        for first, second in zip(one, other, strict=True)
        for name in first
        if name.startswith("train/")
    ]
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)


def tests(device: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    chosen = ["tests/inference/test_cuda.py", "tests/inference/test_sums.py"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], file=sys.stderr)
    return {"summary": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one part, or one row of it, in this process."""
    part, _, way = arguments.measure.partition("/")
    device, quick, folder, extra = arguments.device, arguments.quick, arguments.data, arguments.extra
    if device == "cpu":
        import torch

        torch.set_num_threads(1)
    if part == "card":
        return card(device, quick)
    if part == "cifar":
        return cifar(device, quick, way, extra, folder)
    if part == "fedlabel":
        return fedlabel(device, quick, way, extra, folder)
    if part == "belief":
        return belief(device, quick, int(way))
    return masked(device, quick, folder) if part == "masked" else tests(device, quick)


# ------------------------------------------------------------------------------------------------------ all of them

LIMITS = {"card": 40.0, "cifar": 60.0, "fedlabel": 70.0, "belief": 60.0, "masked": 60.0, "tests": 60.0}
"""Seconds for a row of each part; the most important first, as all of them together may take `TOTAL`."""


def rows(part: str, extra: Sequence[str]) -> list[str]:
    if part == "cifar":
        return [f"cifar/{way}" for way in (*ways(extra), "pfl", "bare loop")]
    if part == "fedlabel":
        alone = ["one by one + graphs, tf32", "one by one + graphs, bf16", "one by one, tf32", "one by one, fp32"]
        further = [f"{way}, bf16" for way in list(ways(extra))[4:]]
        return [f"fedlabel/{row}" for row in (*alone, *further)]
    return [f"belief/{size}" for size in (256, 32, 2048)] if part == "belief" else [part]


def unpack(wheels: Path, into: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)


def start(row: str, arguments: argparse.Namespace, scratch: Path, limit: float, path: str) -> dict[str, Any]:
    """Measures a row in a process of its own; returns its result, or {"failed": why}."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--measure", row, "--device", arguments.device, "--data", str(scratch)]
    command += ["--json", str(result), *["--quick"] * arguments.quick, *[f"--extra={each}" for each in arguments.extra]]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "FLWR_HOME": str(scratch / "flwr")}
    environment["FLWR_TELEMETRY_ENABLED"] = "0"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"over {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code or not result.exists():
            output.seek(0)
            text = output.read()
            print(text[-2500:], flush=True)
            return {"failed": (text.strip().splitlines() or [f"exit code {code}"])[-1][:200]}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def shown(found: dict[str, Any]) -> str:
    parts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.items()
        if not isinstance(value, dict)
    ]
    return "; ".join(parts)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Returns the tables of the two jobs, in Markdown."""
    card_, lines = results.get("card", {}), []
    for part in ("cifar", "fedlabel"):
        found = {name.partition("/")[2]: value for name, value in results.items() if name.startswith(f"{part}/")}
        timed = {name: value for name, value in found.items() if "s per round" in value}
        if not timed:
            continue
        pfl = timed.get("pfl", {}).get("s per round", math.nan)
        lines += [f"| {part} | s per round | pfl's / this | TFLOP/s | of peak | GiB |", "|---|---|---|---|---|---|"]
        for name, value in timed.items():
            kind = next((each for each in ("fp32", "tf32", "bf16") if name.endswith(each)), "tf32")
            rate = value.get("TFLOP per round", math.nan) / value["s per round"]
            share = rate / card_.get(f"{kind} TFLOP/s", math.nan)
            cells = [f"{value['s per round']:.3f}", f"{pfl / value['s per round']:.1f}", f"{rate:.2f}", f"{share:.1%}"]
            lines.append(f"| {name} | {' | '.join(cells)} | {value.get('GiB', math.nan):.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are put first on the path")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="where bench_gpu.json goes")
    parser.add_argument("--only", action="append", help="a part, or a row of one (cifar/pfl); may be given again")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="a further way")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.json.write_text(json.dumps(measure(arguments)))
        return
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        site = scratch / "site"
        if arguments.wheels is not None:
            unpack(arguments.wheels, site)
        path = os.pathsep.join(map(str, (site, ROOT, SCRIPTS)))
        sys.path[:0] = path.split(os.pathsep)
        for chosen in arguments.only or LIMITS:
            part = chosen.partition("/")[0]
            try:
                wanted = [row for row in rows(part, arguments.extra) if chosen in (part, row)]
            except Exception:  # the rest must not be lost
                traceback.print_exc()
                results[part] = {"failed": traceback.format_exc().strip().splitlines()[-1]}
                continue
            for row in wanted:
                left = arguments.total - (time.monotonic() - started)
                if left < 10:
                    results[row] = {"failed": f"no time left of {arguments.total:.0f} s"}
                else:
                    results[row] = start(row, arguments, scratch, min(LIMITS[part], left), path)
                print(f"[{time.monotonic() - started:5.0f} s] {row}: {shown(results[row])}", flush=True)
                (arguments.out / "bench_gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    print(summary(results))


if __name__ == "__main__":
    main()
