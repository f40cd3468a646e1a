"""How the server runs a round: who trains, how long it waits, and how it combines the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedlabel.checks import at_least, finite, in_unit_interval, no_effect, one_of, positive

SAMPLINGS = ("uniform", "size", "least_available", "power_of_choice", "oort", "label_kinds")
PACINGS = ("synchronous", "deadline", "over_selection", "tiers", "fedbuff", "fedasync")
ASYNCHRONOUS = ("fedbuff", "fedasync")
TIMED = (*PACINGS[1:], "least_available")
"""Kinds of pacing and sampling that need devices."""
TIERS = 5
"""Default of `pacing.tiers`."""


@dataclass(frozen=True)
class StrategyConfig:
    """How the server combines the clients' models."""

    name: str = "weighted_mean"
    """weighted_mean, or a Flower strategy by class name: FedAdam, FedAvgM, FedTrimmedAvg, Krum, ..."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the Flower strategy, e.g. {eta: 0.01}."""
    min_replies: int = no_effect(1)
    """Replies that a round needs; with fewer usable replies the run stops, and can be resumed from its checkpoint.
    Clients that are late or drop out by `pacing` and `devices` count as if they had replied."""
    max_update_norm: float | None = None
    """Largest Euclidean distance, over the trained weights, of a client's model from the one it was sent; models
    further away are rejected. null: no limit. It bounds the effect of one client on the mean."""
    clip_update_norm: float | None = None
    """As `max_update_norm`, but models further away are moved back to this distance (norm bounding; Sun et al., "Can
    You Really Backdoor Federated Learning?", 2019). null: no limit."""
    normalize_steps: bool = False
    """FedNova (Wang et al., NeurIPS 2020): each client's update is divided by its number of local steps, and their mean
    multiplied by the mean number, so that clients with more steps do not pull harder."""

    def __post_init__(self) -> None:
        at_least(self, "strategy", 1, "min_replies")
        positive(self, "strategy", "max_update_norm", "clip_update_norm", null=True)
        if self.max_update_norm is not None and self.clip_update_norm is not None:
            raise ValueError(
                f"`strategy.max_update_norm` (={self.max_update_norm:g}) and `strategy.clip_update_norm` "
                f"(={self.clip_update_norm:g}) exclude each other: give one of them."
            )
        if self.name == "weighted_mean" and self.args:
            raise ValueError(f"`strategy.args` (={self.args}) must be empty for strategy.name=weighted_mean.")


@dataclass(frozen=True)
class SamplingConfig:
    """Who is invited to a round (see server/sampling.py), of the clients whose device is available."""

    kind: str = "uniform"
    """uniform; size: with probability proportional to the number of samples; least_available: those whose
    device is available least of the time; power_of_choice: of some `candidates` those with the largest last loss; oort:
    by loss and speed; label_kinds: clients with different kinds of label equally often."""
    candidates: int | None = None
    """power_of_choice: clients that are drawn first; null: twice the cohort."""
    exploration: float | None = None
    """oort: share of the cohort that never trained before, as long as there are such; null: 0.2."""
    speed_exponent: float | None = None
    """oort: the utility of a client that takes t seconds, above the median T, is multiplied by (T / t) to this power;
    null: 2."""

    def __post_init__(self) -> None:
        one_of(self, "sampling", kind=SAMPLINGS)
        _only_for(self, "sampling", self.kind, candidates="power_of_choice", exploration="oort", speed_exponent="oort")
        at_least(self, "sampling", 1, "candidates", null=True)
        if self.exploration is not None:
            in_unit_interval(self, "sampling", "exploration")
        if self.speed_exponent is not None:
            finite(self, "sampling", "speed_exponent")


@dataclass(frozen=True)
class PacingConfig:
    """When a round ends on the simulated clock, and whose results count (see server/pacing.py). All kinds but
    synchronous need `devices`.
    """

    kind: str = "synchronous"
    """synchronous: when all have replied; deadline: after `deadline` seconds; over_selection: when as many have replied
    as the cohort has clients, of some more that are invited; tiers: the cohort is drawn from clients of similar speed;
    fedbuff: when `buffer` clients have replied, while the others go on; fedasync: after every reply."""
    deadline: float | None = None
    """deadline: simulated seconds of a round."""
    partial_work: bool = False
    """deadline: a client that would be late takes fewer local steps, at least one in each phase."""
    over_selection: float | None = None
    """over_selection: invited clients per client of the cohort; null: 1.3."""
    tiers: int | None = None
    """tiers: groups of equal size by speed, of which one is drawn in each round; null: 5."""
    buffer: int | None = None
    """fedbuff: replies per update of the model; null: half of the clients that train at a time."""
    staleness_exponent: float | None = None
    """fedbuff, fedasync: a reply to a model that has been updated t times since counts (1 + t)^-exponent; null: 0.5."""
    server_rate: float | None = None
    """fedbuff: share of the mean update that is applied; null: 1."""
    mixing: float | None = None
    """fedasync: weight of a client's model in the new one, before its staleness; null: 0.6."""

    def __post_init__(self) -> None:
        one_of(self, "pacing", kind=PACINGS)
        _only_for(
            self,
            "pacing",
            self.kind,
            **dict.fromkeys(("deadline", "partial_work"), "deadline"),
            over_selection="over_selection",
            tiers="tiers",
            buffer="fedbuff",
            server_rate="fedbuff",
            mixing="fedasync",
        )
        if self.staleness_exponent is not None and not self.is_asynchronous:
            raise ValueError(
                f"`pacing.staleness_exponent` (={self.staleness_exponent:g}) is for pacing.kind=fedbuff and fedasync, "
                f"and `pacing.kind` is {self.kind}: leave it out."
            )
        if self.kind == "deadline" and self.deadline is None:
            raise ValueError("`pacing.kind` (=deadline) needs `pacing.deadline`, the simulated seconds of a round.")
        positive(self, "pacing", "deadline", "server_rate", null=True)
        at_least(self, "pacing", 1, "tiers", "buffer", null=True)
        if self.over_selection is not None and not 1 <= self.over_selection <= 100:
            raise ValueError(f"`pacing.over_selection` (={self.over_selection:g}) must lie in [1, 100].")
        if self.staleness_exponent is not None:
            finite(self, "pacing", "staleness_exponent")
        if self.mixing is not None:
            in_unit_interval(self, "pacing", "mixing")

    @property
    def is_asynchronous(self) -> bool:
        """Whether clients go on training while the model is updated."""
        return self.kind in ASYNCHRONOUS


def _only_for(config: Any, section: str, kind: str, **owners: str) -> None:
    """Raises if a key is set that another kind reads; owners: key -> the kind that reads it."""
    for key, owner in owners.items():
        value = getattr(config, key)
        if value not in (None, False) and kind != owner:
            raise ValueError(
                f"`{section}.{key}` (={value}) is for {section}.kind={owner}, and `{section}.kind` is {kind}: leave it "
                "out."
            )
