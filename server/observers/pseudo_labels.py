"""Accuracy and coverage of pseudo-labels, per class and per client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlabel.learning.metrics import Counts, bins_of, pseudo_label_metrics, ratio, tenths
from server.observers.base import Observer, Report, Round
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PseudoLabelObserver(Observer):
    """Computes them from counts that clients of a simulation make with their hidden labels."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        counts = seen.counts
        if "drawn" not in counts:
            return Report()
        of_clients = seen.tally.client_counts
        clients = sorted(of_clients)
        drawn, kept, correct = (
            [sum(of_clients[client].get(key, [0.0])) for client in clients] for key in ("drawn", "kept", "correct")
        )
        coverage, accuracy = ratio(kept, drawn), ratio(correct, kept)
        drawn_of_class = np.array(counts["drawn"])
        by_both = (np.reshape(counts[name], (-1, 2)).T for name in ("kept_by_both", "correct_by_both"))
        of_experts = dict(zip(("local", "global"), zip(*by_both, strict=True), strict=True))
        lists = {
            "pseudo/class_coverage": ratio(counts["kept"], counts["drawn"]),
            "pseudo/class_accuracy": ratio(counts["correct"], counts["kept"]),
            **{f"pseudo/class_coverage_{name}": ratio(of[0], drawn_of_class) for name, of in of_experts.items()},
            **{f"pseudo/class_accuracy_{name}": ratio(of[1], of[0]) for name, of in of_experts.items()},
            "pseudo/client_coverage": self.of_trained(dict(zip(clients, coverage, strict=True))),
            "pseudo/client_accuracy": self.of_trained(dict(zip(clients, accuracy, strict=True))),
        }
        bins = {"pseudo/confidences": bins_of(counts)[0]}
        if "beliefs" in counts:
            bins["pseudo/beliefs"] = np.array(counts["beliefs"])
        figures: dict[str, Figure] = {}
        final = self.experiment.recipe.place(seen.number).stage.final
        if seen.is_evaluated and seen.may_draw and final and self.has_figures(seen.number):
            figures = self._figures(counts, seen.number)
        metrics = pseudo_label_metrics(counts)
        if np.isfinite(accuracy).any():
            tags = ("pseudo/lowest_10pct_client_accuracy", "pseudo/highest_10pct_client_accuracy")
            metrics |= dict(zip(tags, tenths(accuracy), strict=True))
        return Report(metrics, lists, bins, figures)

    def _figures(self, counts: Counts, number: int) -> dict[str, Figure]:
        from fedlabel.record.figures import reliability_figure  # here: matplotlib takes a while to import
        from fedlabel.record.figures_pseudo import experts_figure, precision_coverage_figure

        bins, names = bins_of(counts), self.experiment.federation.dataset.class_names
        drawn, kept, correct = (np.array(counts[name]) for name in ("drawn", "kept_by_both", "correct_by_both"))
        by_model = kept.reshape(-1, 2), correct.reshape(-1, 2)
        return {
            "pseudo/reliability": reliability_figure(bins, f"Pseudo-labels of round {number}"),
            "pseudo/precision_coverage": precision_coverage_figure(bins, float(kept.sum()), float(correct.sum())),
            "pseudo/experts": experts_figure(drawn, *by_model, names),
        }
