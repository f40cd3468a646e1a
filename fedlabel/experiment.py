"""What a process needs to play its part in a run; client and server build the same from the same configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedlabel.config import SELECT, ExperimentConfig, parse_config
from fedlabel.data.bags import Bags
from fedlabel.data.datasets import Split
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.skew import shift_features
from fedlabel.evaluation import Evaluation, evaluate
from fedlabel.hardware import memory_bytes, resolve_device
from fedlabel.methods.steps import State, StateDict
from fedlabel.models import Net, build_model, check_size, running_statistics
from fedlabel.models.additive import Additive
from fedlabel.models.bag_head import BagHead
from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.twins import Twins
from fedlabel.seeding import derive_seed
from fedlabel.training import (
    ClientData,
    ClientUpdate,
    ImageTransform,
    Trainer,
    frozen_model,
    train_client,
    train_server,
)

AVERAGES = ("weighted_mean", "FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
"""The strategies whose result is a mean, a median or one of what clients send: right for running statistics, too."""


class Judged(NamedTuple):
    """What models are judged on."""

    split: Split
    parts: Sequence[np.ndarray]
    """Rows of the split that each client is judged on."""
    bags: Bags | None
    """Of the samples of the split."""


class Experiment:
    """Data on the device, two resident modules (student and teacher), and the steps of a run."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        if self.device.type == "cuda":  # the same seed should give the same numbers on a GPU, too
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.federation: Federation = self._federation(config.evaluation.split)
        if len(self.federation.server_rows) and not config.method.server_labels:
            raise ValueError(
                f"`supervision.labels_at` (=server): method {config.method.name} learns from labels at the clients. "
                "Take supervision.labels_at=clients or some_clients."
            )
        config.method.check(self.federation.record)
        dataset, skew = self.federation.dataset, config.skew
        images = shift_features(dataset.train.images, self.federation.parts, skew, config.seed, "train")
        self.images = images.to(self.device)
        self.judged = self._judged(config.evaluation.split)
        self.selects_by = self._judged("validation") if config.evaluation.select is not None else None
        self.transform = ImageTransform(
            mean=torch.tensor(dataset.mean, device=self.device).view(-1, 1, 1),
            std=torch.tensor(dataset.std, device=self.device).view(-1, 1, 1),
            augment=config.augment,
            allow_flip=dataset.allow_flip,
        )
        seed = derive_seed(config.seed, "model")
        memory = memory_bytes()
        if memory is not None:
            check_size(lambda: self._network(seed), config.model, memory)
        student, self.teacher = (self._build_model(seed) for _ in range(2))
        self._check_strategy(student)
        self.trainer = Trainer(student, self.teacher, self.transform, config.training)
        # Fails here, before anything is started, if the augmentation does not fit the images.
        self.transform.views(self.images[:1], ("weak", "strong"), torch.Generator(self.device))
        self.initial_state: StateDict = {name: value.clone() for name, value in student.state_dict().items()}
        self.running = running_statistics(student)

    def _federation(self, split: str) -> Federation:
        config = self.config
        return build_federation(
            config.data,
            config.partition,
            config.labeled_partition,
            config.supervision,
            config.skew,
            config.num_clients,
            split,
            config.method.oracle_labels,
            config.seed,
        )

    def _judged(self, split: str) -> Judged:
        """Returns what models are judged on, on the device."""
        config, select = self.config, self.config.evaluation.select
        if select is not None and len(self.federation.dataset.validation.labels) == 0:
            raise ValueError(
                f"`evaluation.select` (={select}) goes by the validation split, which is empty: set "
                f"data.validation_fraction (={config.data.validation_fraction:g}) above 0, or evaluation.select=null."
            )
        labels = self.federation.dataset.validation.labels
        if select == "instance_auc" and bool((labels == labels[0]).all()):
            raise ValueError(
                f"`evaluation.select` (={select}) needs samples of both classes in the validation split, and all "
                f"{len(labels)} are of one: raise data.validation_fraction (={config.data.validation_fraction:g})."
            )
        federation = self._federation(split)
        dataset, bags = federation.dataset, federation.test_bags
        classes = dataset.num_classes
        if (select == "bag_mae" and bags is None) or (select == "instance_auc" and classes != 2):
            raise ValueError(
                f"`evaluation.select` (={select}) needs {'bags' if select == 'bag_mae' else 'two classes'}, and there "
                f"are {'none' if select == 'bag_mae' else classes}: take another, or evaluation.select=null."
            )
        samples = dataset.validation if split == "validation" else dataset.test
        images = shift_features(samples.images, federation.test_parts, config.skew, config.seed, "evaluation")
        return Judged(
            Split(images.to(self.device), samples.labels.to(self.device)),
            federation.test_parts,
            None if bags is None else Bags(*(values.to(self.device) for values in bags)),
        )

    def _check_strategy(self, model: nn.Module) -> None:
        """Looks for buffers: to a server's optimiser or noise they would be weights like others."""
        name, weights = self.config.strategy.name, {key for key, _ in model.named_parameters(remove_duplicate=False)}
        buffers = [key for key in model.state_dict() if key not in weights]
        if buffers and name not in AVERAGES:
            raise ValueError(
                f"`strategy.name` (={name}) would apply its optimiser or noise to what `model.name` "
                f"(={self.config.model.name}) keeps beside its weights, BatchNorm's running statistics for instance: "
                f"{', '.join(buffers[:3])} ({len(buffers)} in all). Take a network without, e.g. "
                f"model.name=cnn with model.norm=group, or strategy.name={' or '.join(AVERAGES)}."
            )

    def _build_model(self, seed: int) -> nn.Module:
        return self._network(seed).to(self.device)

    def _network(self, seed: int) -> nn.Module:
        """Returns the student, on the device that torch makes things on."""
        dataset, method = self.federation.dataset, self.config.method
        if method.additive and method.networks > 1:
            raise ValueError(
                f"`networks` (={method.networks}) of method {method.name} must be 1 where its model is a sum of parts "
                f"(`additive` ={', '.join(method.additive)}): leave out one of the two."
            )
        # The first network is what a method of one network starts from.
        seeds = [seed, *(derive_seed(seed, "network", place) for place in range(1, method.networks))]
        models = [build_model(self.config.model, dataset.input_shape, dataset.num_classes, own) for own in seeds]
        if method.needs_embeddings and not isinstance(models[0], Net):
            raise ValueError(
                f"`model.name` (={self.config.model.name}) gives no embeddings, which method {method.name} needs: "
                "take a network of our own, e.g. cnn or mlp."
            )
        running = sorted(name.rpartition(".")[0] for name in running_statistics(models[0]).means)
        if method.input_gradients and running:
            raise ValueError(
                f"`model.norm` (={self.config.model.norm}) of `model.name` (={self.config.model.name}): its layer "
                f"{running[0]} is BatchNorm, or has running statistics like it, which method {method.name} cannot "
                "differentiate by its inputs: take model.norm=group and a network of our own."
            )
        for name, size, wrap in (
            ("bag_head", method.bag_head, BagHead),
            ("labeling_heads", method.labeling_heads, LabelingHeads),
        ):
            if size:
                assert isinstance(models[0], Net), "who has heads of its own needs embeddings"
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(derive_seed(seed, name))  # and no GPU's
                    return wrap(models[0], size)
        if len(models) > 1:
            return Twins(models)
        return Additive(models[0], method.additive) if method.additive else models[0]

    def fresh_state(self, round_number: int) -> StateDict:
        """Returns the weights that a stage which starts in this round starts from (see `Method.starts_stage`)."""
        state = self._build_model(derive_seed(self.config.seed, "model", round_number)).state_dict()
        return {name: value.clone() for name, value in state.items()}

    def client_data(self, client: int) -> ClientData:
        """Returns what training may see of `client`, on the device."""
        rows = torch.from_numpy(self.federation.parts[client]).to(self.device)
        return ClientData(self.images[rows], self.federation.supervision(client).to(self.device))

    def server_data(self) -> ClientData | None:
        """Returns the server's labelled samples, on the device; None if it has none."""
        rows = torch.from_numpy(self.federation.server_rows).to(self.device)
        if len(rows) == 0:
            return None
        return ClientData(self.images[rows], self.federation.server_supervision().to(self.device))

    def train(
        self,
        client: int,
        global_state: StateDict,
        round_number: int,
        memory: State | None = None,
        helpers: Mapping[str, StateDict] = MappingProxyType({}),
    ) -> ClientUpdate:
        """Runs `client`'s part of a round from `global_state`; all tensors on the device, see `train_client`."""
        seed = derive_seed(self.config.seed, "client", client, "round", round_number)
        data = self.client_data(client)
        return train_client(self.config.method, self.trainer, global_state, data, round_number, seed, memory, helpers)

    def train_server(self, global_state: StateDict, round_number: int) -> StateDict:
        """Trains `global_state` on the server's own labels after a round; returns it as it is if there are none."""
        data = self.server_data()
        if data is None:
            return global_state
        seed = derive_seed(self.config.seed, "server", "round", round_number)
        return train_server(self.config.method, self.trainer, global_state, data, round_number, seed)

    def evaluate(self, states: Mapping[str, StateDict], shared: State = MappingProxyType({})) -> Evaluation | None:  # type: ignore[assignment]
        """Evaluates on the configured split what the method takes for the global model, if anything (`Method.judged`).

        Args:
            states: weights on the device: "model", and "average" and "previous" where there are such.
            shared: what the server shares.
        """
        return self._evaluate(states, shared, self.judged)

    def selection_score(self, states: Mapping[str, StateDict], shared: State) -> float | None:
        """Returns what `evaluation.select` asks of the same model on the validation split; None where nothing is asked,
        or the answer is no number.
        """
        select = self.config.evaluation.select
        found = self._evaluate(states, shared, self.selects_by) if self.selects_by is not None else None
        score = None if found is None or select is None else found.metrics()[SELECT[select]]
        return score if score is not None and math.isfinite(score) else None

    def _evaluate(self, states: Mapping[str, StateDict], shared: State, on: Judged) -> Evaluation | None:
        models = {name: frozen_model(self.teacher, state) for name, state in states.items()}
        judged = self.config.method.judged(models, shared)
        if judged is None:
            return None
        return evaluate(judged, on.split, self.transform, self.federation.dataset.num_classes, on.parts, on.bags)


@lru_cache(maxsize=1)
def open_experiment(text: str) -> Experiment:
    """Returns this process's `Experiment` for a resolved configuration as YAML text (see `config.to_yaml`)."""
    return Experiment(parse_config(text))
