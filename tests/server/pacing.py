"""Three clients with devices of round numbers, for tests of pacing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.config import load_config
from fedlabel.devices.clock import Devices
from fedlabel.devices.machines import ProfiledMachines
from fedlabel.devices.profiles import Profile
from fedlabel.methods.uploads import ModelPart
from server.asynchronous import Asynchronous
from server.blocks import BlockResult, Failure, cut_into_blocks
from server.pacing import Pacing, Rounds
from server.tally import RoundTally
from server.traffic import invitation_bytes

DRAWS = 10
"""Samples that each client draws at most in a round."""
PASSES = (20.0, 10.0)
"""Forward and backward passes of each client with all of its steps."""
MODEL = {"w": torch.zeros(2), "mean": torch.zeros(2), "count": torch.zeros((), dtype=torch.int64)}
UP = 100
"""Bytes of a result."""
DOWN = invitation_bytes(Invitation(1, MODEL, {}, {}), [0])


class Bytes:
    """The size of results."""

    models = UP

    def of(self, result: ClientResult) -> int:
        return UP


def devices(
    speeds: Sequence[float] = (20, 10, 4), dropout: tuple[float, ...] = (0, 0, 0), free: bool = False, seed: int = 0
) -> Devices:
    """Returns devices that compute as many forward and half as many backward samples a second, and receive and send for
    half a second each; free: everything takes no time.
    """
    inf = math.inf
    profiles = [
        Profile(inf, inf, inf, inf, inf, 1.0) if free else Profile(speed, speed / 2, 2 * DOWN, 2 * UP, inf, 1.0)
        for speed in speeds
    ]
    kind, ones = np.arange(len(speeds)), np.ones(len(speeds))
    machines = ProfiledMachines(profiles, [""] * len(speeds), kind, ones, 86400.0, np.zeros(len(speeds)))
    return Devices(machines, len(speeds), dropout, seed)


def pacing(
    *overrides: str, fraction: float = 1.0, machines: Devices | None = None, saved: Mapping[str, Any] | None = None
) -> Pacing:
    """Returns the pacing of three clients."""
    some = "devices.population=[{profile: laptop}]"
    options = ("num_clients=3", f"fraction_train={fraction}", "devices.kind=preset", some, *overrides)
    config = load_config([], options)
    experiment: Any = SimpleNamespace(
        config=config,
        devices=machines or devices(),
        memory_needed=0,
        parameters=frozenset(["w"]),
        device=torch.device("cpu"),
        federation=SimpleNamespace(parts=SimpleNamespace(lengths=np.ones(3)), kinds=lambda: np.ones((3, 1))),
    )
    kind = Asynchronous if config.pacing.is_asynchronous else Rounds
    return kind(experiment, Bytes(), lambda client, number: DRAWS, saved or {})  # type: ignore[arg-type]


class Played:
    """A round that was played.

    Args:
        paced: the pacing.
        number: of the round.
        model: the global one.
        fails: clients whose training fails.
    """

    def __init__(self, paced: Pacing, number: int, model: Mapping[str, Any] = MODEL, fails: Sequence[int] = ()) -> None:
        self.trained: list[list[int]] = []
        """Clients that were trained together, in turn."""
        self.work: dict[int, float] = {}
        invitation = Invitation(number, dict(model), {}, {})
        cohort = paced.cohort(number)
        self.tally = RoundTally(invitation, cohort, Bytes())  # type: ignore[arg-type]

        def train(clients: Sequence[int], work: Mapping[int, float]) -> Iterator[BlockResult]:
            self.trained.append(list(clients))
            self.work |= work
            for block in cut_into_blocks(clients):
                good = [client for client in block if client not in fails]
                bad = [Failure(f"client {client}", "it broke") for client in block if client in fails]
                yield BlockResult([result(client, invitation, work.get(client, 1.0)) for client in good], bad, None)

        blocks = list(self.tally.watch(paced.blocks(invitation, cohort, train, self.tally)))
        self.results = {each.client: each for block in blocks for each in block.results}
        self.kept = sorted(self.results)
        self.seconds = paced.seconds


def result(client: int, invitation: Invitation, share: float) -> ClientResult:
    """A client's result: it moves its weights to its number plus ten times the round's, the buffer to 1, and counts."""
    state = {
        "w": invitation.model["w"] + client + 10 * invitation.round_number,
        "mean": torch.ones(2),
        "count": torch.tensor(7),
    }
    passes = [share * each for each in PASSES]
    sums = {"train/loss": [float(client), 1.0]}
    return ClientResult(client, {"model": ModelPart(state, 1.0)}, sums, {"passes": passes}, {"s": torch.ones(1)}, {})
