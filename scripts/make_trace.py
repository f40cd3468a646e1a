"""Writes configs/devices/two_days.csv: a made-up trace of 50 phones over two days, of the shape that real ones have.

    python scripts/make_trace.py

Phones are on the charger and on Wi-Fi at night, and some for a while by day (as in figure 5 of Bonawitz et al., MLSys
2019, where four times as many are available at night); they differ in speed and bandwidth by factors that are
log-normal. Nobody was measured.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HOUR, DAY, DAYS, PHONES = 3600, 86_400, 2, 50
HEADER = "client,start,end,speed,up,down"
PATH = Path(__file__).parent.parent / "configs" / "devices" / "two_days.csv"


def trace(seed: int = 0) -> str:
    """Returns the text of the file; time 0 is midnight."""
    rng = np.random.default_rng(seed)
    lines = [HEADER]
    for phone in range(PHONES):
        speed = 300 * np.exp(0.6 * rng.standard_normal())
        down = 6.25e6 * np.exp(0.7 * rng.standard_normal())
        bedtime, sleep = 22.5 + rng.standard_normal(), 7.5 + rng.standard_normal()
        times = []
        for day in range(DAYS):
            if rng.random() < 0.9:  # not forgotten
                begin = day * 24 + bedtime + 0.5 * rng.standard_normal()
                times.append((begin, begin + max(3.0, sleep + 0.5 * rng.standard_normal())))
            if rng.random() < 0.4:
                begin = day * 24 + rng.uniform(9, 18)
                times.append((begin, begin + rng.uniform(0.3, 1.5)))
        rows = []
        for begin, end in times:
            # A phone that charges slowly, or is warm, is slower; networks are shared with others.
            at = speed * rng.uniform(0.8, 1.0), down * rng.uniform(0.5, 1.0)
            start, stop = round(begin * HOUR), round(end * HOUR)
            rows += [(first, last, *at) for first, last in _within(start, stop)]
        lines += [f"{phone},{a},{b},{s:.0f},{d / 5:.0f},{d:.0f}" for a, b, s, d in sorted(rows)]
    return "\n".join(lines) + "\n"


def _within(start: int, stop: int) -> list[tuple[int, int]]:
    """Returns the times inside of the trace: what is beyond its end is at its beginning."""
    length = DAYS * DAY
    start, stop = start - start // length * length, stop - start // length * length
    return [(start, stop)] if stop <= length else [(start, length), (0, stop - length)]


if __name__ == "__main__":
    PATH.write_text(trace())
