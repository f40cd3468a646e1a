"""Devices from a trace: a CSV file that says when each device is available, and how fast it is then.

    client,start,end,speed,up,down
    a,0,21600,310,2500000,9000000
    a,80000,86400,290,1200000,6000000
    b,3600,7200,1500,2500000,12500000

In the seconds [start, end) the device has `speed` samples per second of forward passes, half of it of backward passes,
and sends and receives `up` and `down` bytes per second. After the last end of the file all begins again. Rows of a
device that touch are one stretch of availability, also across that end; work goes on through it at changing speeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlabel.data.sets.cells import LARGEST, is_number
from fedlabel.data.sets.csv_files import read_csv
from fedlabel.data.sets.names import listed
from fedlabel.devices.machines import Seconds, Work
from fedlabel.devices.profiles import Profile, assign
from fedlabel.errors import is_file
from fedlabel.names import did_you_mean
from fedlabel.seeding import numpy_generator
from fedlabel.shipped import CONFIGS
from fedlabel.shown import shown

COLUMNS = ("client", "start", "end", "speed", "up", "down")
LONGEST = 10**9
"""Seconds of a trace: 31 years. Later times are those of a calendar."""


class Trace(NamedTuple):
    """A file's rows, sorted by device and start; the rows of a device do not overlap."""

    names: tuple[str, ...]
    """Of the devices, in the order of the file."""
    device: np.ndarray
    """(rows,) int64, the place in `names`."""
    start: np.ndarray
    """(rows,) int64, seconds."""
    end: np.ndarray
    """(rows,) int64."""
    speed: np.ndarray
    """(rows,) float64, samples per second."""
    up: np.ndarray
    """(rows,) float64, bytes per second."""
    down: np.ndarray
    """(rows,) float64."""
    sha256: str
    """Of the file."""


def find_trace(path: str) -> Path:
    """Returns the path of a trace: as given, or of one that comes with fedlabel.

    Raises:
        ValueError: there is none.
    """
    candidates = [Path(path).expanduser(), CONFIGS / path]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    places = dict.fromkeys(shown(candidate.absolute(), 1000) for candidate in candidates)
    raise ValueError(f"`devices.trace` (={shown(path)}) is no file: looked at {', '.join(places)}.")


def read_trace(path: Path) -> Trace:
    """Returns the trace in a CSV file; see the top of this file and, for what a CSV file is, `read_csv`.

    Raises:
        ValueError: it cannot be read, lacks a column, or has an impossible value; the message names row and column.
    """
    where = f"`devices.trace` (={path.name})"
    try:
        columns = read_csv(path).columns
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    for name in COLUMNS:
        if name not in columns:
            others = [each for each in columns if each not in COLUMNS]
            hint = did_you_mean(name, others).replace("Did you mean", "Is it").rstrip()
            raise ValueError(f"{where} has no column `{name}`: it needs {', '.join(COLUMNS)}.{hint}")
    if others := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"{where} has columns that mean nothing here, {listed(others)}: delete them.")
    start, end = (_whole(where, name, columns[name]) for name in ("start", "end"))
    speed, up, down = (_positive(where, name, columns[name]) for name in ("speed", "up", "down"))
    owners = columns["client"]
    if "" in owners:
        raise ValueError(f"{where}, data row {owners.index('') + 1}, column client: it is empty. Name the device.")
    for row in np.flatnonzero(end <= start)[:1].tolist():
        raise ValueError(f"{where}, data row {row + 1}: end (={end[row]}) must be greater than start (={start[row]}).")
    names = tuple(dict.fromkeys(owners))
    place = {name: number for number, name in enumerate(names)}
    device = np.array([place[name] for name in owners], dtype=np.int64)
    order = np.lexsort((start, device))
    overlaps = (device[order][1:] == device[order][:-1]) & (start[order][1:] < end[order][:-1])
    for at in np.flatnonzero(overlaps)[:1].tolist():
        one, other = sorted(order[at : at + 2].tolist())
        raise ValueError(
            f"{where}, data row {other + 1}: the times of client {shown(owners[other])}, {start[other]} to "
            f"{end[other]}, overlap those of data row {one + 1}, {start[one]} to {end[one]}. A device has one speed at "
            "a time: shorten or merge them."
        )
    device, start, end, speed, up, down = (values[order] for values in (device, start, end, speed, up, down))
    return Trace(names, device, start, end, speed, up, down, digest)


