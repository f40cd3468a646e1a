"""Embeddings of a fixed sample of the clients' data, for TensorBoard's projector."""

from __future__ import annotations

import numpy as np
import torch

from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.record.projector import projector_files
from fedlabel.seeding import numpy_generator
from server.observers.base import Observer, Report, Round
from server.state import ServerState

SAMPLES = 400
"""Points: the same ones in all rounds."""


class ProjectorObserver(Observer):
    """Writes them with the figures of an evaluation, in place of those of before (tracking.level=full)."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        experiment, number = self.experiment, seen.number
        config, federation = experiment.config, experiment.federation
        due = seen.is_evaluated and seen.may_draw and self.has_figures(number)
        predict = experiment.predictor(number, state.models, state.shared) if due and self.is_full else None
        if predict is None:
            return Report()
        held = federation.parts
        chosen = numpy_generator(config.seed, "projector").permutation(len(held.rows))[:SAMPLES]
        rows, owner = held.rows[chosen], held.part_of_row[chosen]
        index = torch.from_numpy(rows)
        images = experiment.images[index.to(experiment.device)]
        inputs = experiment.transform.normalize(images)
        with torch.no_grad():
            logits = predict(inputs)
        embed = experiment.embedder(state.model)
        points = logits if embed is None else embed(inputs)
        confidence, label = logits.softmax(-1).max(-1)
        truth, names = federation.dataset.train.labels[index], federation.dataset.class_names
        right = label.cpu() == truth
        kinds = federation.record.kind[index].tolist()
        columns = {
            "true class": [names[each] for each in truth.tolist()],
            "pseudo-label": [names[each] for each in label.tolist()],
            "right": ["right" if each else "wrong" for each in right.tolist()],
            "confidence": [f"{each:.3f}" for each in confidence.tolist()],
            "client": owner.tolist(),
            "kind of label": [KIND_NAMES[each] for each in kinds],
        }
        pictures = None if federation.dataset.tabular else images.cpu().numpy()
        name = f"{'logits' if embed is None else 'embeddings'} of round {number}"
        values = points.float().cpu().numpy()
        return Report(files=projector_files(name, values, columns, pictures)) if _usable(values) else Report()


def _usable(points: np.ndarray) -> bool:
    return points.ndim == 2 and bool(np.isfinite(points).all())
