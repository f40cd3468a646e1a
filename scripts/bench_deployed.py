"""Seconds per round of a federation on real nodes: SuperLink, SuperNodes and `flwr run` as processes on loopback.

Usage: python scripts/bench_deployed.py [--rounds 5] [--nodes 2] [--runs 1] [--kinds flower resident]

kinds: flower: nodes started with `flower-supernode`, which starts a process for every message; resident: with
`python -m clients.node`, which keeps one. Where several are given, their runs take turns. Prints, for each run, the
seconds from its start to the end of round 1 and those of the later rounds, in which clients take 3 steps on digits
("empty"; with --overrides training.local_steps=3000 they have something to do), what of it is the slowest node's
training, where nodes log it, and the server's own clock; at last the medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.loopback import Loopback, loopback
from tests.integration.tiny import TINY


def measure(machine: Loopback, nodes: int, rounds: int, options: list[str]) -> tuple[float, list[float]]:
    """Returns the seconds until the end of round 1, and those of each later one, of a run."""
    processes = [machine.superlink(), *(machine.supernode(client) for client in range(nodes))]
    settings = [*TINY, f"num_clients={nodes}", f"num_rounds={rounds}", "fraction_train=1", "evaluation.figures=false"]
    started, ends, file = time.monotonic(), list[float](), None
    run = machine.run(" ".join([*settings, *options]))
    while len(ends) < rounds and run.poll() is None:
        file = file or next(machine.work.glob("runs/*/metrics.jsonl"), None)
        done = file.read_bytes().count(b"\n") if file else 0
        ends += [time.monotonic()] * (done - len(ends))
        time.sleep(0.05)
    code = run.wait(timeout=120)
    if len(ends) < rounds or code or any(process.poll() is not None for process in processes):
        raise SystemExit(machine.logs())
    assert file is not None
    taken = [
        re.findall(r"Handled a train message in ([\d.]+) s", log.read_text()) for log in machine.work.glob("*-node*")
    ]
    if slowest := [max(map(float, each)) for each in zip(*taken, strict=True)]:
        print(f"  the slowest node, with its worker: {' '.join(f'{each:.2f}' for each in slowest)}")
    inside = [json.loads(line)["system/round_seconds"] for line in file.read_text().splitlines()]
    print(f"  by the server's clock: {' '.join(f'{each:.1f}' for each in inside)}", flush=True)
    return ends[0] - started, [after - before for before, after in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=["flower", "resident"], choices=["flower", "resident"])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="further ones of the run")
    asked = parser.parse_args()
    first: dict[str, list[float]] = {kind: [] for kind in asked.kinds}
    later: dict[str, list[float]] = {kind: [] for kind in asked.kinds}
    for _ in range(asked.runs):
        for kind in asked.kinds:
            with tempfile.TemporaryDirectory() as folder, loopback(Path(folder) / "b", kind == "resident") as machine:
                begin, rest = measure(machine, asked.nodes, asked.rounds, asked.overrides)
            first[kind].append(begin)
            later[kind] += rest
            print(f"{kind}: first {begin:.1f} s, later {' '.join(f'{each:.1f}' for each in rest)} s", flush=True)
    for kind in asked.kinds:
        print(
            f"{kind}: median of {len(first[kind])} first rounds {statistics.median(first[kind]):.1f} s, of "
            f"{len(later[kind])} later rounds {statistics.median(later[kind]):.1f} s"
        )


if __name__ == "__main__":
    main()
