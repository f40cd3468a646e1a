"""Collects a client's metrics, pseudo-labels and passes during a round; tensors stay on the device until its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlabel.methods.batch import PseudoLabels, Votes
from fedlabel.metric_tags import Tag

FROM_INPUTS = ((), ("all",), ("embed",), ("heads",))
"""The parts of a network that begin with its inputs: a pass through the rest is not counted as another."""


class Passes:
    """Counts samples that go through models."""

    def __init__(self) -> None:
        self.forward = 0
        """Samples sent through a model, student's and teachers' alike."""
        self.backward: int | Tensor = 0
        """Samples whose gradient was propagated back."""

    def count(self, inputs: Tensor, part: tuple[str, ...], with_gradient: bool) -> None:
        """Counts a pass through the part of a model that its other arguments name."""
        count = len(inputs) if part in FROM_INPUTS else 0
        self.forward += count
        self.backward += count if with_gradient else 0


class Meter(Passes):
    """Sums of the metrics that the phases of a round report.

    Args:
        tags: name -> tag of each metric that a client may send.
    """

    def __init__(self, tags: Mapping[str, Tag]) -> None:
        super().__init__()
        self._tags = tags
        self.pairs: Tensor | None = None
        """See `Prepared.pairs`."""
        self.votes: Votes | None = None
        """See `Prepared.votes`."""
        self._pairs: dict[str, list[Tensor]] = {}
        """Metric -> (2,) (sum, count) of each step."""
        self._rows: list[Tensor] = []
        self._pseudo: list[PseudoLabels] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds metrics, see `Step.metrics`.

        Raises:
            ValueError: one is not declared, so that the server would refuse it.
        """
        self.check(metrics)
        for name, pair in metrics.items():
            self._pairs.setdefault(name, []).append(pair)

    def check(self, metrics: Mapping[str, Tensor]) -> None:
        """Checks the names of metrics.

        Raises:
            ValueError: see `add`.
        """
        for name in metrics:
            if name not in self._tags:
                raise ValueError(
                    f"The method makes the metric {name}, which is not declared, so the server would refuse it. "
                    f'Declare it: metrics = (Tag("{name}", title, unit, page, least=0.0, largest=1.0),) in the '
                    "method's class, with Tag of fedlabel.metric_tags."
                )

    def sums(self) -> dict[str, list[float]]:
        """Returns metric -> (sum, count) over all steps, added in their order in double precision."""
        pairs = [pair for values in self._pairs.values() for pair in values]
        if not pairs:
            return {}
        if len({pair.dtype for pair in pairs}) > 1:
            pairs = [pair.double() for pair in pairs]
        numbers = iter(torch.stack(pairs).detach().tolist())  # the only wait for the device
        found = {}
        for name, values in self._pairs.items():
            total, count = next(numbers)
            for _ in values[1:]:
                more, further = next(numbers)
                total, count = total + more, count + further
            found[name] = [total, count]
        return found

    def add_pseudo(self, pseudo: PseudoLabels | None, rows: Tensor, guessed: Tensor) -> None:
        """Records pseudo-labels of samples `rows` (m,), positions in the client's data, where `guessed` (m,) bool."""
        if pseudo is None:
            return
        if not bool(guessed.all()):  # on the CPU, as `rows` are: no look at a number on the device
            places = guessed.nonzero().squeeze(1)
            rows, here = rows[places], places.to(pseudo.label.device)
            pseudo = PseudoLabels(*(values[here] for values in pseudo))
        self._rows.append(rows)
        self._pseudo.append(pseudo)

    def pseudo_labels(self) -> tuple[Tensor, PseudoLabels | None]:
        """Returns the positions (draws,) of the pseudo-labelled draws and their pseudo-labels, on the CPU; None without
        draws.
        """
        if not self._pseudo:
            return torch.zeros(0, dtype=torch.int64), None
        fields = zip(*self._pseudo, strict=True)
        return torch.cat(self._rows), PseudoLabels(*(torch.cat(values).cpu() for values in fields))
