"""How long a client's work takes on its device, and whether it is there, as pure functions of simulated time.

Time is in seconds since the start of the run, work in passes and bytes that were counted: nothing here depends on the
machine that simulates. A client receives, then computes, then sends; it does one of them at a time, and its link and
processor are its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedlabel.devices.config import DROPOUTS, DevicesConfig
from fedlabel.devices.machines import Machines, ProfiledMachines, Seconds, Work, at_speeds
from fedlabel.devices.profiles import Profile
from fedlabel.devices.traces import TracedMachines
from fedlabel.seeding import derive_seeds

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Of the speeds in `Devices.summary`."""


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
        machines: Machines
        if config.trace is not None:
            machines = TracedMachines.of(config.trace, num_clients, config.correlation, seed, rarity)
        else:
            machines = ProfiledMachines.of(config, num_clients, seed, rarity)
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
        arrival = self._machines.arrival(client, start, work)
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
