"""What is shown of a noise matrix that the server knows: how far from the truth, and whether it can be trusted."""

from __future__ import annotations

import logging

import numpy as np
import torch
from matplotlib.figure import Figure

from fedlabel.experiment import Experiment
from fedlabel.figures import transition_figure
from fedlabel.inference.transition import not_dominant, transition_error
from fedlabel.methods.steps import State
from fedlabel.metrics import ratio

logger = logging.getLogger("fedlabel")


class NoiseWatch:
    """Follows a run's noise matrices; says once which classes lose the diagonal."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._warned: set[tuple[int, int]] = set()

    def metrics(self, shared: State, round_number: int) -> dict[str, float]:
        """Returns `transition/...` of a round; the true matrix is that of the samples of this simulated federation."""
        matrices = self._experiment.config.method.noise_matrix(shared)
        if matrices is None:
            return {}
        matrices = matrices.detach().cpu()
        self._warn(matrices, round_number)
        metrics = {"transition/smallest_diagonal": float(matrices.diagonal(dim1=1, dim2=2).min())}
        errors = [
            transition_error(matrix[known], torch.from_numpy(truth)[known])
            for matrix, truth in zip(matrices, self._truth(len(matrices)), strict=True)
            if (known := torch.from_numpy(np.isfinite(truth).all(1))).any()
        ]
        if errors:
            largest, mean = zip(*errors, strict=True)
            metrics |= {"transition/largest_error": max(largest), "transition/mean_error": float(np.mean(mean))}
        return metrics

    def is_shown(self, round_number: int) -> bool:
        """Whether this is one of the ten or so rounds of a run that get a figure; the last one is."""
        rounds = self._experiment.config.num_rounds
        return round_number == rounds or round_number % max(1, rounds // 10) == 0

    def figures(self, shared: State) -> dict[str, Figure]:
        """Returns a figure per matrix, beside the truth where there is one."""
        matrices = self._experiment.config.method.noise_matrix(shared)
        if matrices is None:
            return {}
        names = self._experiment.federation.dataset.class_names
        found = {}
        for place, (matrix, truth) in enumerate(zip(matrices.cpu().numpy(), self._truth(len(matrices)), strict=True)):
            shown = truth if np.isfinite(truth).any() else None
            found["transition" if len(matrices) == 1 else f"transition/{place}"] = transition_figure(
                matrix, shown, names
            )
        return found

    def _truth(self, annotators: int) -> np.ndarray:
        """Returns (annotators, classes, classes), NaN in the rows of classes without a noisy label."""
        counts = self._experiment.federation.noise_counts(annotators)
        if self._experiment.federation.has_noisy_sets:
            counts = np.zeros_like(counts)  # what T means then is the set likelihood's affair
        totals = np.repeat(counts.sum(2, keepdims=True), counts.shape[2], 2)
        return ratio(counts.ravel(), totals.ravel()).reshape(counts.shape)

    def _warn(self, matrices: torch.Tensor, round_number: int) -> None:
        names = self._experiment.federation.dataset.class_names
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
