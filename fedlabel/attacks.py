"""Attacks of simulated clients, to test a server's defences with: pure functions of what an honest client would have.

Sources: label flip (Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020), sign
flip (Li et al., "RSA: Byzantine-Robust Stochastic Aggregation", AAAI 2019), scaled updates (Bagdasaryan et al., "How To
Backdoor Federated Learning", AISTATS 2020).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlabel.checks import in_unit_interval, one_of, positive
from fedlabel.data.labels.supervision import Supervision
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.uploads import ModelPart
from fedlabel.seeding import numpy_generator

KINDS = ("none", "label_flip", "sign_flip", "scaled", "nan", "false_counts")
SCALES = {"sign_flip": 1.0, "scaled": 10.0, "false_counts": 1.0}
"""Kind of attack that has a scale -> its default."""


@dataclass(frozen=True)
class AttackConfig:
    """Attackers among the simulated clients; real nodes are never told to attack."""

    kind: str = "none"
    """none. label_flip: of C classes, c is labelled C - 1 - c. sign_flip: the update is multiplied by -`scale`. scaled:
    by `scale`. nan: the model is all NaN. false_counts: statistics of the shared state have their classes in reverse
    order, and are multiplied by `scale`."""
    share: float = 0.0
    """Share of the clients that attack, in every round that they take part in; which ones is drawn from the seed."""
    scale: float | None = None
    """See `kind`; null: 1 for sign_flip and false_counts, 10 for scaled."""

    def __post_init__(self) -> None:
        one_of(self, "attack", kind=KINDS)
        in_unit_interval(self, "attack", "share")
        positive(self, "attack", "scale", null=True)
        if (self.kind == "none") != (self.share == 0):
            raise ValueError(
                f"`attack.kind` (={self.kind}) and `attack.share` (={self.share:g}) belong together: give "
                "both, or none."
            )
        if self.scale is not None and self.kind not in SCALES:
            raise ValueError(
                f"`attack.scale` (={self.scale:g}) is for attack.kind={', '.join(SCALES)}, and `attack.kind` is "
                f"{self.kind}: leave it out."
            )


def attackers(config: AttackConfig, num_clients: int, seed: int) -> frozenset[int]:
    """Returns the clients that attack."""
    if config.kind == "none":
        return frozenset()
    count = round(config.share * num_clients)
    return frozenset(numpy_generator(seed, "attackers").permutation(num_clients)[:count].tolist())


def flipped(supervision: Supervision) -> Supervision:
    """Returns a record in which class c is C - 1 - c, in every kind of label of single samples and in bags; votes of
    labelling functions stay.
    """
    classes = supervision.candidates.shape[1]
    given = supervision.annotations
    return Supervision(
        supervision.candidates.flip(1),
        supervision.noisy,
        torch.where(given >= 0, classes - 1 - given, given),
        supervision.bag,
        supervision.bag_counts.flip(1),
        supervision.votes,
    )


def attacked(
    config: AttackConfig,
    parts: Mapping[str, ModelPart],
    statistics: State,
    start: StateDict,
    names: Collection[str],
) -> tuple[dict[str, ModelPart], State]:
    """Returns what an attacker sends in place of its models and statistics.

    Args:
        config: the attack.
        parts: models of an honest client, with their weights.
        statistics: its statistics.
        start: the model that it was sent.
        names: of what is trained in it.
    """
    scale = SCALES.get(config.kind, 1.0) if config.scale is None else config.scale
    factor = {"sign_flip": -scale, "scaled": scale, "nan": math.nan}.get(config.kind)
    if factor is not None:
        parts = {
            name: ModelPart(_stretched(part.state, start, names, factor), part.weight) for name, part in parts.items()
        }
    if config.kind == "false_counts":
        statistics = {name: scale * _reversed(value) for name, value in statistics.items()}
    return dict(parts), statistics


def _stretched(model: StateDict, start: StateDict, names: Collection[str], factor: float) -> StateDict:
    return {n: start[n] + factor * (v - start[n]) if n in names else v for n, v in model.items()}


def _reversed(values: Tensor) -> Tensor:
    return values.flip(-1) if values.dim() else values
