"""Accuracy and coverage of pseudo-labels, per class and per client."""

from __future__ import annotations

import numpy as np

from fedlabel.data.federation import SHOWN_CLIENTS
from fedlabel.learning.metrics import bins_of, pseudo_label_metrics, ratio
from server.observers.base import Observer, Report, Round
from server.state import ServerState


class PseudoLabelObserver(Observer):
    """Computes them from counts that clients of a simulation make with their hidden labels."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        counts = seen.counts
        if "drawn" not in counts:
            return Report()
        of_clients, number = seen.tally.client_counts, self.experiment.config.num_clients
        # Of many clients a fixed choice would hardly ever have trained: then those are shown that have, in their order.
        shown = range(number) if number <= SHOWN_CLIENTS else sorted(of_clients)[:SHOWN_CLIENTS]
        clients = [of_clients.get(client, {}) for client in shown]
        drawn, kept, correct = ([sum(c.get(key, [0.0])) for c in clients] for key in ("drawn", "kept", "correct"))
        lists = {
            "pseudo/class_coverage": ratio(counts["kept"], counts["drawn"]),
            "pseudo/class_accuracy": ratio(counts["correct"], counts["kept"]),
            "pseudo/client_coverage": ratio(kept, drawn),  # NaN for clients that did not train this round
            "pseudo/client_accuracy": ratio(correct, kept),
        }
        bins = {"pseudo/confidences": bins_of(counts)[0]}
        if "beliefs" in counts:
            bins["pseudo/beliefs"] = np.array(counts["beliefs"])
        figures = {}
        final = self.experiment.recipe.place(seen.number).stage.final
        if seen.is_evaluated and final and self.has_figures(seen.number):
            from fedlabel.record.figures import reliability_figure  # here: matplotlib takes a while to import

            figures["pseudo/reliability"] = reliability_figure(bins_of(counts), f"Pseudo-labels of round {seen.number}")
        return Report(pseudo_label_metrics(counts), lists, bins, figures)
