"""Differential privacy of clients: what is clipped, where noise is added, and which epsilon is spent.

Sources: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
(clipped updates, noise on their sum); Wang, Balle, Kasiviswanathan, "Subsampled Renyi Differential Privacy and
Analytical Moments Accountant", AISTATS 2019 (cohorts of a fixed size). What is covered and what is not is in
docs/privacy.md; why these are not Flower's wrappers, in docs/decisions/0011-privacy.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedlabel.checks import at_least, one_of, positive, within
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart

KINDS = ("none", "server", "client")
DELTA = 1e-5
"""Default of `privacy.delta`."""
_STEPS = (0.0, 1e-6, 1e-4, 1e-2)
"""By which shares a clipped update is shortened, one after the other, until it is not too long after rounding."""


class NotFinite(ValueError):
    """A client's model holds NaN or infinity."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Protection of the clients: differential privacy (see docs/privacy.md), and the fewest samples of a number."""

    kind: str = "none"
    """none. server: clients clip their updates, and the server, which is trusted, adds noise to their sum. client:
    each client adds noise to its own clipped update, so that nobody has to be trusted; it needs far more noise."""
    clipping_norm: float | None = None
    """The largest Euclidean norm of a client's update over all weights; longer ones are shortened to it."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in clipping norms: of each number in the sum of the updates (server), or in an
    update (client)."""
    delta: float | None = None
    """Probability in (0, 1 / num_clients) with which `privacy/epsilon` need not hold; null: 0.00001."""
    min_count: int = 1
    """Fewest samples that anything but a model may be made of: a client with fewer samples takes no part; one with
    fewer samples of some kind of label, or fewer bags, sends its model without statistics and metrics; and a metric of
    fewer samples is left out (see docs/trust.md). A node may have a larger one of its own. 1: nothing is left out."""

    def __post_init__(self) -> None:
        at_least(self, "privacy", 1, "min_count")
        one_of(self, "privacy", kind=KINDS)
        given = [key for key in ("clipping_norm", "noise_multiplier", "delta") if getattr(self, key) is not None]
        if self.kind == "none":
            if given:
                raise ValueError(
                    f"`privacy.{given[0]}` (={getattr(self, given[0]):g}) is for privacy.kind=server and client, and "
                    "`privacy.kind` is none: leave it out."
                )
            return
        for key in ("clipping_norm", "noise_multiplier"):
            if key not in given:
                raise ValueError(f"`privacy.kind` (={self.kind}) needs `privacy.{key}`, a positive number.")
        positive(self, "privacy", "clipping_norm", "noise_multiplier")
        if self.delta is not None:
            within(self, "privacy", 0, 1, "delta", ends="()")

    @property
    def is_on(self) -> bool:
        """Whether clients are protected."""
        return self.kind != "none"

    @property
    def spent_at(self) -> float:
        """The delta at which epsilon is reported."""
        return DELTA if self.delta is None else self.delta

    @property
    def limit(self) -> float:
        """`clipping_norm`."""
        assert self.clipping_norm is not None, "checked with the configuration"
        return self.clipping_norm

    @property
    def noise(self) -> float:
        """The standard deviation of the noise, see `noise_multiplier`."""
        assert self.noise_multiplier is not None, "checked with the configuration"
        return self.noise_multiplier * self.limit


def distance(model: StateDict, start: StateDict, names: Collection[str]) -> float:
    """Returns the Euclidean distance of two models over the named arrays, computed in double precision."""
    moved = [float(_difference(model[name], start[name]).square().sum()) for name in start if name in names]
    return math.sqrt(math.fsum(moved))


def clipped(model: StateDict, start: StateDict, names: Collection[str], norm: float) -> StateDict:
    """Returns a model that is at most `norm` away from where it started; itself if it is.

    The distance holds for the numbers as they are sent: where rounding makes them differ by more, the update is
    shortened a little further, and left out where the weights are too large for an update of this norm.

    Args:
        model: a client's.
        start: the one it was sent.
        names: of what is trained in it; the other arrays stay as they are.
        norm: the largest distance.

    Raises:
        NotFinite: the model holds NaN or infinity.
    """
    found = distance(model, start, names)
    if not found < math.inf:
        raise NotFinite("the model holds NaN or infinity, and cannot be clipped")
    if found <= norm:
        return model
    for step in _STEPS:
        scale = norm / found * (1 - step)
        shorter = {n: _moved(start[n], scale * _difference(v, start[n])) if n in names else v for n, v in model.items()}
        if distance(shorter, start, names) <= norm:
            return shorter
    return {name: start[name] if name in names else value for name, value in model.items()}