def _whole(where: str, name: str, cells: Sequence[str]) -> np.ndarray:
    values = _numbers(where, name, cells)
    for row in np.flatnonzero((values % 1 != 0) | (values < 0) | (values > LONGEST))[:1].tolist():
        raise ValueError(
            f"{where}, data row {row + 1}, column {name} (={shown(cells[row])}): it must be a whole number of seconds "
            f"since the trace's beginning, from 0 to {LONGEST}. Round it; from times of a calendar subtract the first."
        )
    return values.astype(np.int64)


def _positive(where: str, name: str, cells: Sequence[str]) -> np.ndarray:
    values = _numbers(where, name, cells)
    for row in np.flatnonzero((values <= 0) | (values > LARGEST))[:1].tolist():
        unit = "samples" if name == "speed" else "bytes"
        raise ValueError(
            f"{where}, data row {row + 1}, column {name} (={shown(cells[row])}): it must be a positive number of "
            f"{unit} per second. Leave out the time at which a device is not available."
        )
    return values


def _numbers(where: str, name: str, cells: Sequence[str]) -> np.ndarray:
    for row, cell in enumerate(cells):
        if not is_number(cell):
            raise ValueError(f"{where}, data row {row + 1}, column {name}: {shown(cell) or 'it'} is not a number.")
    return np.array([float(cell) for cell in cells])


class Rates(NamedTuple):
    """The speed of one kind of work in each row of a trace."""

    rate: np.ndarray
    """(rows,) per second."""
    capacity: np.ndarray
    """(rows,) how much a device does in the row."""
    before: np.ndarray
    """(rows,) how much it does in its rows before this one."""


