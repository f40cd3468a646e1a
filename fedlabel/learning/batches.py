"""Makes batches from a plan: hides labels that a loss must not see, and makes views."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.plan import Plan, StepPlan, Units
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Batch, Part, State
from fedlabel.methods.recipe import ByKnowledge, BySample, Draw, Views


class BatchMaker:
    """Makes the batches of one phase, in the order of its plan.

    Args:
        draw: the phase's.
        plan: its samples.
        images: (n, ...) all of the client's samples, on the device.
        supervision: of these.
        targets: see `Prepared.targets`.
        transform: makes views.
        generator: of the augmentation, on the device.
    """

    def __init__(
        self,
        draw: Draw,
        plan: Plan,
        images: Tensor,
        supervision: Supervision,
        targets: Mapping[str, Tensor],
        transform: ImageTransform,
        generator: torch.Generator,
    ) -> None:
        self._by_supervision = isinstance(draw, ByKnowledge)
        free = () if not isinstance(draw, (BySample, ByKnowledge)) else draw.unlabeled
        self._views: dict[str, Views] = {
            "labeled": draw.labeled,
            "unlabeled": free,
            "mix": draw.mix if isinstance(draw, BySample) else (),
        }
        self._sizes = dict(zip(self._views, plan.sizes, strict=True))
        self._images, self._supervision, self._targets = images, supervision, targets
        self._transform, self._generator = transform, generator
        self._empty: dict[str, Part] = {}

    def make(self, step: StepPlan, memory: State) -> Batch:
        """Returns the batch of a step."""
        return Batch(
            labeled=self._part("labeled", step.labeled, step.units),
            unlabeled=self._part("unlabeled", step.unlabeled),
            mix=self._part("mix", step.mix),
            mixing=torch.tensor(step.mixing, dtype=torch.float32, device=self._images.device),
            memory=memory,
        )

    def _part(self, kind: str, rows: Tensor, units: Units | None = None) -> Part:
        if kind in self._empty:
            return self._empty[kind]
        device, supervision = self._images.device, self._supervision
        members = torch.zeros(0, 0, dtype=torch.int64, device=device)
        counts = supervision.bag_counts[:0]
        if units is not None:
            members = units.rows.masked_scatter(units.rows >= 0, torch.arange(len(rows))).to(device)
            counts = units.counts.to(device)
        rows = rows.to(device)
        candidates, noisy = supervision.candidates[rows], supervision.noisy[rows]
        annotations = supervision.annotations[rows]
        if kind != "labeled":  # a labelled sample drawn as an unlabelled one keeps its label to itself
            hidden = torch.ones_like(noisy) if self._by_supervision else candidates.sum(1) == 1
            candidates, noisy = candidates | hidden[:, None], noisy & ~hidden
            annotations = torch.where(hidden[:, None], -1, annotations)
        views = self._transform.views(self._images[rows], self._views[kind], self._generator)
        targets = {name: values[rows] for name, values in self._targets.items()}
        size = torch.tensor(float(self._sizes[kind]), device=device)
        part = Part(views, candidates, targets, noisy, annotations, rows, size, members, counts)
        if not len(rows):  # so it is in every step
            self._empty[kind] = part
        return part
