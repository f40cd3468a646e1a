"""Configuration of the clients' devices."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedlabel.checks import in_unit_interval, one_of, within
from fedlabel.devices.profiles import PRESETS, Profile
from fedlabel.names import did_you_mean

KINDS = ("none", "preset", "lognormal", "zipf", "trace")
DROPOUTS = ("before", "during", "after")
"""When a client can drop out of a round."""
NUMBERS = ("forward", "down", "up", "memory")
"""What a part of the population may have in place of its profile's."""
_ONLY_OF = {
    "population": ("preset", "lognormal", "zipf"),
    "sigma": ("lognormal",),
    "exponent": ("zipf",),
    "trace": ("trace",),
    "available": ("preset", "lognormal", "zipf"),
    "period": ("preset", "lognormal", "zipf"),
}
"""Keys that only some kinds have; the others are of all but none."""


@dataclass(frozen=True)
class PopulationPart:
    """Clients with one profile."""

    profile: str
    """phone, laptop, edge_box or hospital_server; see fedlabel/devices/profiles.py for their numbers."""
    share: float = 1.0
    """Share of the clients, in (0, 1]; which ones is drawn from the seed."""
    forward: float | None = None
    """Samples per second of a forward pass through the run's network, half of it of a backward pass; null: the
    profile's, which is for a small convolutional network on images of 32 x 32 pixels."""
    down: float | None = None
    """Bytes per second that a client receives; null: the profile's."""
    up: float | None = None
    """Bytes per second that a client sends; null: the profile's."""
    memory: float | None = None
    """Bytes that training may use at a client; null: the profile's."""

    def __post_init__(self) -> None:
        if self.profile not in PRESETS:
            hint = did_you_mean(self.profile, PRESETS)
            raise ValueError(
                f"`devices.population[].profile` (={self.profile}) must be one of {', '.join(PRESETS)}.{hint}"
            )
        within(self, "devices.population[]", 0, 1, "share", ends="(]")
        given = [key for key in NUMBERS if getattr(self, key) is not None]
        within(self, "devices.population[]", 0, 1e30, *given, ends="(]")

    @property
    def numbers(self) -> Profile:
        """The profile, with the numbers that are given here."""
        given = {key: getattr(self, key) for key in NUMBERS if getattr(self, key) is not None}
        profile = PRESETS[self.profile]._replace(**given)
        return profile if self.forward is None else profile._replace(backward=self.forward / 2)


