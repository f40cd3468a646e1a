"""Kills processes of a federation on real nodes at random, and compares its run with one that nothing happened to.

Usage: python scripts/kill_nodes.py [--kills 20] [--rounds 8] [--seed 0] [--kinds KIND ...] [METHOD ...]

METHOD: names in `kill_runs.METHODS` (default: proden and ill in turn; their clients remember something). SuperLink, two
nodes and `flwr run` are processes on loopback, and each that ends is started again, as systemd would: nodes and
SuperLink as they were, `flwr run` with resume=true. Every few seconds SIGKILL hits the SuperLink, a node, or the
ServerApp. All metrics but timings and the final weights are compared, bit by bit, with those of an undisturbed run,
and every client must have counted in every round, once. Prints a line per kill and per run; exit status 1 if any
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.kill_runs import METHODS, rounds_in
from scripts.loopback import Loopback, Process, loopback
from tests.integration.processes import marked
from tests.integration.tiny import TINY, assert_same_run

NODES = 2
KINDS = ("node", "superlink", "serverapp")
AGAIN = 1.0
"""Seconds until what has ended is started again."""


def options(method: str, rounds: int) -> str:
    settings = [option for option in TINY if not option.startswith(("method.", "num_", "fraction_train"))]
    settings += [f"num_clients={NODES}", f"num_rounds={rounds}", "fraction_train=1", "evaluation.figures=false"]
    return " ".join([*settings, f"method.name={method}", *METHODS[method], "grid.connect_timeout=300"])


class Federation:
    """The processes of a federation, each of which is started again when it has ended.

    Args:
        machine: where they run.
        memories: folder for what nodes remember.
        overrides: of the run.
    """

    def __init__(self, machine: Loopback, memories: Path, overrides: str) -> None:
        self._machine, self._memories, self._overrides = machine, memories, overrides
        self.path = machine.work / "runs" / "killed"
        self._superlink = machine.superlink()
        self._nodes = [self._node(client) for client in range(NODES)]
        self._run = self._start_run()
        self._since = time.monotonic()

    def _node(self, client: int) -> Process:
        return self._machine.supernode(client, f'memory="{self._memories / str(client)}"')

    def _start_run(self) -> Process:
        self._since = time.monotonic()
        resume = "true" if (self.path / "config.yaml").exists() else "false"
        return self._machine.run("" if resume == "true" else self._overrides, name='"killed"', resume=resume)

    def serverapps(self) -> list[int]:
        """Returns the ids of the ServerApp's processes."""
        found = []
        for pid in marked("FLWR_HOME", str(self._machine.home)):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"flwr-serverapp" in command:
                found.append(pid)
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended as it should."""
        return (self.path / "summary.json").exists()

    def restart(self) -> None:
        """Starts what has ended."""
        if self._superlink.poll() is not None:
            time.sleep(AGAIN)
            self._superlink = self._machine.superlink()
        for client, node in enumerate(self._nodes):
            if node.poll() is not None:
                time.sleep(AGAIN)
                self._nodes[client] = self._node(client)
        lost = not self.serverapps() and time.monotonic() - self._since > 30
        if (self._run.poll() is not None or lost) and not self.is_finished:
            if self._run.poll() is None:
                self._run.kill()
                self._run.wait()
            self._run = self._start_run()

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kills one; returns whether there was any."""
        if kind == "serverapp":
            pids = self.serverapps()
        else:
            processes = self._nodes if kind == "node" else [self._superlink]
            pids = [process.pid for process in processes if process.poll() is None]
        if not pids:
            return False
        os.kill(rng.choice(pids), signal.SIGKILL)
        self._since = min(self._since, time.monotonic() - 25) if kind == "serverapp" else self._since
        return True


def disturbed(
    folder: Path, overrides: str, kinds: list[str], kills: int, rng: random.Random, most: float
) -> tuple[Path, int]:
    """Runs to the end with up to `kills` kills; returns the run's folder and how many there were."""
    done = 0
    with loopback(folder / "killed", resident=True) as machine:
        federation = Federation(machine, folder / "memories", overrides)
        started = time.monotonic()
        next_kill, before, progress = time.monotonic() + rng.uniform(8, 20), 0, 0
        while not federation.is_finished:
            if time.monotonic() - started > most:
                raise SystemExit(f"The run does not end: {machine.logs(1500)}")
            federation.restart()
            progress = rounds_in(federation.path)
            # After a kill, a round has to end before the next one: else nothing would ever be done.
            if done < kills and time.monotonic() > next_kill and (progress > before or not done):
                kind = rng.choice(kinds)
                if federation.kill(kind, rng):
                    done += 1
                    print(f"  {time.monotonic() - started:.0f} s: {kind} killed after round {progress}", flush=True)
                    next_kill, before = time.monotonic() + rng.uniform(0, 6), progress
            time.sleep(0.1)
        print(f"  {time.monotonic() - started:.0f} s: the run has ended", flush=True)
    return federation.path, done


def undisturbed(folder: Path, overrides: str) -> Path:
    """Runs to the end without a kill."""
    with loopback(folder / "whole", resident=True) as machine:
        federation = Federation(machine, folder / "memories of whole", overrides)
        deadline = time.monotonic() + 600
        while not federation.is_finished and time.monotonic() < deadline:
            time.sleep(0.2)
        if not federation.is_finished:
            raise SystemExit(machine.logs())
    return federation.path


def difference(killed: Path, whole: Path, rounds: int) -> str:
    """Returns what differs; "" if nothing does."""
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    if [row["round"] for row in rows] != list(range(1, rounds + 1)):
        return f"rounds {[row['round'] for row in rows]}"
    if failed := [row["round"] for row in rows if row["system/failed_clients"] or row["system/refused_replies"]]:
        return f"clients failed in rounds {failed}: {(killed / 'failures.log').read_text()[:500]}"
    try:
        assert_same_run(killed, whole)
    except AssertionError as error:
        return str(error)[:500] or "weights or metrics"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: proden ill")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--most", type=float, default=1200, help="seconds that a run may take")
    asked = parser.parse_args()
    methods, rng = asked.methods or ["proden", "ill"], random.Random(asked.seed)
    kills, runs, different = 0, 0, 0
    while kills < asked.kills:
        method = methods[runs % len(methods)]
        with tempfile.TemporaryDirectory() as folder:
            overrides = options(method, asked.rounds)
            whole = undisturbed(Path(folder), overrides)
            limit = min(asked.rounds - 1, asked.kills - kills)
            killed, done = disturbed(Path(folder), overrides, asked.kinds, limit, rng, asked.most)
            wrong = difference(killed, whole, asked.rounds)
        kills, runs, different = kills + done, runs + 1, different + bool(wrong)
        print(f"{method}: {done} kills: {'DIFFERENT: ' + wrong if wrong else 'the same'}", flush=True)
    print(f"{runs} runs, {kills} kills, {different} different")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
