"""Pacing: who trains in a round, when the round ends on the simulated clock, and whose results count.

The clock goes by what clients really did: passes that were counted and bytes that travel, at the speeds of their
devices (`fedlabel/devices`). It is the same on every grid, as it depends on results only. Here are the pacings in which
all start from one model; those in which they do not are in `asynchronous.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.devices.clock import Devices
from fedlabel.devices.machines import Work
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import StateDict
from fedlabel.seeding import numpy_generator
from fedlabel.server_config import TIERS
from server.blocks import BlockResult
from server.sampling import REMEMBERING, History, Pool, sampler_of
from server.tally import RoundTally
from server.traffic import ResultBytes, invitation_bytes

OVER_SELECTION = 1.3
"""Default of `pacing.over_selection`."""

Train = Callable[[Sequence[int], Mapping[int, float]], Iterator[BlockResult]]
"""(clients in ascending order, client -> share of its steps that it takes, of those that do not take all) -> the
results of their blocks, in order."""
Draws = Callable[[int, int], int]
NO_PASSES = {"forward": 1.0, "backward": 1.0, "draws": 1.0}
"""Before anybody trained: every sample that is drawn passes once forward and once backward."""


class Arrival(NamedTuple):
    """A client's reply on the simulated clock."""

    client: int
    seconds: float
    """Since the round began; `math.inf` if it never arrives."""


class Kept(NamedTuple):
    """Whose replies of a round count, and how long it took."""

    clients: frozenset[int]
    seconds: float


def wait_for_all(arrivals: Sequence[Arrival]) -> Kept:
    """Keeps every reply; the last one ends the round."""
    there = [arrival for arrival in arrivals if arrival.seconds < math.inf]
    return Kept(frozenset(a.client for a in there), max((a.seconds for a in there), default=0.0))


def wait_until(arrivals: Sequence[Arrival], deadline: float, missing: bool = False) -> Kept:
    """Keeps the replies that arrive by a deadline; a round in which everybody replied ends before.

    Args:
        arrivals: of the clients that train.
        deadline: seconds of the round.
        missing: whether other clients were invited, who will not reply.
    """
    in_time = [arrival for arrival in arrivals if arrival.seconds <= deadline]
    all_there = len(in_time) == len(arrivals) and not missing
    return Kept(
        frozenset(a.client for a in in_time), max((a.seconds for a in in_time), default=0.0) if all_there else deadline
    )


def wait_for_first(arrivals: Sequence[Arrival], number: int) -> Kept:
    """Keeps the first replies; of two at the same time that of the smaller client number is the first."""
    there = sorted((a.seconds, a.client) for a in arrivals if a.seconds < math.inf)[:number]
    return Kept(frozenset(client for _, client in there), there[-1][0] if there else 0.0)


def tier_of(order: np.ndarray, tier: int, tiers: int) -> np.ndarray:
    """Returns the clients of a tier, one of `tiers` nearly equal parts of `order`, (clients,) by falling speed."""
    return np.array_split(order, tiers)[tier]