@dataclass(frozen=True)
class DevicesConfig:
    """Simulated devices of the clients, on which time depends."""

    kind: str = "none"
    """none: clients are not told apart as machines, and there is no simulated time. preset: each client has one of the
    profiles of `population`. lognormal, zipf: also a factor of its own on all its speeds (samples and bytes per
    second). trace: speeds and times of availability from a file."""
    population: tuple[PopulationPart, ...] = ()
    """For preset, lognormal and zipf: the profiles, each with a `share` of the clients, which sum to 1, e.g. [{profile:
    phone, share: 0.8}, {profile: laptop, share: 0.2}]; also with numbers of their own, as forward, down, up, memory in
    docs/devices.md."""
    sigma: float = 1.0
    """For lognormal: standard deviation of the factor's logarithm; the median factor is 1."""
    exponent: float = 1.0
    """For zipf: the factors are r^-exponent, r = 1 .. num_clients, in random order."""
    trace: str | None = None
    """For trace: a CSV file with the columns client, start, end, speed, up, down (see docs/devices.md), relative to the
    working directory or to the `configs/` that come with fedlabel. Devices are drawn from it without repetition as long
    as there are enough."""
    correlation: float = 0.0
    """Rank correlation, in [-1, 1], of a client's slowness and the share of its samples that are of rare classes. 1:
    the slowest device goes to the client with the largest share, and so on; 0: independent; -1: the fastest."""
    rare_classes: tuple[str, ...] = ()
    """For correlation: names of the rare classes (or their numbers from 0, if they are not named by numbers). Empty:
    the half of the classes (rounded down) with the fewest samples; among equal ones the first."""
    available: float | None = None
    """Share of the time that a client is available, in [0.001, 1]; null: its profile's. It is available once every
    `period`, from a point in time of its own on, which is drawn from the seed."""
    period: float = 86_400.0
    """Seconds of simulated time, in [1, 1e9], after which a client's availability repeats."""
    dropout_before: float = 0.0
    """Probability that a client that was chosen drops out of a round before it receives the model. At most one of the
    three happens: they sum to at most 1."""
    dropout_during: float = 0.0
    """Probability that it drops out while it trains."""
    dropout_after: float = 0.0
    """Probability that it has trained, and its reply is lost."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "population", tuple(self.population))
        object.__setattr__(self, "rare_classes", tuple(map(str, self.rare_classes)))
        one_of(self, "devices", kind=KINDS)
        self._check_effect()
        if self.kind in _ONLY_OF["population"]:
            self._check_population()
        if self.kind == "trace" and not self.trace:
            raise ValueError(
                "`devices.kind` (=trace) needs `devices.trace`, the path of a CSV file, e.g. "
                "devices.trace=devices/two_days.csv."
            )
        within(self, "devices", 0, 10, "sigma", "exponent", ends="(]", hint="for equal ones take devices.kind=preset")
        within(self, "devices", -1, 1, "correlation")
        within(self, "devices", 1, 1e9, "period", hint="it is in seconds")
        if self.available is not None:
            within(self, "devices", 0.001, 1, "available")
        dropouts = [f"dropout_{each}" for each in DROPOUTS]
        in_unit_interval(self, "devices", *dropouts)
        total = sum(getattr(self, key) for key in dropouts)
        if total > 1 + 1e-9:
            raise ValueError(f"`devices.{'`, `devices.'.join(dropouts)}` sum to {total:g}; they must sum to at most 1.")

    def _check_effect(self) -> None:
        """Refuses keys that would have no effect."""
        default = {each.name: each.default for each in fields(self)}
        for key, value in default.items():
            if getattr(self, key) == value or key == "kind":
                continue
            kinds = _ONLY_OF.get(key, KINDS[1:])
            if self.kind not in kinds:
                raise ValueError(
                    f"`devices.{key}` (={_shown(getattr(self, key))}) has no effect with devices.kind={self.kind}: "
                    f"leave it out, or take devices.kind={' or '.join(kinds)}."
                )
        if self.rare_classes and self.correlation == 0:
            raise ValueError(
                f"`devices.rare_classes` (={_shown(self.rare_classes)}) has no effect with devices.correlation=0: "
                "leave it out, or give a correlation."
            )

    def _check_population(self) -> None:
        total = sum(part.share for part in self.population)
        if abs(total - 1) > 1e-9:
            raise ValueError(
                f"The shares of `devices.population` sum to {total:g}; for devices.kind={self.kind} they must sum to "
                "1, e.g. devices.population=[{profile: phone, share: 0.8}, {profile: laptop, share: 0.2}]."
            )
        if self.period != 86_400 and all(profile.available == 1 for profile in self.profiles):
            raise ValueError(
                f"`devices.period` (={self.period:g}) has no effect where all clients are always available: leave it "
                "out, or set devices.available below 1."
            )

    @property
    def may_lose(self) -> bool:
        """Whether the reply of a client that was invited can fail to arrive."""
        if self.kind in ("none", "trace"):
            return self.kind == "trace"
        return any(self.dropout) or any(profile.available < 1 for profile in self.profiles)

    @property
    def profiles(self) -> list[Profile]:
        """The profiles of `population`, with `available` in place of their own."""
        numbers = [part.numbers for part in self.population]
        return numbers if self.available is None else [each._replace(available=self.available) for each in numbers]

    @property
    def dropout(self) -> tuple[float, ...]:
        """The probabilities of `DROPOUTS`."""
        return self.dropout_before, self.dropout_during, self.dropout_after


def _shown(value: object) -> object:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else value
