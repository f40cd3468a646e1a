"""FedAvg and FedProx on the labelled part alone: the lower bound, or with `oracle_labels` the upper bound.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017;
Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (the proximal term).

What differs: nothing in the objective. The number of local steps and the clients' weights are `training`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlabel.methods.base import Batch, Method, Model, Phase, Step, cross_entropy_on_labels


@dataclass(frozen=True)
class Supervised(Method):
    """Cross-entropy on labelled samples."""

    name: str = "supervised"
    oracle_labels: bool = False  # type: ignore[misc]  # a field here, a constant in every other method
    """Give every client the true label of all its training samples (the fully labelled upper bound)."""
    prox_mu: float = 0.0
    """FedProx: weight of (mu / 2) * ||w - w_global||^2 added to the local loss."""

    description: ClassVar[str] = "FedAvg / FedProx on labelled samples only; oracle_labels=true is the upper bound"

    def __post_init__(self) -> None:
        if not 0 <= self.prox_mu < float("inf"):
            raise ValueError(f"`method.prox_mu` (={self.prox_mu}) must be a finite number of at least 0.")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        proximal = self._proximal if self.prox_mu > 0 else None
        return (Phase("supervised", self.loss, labeled=("weak",), proximal=proximal),)

    def _proximal(self, parameter: Tensor) -> float:
        return self.prox_mu

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        return cross_entropy_on_labels(student, batch.labeled)
