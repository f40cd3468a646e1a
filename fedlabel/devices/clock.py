"""How long a client's work takes on its device, and whether it is there, as pure functions of simulated time.

Time is in seconds since the start of the run, work in passes and bytes that were counted: nothing here depends on the
machine that simulates. A client receives, then computes, then sends; it does one of them at a time, and its link and
processor are its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedlabel.devices.config import DROPOUTS, DevicesConfig
from fedlabel.devices.profiles import Profile, assign, lognormal_factors, shares_of, zipf_factors
from fedlabel.seeding import derive_seeds, numpy_generator

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Of the speeds in `Devices.summary`."""


class Work(NamedTuple):
    """What a client does in a round."""

    forward: float
    """Samples of forward passes, those that a backward pass follows included."""
    backward: float
    """Samples of backward passes."""
    bytes_down: float
    """Bytes that it receives."""
    bytes_up: float
    """Bytes that it sends."""


class Seconds(NamedTuple):
    """How long the parts of a client's work take, in this order; `math.inf` for what cannot be done."""

    down: float
    compute: float
    up: float

    @property
    def total(self) -> float:
        """Seconds of all together."""
        return self.down + self.compute + self.up


class Machines(Protocol):
    """Speeds and availability of all clients. Clients are numbers from 0, `clients` (m,) integers, times seconds."""

    def profile(self, client: int) -> Profile:
        """Returns what the client's device can do, on the average of the time that it is available."""

    def forward(self, clients: np.ndarray) -> np.ndarray:
        """Returns (m,) float64, the samples per second of forward passes, as of `profile`."""

    def memory(self, clients: np.ndarray) -> np.ndarray:
        """Returns (m,) float64, bytes; `math.inf` where nobody says."""

    def seconds(self, client: int, work: Work, start: float) -> Seconds:
        """Returns how long work takes that the client begins at `start`, when it is available."""

    def ends(self, client: int, time: float) -> float:
        """Returns until when a client that is available at `time` stays so, `math.inf` for ever; `time` if it is not
        available.
        """

    def is_available(self, clients: np.ndarray, time: float) -> np.ndarray:
        """Returns (m,) bool."""

    def next_available(self, clients: np.ndarray, time: float) -> float:
        """Returns the first time from `time` on at which one of the clients, of which there is one, is available."""

    @property
    def may_leave(self) -> bool:
        """Whether some device is not always available."""

    def summary(self) -> dict[str, Any]:
        """Returns what `Devices.summary` says of them besides the speeds."""


