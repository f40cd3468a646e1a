"""A panel of one client's samples with their pseudo-labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from flwr.app import ArrayRecord, RecordDict

from fedlabel.experiment import Experiment
from fedlabel.methods.shared import state_from_lists
from server.observers.base import Observer, Report, Round
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PanelObserver(Observer):
    """Shows the panel in TensorBoard with the figures of an evaluation."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        final = self.experiment.recipe.place(seen.number).stage.final
        if not (seen.is_evaluated and final and self.has_figures(seen.number)):
            return Report()
        panel = pseudo_panel(self.experiment, seen)
        return Report(figures={"pseudo/samples": panel} if panel is not None else {})


def pseudo_panel(experiment: Experiment, seen: Round) -> Figure | None:
    """Returns a figure of one client's pseudo-labelled samples, or None if the method has none.

    Nothing is asked of the client: this process trains its own copy of the (simulated) client once more, which gives
    the same draws and the same experts. Where what clients keep is not in this process, a method that keeps something
    has no panel; nor have tables, whose samples are no pictures.
    """
    tally, client_states = seen.tally, seen.client_states
    size = 0 if experiment.federation.dataset.tabular else experiment.config.evaluation.panel_samples
    client = next((c for c, counts in tally.client_counts.items() if "drawn" in counts), None)
    if client is None and experiment.federation.num_without_label:  # then pseudo-labels were compared with nothing
        client = next(iter(tally.client_counts), None)
    if size == 0 or client is None:
        return None
    content = tally.messages[client].content
    types = {name: value.dtype for name, value in experiment.initial_state.items()}
    received = {
        record: {name: value.to(experiment.device, types[name]) for name, value in arrays.to_torch_state_dict().items()}
        for record, arrays in content.array_records.items()
    }
    kept = (client_states or {}).get(client, RecordDict()).array_records.get("memory", ArrayRecord({}))
    memory = {name: torch.from_numpy(array.numpy().copy()).to(experiment.device) for name, array in kept.items()}
    memory |= state_from_lists(
        {key: cast(list[float], value) for key, value in content.config_records["shared"].items()}, experiment.device
    )
    update = experiment.train(client, received.pop("arrays"), tally.round_number, memory, received)
    if update.pseudo is None or (client_states is None and update.kept):
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
