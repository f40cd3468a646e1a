"""Co-teaching: two networks, each trained on the samples with the smallest loss under the other.

Source: Han, Yao, Yu, Niu, Xu, Hu, Tsang, Sugiyama, "Co-teaching: Robust Training of Deep Neural Networks with Extremely
Noisy Labels", NeurIPS 2018 (arXiv 1804.06872). Setting: labels at the clients, some of them wrong.

In every batch each network picks the share R(t) of the samples with the smallest cross-entropy, and the other network
takes its step on these. R falls from 1 to 1 - `forget_rate`, as networks learn true labels first and wrong ones later.

What differs, and why:
- t counts communication rounds before this one, not epochs.
- Both networks travel, so a round costs twice the traffic and computation. The server averages each network over the
  clients for itself; they stay different because they start from different weights. The global model is the mean of
  their probabilities; the paper shows each by itself.
- At least one sample is kept; as one optimiser step moves both networks, `training.max_grad_norm` is of both together.
- A label that is certain is treated like the others. Labels at the server are certain, and it trains both on all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import at_least, in_unit_interval
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.losses import mean_metric
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.models.wrap import twins

ROUNDING = 1e-9
"""Share * samples may fall short of a whole number by rounding."""


def smallest(losses: Tensor, counted: Tensor, share: float) -> Tensor:
    """Returns (n, networks) bool, the floor(share * counted) smallest losses of each network, at least one if any.

    Among equal losses the first ones are taken.

    Args:
        losses: (n, networks).
        counted: (n,) bool, the samples to choose from.
        share: R in [0, 1].
    """
    position = torch.arange(len(losses), device=losses.device)
    first = (losses[None] == losses[:, None]) & (position < position[:, None])[..., None]
    # (sample, other sample, network): how many others come before the sample.
    rank = (((losses[None] < losses[:, None]) | first) & counted[None, :, None]).sum(1)
    number = (share * counted.sum().double() + ROUNDING).floor().clamp_min(1)
    return (rank < number) & counted[:, None]


@dataclass(frozen=True)
class CoTeaching(Method):
    """Hyper-parameters of Co-teaching."""

    name: str = "co_teaching"
    forget_rate: float = 0.2
    """Share of a batch that is dropped after the ramp, in [0, 1); the paper uses the share of wrong labels."""
    ramp_rounds: int = 10
    """T_k: rounds over which the dropped share rises from 0; 0: it is `forget_rate` from the first round."""

    description: ClassVar[str] = "noisy labels: two networks pick small-loss samples (Han et al., NeurIPS 2018)"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "forget_rate", below_one=True)
        at_least(self, "method", 0, "ramp_rounds")

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(Stage(self.phases),),
            uses=LabelKinds.SINGLE,
            network=twins(),
            server_phases=(Phase("server", self.loss),),
        )

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the one phase of a round (1-based), with its R."""
        return (Phase("train", partial(self.loss, share=self.share(round_number))),)

    def share(self, round_number: int) -> float:
        """Returns R of a round (1-based): 1 - min(t / T_k, 1) forget_rate for the t rounds before it."""
        progress = min((round_number - 1) / self.ramp_rounds, 1.0) if self.ramp_rounds else 1.0
        return 1 - progress * self.forget_rate

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, share: float = 1.0) -> Step:
        """Returns the sum over both networks of the mean cross-entropy of the samples selected by the other one.

        Args:
            student: images -> logits (batch, 2, classes).
            teachers: none.
            batch: its labelled part is used.
            share: R.
        """
        candidates = batch.labeled.candidates
        losses = -(student(batch.labeled.views["weak"]).log_softmax(-1) * candidates[:, None]).sum(-1)
        labeled = candidates.sum(-1) == 1
        taught = smallest(losses.detach(), labeled, share).flip(-1)
        values = torch.where(taught, losses, torch.zeros_like(losses))
        number = taught[:, 0].sum()  # the same for both networks
        loss = values.sum() / number.clamp_min(1)
        metrics = {
            "train/loss": torch.stack([loss, torch.ones_like(loss)]).detach(),
            "train/loss_supervised": mean_metric(values.flatten(), taught.flatten()),
            "train/kept": mean_metric(taught.to(losses.dtype).mean(-1), labeled),
        }
        return Step(loss, metrics, number)