class Devices:
    """The devices of all clients.

    Args:
        machines: their speeds and availability.
        num_clients: how many there are.
        dropout: the probabilities of `DROPOUTS` for each client and round.
        seed: the experiment's.
    """

    def __init__(self, machines: Machines, num_clients: int, dropout: tuple[float, ...], seed: int) -> None:
        self._machines = machines
        self._num_clients = num_clients
        self._dropout = dropout
        self._seed = seed

    @classmethod
    def of(cls, config: DevicesConfig, num_clients: int, seed: int, rarity: np.ndarray | None = None) -> Devices:
        """Returns the devices that a configuration describes.

        Args:
            config: of any kind but none.
            num_clients: how many clients there are.
            seed: the experiment's.
            rarity: (num_clients,) the share of each client's samples that are of rare classes; with a correlation only.

        Raises:
            ValueError: the trace is missing or damaged.
        """
        assert config.kind != "none"
        machines: Machines = ProfiledMachines.of(config, num_clients, seed, rarity)
        return cls(machines, num_clients, config.dropout, seed)

    def profile(self, client: int) -> Profile:
        """Returns what the client's device can do; of a trace the average over the time that it is available."""
        return self._machines.profile(client)

    def speed(self, clients: np.ndarray) -> np.ndarray:
        """Returns (m,) float64, samples per second of forward passes (see `profile`); clients: (m,) integers."""
        return self._machines.forward(clients)

    def seconds(self, client: int, work: Work, start: float | None = None) -> Seconds:
        """Returns how long work takes.

        Args:
            client: whose.
            work: what is to be done.
            start: when it begins, which matters with a trace: a device's speed changes with time there, and work that
                it cannot finish before it leaves takes infinitely long. None: at the average speeds of `profile`.
        """
        if start is not None:
            return self._machines.seconds(client, work, start)
        return at_speeds(self.profile(client), work)

    def finish(self, client: int, start: float, work: Work) -> float:
        """Returns the time at which the reply to an invitation of time `start` arrives; `math.inf` if the device is not
        available then, or leaves before that.
        """
        end = self._machines.ends(client, start)
        if end <= start:
            return math.inf
        arrival = start + self._machines.seconds(client, work, start).total
        return arrival if arrival <= end else math.inf

    def least(self, client: int, start: float, bytes_down: float, bytes_up: float) -> float:
        """Returns a lower bound of `finish` for these bytes and any passes."""
        return self.finish(client, start, Work(0, 0, bytes_down, bytes_up))

    def stays(self, client: int, time: float) -> float:
        """Returns for how many seconds from `time` on the client is available: 0 if it is not, `math.inf` for ever."""
        return self._machines.ends(client, time) - time

    def is_available(self, clients: np.ndarray, time: float) -> np.ndarray:
        """Returns (m,) bool, who is available; clients: (m,) integers."""
        return self._machines.is_available(clients, time)

    def next_available(self, clients: np.ndarray, time: float) -> float:
        """Returns the first time from `time` on at which one of the clients, (m,) integers, is available; `math.inf`
        without any client.
        """
        return self._machines.next_available(clients, time) if len(clients) else math.inf

    def fits(self, clients: np.ndarray, bytes_needed: float) -> np.ndarray:
        """Returns (m,) bool, whose memory holds so many bytes; clients: (m,) integers. A trace has no limit."""
        return self._machines.memory(clients) >= bytes_needed

    @property
    def may_lose(self) -> bool:
        """Whether the reply of a client that was invited can fail to arrive."""
        return any(self._dropout) or self.may_leave

    @property
    def may_leave(self) -> bool:
        """Whether some device is not always available."""
        return self._machines.may_leave

    def dropouts(self, round_number: int, clients: np.ndarray) -> dict[int, str]:
        """Returns who drops out of a round if invited, and when: client -> one of `DROPOUTS`.

        Args:
            round_number: of the round.
            clients: (m,) integers. What becomes of a client does not depend on the others.
        """
        if not any(self._dropout):
            return {}
        drawn = derive_seeds(self._seed, "devices", "dropout", round_number, last=clients)
        uniform = (drawn >> np.uint64(10)) * 2.0**-53  # of 63 bits, as many as a float holds
        when = np.searchsorted(np.cumsum(self._dropout), uniform, side="right").tolist()
        return {
            client: DROPOUTS[place]
            for client, place in zip(clients.tolist(), when, strict=True)
            if place < len(DROPOUTS)
        }

    def summary(self) -> dict[str, Any]:
        """Returns a few numbers for a run's summary: clients per profile or trace, and quantiles of their speeds in
        samples per second.
        """
        speed = self.speed(np.arange(self._num_clients))
        quantiles = np.quantile(speed, QUANTILES).tolist()
        return {
            **self._machines.summary(),
            "speed": {f"q{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        }


def at_speeds(profile: Profile, work: Work) -> Seconds:
    """Returns how long work takes at constant speeds."""
    return Seconds(
        work.bytes_down / profile.down,
        work.forward / profile.forward + work.backward / profile.backward,
        work.bytes_up / profile.up,
    )


class ProfiledMachines:
    """Devices with a profile and a factor on its speeds, available for the same share of every period.

    Args:
        profiles: the different ones.
        names: their names.
        kind: (n,) int64, the profile of each client.
        factor: (n,) by which a client's speeds are multiplied.
        period: seconds after which availability repeats.
        phase: (n,) seconds in [0, period): a client that is not always available is so from `phase + k * period` on,
            for each whole number k, until its share of the period is over.
    """

    def __init__(
        self,
        profiles: list[Profile],
        names: list[str],
        kind: np.ndarray,
        factor: np.ndarray,
        period: float,
        phase: np.ndarray,
    ) -> None:
        self._profiles, self._names, self._kind, self._factor = profiles, names, kind, factor
        self._forward, self._memory, self._share = (
            np.array([getattr(each, name) for each in profiles], dtype=np.float64)
            for name in ("forward", "memory", "available")
        )
        self._period, self._phase = period, phase

    @classmethod
    def of(cls, config: DevicesConfig, num_clients: int, seed: int, rarity: np.ndarray | None) -> ProfiledMachines:
        """Draws them; for the arguments see `Devices.of`."""
        profiles, names = config.profiles, [part.profile for part in config.population]
        kind = shares_of([part.share for part in config.population], num_clients)
        match config.kind:
            case "lognormal":
                factor = lognormal_factors(config.sigma, num_clients, seed)
            case "zipf":
                factor = zipf_factors(config.exponent, num_clients, seed)
            case _:
                factor = np.ones(num_clients)
        speed = np.array([each.forward for each in profiles])[kind] * factor
        device = assign(speed, rarity, config.correlation, seed)
        phase = numpy_generator(seed, "devices", "phases").random(num_clients) * config.period
        return cls(profiles, names, kind[device], factor[device], config.period, phase)

    def profile(self, client: int) -> Profile:
        """See `Machines`."""
        profile, factor = self._profiles[self._kind[client]], float(self._factor[client])
        forward, backward, down, up = (factor * speed for speed in profile[:4])
        return Profile(forward, backward, down, up, profile.memory, profile.available)

    def forward(self, clients: np.ndarray) -> np.ndarray:
        """See `Machines`."""
        return self._forward[self._kind[clients]] * self._factor[clients]

    def memory(self, clients: np.ndarray) -> np.ndarray:
        """See `Machines`."""
        return self._memory[self._kind[clients]]

    def seconds(self, client: int, work: Work, start: float) -> Seconds:
        """See `Machines`."""
        return at_speeds(self.profile(client), work)

    def ends(self, client: int, time: float) -> float:
        """See `Machines`."""
        begin, end = self._window(np.array([client]), time)
        return float(end[0]) if begin[0] <= time < end[0] else time

    def is_available(self, clients: np.ndarray, time: float) -> np.ndarray:
        """See `Machines`."""
        return time < self._window(clients, time)[1]

    def next_available(self, clients: np.ndarray, time: float) -> float:
        """See `Machines`."""
        there = self.is_available(clients, time)
        return time if there.any() else float(self._begin(clients, self._cycle(clients, time) + 1).min())

    @property
    def may_leave(self) -> bool:
        """See `Machines`."""
        return bool((self._share < 1).any())

    def summary(self) -> dict[str, Any]:
        """See `Machines`."""
        counts = dict.fromkeys(self._names, 0)
        for name, count in zip(self._names, np.bincount(self._kind, minlength=len(self._names)), strict=True):
            counts[name] += int(count)
        return {"profiles": counts}

    def _window(self, clients: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns (m,) begin and end of each client's last time of availability that began by `time`."""
        begin, share = self._begin(clients, self._cycle(clients, time)), self._share[self._kind[clients]]
        return begin, np.where(share == 1, math.inf, begin + share * self._period)

    def _cycle(self, clients: np.ndarray, time: float) -> np.ndarray:
        """Returns (m,) the largest whole k with `_begin(clients, k) <= time`."""
        k = np.floor((time - self._phase[clients]) / self._period)
        # Rounding may put it one off, and then a client would not be there at the very time at which it comes.
        k -= self._begin(clients, k) > time
        return k + (self._begin(clients, k + 1) <= time)

    def _begin(self, clients: np.ndarray, k: np.ndarray) -> np.ndarray:
        return self._phase[clients] + k * self._period