class Pacing:
    """Draws cohorts and passes on the results that count; the base of all kinds.

    Args:
        experiment: the run's.
        result_bytes: the size of a result.
        draws: (client, round) -> how many samples the client draws or looks at, at most.
        saved: the result of `dump` in a checkpoint; empty at the start of a run.
    """

    def __init__(
        self, experiment: Experiment, result_bytes: ResultBytes, draws: Draws, saved: Mapping[str, Any]
    ) -> None:
        self._experiment, self._config, self._result_bytes = experiment, experiment.config, result_bytes
        self._draws = draws
        self._devices: Devices | None = experiment.devices
        self._sampler = sampler_of(self._config.sampling)
        self._remembers = self._config.sampling.kind in REMEMBERING
        self.history = History.load(saved["history"]) if saved else History()
        self.seconds: float = saved["seconds"] if saved else 0.0
        """Simulated time."""

    @property
    def needs_models(self) -> bool:
        """Whether single models are needed, not only their sums: some results may not count."""
        return False

    def cohort(self, number: int) -> list[int]:
        """Returns who is invited to a round, sorted: a function of the seed, the round and what came before it."""
        raise NotImplementedError

    def blocks(
        self, invitation: Invitation, cohort: Sequence[int], train: Train, tally: RoundTally
    ) -> Iterator[BlockResult]:
        """Yields the results that count, in blocks, and moves the clock.

        Args:
            invitation: what clients get.
            cohort: who was invited.
            train: runs their rounds.
            tally: of the round; takes note of who is late, and of the clock.
        """
        raise NotImplementedError

    def moved(self, before: StateDict, mean: StateDict) -> StateDict:
        """Returns the next global model; mean: what the strategy made of the results."""
        return mean

    def begin_stage(self) -> None:
        """Forgets what belongs to the stage before."""

    def dump(self) -> dict[str, Any]:
        """Returns the state between rounds, for a checkpoint: numbers, arrays and tensors; empty if there is none."""
        if self._devices is None and not self._remembers:
            return {}
        return {"seconds": self.seconds, "history": self.history.dump()}

    def _draw(
        self, number: int, size: int, *scope: int, excluded: frozenset[int] = frozenset(), wait: bool = True
    ) -> list[int]:
        """Returns clients that are drawn at this moment of the simulated clock, sorted.

        Args:
            number: of the round.
            size: how many are wanted.
            scope: tells one draw of a round from another.
            excluded: who may not be drawn.
            wait: whether the clock moves to when a client is available, if none is.
        """
        rng = numpy_generator(self._config.seed, "cohort", number, *scope)
        return self._sampler(self._pool(excluded, wait), size, rng)

    def _pool(self, excluded: frozenset[int], wait: bool) -> Pool:
        federation = self._experiment.federation
        return Pool(
            self._config.num_clients,
            self.history,
            excluded | self._too_small,
            sizes=lambda: federation.parts.lengths,
            kinds=federation.kinds,
            connected=self._connected(wait),
            availability=self._availability,
        )

    def _connected(self, wait: bool) -> np.ndarray | None:
        """Returns the clients that are available, see `_draw`; None: all are."""
        if self._devices is None or not self._devices.may_leave:
            return None
        clients = np.arange(self._config.num_clients)
        if wait:
            self.seconds = self._devices.next_available(clients, self.seconds)
        return clients[self._devices.is_available(clients, self.seconds)]

    def _availability(self, clients: np.ndarray) -> np.ndarray:
        assert self._devices is not None, "checked with the configuration"
        return np.array([self._devices.profile(client).available for client in clients.tolist()])

    @cached_property
    def _too_small(self) -> frozenset[int]:
        """Clients whose memory cannot hold what training needs."""
        if self._devices is None:
            return frozenset()
        clients = np.arange(self._config.num_clients)
        return frozenset(clients[~self._devices.fits(clients, self._experiment.memory_needed)].tolist())

    def _lost_before(self, number: int, cohort: Sequence[int]) -> dict[int, str]:
        """Returns the clients that drop out of a round, and when."""
        if self._devices is None:
            return {}
        clients = np.array(cohort, np.int64)
        away = clients[~self._devices.is_available(clients, self.seconds)].tolist()
        return {**self._devices.dropouts(number, clients), **dict.fromkeys(away, "before")}

    def _finish(self, invitation: Invitation, result: ClientResult, start: float) -> float:
        """Returns when a result arrives, on the simulated clock."""
        assert self._devices is not None
        forward, backward = result.counts["passes"]
        work = Work(forward, backward, self._bytes_down(invitation, result.client), self._result_bytes.of(result))
        return self._devices.finish(result.client, start, work)

    def _bytes_down(self, invitation: Invitation, client: int) -> int:
        return invitation_bytes(invitation, [client])

    def _see(self, number: int, result: ClientResult, seconds: float | None) -> None:
        if self._remembers:
            total, count = result.sums.get("train/loss", (0.0, 0.0))
            self.history.see(result.client, number, (total, count), seconds)

    def _note(self, tally: RoundTally, kept: Iterable[int], **numbers: float) -> None:
        """Hands the numbers of the clock to the tally, if there is a clock; kept: clients whose replies count."""
        if self._devices is None:
            return
        speed = self._devices.speed(np.array(sorted(kept), np.int64))
        tally.pace |= {"virtual_seconds": self.seconds, **numbers}
        if len(speed):
            tally.pace["slow_half_share"] = float((speed < self._median_speed).mean())

    @cached_property
    def _median_speed(self) -> float:
        assert self._devices is not None
        return float(np.median(self._devices.speed(np.arange(self._config.num_clients))))


