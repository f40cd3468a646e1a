"""Sends models of other clients to those with similar outputs: FedMatch's inter-client consistency.

Jeong et al., "Federated Semi-Supervised Learning with Inter-Client Consistency & Disjoint Learning", ICLR 2021: the
server describes every model it got by its output on one fixed random image and looks for the nearest in a k-d tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from scipy.spatial import KDTree

from fedlabel.experiment import Experiment
from fedlabel.learning.step import frozen_model
from fedlabel.methods.recipe import Helpers
from fedlabel.seeding import numpy_generator
from server.strategy import decode


class HelperPool:
    """The last model of every client that has trained (one copy of `Helpers.prefix` each), and its output.

    Args:
        experiment: gives the architecture.
        helpers: how many models go to whom, and when.
    """

    def __init__(self, experiment: Experiment, helpers: Helpers) -> None:
        self._experiment = experiment
        self._helpers = helpers
        self._models: dict[int, dict[str, np.ndarray]] = {}
        self._outputs: dict[int, np.ndarray] = {}
        dataset, rng = experiment.federation.dataset, numpy_generator(experiment.config.seed, "helpers")
        if dataset.tabular:
            noise = rng.normal(size=(1, *dataset.input_shape)).astype(np.float32)
        else:
            noise = rng.normal(125, 125, (1, *dataset.input_shape)).clip(0, 255).astype(np.uint8)
        self._probe = experiment.transform.normalize(torch.from_numpy(noise).to(experiment.device))

    def watch(self, replies: Iterable[Message], client_of: Mapping[int, int]) -> Iterator[Message]:
        """Passes on usable replies, and stores the models in them; client_of: node id -> client."""
        types = {name: value.dtype for name, value in self._experiment.initial_state.items()}
        for reply in replies:
            arrays = {name: decode(array) for name, array in reply.content.array_records["arrays"].items()}
            state = {n: torch.from_numpy(a.copy()).to(self._experiment.device, types[n]) for n, a in arrays.items()}
            client = client_of[reply.metadata.src_node_id]
            output = frozen_model(self._experiment.teacher, state)(self._probe).softmax(-1)
            if output.isfinite().all():  # a model that says nothing has no neighbours and helps nobody
                self._outputs[client] = output[0].double().cpu().numpy()
                chosen = {name: array for name, array in arrays.items() if name.startswith(self._helpers.prefix)}
                self._models[client] = {name: array.copy() for name, array in chosen.items()}
            yield reply

    def nearest(self, client: int) -> list[int]:
        """Returns the clients whose models are nearest to the last one of `client`; empty if it never trained."""
        if client not in self._outputs:
            return []
        clients = sorted(self._outputs)
        tree = KDTree(np.stack([self._outputs[other] for other in clients]))
        _, found = tree.query(self._outputs[client], k=min(self._helpers.count + 1, len(clients)))
        others = [clients[position] for position in np.atleast_1d(found)]
        return [other for other in others if other != client][: self._helpers.count]

    def attach(self, messages: list[Message], client_of: Mapping[int, int], round_number: int) -> list[Message]:
        """Returns the messages of a round; in rounds with helpers they also carry the models "helper0", ..."""
        if round_number % self._helpers.every:
            return messages
        return [self._with_helpers(message, client_of[message.metadata.dst_node_id]) for message in messages]

    def _with_helpers(self, message: Message, client: int) -> Message:
        records = {
            f"helper{position}": ArrayRecord({name: Array(value) for name, value in self._models[other].items()})
            for position, other in enumerate(self.nearest(client))
        }
        if not records:
            return message
        about = message.metadata
        content = RecordDict({**message.content, **records})
        return Message(content, about.dst_node_id, about.message_type, group_id=about.group_id)

    def dump(self) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        """Returns the stored models, for a checkpoint."""
        outputs = {client: {"output": output} for client, output in self._outputs.items()}
        return {"models": dict(self._models), "outputs": outputs}

    def load(self, saved: Mapping[str, dict[int, dict[str, np.ndarray]]]) -> None:
        """Restores the result of `dump`."""
        self._models = dict(saved["models"])
        self._outputs = {client: entry["output"] for client, entry in saved["outputs"].items()}
