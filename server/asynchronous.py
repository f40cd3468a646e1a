"""Asynchronous pacing: clients train while the model is updated, and reply to a model that is no longer the newest.

FedBuff (Nguyen et al., AISTATS 2022) updates the model when a buffer of replies is full, FedAsync (Xie et al., 2019)
after each reply. A round is one update. The simulation goes from event to event on the simulated clock: at one instant
replies come first, in the order of client numbers, then the update, then new clients start. A client is trained when it
starts, from the model of that moment, and its reply waits here until the clock reaches its arrival; so memory grows
with the number of clients that train at a time. Clients whose start is certain are trained together, so that workers
have something to do.

A reply to a model that was updated t times since has the weight s(t) = (1 + t)^-a. FedBuff adds s(t) times the client's
update to the newest model; buffers of the network (running statistics of BatchNorm), which are no updates, move by s(t)
of the way to the client's. FedAsync takes s(t) * `mixing` of the client's model and the rest of the newest one.
Statistics for the shared state, which clients made with the shared state that they were sent, are multiplied by s(t)
before they are added up. What is on its way when a stage of the method ends is dropped.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.devices.machines import Work
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart
from server.blocks import BlockResult, cut_into_blocks
from server.pacing import Draws, Pacing, Train
from server.tally import RoundTally
from server.traffic import ResultBytes

STALENESS_EXPONENT, SERVER_RATE, MIXING = 0.5, 1.0, 0.6
"""Defaults of `pacing`."""


def staleness_weight(updates: int, exponent: float) -> float:
    """Returns (1 + updates)^-exponent, the weight of a reply to a model that was updated so often since."""
    return float((1 + updates) ** -exponent)


class Flight(NamedTuple):
    """A client's reply on its way."""

    finish: float
    """When it arrives, or when the connection is lost, on the simulated clock."""
    client: int
    start: float
    """When the client started."""
    version: int
    """The round that the client started in."""
    result: ClientResult | None
    """None: the client drops out, or fails."""


class Waiting(NamedTuple):
    """A client that has started and is still to be trained."""

    least: float
    """Before this time its reply cannot arrive."""
    start: float
    is_lost: bool
    """Whether it drops out after training."""