class Rounds(Pacing):
    """Rounds in which all clients start from the same model: synchronous, deadline, over_selection and tiers; for the
    arguments see `Pacing`.
    """

    def __init__(
        self, experiment: Experiment, result_bytes: ResultBytes, draws: Draws, saved: Mapping[str, Any]
    ) -> None:
        super().__init__(experiment, result_bytes, draws, saved)
        self._passes: dict[str, float] = dict(saved.get("passes", NO_PASSES))
        """Passes of all clients so far, and of how many draws: by their ratio those of a round are predicted."""

    @property
    def needs_models(self) -> bool:
        """See `Pacing`."""
        return self._devices is not None and (
            self._config.pacing.kind in ("deadline", "over_selection") or self._devices.may_lose
        )

    def cohort(self, number: int) -> list[int]:
        """See `Pacing`."""
        size, pacing = self._config.cohort_size, self._config.pacing
        if pacing.kind == "over_selection":
            size = min(math.ceil(size * (pacing.over_selection or OVER_SELECTION)), self._config.num_clients)
        if pacing.kind == "tiers":
            return self._draw_tier(number, size, pacing.tiers or TIERS)
        return self._draw(number, size)

    def _draw_tier(self, number: int, size: int, tiers: int) -> list[int]:
        tier = int(numpy_generator(self._config.seed, "tier", number).integers(tiers))
        others = np.setdiff1d(self._by_speed, tier_of(self._by_speed, tier, tiers))
        return self._draw(number, size, excluded=frozenset(others.tolist()))

    @cached_property
    def _by_speed(self) -> np.ndarray:
        """All clients, the fastest first; of equal ones the smaller number."""
        assert self._devices is not None
        clients = np.arange(self._config.num_clients)
        return clients[np.argsort(-self._devices.speed(clients), kind="stable")]

    def blocks(
        self, invitation: Invitation, cohort: Sequence[int], train: Train, tally: RoundTally
    ) -> Iterator[BlockResult]:
        """See `Pacing`."""
        number, start = invitation.round_number, self.seconds
        lost = self._lost_before(number, cohort)
        trained = [client for client in cohort if lost.get(client) not in ("before", "during")]
        work = self._work(invitation, trained) if self._config.pacing.partial_work else {}
        if self._devices is None:
            for block in train(trained, work):
                for result in block.results:
                    self._see(number, result, None)
                yield block
            return
        arrivals: list[Arrival] = []

        def note(block: BlockResult) -> BlockResult:
            for result in block.results:
                lasting = math.inf if result.client in lost else self._finish(invitation, result, start) - start
                arrivals.append(Arrival(result.client, lasting))
            return block

        if not self.needs_models:
            results: dict[int, ClientResult] = {}
            for block in train(trained, work):
                yield note(block)
                results |= {result.client: result._replace(parts={}) for result in block.results}
            kept = self._kept(arrivals, missing=False)
        else:
            found = [note(block) for block in train(trained, work)]
            failed = len(trained) - len(arrivals)
            kept = self._kept(arrivals, missing=bool(lost) or failed > 0)
            results = {r.client: r for block in found for r in block.results}
            for block in found:
                yield block._replace(results=[r for r in block.results if r.client in kept.clients])
        self.seconds = start + kept.seconds
        took = dict(arrivals)
        for client in sorted(kept.clients):
            self._see(number, results[client], took[client])
        gone = {client for client, seconds in arrivals if seconds == math.inf} | set(lost)
        late = [client for client in took if client not in kept.clients and client not in gone]
        for client in late:
            tally.late(results[client])
        tally.excused |= gone | set(late)
        tally.unreached([client for client, when in lost.items() if when == "before"])
        further = {"work_share": float(np.mean([work.get(c, 1.0) for c in trained]))} if work and trained else {}
        self._note(tally, kept.clients, dropped_clients=len(gone), late_clients=len(late), **further)
        self._learn_passes(number, trained, work, results.values())

    def _kept(self, arrivals: Sequence[Arrival], missing: bool) -> Kept:
        pacing = self._config.pacing
        if pacing.kind == "deadline":
            assert pacing.deadline is not None, "checked with the configuration"
            return wait_until(arrivals, pacing.deadline, missing)
        if pacing.kind == "over_selection":
            return wait_for_first(arrivals, self._config.cohort_size)
        return wait_for_all(arrivals)

    def _work(self, invitation: Invitation, clients: Sequence[int]) -> dict[int, float]:
        """Returns client -> share of its steps with which it should be in time, of those that would be late."""
        assert self._devices is not None
        assert self._config.pacing.deadline is not None
        shares = {}
        for client in clients:
            draws = self._draws(client, invitation.round_number)
            forward, backward = (draws * self._passes[name] / self._passes["draws"] for name in ("forward", "backward"))
            up = self._result_bytes.models
            planned = Work(forward, backward, self._bytes_down(invitation, client), up)
            down, compute, sending = self._devices.seconds(client, planned, self.seconds)
            left = self._config.pacing.deadline - down - sending
            if compute > left:
                shares[client] = max(left / compute, 0.0) if compute < math.inf else 0.0
        return shares

    def _learn_passes(
        self, number: int, trained: Sequence[int], work: Mapping[int, float], results: Iterable[ClientResult]
    ) -> None:
        """Adds the passes that clients took to those that are expected of the next ones."""
        if not self._config.pacing.partial_work:
            return
        for result in results:
            share = max(work.get(result.client, 1.0), 0.01)
            forward, backward = result.counts["passes"]
            found = {"forward": forward / share, "backward": backward / share}
            for name, value in {**found, "draws": self._draws(result.client, number)}.items():
                self._passes[name] += value

    def dump(self) -> dict[str, Any]:
        """See `Pacing`."""
        saved = super().dump()
        return {**saved, "passes": dict(self._passes)} if self._config.pacing.partial_work else saved
