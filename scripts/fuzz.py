"""Sends seeded wrong input through one door after the other and counts what should not happen.

Usage: python scripts/fuzz.py [AREA ...] [--cases N] [--seed S] [--seconds T]

AREA is a module of tests/fuzzing (default: all of them). A case that takes over T seconds is a hang. Prints a line per
failure, then a line per area; exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests.fuzzing
from tests.fuzzing import limited


def run_area(area: str, cases: int, first_seed: int, seconds: int) -> int:
    case = importlib.import_module(f"tests.fuzzing.{area}").case
    started, failed = time.monotonic(), 0
    for seed in range(first_seed, first_seed + cases):
        with tempfile.TemporaryDirectory() as folder:
            try:
                wrong = limited(case, seed, Path(folder), seconds)
            except Exception:
                wrong = traceback.format_exc().strip().replace("\n", "\n    ")
        if wrong:
            failed += 1
            print(f"{area} {seed}: {wrong}", flush=True)
    print(f"{area}: {cases} cases, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def main() -> None:
    areas = sorted(module.name for module in pkgutil.iter_modules(tests.fuzzing.__path__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(areas)}; default: all")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each next one has the next")
    parser.add_argument("--seconds", type=int, default=20)
    asked = parser.parse_args()
    if unknown := set(asked.areas) - set(areas):
        parser.error(f"unknown area {', '.join(sorted(unknown))}; there are {', '.join(areas)}")
    failed = [run_area(area, asked.cases, asked.seed, asked.seconds) for area in asked.areas or areas]
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
