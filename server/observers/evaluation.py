"""Evaluates the global model on the test (or validation) split, and computes the metric of `evaluation.select`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlabel.data.federation import shown_clients
from server.observers.base import Observer, Report, Round
from server.selection import select_key
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EvaluationObserver(Observer):
    """Evaluates the global model, as the method defines it (`Stage.predict`)."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        experiment, number = self.experiment, seen.number
        if not seen.is_evaluated:
            return Report()
        if seen.evaluate is None:
            evaluation = experiment.evaluate(number, state.models, state.shared)
        else:
            evaluation = seen.evaluate()
        if evaluation is None:
            return Report()
        metrics = evaluation.metrics()
        if not experiment.recipe.place(number).stage.final:
            return Report({"interim/accuracy": metrics["eval/accuracy"]})
        if experiment.config.devices.correlation:
            rare = experiment.federation.rare_classes(experiment.config.devices.rare_classes)
            metrics["eval/rare_class_accuracy"] = float(np.nanmean(evaluation.class_accuracy[rare]))
        accuracy = evaluation.client_accuracy
        lists: dict[str, np.ndarray] = {
            "eval/class_accuracy": evaluation.class_accuracy,
        }
        is_by_client = bool(np.isfinite(accuracy).any())
        if is_by_client:
            lists["eval/client_accuracy"] = accuracy[shown_clients(len(accuracy))]
        figures: dict[str, Figure] = {}
        if seen.may_draw and self.has_figures(number):
            from fedlabel.record.figures import client_accuracy_figure, confusion_figure  # matplotlib takes a while

            names = experiment.federation.dataset.class_names
            figures["eval/confusion"] = confusion_figure(evaluation.confusion, names)
            if evaluation.bag_shares is not None and evaluation.bag_shares.size:
                from fedlabel.record.figures_bags import bags_figure

                figures["eval/bags"] = bags_figure(evaluation.bag_shares[0], evaluation.bag_shares[1], names)
            if is_by_client:
                labels = experiment.federation.client_labels(np.arange(len(accuracy)))
                figures["eval/clients"] = client_accuracy_figure(accuracy, labels)
        tag = select_key(experiment)
        # Not in the other rounds of the last tenth: the next stage starts from the model that is selected, and what a
        # run learns must not depend on when it is to end.
        if tag is not None and (self.is_last(number) or number % experiment.config.evaluation.every == 0):
            score = experiment.selection_score(number, state.models, state.shared)
            metrics |= {tag: score} if score is not None else {}
        return Report(metrics, lists, figures=figures)
