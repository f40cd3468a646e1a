"""Accuracy and coverage of pseudo-labels, per class and per client."""

from __future__ import annotations

import numpy as np

from fedlabel.learning.metrics import bins_of, pseudo_label_metrics, ratio, tenths
from server.observers.base import Observer, Report, Round
from server.state import ServerState


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
        lists = {
            "pseudo/class_coverage": ratio(counts["kept"], counts["drawn"]),
            "pseudo/class_accuracy": ratio(counts["correct"], counts["kept"]),
            "pseudo/client_coverage": self.of_trained(dict(zip(clients, coverage, strict=True))),
            "pseudo/client_accuracy": self.of_trained(dict(zip(clients, accuracy, strict=True))),
        }
        bins = {"pseudo/confidences": bins_of(counts)[0]}
        if "beliefs" in counts:
            bins["pseudo/beliefs"] = np.array(counts["beliefs"])
        figures = {}
        final = self.experiment.recipe.place(seen.number).stage.final
        if seen.is_evaluated and final and self.has_figures(seen.number):
            from fedlabel.record.figures import reliability_figure  # here: matplotlib takes a while to import

            figures["pseudo/reliability"] = reliability_figure(bins_of(counts), f"Pseudo-labels of round {seen.number}")
        metrics = pseudo_label_metrics(counts)
        if np.isfinite(accuracy).any():
            tags = ("pseudo/lowest_10pct_client_accuracy", "pseudo/highest_10pct_client_accuracy")
            metrics |= dict(zip(tags, tenths(accuracy), strict=True))
        return Report(metrics, lists, bins, figures)
