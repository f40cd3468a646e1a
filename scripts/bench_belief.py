"""Seconds and memory of belief propagation over bags and neighbours, beside one epoch of the learner on the same data.

    python scripts/bench_belief.py                          # a million samples in bags of 32, 256 and 2048
    python scripts/bench_belief.py --scaling scaling.png    # how it grows with samples, bag size and neighbours

Made-up data: two Gaussians in `--features` dimensions that differ in two of them, 30 % positive, random bags with exact
counts; the graph is made by faiss where it is installed, else by scikit-learn, and timed. Every measurement runs in a
process of its own (on Linux, which says how much memory the inference took on top of data and graph); the learner's
epoch is measured in it right after.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PAPER, SMALL = (5040, 1280, 320, 128, 64), (256, 128, 64)


def make(n: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, generator=generator) < 0.3).long()
    x = torch.randn(n, features, generator=generator)
    x[:, :2] += 4 * labels[:, None] - 2.0
    return x, labels


def epoch(x: torch.Tensor, labels: torch.Tensor, widths: tuple[int, ...], share: float) -> float:
    """Seconds of one epoch in batches of 1024, from `share` of it."""
    from fedlabel.models.nets import Mlp

    net = Mlp((x.shape[1], 1, 1), 2, widths).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    batches = list(zip(x.split(1024), labels.split(1024), strict=True))
    batches = batches[: max(2, int(share * len(batches)))]
    for inputs, targets in batches[:1]:  # warm-up
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
    wait(x.device)
    started = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    wait(x.device)
    return (time.perf_counter() - started) * len(x) / sum(len(inputs) for inputs, _ in batches)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_mib(field: str, forget_peak: bool = False) -> float:
    """Returns what the kernel says of this process: "VmRSS", its memory now, or "VmHWM", the most it ever had.

    Args:
        field: one of these.
        forget_peak: the most it had counts from now.
    """
    if forget_peak:
        ctypes.CDLL(None).malloc_trim(0)  # what the graph no longer needs goes back, or it would be taken from there
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    from fedlabel.inference.belief import Beliefs, marginals
    from fedlabel.inference.neighbors import neighbor_graph

    torch.set_num_threads(arguments.threads)
    x, labels = make(arguments.n, arguments.features)
    started = time.perf_counter()
    faiss = importlib.util.find_spec("faiss") is not None
    graph = neighbor_graph(x, arguments.neighbors, backend="faiss" if faiss else "sklearn")
    graph_seconds = time.perf_counter() - started
    n, size = arguments.n - arguments.n % arguments.bag, arguments.bag
    bag = torch.arange(arguments.n) // size
    bag[n:] = -1
    counts = torch.bincount(bag[:n][labels[:n] == 1], minlength=n // size)
    device = torch.device(arguments.device)
    log_odds, x, y = torch.zeros(arguments.n, device=device), x.to(device), labels.to(device)
    given = [value.to(device) for value in (bag, counts, graph.edges, graph.weight)]

    def infer(iterations: int) -> Beliefs:
        return marginals(
            log_odds,
            *given,
            lambda_edge=arguments.lambda_edge,
            damping=arguments.damping,
            max_iterations=iterations,
        )

    if device.type == "cuda":
        infer(2)  # warm-up
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resident_mib("VmRSS", forget_peak=True)
    wait(device)
    started = time.perf_counter()
    beliefs = infer(200)
    wait(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mib("VmHWM")
    inside = beliefs.probability[:n].cpu()
    return {
        "n": arguments.n,
        "bag": size,
        "k": arguments.neighbors,
        "edges": len(graph.edges),
        "graph s": graph_seconds,
        "iterations": beliefs.iterations,
        "converged": beliefs.converged,
        "belief s": seconds,
        "s / iteration": seconds / beliefs.iterations,
        "MiB before": before,
        "MiB more": peak - before,
        "AUC": roc_auc_score(labels[:n], inside),
        "epoch small s": epoch(x, y, SMALL, 0.2),
        "epoch paper s": epoch(x, y, PAPER, 0.01) if arguments.paper else float("nan"),
    }


def alone(arguments: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    given = {**vars(arguments), **changes}
    options = ["--one", "--n", str(given["n"]), "--bag", str(given["bag"]), "--neighbors", str(given["neighbors"])]
    options += ["--features", str(given["features"]), "--threads", str(given["threads"])]
    options += ["--device", given["device"]]
    options += ["--damping", str(given["damping"]), "--lambda-edge", str(given["lambda_edge"])]
    options += ["--paper"] if given["paper"] else []
    done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> None:
    columns = [*rows[0], "of an epoch"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        values = {**row, "of an epoch": row["belief s"] / row["epoch small s"]}
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values.values()) + " |")


def scaling(arguments: argparse.Namespace) -> None:
    """Time per iteration against each of three sizes, the others fixed, to a figure and a table."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    base = {"n": 131_072, "bag": 32, "neighbors": 5, "paper": False}
    grids = {
        "n": [16_384, 32_768, 65_536, 131_072, 262_144],
        "bag": [8, 16, 32, 64, 128, 256, 512, 2048],
        "neighbors": [0, 2, 5, 10, 20],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, (key, values) in zip(axes, grids.items(), strict=True):
        rows = [alone(arguments, **{**base, key: value}) for value in values]
        table(rows)
        if key == "neighbors":  # without neighbours one iteration is all
            rows, values = rows[1:], values[1:]
        axis.plot(values, [1000 * row["s / iteration"] for row in rows], "o-")
        axis.set_xlabel({"n": "samples", "bag": "samples in a bag", "neighbors": "neighbours"}[key])
        if key != "neighbors":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True, color="#E5E5E5")
    axes[0].set_ylabel("milliseconds an iteration")
    figure.savefig(arguments.scaling, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--bag", type=int, default=0, help="one bag size; 0: 32, 256 and 2048")
    parser.add_argument("--neighbors", type=int, default=5)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--lambda-edge", type=float, default=1.0)
    parser.add_argument("--damping", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of inference and learner; memory is the device's")
    parser.add_argument("--paper", action="store_true", help="also an epoch of the paper's 5040-1280-320-128-64 net")
    parser.add_argument("--scaling", help="file for a figure; smaller sizes than --n")
    parser.add_argument("--one", action="store_true", help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    if arguments.scaling:
        scaling(arguments)
    else:
        table([alone(arguments, bag=bag) for bag in ([arguments.bag] if arguments.bag else [32, 256, 2048])])


if __name__ == "__main__":
    main()