class TracedMachines:
    """Devices of a trace.

    Whole seconds of the trace make all comparisons of times exact; and what a device does until a time is read off one
    rising function, so that more work is never done earlier, not even by rounding.

    Args:
        trace: the trace.
        device: (n,) int64, the device of each client.
    """

    def __init__(self, trace: Trace, device: np.ndarray) -> None:
        self._trace, self._device = trace, device
        self._cycle = int(trace.end.max())
        """Seconds after which all begins again."""
        self._offsets = np.searchsorted(trace.device, np.arange(len(trace.names) + 1))
        self._key = trace.device * self._cycle + trace.start
        """(rows,) rising."""
        first, last = self._offsets[:-1], self._offsets[1:] - 1
        joined = (trace.device[1:] == trace.device[:-1]) & (trace.start[1:] == trace.end[:-1])
        stretch_ends = np.flatnonzero(np.append(~joined, True))
        self._last = stretch_ends[np.searchsorted(stretch_ends, np.arange(len(trace.start)))]
        """(rows,) the last row of the stretch, within the cycle."""
        self._goes_on = (trace.start[first] == 0) & (trace.end[last] == self._cycle)
        """(devices,) whether a stretch goes on from the end of the cycle to its beginning."""
        self._always = self._goes_on & (self._last[first] == last)
        """(devices,) whether the device is always available."""
        self._computes, self._sends, self._receives = map(self._rates, (trace.speed, trace.up, trace.down))
        time = np.add.reduceat(trace.end - trace.start, first)
        self._mean = {
            name: np.add.reduceat(rates.capacity, first) / time
            for name, rates in (("forward", self._computes), ("up", self._sends), ("down", self._receives))
        }
        self._share = time / self._cycle

    @classmethod
    def of(
        cls, path: str, num_clients: int, correlation: float, seed: int, rarity: np.ndarray | None
    ) -> TracedMachines:
        """Draws a device of the trace for each client; each comes once before one comes twice. For the arguments see
        `Devices.of`.
        """
        trace = read_trace(find_trace(path))
        order = numpy_generator(seed, "devices", "trace").permutation(len(trace.names))
        drawn = order[np.arange(num_clients) % len(order)]
        speed = cls(trace, drawn).forward(np.arange(num_clients))
        return cls(trace, drawn[assign(speed, rarity, correlation, seed)])

    def _rates(self, rate: np.ndarray) -> Rates:
        capacity = (self._trace.end - self._trace.start) * rate
        before = np.empty_like(capacity)
        for first, stop in zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist(), strict=True):
            before[first] = 0
            np.cumsum(capacity[first : stop - 1], out=before[first + 1 : stop])
        return Rates(rate, capacity, before)

    def profile(self, client: int) -> Profile:
        """See `Machines`."""
        device = self._device[client]
        forward, down, up = (float(self._mean[name][device]) for name in ("forward", "down", "up"))
        return Profile(forward, forward / 2, down, up, math.inf, float(self._share[device]))

    def forward(self, clients: np.ndarray) -> np.ndarray:
        """See `Machines`."""
        return self._mean["forward"][self._device[clients]]

    def memory(self, clients: np.ndarray) -> np.ndarray:
        """See `Machines`."""
        return np.full(len(clients), math.inf)

    def seconds(self, client: int, work: Work, start: float) -> Seconds:
        """See `Machines`."""
        times = [start, *self._times(client, start, work)]
        return Seconds(*(then - now if then < math.inf else then for now, then in pairwise(times)))

    def arrival(self, client: int, start: float, work: Work) -> float:
        """See `Machines`."""
        return self._times(client, start, work)[-1]

    def ends(self, client: int, time: float) -> float:
        """See `Machines`."""
        device, cycle, row = self._find(client, time)
        if row is None:
            return time
        if self._always[device]:
            return math.inf
        last = self._last[row]
        if last == self._offsets[device + 1] - 1 and self._goes_on[device]:
            last, cycle = self._last[self._offsets[device]], cycle + 1
        return float(cycle * self._cycle + self._trace.end[last])

    def is_available(self, clients: np.ndarray, time: float) -> np.ndarray:
        """See `Machines`."""
        return self._rows(clients, time)[1]

    def next_available(self, clients: np.ndarray, time: float) -> float:
        """See `Machines`."""
        row, there = self._rows(clients, time)
        if there.any():
            return time
        device, begun = self._device[clients], time // self._cycle * self._cycle
        is_last = row + 1 == self._offsets[device + 1]
        following = np.where(is_last, self._offsets[device], row + 1)
        return float((begun + is_last * self._cycle + self._trace.start[following]).min())

    @property
    def may_leave(self) -> bool:
        """See `Machines`."""
        return not bool(self._always[self._device].all())

    def summary(self) -> dict[str, Any]:
        """See `Machines`."""
        trace = self._trace
        return {
            "trace": {
                "devices": len(trace.names),
                "rows": len(trace.start),
                "seconds": self._cycle,
                "sha256": trace.sha256,
            }
        }

    def _rows(self, clients: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns (m,) the last row of each client's device that begins by `time` in its cycle, the one before the
        device's first if none does; and (m,) bool, whether the client is available.
        """
        device, second = self._device[clients], int(time % self._cycle)
        row = np.searchsorted(self._key, device * self._cycle + second, side="right") - 1
        return row, (row >= self._offsets[device]) & (second < self._trace.end[row])

    def _find(self, client: int, time: float) -> tuple[int, int, int | None]:
        """Returns the client's device, the number of the cycle, and the row in which it is available; None if not."""
        row, there = self._rows(np.array([client]), time)
        return int(self._device[client]), int(time // self._cycle), int(row[0]) if there[0] else None

    def _times(self, client: int, start: float, work: Work) -> tuple[float, float, float]:
        """Returns when the work is received, computed and sent."""
        received = self._after(client, start, work.bytes_down, self._receives)
        # Of a backward pass a device does half as many samples a second.
        computed = self._after(client, received, work.forward + 2 * work.backward, self._computes)
        return received, computed, self._after(client, computed, work.bytes_up, self._sends)

    def _after(self, client: int, time: float, amount: float, rates: Rates) -> float:
        """Returns when an amount of work is done that begins at `time`, or goes on then; `math.inf` if not before the
        client leaves.
        """
        if amount == 0 or time == math.inf:
            return time
        device, cycle, row = self._find(client, time)
        if row is None:
            return math.inf
        first, last = int(self._offsets[device]), int(self._offsets[device + 1] - 1)
        rate, capacity, before = rates
        done = before[row] + (time % self._cycle - self._trace.start[row]) * rate[row] + amount
        whole = before[last] + capacity[last]
        stretch = int(self._last[row])
        if done > whole and stretch == last and self._goes_on[device]:
            done, cycle, stretch = done - whole, cycle + 1, int(self._last[first])
            if self._always[device]:
                cycles, done = divmod(done, whole)
                cycle += int(cycles)
        if done > before[stretch] + capacity[stretch]:
            return math.inf
        at = max(first, first + int(np.searchsorted(before[first : stretch + 1], done)) - 1)
        second = min(self._trace.start[at] + (done - before[at]) / rate[at], self._trace.end[at])
        return max(time, float(cycle * self._cycle + second))