class Asynchronous(Pacing):
    """FedBuff and FedAsync; for the arguments see `Pacing`."""

    def __init__(
        self, experiment: Experiment, result_bytes: ResultBytes, draws: Draws, saved: Mapping[str, Any]
    ) -> None:
        super().__init__(experiment, result_bytes, draws, saved)
        pacing = self._config.pacing
        self._at_a_time = self._config.cohort_size
        self._is_fedbuff = pacing.kind == "fedbuff"
        self._size = (pacing.buffer or max(1, self._at_a_time // 2)) if self._is_fedbuff else 1
        self._exponent = STALENESS_EXPONENT if pacing.staleness_exponent is None else pacing.staleness_exponent
        self._rate = SERVER_RATE if pacing.server_rate is None else pacing.server_rate
        self._mixing = MIXING if pacing.mixing is None else pacing.mixing
        self._flights: list[Flight] = [self._load(each) for each in saved.get("flights", [])]
        """A heap by arrival."""
        heapq.heapify(self._flights)
        self._weight = 1.0
        """FedAsync: of the reply of this round."""

    @property
    def needs_models(self) -> bool:
        """See `Pacing`."""
        return True

    def begin_stage(self) -> None:
        """See `Pacing`."""
        self._flights = []

    def cohort(self, number: int) -> list[int]:
        """Returns the clients that start with the newest model, at once."""
        free = self._at_a_time - len(self._flights)
        return self._draw(number, free, excluded=self._in_flight, wait=not self._flights)

    @property
    def _in_flight(self) -> frozenset[int]:
        return frozenset(flight.client for flight in self._flights)

    def blocks(
        self, invitation: Invitation, cohort: Sequence[int], train: Train, tally: RoundTally
    ) -> Iterator[BlockResult]:
        """See `Pacing`."""
        number, draws, lost = invitation.round_number, 0, 0
        started = set(cohort)  # a client that trained twice from one model would do the same again
        waiting = self._start(invitation, cohort, tally)
        buffer: list[Flight] = []
        while len(buffer) < self._size:
            if waiting and (not self._flights or self._flights[0].finish >= min(waiting.values()).least):
                yield from self._launch(invitation, waiting, train)
                waiting = {}
                continue
            if not self._flights:
                break  # nobody is left who could reply
            flight = heapq.heappop(self._flights)
            self.seconds = max(self.seconds, flight.finish)
            if flight.result is not None:
                buffer.append(flight)
                self._see(number, flight.result, flight.finish - flight.start)
            else:
                lost += 1
            if len(buffer) < self._size and not self._is_more_now(waiting):
                draws += 1
                free = self._at_a_time - len(self._flights) - len(waiting)
                busy = bool(self._flights or waiting)
                new = self._draw(number, free, draws, excluded=self._in_flight | started, wait=not busy)
                started |= set(new)
                tally.invite(new)
                waiting |= self._start(invitation, new, tally)
        if waiting:  # they started from this model
            yield from self._launch(invitation, waiting, train)
        stale = [number - flight.version for flight in buffer]
        yield from self._adapted(invitation, buffer)
        tally.excused |= {flight.client for flight in self._flights if flight.result is not None}
        if self._is_fedbuff:
            self._flights = [self._as_update(flight, invitation) for flight in self._flights]
        kept = [flight.client for flight in buffer]
        mean = {"staleness": sum(stale) / len(stale)} if stale else {}
        self._note(tally, kept, dropped_clients=lost, clients_in_flight=len(self._flights), **mean)

    def _is_more_now(self, waiting: Mapping[int, Waiting]) -> bool:
        """Returns whether another reply can arrive at this very instant."""
        soonest = [flight.finish for flight in self._flights[:1]] + [each.least for each in waiting.values()]
        return bool(soonest) and min(soonest) <= self.seconds

    def _start(self, invitation: Invitation, clients: Sequence[int], tally: RoundTally) -> dict[int, Waiting]:
        """Sends the model to clients; returns those whose device stays long enough, which are still to be trained."""
        assert self._devices is not None
        lost = self._lost_before(invitation.round_number, clients)
        waiting = {}
        for client in clients:
            sent = (self._bytes_down(invitation, client), self._result_bytes.models)
            transfers = self._devices.seconds(client, Work(0, 0, *sent), self.seconds)
            least = self._devices.least(client, self.seconds, *sent)
            if lost.get(client) == "before":
                ends = self.seconds
            elif lost.get(client) == "during":
                ends = self.seconds + min(transfers.down, self._devices.stays(client, self.seconds))
            elif least == math.inf:
                ends = self.seconds + self._devices.stays(client, self.seconds)
            else:
                waiting[client] = Waiting(least, self.seconds, client in lost)
                continue
            self._take_off(Flight(ends, client, self.seconds, invitation.round_number, None))
        tally.excused |= lost.keys() | (set(clients) - waiting.keys())
        tally.unreached([client for client, when in lost.items() if when == "before"])
        return waiting

    def _launch(self, invitation: Invitation, waiting: Mapping[int, Waiting], train: Train) -> Iterator[BlockResult]:
        """Trains clients, whose replies are then on their way; yields their failures."""
        assert self._devices is not None
        number, missing = invitation.round_number, set(waiting)
        for block in train(sorted(waiting), {}):
            for result in block.results:
                _, start, is_lost = waiting[result.client]
                missing.remove(result.client)
                finish = self._finish(invitation, result, start)
                if finish == math.inf:
                    finish, is_lost = start + self._devices.stays(result.client, start), True
                result = own_memory(result)
                self._take_off(Flight(finish, result.client, start, number, None if is_lost else result))
            if block.failures:
                yield BlockResult([], block.failures, None)
        for client in sorted(missing):
            self._take_off(Flight(waiting[client].least, client, waiting[client].start, number, None))

    def _take_off(self, flight: Flight) -> None:
        heapq.heappush(self._flights, flight)

    def _adapted(self, invitation: Invitation, buffer: Sequence[Flight]) -> Iterator[BlockResult]:
        """Yields the results of a buffer as if their clients had started from the newest model, in blocks."""
        results: dict[int, ClientResult] = {}
        for flight in sorted(buffer, key=lambda flight: flight.client):
            weight = staleness_weight(invitation.round_number - flight.version, self._exponent)
            result = flight.result
            assert result is not None
            if flight.version < invitation.round_number:
                if self._is_fedbuff:
                    moved = {name: self._moved(part, invitation.model, weight) for name, part in result.parts.items()}
                    result = result._replace(parts=moved)
                statistics = {
                    name: weight * value.double() for name, value in result.statistics.items()
                }  # as they add up
                result = result._replace(statistics=statistics)
            self._weight = weight * self._mixing
            results[flight.client] = result
        for block in cut_into_blocks(sorted(results)):
            yield BlockResult([results[client] for client in block], [], None)

    def _moved(self, part: ModelPart, model: StateDict, weight: float) -> ModelPart:
        """Returns the newest model moved by a stale update, see `_as_update`."""
        state = {}
        for name, value in part.state.items():
            newest = model[name]
            if name in self._experiment.parameters:
                state[name] = newest + weight * value
            elif value.is_floating_point():
                state[name] = torch.lerp(newest, value, weight)
            else:
                state[name] = value
        return ModelPart(state, part.weight)

    def _as_update(self, flight: Flight, invitation: Invitation) -> Flight:
        """Returns a reply to this round's model with the update in place of the model: the next model is another one.
        Buffers of the network stay as they are.
        """
        if flight.result is None or flight.version < invitation.round_number:
            return flight
        parts = {
            part: ModelPart(
                {
                    name: value - invitation.model[name] if name in self._experiment.parameters else value
                    for name, value in state.items()
                },
                weight,
            )
            for part, (state, weight) in flight.result.parts.items()
        }
        return flight._replace(result=flight.result._replace(parts=parts))

    def moved(self, before: StateDict, mean: StateDict) -> StateDict:
        """See `Pacing`."""
        share = self._rate if self._is_fedbuff else self._weight
        if share == 1:
            return mean
        return {
            name: torch.lerp(old, mean[name], share) if old.is_floating_point() else mean[name]
            for name, old in before.items()
        }

    def dump(self) -> dict[str, Any]:
        """See `Pacing`."""
        return {**super().dump(), "flights": [_plain(flight) for flight in sorted(self._flights)]}

    def _load(self, saved: Mapping[str, Any]) -> Flight:
        """Restores the result of `_plain`, on the experiment's device."""
        if saved["result"] is None:
            return Flight(**saved)
        found, device = saved["result"], self._experiment.device
        parts = {
            name: ModelPart({key: value.to(device) for key, value in part["state"].items()}, part["weight"])
            for name, part in found["parts"].items()
        }
        statistics = {name: value.to(device) for name, value in found["statistics"].items()}
        sums, counts = found["sums"], found["counts"]
        result = ClientResult(saved["client"], parts, sums, counts, statistics, {}, stacked=found["stacked"])
        return Flight(**{**saved, "result": result})


def _plain(flight: Flight) -> dict[str, Any]:
    """Returns a reply in dictionaries, for a checkpoint."""
    result = flight.result
    if result is None:
        return flight._asdict()
    parts = {
        name: {"state": {key: value.cpu() for key, value in part.state.items()}, "weight": float(part.weight)}
        for name, part in result.parts.items()
    }
    statistics = {name: value.cpu() for name, value in result.statistics.items()}
    plain = {"parts": parts, "statistics": statistics, "stacked": result.stacked}
    for field in ("sums", "counts"):
        plain[field] = {name: [float(each) for each in values] for name, values in getattr(result, field).items()}
    return {**flight._asdict(), "result": plain}


def own_memory(result: ClientResult) -> ClientResult:
    """Returns a result whose tensors hold no memory but their own: one of a stack would hold all of it."""
    parts = {
        name: ModelPart({key: value.detach().clone() for key, value in part.state.items()}, part.weight)
        for name, part in result.parts.items()
    }
    return result._replace(parts=parts)
