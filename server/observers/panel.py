"""A panel of one client's samples with their pseudo-labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlabel.compression import without_residuals
from fedlabel.experiment import Experiment
from fedlabel.record.results import is_evaluated
from server.observers.base import Observer, Report, Round
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PanelObserver(Observer):
    """Shows the panel in TensorBoard with the figures of an evaluation."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        if not self.needs_memory(seen.number):
            return Report()
        panel = pseudo_panel(self.experiment, seen)
        return Report(figures={"pseudo/samples": panel} if panel is not None else {})

    def needs_memory(self, number: int) -> bool:
        """See `Observer`: in rounds with a panel."""
        config = self.experiment.config
        final = self.experiment.recipe.place(number).stage.final
        return final and is_evaluated(number, config.num_rounds, config.evaluation.every) and self.has_figures(number)


def pseudo_panel(experiment: Experiment, seen: Round) -> Figure | None:
    """Returns a figure of one client's pseudo-labelled samples, or None if the method has none.

    Nothing is asked of the client: this process trains its own copy of the (simulated) client once more, which gives
    the same draws and the same experts. Where only they know what clients keep, a method that keeps something
    has no panel; nor have tables, whose samples are no pictures.
    """
    tally, invitation = seen.tally, seen.tally.invitation
    size = 0 if experiment.federation.dataset.tabular else experiment.config.evaluation.panel_samples
    client = next((c for c, counts in tally.client_counts.items() if "drawn" in counts), None)
    if client is None and experiment.federation.num_without_label:  # then pseudo-labels were compared with nothing
        client = next(iter(tally.client_counts), None)
    if size == 0 or client is None:
        return None
    remembered = {} if seen.memory_of is None else seen.memory_of(client)
    kept = {name: value.to(experiment.device) for name, value in without_residuals(remembered).items()}
    previous = {"previous": invitation.previous} if invitation.previous else {}
    further = {**previous, **invitation.helpers.get(client, {})}
    memory = {**kept, **invitation.shared}
    update = experiment.train(client, invitation.model, invitation.round_number, memory, further)
    if update.pseudo is None or (seen.memory_of is None and update.kept):
        return None
    from fedlabel.record.figures import pseudo_label_panel  # here: matplotlib takes a while to import

    rows = update.pseudo_index[:size]
    names = experiment.federation.dataset.class_names
    pseudo = [values[: len(rows)].cpu() for values in update.pseudo]
    return pseudo_label_panel(
        images=experiment.client_data(client).images[rows.to(experiment.device)].cpu(),
        true_names=[names[y] if y >= 0 else None for y in experiment.federation.hidden_labels(client)[rows].tolist()],
        pseudo_names=[names[int(y)] for y in pseudo[0]],
        kept=pseudo[1].tolist(),
        experts=["global" if g else "local" for g in pseudo[2]],
        confidences=pseudo[3].tolist(),
    )
