"""Draws the clients of a round: one function for each kind of sampling, pure in what it is given.

All draw without replacement, from clients that are connected and not excluded. Where fewer are left than wanted, all of
them train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlabel.server_config import SamplingConfig

PENALTY, EXPLORATION = 2.0, 0.2
"""Oort's defaults of `sampling.speed_exponent` and `sampling.exploration`."""
CUTOFF = 0.95
"""Oort draws among clients whose utility is at least this share of that of the last one in the cohort."""


@dataclass
class History:
    """What the server remembers of clients that have trained: of each its last round."""

    loss: dict[int, float] = field(default_factory=dict)
    """Client -> its mean training loss."""
    samples: dict[int, float] = field(default_factory=dict)
    """Client -> over how many samples."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Client -> how long it took on the simulated clock; only with a clock."""
    round: dict[int, int] = field(default_factory=dict)
    """Client -> the number of the round."""

    def see(self, client: int, number: int, loss: tuple[float, float], seconds: float | None) -> None:
        """Records a client's result; loss: sum and number of samples."""
        total, count = loss
        self.loss[client], self.samples[client] = (total / count if count else 0.0), count
        self.round[client] = number
        if seconds is not None:
            self.seconds[client] = seconds

    def dump(self) -> dict[str, Any]:
        """Returns it as arrays, for a checkpoint."""
        clients = sorted(self.round)
        columns = {name: [getattr(self, name).get(client, math.nan) for client in clients] for name in COLUMNS}
        return {"client": np.array(clients, np.int64), **{n: np.array(v, np.float64) for n, v in columns.items()}}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> History:
        """Restores the result of `dump`."""
        history, clients = cls(), saved["client"].tolist()
        for name in COLUMNS:
            kept = {c: v for c, v in zip(clients, saved[name].tolist(), strict=True) if not math.isnan(v)}
            setattr(history, name, {c: int(v) for c, v in kept.items()} if name == "round" else kept)
        return history


COLUMNS = ("loss", "samples", "seconds", "round")
"""Of `History`, and of its arrays in a checkpoint."""
REMEMBERING = ("power_of_choice", "oort")
"""Kinds of sampling that go by how clients trained before."""


@dataclass(frozen=True)
class Pool:
    """The clients that may be drawn."""

    num_clients: int
    history: History
    excluded: frozenset[int] = frozenset()
    """Clients that may not be drawn: they train already, say."""
    sizes: Callable[[], np.ndarray] = lambda: np.empty(0)
    """() -> (clients,) samples of each client."""
    kinds: Callable[[], np.ndarray] = lambda: np.empty((0, 0))
    """() -> (clients, kinds) samples of each client by kind of label."""
    connected: np.ndarray | None = None
    """Clients whose device is available at this moment; None: all."""
    availability: Callable[[np.ndarray], np.ndarray] = lambda clients: np.ones(len(clients))
    """Clients -> the share of the time that each one's device is available."""

    def of(self, clients: np.ndarray) -> np.ndarray:
        """Returns those of some clients that may be drawn."""
        return clients[~np.isin(clients, list(self.excluded))] if self.excluded else clients

    def everybody(self) -> np.ndarray:
        """Returns all clients that may be drawn."""
        return self.of(np.arange(self.num_clients) if self.connected is None else self.connected)


Sampler = Callable[[Pool, int, np.random.Generator], list[int]]


def sampler_of(config: SamplingConfig) -> Sampler:
    """Returns the function that `sampling.kind` names, with its settings."""
    if config.kind == "power_of_choice":
        return lambda pool, size, rng: power_of_choice(pool, size, rng, config.candidates)
    if config.kind == "oort":
        exploration = EXPLORATION if config.exploration is None else config.exploration
        penalty = PENALTY if config.speed_exponent is None else config.speed_exponent
        return lambda pool, size, rng: oort(pool, size, rng, exploration, penalty)
    plain: dict[str, Sampler] = {
        "uniform": uniform,
        "size": by_size,
        "least_available": least_available,
        "label_kinds": label_kinds,
    }
    return plain[config.kind]


def uniform(pool: Pool, size: int, rng: np.random.Generator) -> list[int]:
    """Draws clients with equal probability; if all are connected, at a cost that does not depend on their number."""
    if pool.connected is not None:
        return _uniform(pool.everybody(), size, rng)
    # In a random order, so that the first ones that are not excluded are a uniform draw, too.
    drawn = rng.choice(pool.num_clients, min(size + len(pool.excluded), pool.num_clients), replace=False)
    return sorted(pool.of(drawn)[:size].tolist())


def by_size(pool: Pool, size: int, rng: np.random.Generator) -> list[int]:
    """Draws clients with probability proportional to the number of their samples, one after the other."""
    clients = pool.everybody()
    weights = pool.sizes()[clients].astype(float)
    return _weighted(clients, weights, size, rng)


