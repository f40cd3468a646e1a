"""Kills runs at random moments, resumes them, and counts in how many anything differs from a run that was never killed.

Usage: python scripts/kill_runs.py [--kills 25] [--ray 8] [--seed 0] [METHOD ...]

METHOD: names in `METHODS` below (default: all of them in turn). Each run is killed with SIGKILL up to three times, a
random while after its first new round, and then goes on to its end. All metrics but timings and the final weights
are compared, bit by bit. `--ray` of the kills are on Ray, the others in one process. Prints a line per run; exit
status 1 if any differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedlabel
from tests.integration.processes import environment, fedlabel_command, marked, start, stop_marked, wait_until
from tests.integration.tiny import TINY, assert_same_run

ROUNDS = 20
NOISY = ["supervision.kind=noisy", "supervision.label_rate=null", "supervision.noise_rate=0.3"]
METHODS = {
    "fedtrinet": ["method.warmup_rounds=4", "method.quality_start=0.2", "method.ramp_end=2"],
    "elr": [*NOISY],
    "freematch": ["strategy.name=FedAdam", "strategy.args.eta=0.01"],
    "ill": [*NOISY, "method.noise.scope=client"],
    "ill, fedbuff": [
        *NOISY,
        "pacing.kind=fedbuff",
        "pacing.buffer=1",
        "sampling.kind=oort",
        "devices.kind=lognormal",
        "devices.population=[{profile: phone}]",
        "devices.dropout_during=0.1",
    ],
    "proden": ["supervision.kind=partial", "supervision.label_rate=null", "supervision.partial_ratio=0.3"],
    "fedmatch": ["method.helper_interval=1", "method.lambda_i=1"],
    "llp_bp": [
        "method.stage_rounds=7",
        "supervision.kind=bags",
        "supervision.label_rate=null",
        "supervision.bag_size=5",
    ],
}
"""Method, and what else is told apart -> options under which clients, server, strategy or clock remember something."""


def options(method: str) -> list[str]:
    shared = [option for option in TINY if not option.startswith(("method.", "num_rounds"))]
    return [
        *shared,
        f"num_rounds={ROUNDS}",
        "evaluation.figures=false",
        f"method.name={method.partition(',')[0]}",
        *METHODS[method],
    ]


def rounds_in(path: Path) -> int:
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def run_and_kill(out: Path, arguments: list[str], rng: random.Random) -> int | None:
    """Starts a run and kills it in the middle; returns how many rounds it had, None if it ended before."""
    mark, path = uuid.uuid4().hex, out / "killed"
    before = rounds_in(path)
    command = fedlabel_command("run", *arguments, "--name", "killed", "--out", str(out))
    env = environment(FEDLABEL_TEST=mark, RAY_gcs_rpc_server_reconnect_timeout_s="2")
    process = start(command, out / "log", out, env)
    try:
        wait_until(lambda: rounds_in(path) > before or process.poll() is not None, 600, "no rounds")
        time.sleep(rng.uniform(0, 0.8))
        if process.poll() is not None:
            assert process.returncode == 0, (out / "log").read_text()
            return None
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not marked("FEDLABEL_TEST", mark), 60, "processes outlive the killed run", every=0.1)
        return rounds_in(path)
    finally:
        stop_marked("FEDLABEL_TEST", mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--ray", type=int, default=8, help="how many of the kills are on Ray")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if unknown := set(asked.methods) - set(METHODS):
        parser.error(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    rng, names = random.Random(asked.seed), asked.methods or list(METHODS)
    kills, runs, different = {"ray": 0, "in_process": 0}, 0, 0
    wanted = {"ray": asked.ray, "in_process": asked.kills - asked.ray}
    while any(kills[kind] < wanted[kind] for kind in kills):
        method = names[runs % len(names)]
        kind = next(kind for kind in ("in_process", "ray") if kills[kind] < wanted[kind])
        grid = [f"grid.kind={kind}", "grid.num_workers=2"]
        with tempfile.TemporaryDirectory() as folder:
            out, had = Path(folder), []
            for _ in range(min(3, wanted[kind] - kills[kind])):
                resume = ["--resume"] if (out / "killed").exists() else []
                done = run_and_kill(out, [*(options(method) if not resume else grid), *grid, *resume], rng)
                if done is None:
                    break
                had.append(done)
            kills[kind] += len(had)
            runs += 1
            fedlabel.run(overrides=["grid.kind=in_process"], name="killed", out=out, resume=True)
            whole = fedlabel.run(overrides=options(method), name="whole", out=out).path
            try:
                assert_same_run(out / "killed", whole)
                result = "the same"
            except AssertionError:
                different += 1
                result = "DIFFERENT"
        print(f"{method}, {kind}: killed after rounds {had} of {ROUNDS}: {result}", flush=True)
    print(f"{runs} runs, {kills['in_process']} kills in process, {kills['ray']} on Ray, {different} different")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
