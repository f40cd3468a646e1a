"""What tracking.level costs: CPU seconds and megabytes of a run at each level, beside the same run at off.

    OMP_NUM_THREADS=1 python scripts/bench_tracking.py [--rounds 100] [--clients 100] [--repeats 3] [key=value ...]

Runs of one seed at all levels are made in turn, in one process and in another order each time, after one run that warms
up and does not count. CPU seconds of the process, so that other work on the machine hardly matters; the metrics of a
run must be the same at every level. Bytes are those of event files, projector and pictures (not metrics.jsonl).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import fedlabel
from fedlabel.config import LEVELS
from fedlabel.record.json_files import read_metrics

BASE = ("device=cpu", "model.name=mlp", "partition.min_samples=1", "checkpoint.every=50")


def run(level: str, overrides: list[str], folder: Path, name: str) -> tuple[float, float, list[dict[str, object]]]:
    """Returns CPU seconds, megabytes for TensorBoard, and the metrics that may not depend on the level."""
    began = time.process_time()
    result = fedlabel.run(overrides=[*BASE, *overrides, f"tracking.level={level}"], name=name, out=folder)
    seconds = time.process_time() - began
    files = [*result.path.rglob("events.out.*"), *result.path.rglob("projector*/*"), *result.path.glob("*.png")]
    rows = [{k: v for k, v in row.items() if not k.startswith("system/")} for row in read_metrics(result.path)]
    return seconds, sum(file.stat().st_size for file in files) / 1e6, rows


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    overrides = [f"num_clients={asked.clients}", *asked.overrides]
    seconds: dict[str, list[float]] = {level: [] for level in LEVELS}
    megabytes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run("full", [*overrides, "num_rounds=5"], Path(folder), "warm")
        for repeat in range(asked.repeats):
            shift = repeat % len(LEVELS)
            metrics = []
            for level in [*LEVELS[shift:], *LEVELS[:shift]]:
                rounds = [*overrides, f"num_rounds={asked.rounds}"]
                spent, size, rows = run(level, rounds, Path(folder), f"{level}{repeat}")
                seconds[level].append(spent)
                megabytes[level] = size
                metrics.append(rows)
                print(f"{level} {repeat}: {spent:.1f} s, {size:.1f} MB", flush=True)
            assert all(rows == metrics[0] for rows in metrics), "the level changed what the run computed"
    print(f"{asked.clients} clients, {asked.rounds} rounds, {asked.repeats} pairs, {' '.join(asked.overrides)}")
    for level in LEVELS:
        added = [100 * (own / off - 1) for own, off in zip(seconds[level], seconds["off"], strict=True)]
        print(
            f"{level:6} {statistics.median(seconds[level]):7.1f} CPU s  {statistics.median(added):+6.1f} % "
            f"[{min(added):+.1f}, {max(added):+.1f}]  {megabytes[level]:6.2f} MB"
        )


if __name__ == "__main__":
    main()
