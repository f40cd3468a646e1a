"""Memory of a Ray run in which every client keeps a large array: what the driver holds, and what Ray moves to disk.

    python scripts/bench_memory.py                                # 1,000 clients keep 20 MB each: 20 GB of disk
    python scripts/bench_memory.py --clients 100 --store 0.3      # a tenth of it, with 300 MB of shared memory

Nobody trains. In each round 50 clients that did not take part before get an array; then the first 100 come again and
check that theirs came back. `--store` bounds the shared memory of Ray's object store; the rest goes to Ray's folder
for temporary files, which needs room for all arrays.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.config import load_config, to_yaml
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.methods.batch import State
from server.blocks import cut_into_blocks, cut_into_tasks
from server.grids.base import Order
from server.grids.ray import RayGrid

COHORT = 50
AGAIN = 100
"""Clients that come a second time."""
FLOATS = "FEDLABEL_BENCH_FLOATS"


def train(
    experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
) -> list[ClientResult | Exception]:
    """Runs the round of some clients; each keeps an array that begins with its number."""
    found: list[ClientResult | Exception] = []
    for result, memory in zip(
        train_cohort(experiment, invitation, clients, [{}] * len(clients)), memories, strict=True
    ):
        if isinstance(result, Exception):
            found.append(result)
        elif memory and float(memory["x"][0]) != result.client:
            found.append(ValueError(f"client {result.client} got the memory of {float(memory['x'][0]):g}"))
        elif invitation.round_number < 0 and not memory:
            found.append(ValueError(f"client {result.client} lost its memory"))
        else:
            kept = torch.full((int(os.environ[FLOATS]),), float(result.client))
            found.append(result._replace(kept={"x": kept}))
    return found


def resident() -> float:
    """Returns the MB of memory that this process has for itself, without what it shares with Ray's store."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["RssAnon"].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=20.0, help="that a client keeps")
    parser.add_argument("--store", type=float, default=1.0, help="GB of shared memory")
    options = parser.parse_args()
    os.environ |= {
        FLOATS: str(int(options.megabytes * 1e6 / 4)),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(int(options.store * 1e9)),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    sys.path.insert(0, str(Path(__file__).parent))
    config = load_config(
        (),
        [
            *("method.name=elr", f"num_clients={options.clients}", f"fraction_train={COHORT / options.clients}"),
            *("partition.kind=iid", "partition.min_samples=1", "training.local_steps=0", "model.name=mlp"),
            *(
                "grid.kind=ray",
                "grid.num_workers=2",
                "device=cpu",
                "supervision.kind=full",
                "supervision.label_rate=null",
            ),
        ],
    )
    experiment = open_experiment(to_yaml(config))
    shared = experiment.recipe.shared.start()
    with RayGrid(2, use_gpu=False, train="bench_memory:train") as grid:
        grid.connect(experiment)
        folder = Path(grid._ray._private.worker._global_node.get_session_dir_path())
        rounds = [list(range(start, start + COHORT)) for start in range(0, options.clients, COHORT)]
        rounds += [cohort for cohort in rounds if cohort[0] < AGAIN]
        for number, cohort in enumerate(rounds, 1):
            started = time.perf_counter()
            back = number > options.clients // COHORT
            sent = Invitation(
                -number if back else number, experiment.initial_state, experiment.recipe.shared.broadcast(shared), {}
            )
            blocks = list(grid.train(Order(sent, shared, True), cut_into_tasks(cut_into_blocks(cohort), 1)))
            failures = [failure.reason.splitlines()[0] for block in blocks for failure in block.failures]
            spilled = sum(path.stat().st_size for path in folder.parent.glob("**/ray_spilled_objects*/*")) / 1e9
            seconds = time.perf_counter() - started
            print(
                f"round {number}{' (again)' * back}: driver {resident():.0f} MB of its own, {spilled:.1f} GB on disk, "
                f"{seconds:.1f} s, {len(failures)} failures {failures[:1]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
