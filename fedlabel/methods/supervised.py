"""FedAvg and FedProx on the labelled part alone: the lower bound, or with `oracle_labels` the upper bound.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017;
with `training.prox_mu` Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx).

What differs: nothing in the objective. The number of local steps, the clients' weights and the proximal term are
`training`'s, the same for every method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task


@dataclass(frozen=True)
class Supervised(Method):
    """Cross-entropy on labelled samples."""

    name: str = "supervised"
    oracle_labels: bool = False  # type: ignore[misc]  # a field here, a constant in every other method
    """Give every client the true label of all its training samples (the fully labelled upper bound)."""

    description: ClassVar[str] = "FedAvg on labelled samples only; oracle_labels=true is the upper bound"

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage((Phase("supervised", labels_loss),)),),
            uses=LabelKinds.SINGLE,
        )
