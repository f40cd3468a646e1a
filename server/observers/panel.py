"""Panels of one client's samples with their pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlabel.compression import without_residuals
from fedlabel.experiment import Experiment
from fedlabel.learning.step import frozen_model
from fedlabel.methods.batch import PseudoLabels, StateDict
from fedlabel.record.results import is_evaluated
from server.observers.base import Observer, Report, Round
from server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PanelObserver(Observer):
    """Shows the panels in TensorBoard with the figures of an evaluation."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        if not (seen.may_draw and self.needs_memory(seen.number)):
            return Report()
        return Report(figures=pseudo_panels(self.experiment, seen, self.is_full))

    def needs_memory(self, number: int) -> bool:
        """See `Observer`: in rounds with a panel."""
        config = self.experiment.config
        final = self.experiment.recipe.place(number).stage.final
        return final and is_evaluated(number, config.num_rounds, config.evaluation.every) and self.has_figures(number)


def pseudo_panels(experiment: Experiment, seen: Round, remarkable: bool) -> dict[str, Figure]:
    """Returns figures of one client's pseudo-labelled samples, by tag; none if the method has none.

    Nothing is asked of the client: this process trains its own copy of the (simulated) client once more, which gives
    the same draws and the same experts. Where only they know what clients keep, a method that keeps something
    has no panel; nor have tables, whose samples are no pictures.

    Args:
        experiment: the run's.
        seen: the round.
        remarkable: whether there is a panel for each of `_remarkable`, besides that of the first draws.
    """
    tally, invitation = seen.tally, seen.tally.invitation
    size = 0 if experiment.federation.dataset.tabular else experiment.config.evaluation.panel_samples
    client = next((c for c, counts in tally.client_counts.items() if "drawn" in counts), None)
    if client is None and experiment.federation.num_without_label:  # then pseudo-labels were compared with nothing
        client = next(iter(tally.client_counts), None)
    if size == 0 or client is None:
        return {}
    remembered = {} if seen.memory_of is None else seen.memory_of(client)
    kept = {name: value.to(experiment.device) for name, value in without_residuals(remembered).items()}
    previous = {"previous": invitation.previous} if invitation.previous else {}
    further = {**previous, **invitation.helpers.get(client, {})}
    memory = {**kept, **invitation.shared}
    update = experiment.train(client, invitation.model, invitation.round_number, memory, further)
    if update.pseudo is None or (seen.memory_of is None and update.kept):
        return {}
    from fedlabel.record.figures import pseudo_label_panel  # here: matplotlib takes a while to import

    rows, pseudo = update.pseudo_index.cpu(), PseudoLabels(*(values.cpu() for values in update.pseudo))
    images, truth = experiment.client_data(client).images, experiment.federation.hidden_labels(client)[rows]
    draws = {"pseudo/samples": ("Pseudo-labels", torch.arange(len(rows)))}
    second: Sequence[str] = ()
    if remarkable:
        global_labels = _labels(experiment, invitation.model, images[rows.to(experiment.device)])
        draws |= _remarkable(rows, pseudo, truth, global_labels)
    names = experiment.federation.dataset.class_names
    figures = {}
    for tag, (title, chosen) in draws.items():
        shown = chosen[:size]
        if len(shown) == 0:
            continue
        if tag == DISPUTED:
            second = [f"global model: {names[each]}" for each in global_labels[shown].tolist()]
        figures[tag] = pseudo_label_panel(
            images=images[rows[shown].to(experiment.device)].cpu(),
            true_names=[names[y] if y >= 0 else None for y in truth[shown].tolist()],
            pseudo_names=[names[y] for y in pseudo.label[shown].tolist()],
            kept=pseudo.keep[shown].tolist(),
            experts=["global" if g else "local" for g in pseudo.from_global[shown].tolist()],
            confidences=pseudo.confidence[shown].tolist(),
            title=f"{title}, client {client} in round {seen.number}",
            notes=second if tag == DISPUTED else (),
        )
    return figures


DISPUTED = "pseudo/samples_disputed"


def _remarkable(
    rows: Tensor, pseudo: PseudoLabels, truth: Tensor, global_labels: Tensor
) -> dict[str, tuple[str, Tensor]]:
    """Returns tag -> title and places of draws, each sample once, as it was drawn last.

    Args:
        rows: (n,) int64, the sample of each draw.
        pseudo: of the draws.
        truth: (n,) int64; -1: unknown.
        global_labels: (n,) int64, the class that the global model gives each.
    """
    order: dict[int, tuple[int, int]] = {}
    for place, row in enumerate(rows.tolist()):
        order[row] = order.get(row, (place, place))[0], place
    first, last = torch.tensor(list(order.values()), dtype=torch.int64).reshape(-1, 2).unbind(1)
    last_seen = PseudoLabels(*(values[last] for values in pseudo))
    by_confidence = last_seen.confidence.argsort(descending=True, stable=True)

    def where(mask: Tensor) -> Tensor:
        return last[by_confidence][mask[by_confidence]]

    wrong = last_seen.keep & (last_seen.label != truth[last]) & (truth[last] >= 0)
    found = {
        "pseudo/samples_wrong": ("Wrong pseudo-labels that are used, most confident first", where(wrong)),
        "pseudo/samples_newly_kept": ("First dropped, then used", where(~pseudo.keep[first] & last_seen.keep)),
        "pseudo/samples_dropped": ("Dropped, most confident first", where(~last_seen.keep)),
    }
    if pseudo.from_global.any() and not pseudo.from_global.all():  # a method that chooses between two experts
        disputed = ~last_seen.from_global & (last_seen.label != global_labels[last])
        found[DISPUTED] = ("The local model is the expert, and the global one disagrees", where(disputed))
    return found


def _labels(experiment: Experiment, model: StateDict, images: Tensor) -> Tensor:
    """Returns (n,) int64, the classes that a model gives images (n, channels, height, width)."""
    predict = frozen_model(experiment.teacher, model)
    return torch.cat([predict(experiment.transform.normalize(part)).argmax(-1).cpu() for part in images.split(500)])