def noised(model: StateDict, names: Collection[str], deviation: float, rng: np.random.Generator) -> StateDict:
    """Returns a model with independent Gaussian noise in every number of the named arrays, in the model's order."""
    return {
        name: _moved(value, torch.from_numpy(rng.normal(0.0, deviation, tuple(value.shape))))
        if name in names
        else value
        for name, value in model.items()
    }


def _moved(start: Tensor, step: Tensor) -> Tensor:
    """Returns start + step, in the type and on the device of `start`; step: float64, on the CPU."""
    return (start.cpu().double() + step).to(start.device, start.dtype)


def _difference(value: Tensor, start: Tensor) -> Tensor:
    return value.cpu().double() - start.cpu().double()


def private_upload(
    parts: Mapping[str, ModelPart],
    start: StateDict,
    names: Collection[str],
    config: PrivacyConfig,
    rng: np.random.Generator,
) -> dict[str, ModelPart]:
    """Returns what a client may send of its model: clipped, noised with kind=client, and with weight 1, whatever its
    data: a client that did not train counts as one whose update is 0.

    Args:
        parts: the upload, of one model.
        start: the model that the client was sent.
        names: of what is trained in it, which is all.
        config: how clients are protected.
        rng: draws the noise.
    """
    ((part, (state, _)),) = parts.items()
    short = clipped(state, start, names, config.limit)
    return {part: ModelPart(noised(short, names, config.noise, rng) if config.kind == "client" else short, 1.0)}


def private_mean(
    start: StateDict,
    mean: StateDict,
    names: Collection[str],
    replies: int,
    cohort: int,
    config: PrivacyConfig,
    rng: np.random.Generator,
) -> StateDict:
    """Returns start + (sum of the clipped updates + noise) / cohort (kind=server).

    The sum is divided by the number of clients that were asked, not of those that replied: one client then moves it by
    2 * `clipping_norm` / cohort at most, whoever else replies, and one that does not reply counts as an update of 0.

    Args:
        start: the model that was sent.
        mean: of the clipped models of those that replied.
        names: of what is trained in it, which is all.
        replies: how many these are.
        cohort: how many clients were asked.
        config: how clients are protected.
        rng: draws the noise.
    """
    share = replies / cohort
    moved = {
        name: _moved(start[name], share * _difference(value, start[name])) if name in names else value
        for name, value in mean.items()
    }
    return noised(moved, names, config.noise / cohort, rng)


# ------------------------------------------------------------------------------------------------------- accounting


def epsilon(config: PrivacyConfig, releases: int, cohort: int | None = None, clients: int | None = None) -> float:
    """Returns the epsilon that is spent at `config.spent_at`, by the Renyi accountant of dp-accounting.

    Neighbours are two federations of equally many clients that differ in all data of one client. Its update is any of
    norm `clipping_norm` in both, so a sum differs by 2 * `clipping_norm`: the noise is `noise_multiplier` / 2 times
    what the accountant calls sensitivity.

    Args:
        config: how clients are protected.
        releases: noisy results so far: rounds (server), or uploads of the client that sent most (client).
        cohort: clients of a round, drawn uniformly and in secret from `clients`; None: it is known who was drawn.
        clients: how many there are; with `cohort`.
    """
    from dp_accounting.rdp import compute_epsilon  # an optional dependency

    if releases == 0:
        return 0.0
    assert config.noise_multiplier is not None, "checked with the configuration"
    orders, divergences = _renyi(config.noise_multiplier / 2, cohort, clients)
    return float(compute_epsilon(orders, releases * divergences, config.spent_at)[0])


@lru_cache(maxsize=8)
def _renyi(noise_multiplier: float, cohort: int | None, clients: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns Renyi orders, and the divergence of one release at each."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    event = GaussianDpEvent(noise_multiplier)
    if cohort is not None and clients is not None and cohort < clients:
        event = SampledWithoutReplacementDpEvent(clients, cohort, event)
    accountant.compose(event)
    return accountant.orders, accountant.rdp
