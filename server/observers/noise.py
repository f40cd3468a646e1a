"""The server's noise matrix: whether it is diagonally dominant, and its error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlabel.experiment import Experiment
from fedlabel.inference.transition import not_dominant, transition_error
from fedlabel.learning.metrics import ratio
from server.observers.base import Observer, Report, Round
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("fedlabel")


class NoiseObserver(Observer):
    """Reports the matrices, and warns once of classes whose diagonal is not dominant."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._warned: set[tuple[int, int]] = set()

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        found = self.experiment.recipe.inspect(state.shared).get("noise_matrix")
        if found is None:
            return Report()
        matrices = found.detach().cpu()
        self._warn(matrices, seen.number)
        truths = self.truths(len(matrices))
        metrics = {"transition/smallest_diagonal": float(matrices.diagonal(dim1=1, dim2=2).min())}
        errors = [
            transition_error(matrix[rows], torch.from_numpy(truth)[rows])
            for matrix, truth in zip(matrices, truths, strict=True)
            if truth is not None and (rows := torch.from_numpy(np.isfinite(truth).all(1))).any()
        ]
        if errors:
            largest, mean = zip(*errors, strict=True)
            metrics |= {"transition/largest_error": max(largest), "transition/mean_error": float(np.mean(mean))}
        figures = self._figures(matrices, truths, seen.number) if seen.may_draw else {}
        return Report(metrics, figures=figures)

    def truths(self, matrices: int) -> Sequence[np.ndarray | None]:
        """Returns the true matrices, (classes, classes) with NaN in the rows of classes without a noisy label; None
        here: this server does not know them.
        """
        return [None] * matrices

    def _figures(self, matrices: Tensor, truths: Sequence[np.ndarray | None], number: int) -> dict[str, Figure]:
        """Returns a figure per matrix in about ten rounds of a run, the last one included."""
        config = self.experiment.config
        if not config.draws_figures or not (self.is_last(number) or number % max(1, config.num_rounds // 10) == 0):
            return {}
        from fedlabel.record.figures import transition_figure  # here: matplotlib takes a while to import

        names = self.experiment.federation.dataset.class_names
        return {
            "transition" if len(matrices) == 1 else f"transition/{place}": transition_figure(matrix, truth, names)
            for place, (matrix, truth) in enumerate(zip(matrices.numpy(), truths, strict=True))
        }

    def _warn(self, matrices: torch.Tensor, round_number: int) -> None:
        names = self.experiment.federation.dataset.class_names
        for place, matrix in enumerate(matrices):
            lost = [label for label in not_dominant(matrix) if (place, label) not in self._warned]
            if not lost:
                continue
            self._warned |= {(place, label) for label in lost}
            listed = ", ".join(f"{names[label]} (most often {names[int(matrix[label].argmax())]})" for label in lost)
            whose = f" of annotator {place}" if len(matrices) > 1 else ""
            logger.warning(
                "Round %d: the noise matrix%s is not dominant on its diagonal for %s. It is learnt up to a permutation "
                "of the classes, so these may be exchanged: a longer warm-up (ill: "
                "method.noise.warmup_rounds) or some true labels help.",
                round_number,
                whose,
                listed,
            )


class NoiseErrorObserver(NoiseObserver):
    """Compares the matrices with those of the samples of this simulated federation."""

    def truths(self, matrices: int) -> Sequence[np.ndarray | None]:
        """See `NoiseObserver`."""
        counts = self.experiment.federation.noise_counts(matrices)
        if self.experiment.federation.has_noisy_sets:  # what T means then is the set likelihood's affair
            return [None] * matrices
        totals = np.repeat(counts.sum(2, keepdims=True), counts.shape[2], 2)
        rates = ratio(counts.ravel(), totals.ravel()).reshape(counts.shape)
        return [truth if np.isfinite(truth).any() else None for truth in rates]