def least_available(pool: Pool, size: int, rng: np.random.Generator) -> list[int]:
    """Returns the clients that are available for the smallest share of the time, as others will be there later, too
    (after Abdelmoniem et al., "REFL", EuroSys 2023, who predict it).
    """
    clients = rng.permutation(pool.everybody())  # among equals, chance decides
    order = np.argsort(pool.availability(clients), kind="stable")
    return sorted(clients[order[:size]].tolist())


def power_of_choice(pool: Pool, size: int, rng: np.random.Generator, candidates: int | None = None) -> list[int]:
    """Draws candidates by size and returns those with the largest loss when they trained last; those that never trained
    come first (Cho et al., AISTATS 2022, the variant rpow-d, which asks nobody for a loss).

    Args:
        pool: who may be drawn.
        size: clients wanted.
        rng: draws the candidates.
        candidates: how many; None: twice as many as wanted.
    """
    drawn = by_size(pool, max(size, candidates or 2 * size), rng)
    order = rng.permutation(len(drawn))  # among equals, chance decides
    ranked = sorted((drawn[place] for place in order), key=lambda client: -pool.history.loss.get(client, math.inf))
    return sorted(ranked[:size])


def oort(
    pool: Pool, size: int, rng: np.random.Generator, exploration: float = EXPLORATION, penalty: float = PENALTY
) -> list[int]:
    """Draws clients by utility, and some that never trained (after Lai et al., "Oort", OSDI 2021).

    The utility is samples * loss, scaled to at most 1, plus sqrt(0.1 log(round) / last round), which grows for those
    that have not trained for long; times (T / t)^penalty for clients that took t > T seconds, where T is the median.
    Oort has the root of the mean squared loss in place of the mean loss, and adapts T.

    Args:
        pool: who may be drawn.
        size: clients wanted.
        rng: draws them.
        exploration: share of clients that never trained, if there are any.
        penalty: exponent of the speed.
    """
    history, clients = pool.history, pool.everybody()
    has_trained = np.isin(clients, list(history.round))
    tried, new = clients[has_trained], clients[~has_trained]
    wanted = min(len(tried), size - min(len(new), math.ceil(exploration * size)))
    drawn: list[int] = []
    if wanted:
        utility = oort_utility(history, tried, penalty)
        least = CUTOFF * np.sort(utility)[-wanted]
        drawn = _weighted(tried[utility >= least], utility[utility >= least], wanted, rng)
    return sorted([*drawn, *_uniform(new, size - len(drawn), rng)])


def oort_utility(history: History, clients: np.ndarray, penalty: float) -> np.ndarray:
    """Returns the utility of clients that have trained, (m,), see `oort`."""
    samples, loss, last = (
        np.array([getattr(history, name)[client] for client in clients.tolist()], float)
        for name in ("samples", "loss", "round")
    )
    gain = np.maximum(samples * loss, 0.0)
    now = max(history.round.values()) + 1
    utility = gain / max(gain.max(), 1e-12) + np.sqrt(0.1 * math.log(now) / last)
    if history.seconds:
        median = float(np.median(list(history.seconds.values())))
        took = np.array([history.seconds.get(client, median) for client in clients.tolist()])
        utility = np.where(took > median, utility * (median / np.maximum(took, 1e-12)) ** penalty, utility)
    return utility


def label_kinds(pool: Pool, size: int, rng: np.random.Generator) -> list[int]:
    """Draws clients so that each group, of clients with the same kinds of label, has its turn equally often.

    The groups stand in a random order and give a client each, again and again, as long as they have one.
    """
    clients = pool.everybody()
    _, group = np.unique(pool.kinds()[clients] > 0, axis=0, return_inverse=True)
    order = rng.permutation(len(clients))
    rank = rng.permutation(int(group.max()) + 1) if len(group) else np.empty(0, np.int64)
    place = np.zeros(len(clients), np.int64)  # of a client in its own group
    shuffled = group[order]
    for each in range(len(rank)):
        members = order[shuffled == each]
        place[members] = np.arange(len(members))
    turn = np.lexsort((rank[group], place))
    return sorted(clients[turn[:size]].tolist())


def _uniform(clients: np.ndarray, size: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.choice(clients, min(size, len(clients)), replace=False).tolist())


def _weighted(clients: np.ndarray, weights: np.ndarray, size: int, rng: np.random.Generator) -> list[int]:
    """Draws with probability proportional to weights, (m,); clients of weight 0 only if no others are left."""
    positive = weights > 0
    count = min(size, int(positive.sum()))
    some = clients[positive]
    drawn = rng.choice(some, count, replace=False, p=weights[positive] / weights[positive].sum()) if count else some[:0]
    rest = _uniform(clients[~positive], size - count, rng) if size > count else []
    return sorted([*drawn.tolist(), *rest])
