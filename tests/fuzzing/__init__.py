"""Seeded wrong input, one module per door: `case(seed, folder)` does one and returns what is wrong, or None.

tests/test_fuzzing.py does some of each; `python scripts/fuzz.py` does as many as asked for.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

Case = Callable[[int, Path], str | None]


class Hang(BaseException):
    """A case took too long; no `except Exception` can swallow it."""


def _stop(*_: object) -> None:
    raise Hang


def limited(case: Case, seed: int, folder: Path, seconds: float) -> str | None:
    """Runs one case and returns what is wrong, which it also is if it takes longer than `seconds`.

    Call it in the main thread, which alone gets signals. What never returns from C cannot be stopped.
    """
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again, in case a callback swallows the first
    try:
        return case(seed, folder)
    except Hang:
        return f"took more than {seconds:g} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
