"""Sends models of other clients to those with similar outputs: FedMatch's inter-client consistency.

Jeong et al., "Federated Semi-Supervised Learning with Inter-Client Consistency & Disjoint Learning", ICLR 2021: the
server describes every model it got by its output on one fixed random image and looks for the nearest in a k-d tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.spatial import KDTree

from fedlabel.experiment import Experiment
from fedlabel.learning.step import frozen_model
from fedlabel.methods.batch import StateDict
from fedlabel.methods.recipe import Helpers
from fedlabel.seeding import numpy_generator
from server.blocks import BlockResult


class HelperPool:
    """The last model of every client that has trained (one copy of `Helpers.prefix` each), and its output.

    Args:
        experiment: gives the architecture.
        helpers: how many models go to whom, and when.
    """

    def __init__(self, experiment: Experiment, helpers: Helpers) -> None:
        self._experiment = experiment
        self._helpers = helpers
        self._models: dict[int, StateDict] = {}
        self._outputs: dict[int, np.ndarray] = {}
        dataset, rng = experiment.federation.dataset, numpy_generator(experiment.config.seed, "helpers")
        if dataset.tabular:
            noise = rng.normal(size=(1, *dataset.input_shape)).astype(np.float32)
        else:
            noise = rng.normal(125, 125, (1, *dataset.input_shape)).clip(0, 255).astype(np.uint8)
        self._probe = experiment.transform.normalize(torch.from_numpy(noise).to(experiment.device))

    def watch(self, blocks: Iterable[BlockResult]) -> Iterator[BlockResult]:
        """Passes on blocks, and stores the models in them."""
        for block in blocks:
            for result in block.results:
                (part,) = result.parts.values()
                self._store(result.client, part.state)
            yield block

    def _store(self, client: int, model: StateDict) -> None:
        state = {name: value.to(self._experiment.device) for name, value in model.items()}
        output = frozen_model(self._experiment.teacher, state)(self._probe).softmax(-1)
        if output.isfinite().all():  # a model that says nothing has no neighbours and helps nobody
            self._outputs[client] = output[0].double().cpu().numpy()
            chosen = {name: value for name, value in state.items() if name.startswith(self._helpers.prefix)}
            self._models[client] = {name: value.clone() for name, value in chosen.items()}

    def nearest(self, client: int) -> list[int]:
        """Returns the clients whose models are nearest to the last one of `client`; empty if it never trained."""
        if client not in self._outputs:
            return []
        clients = sorted(self._outputs)
        tree = KDTree(np.stack([self._outputs[other] for other in clients]))
        _, found = tree.query(self._outputs[client], k=min(self._helpers.count + 1, len(clients)))
        others = [clients[position] for position in np.atleast_1d(found)]
        return [other for other in others if other != client][: self._helpers.count]

    def helpers_of(self, cohort: Sequence[int], round_number: int) -> dict[int, dict[str, StateDict]]:
        """Returns the models "helper0", ... for each client that gets some in a round."""
        if round_number % self._helpers.every:
            return {}
        found = {
            client: {f"helper{position}": self._models[other] for position, other in enumerate(self.nearest(client))}
            for client in cohort
        }
        return {client: helpers for client, helpers in found.items() if helpers}

    def dump(self) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        """Returns the stored models, for a checkpoint."""
        outputs = {client: {"output": output} for client, output in self._outputs.items()}
        models = {client: {n: v.cpu().numpy() for n, v in model.items()} for client, model in self._models.items()}
        return {"models": models, "outputs": outputs}

    def load(self, saved: Mapping[str, dict[int, dict[str, np.ndarray]]]) -> None:
        """Restores the result of `dump`."""
        device = self._experiment.device
        self._models = {
            client: {name: torch.from_numpy(array.copy()).to(device) for name, array in model.items()}
            for client, model in saved["models"].items()
        }
        self._outputs = {client: entry["output"] for client, entry in saved["outputs"].items()}
