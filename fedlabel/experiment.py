"""The resources of a run in one process; client and server build the same ones from the same configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedlabel.attacks import attackers, flipped
from fedlabel.compression import Codec
from fedlabel.config import SELECT, ExperimentConfig, parse_config
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.labels.bags import Bags
from fedlabel.data.nodes.federation import NodesFederation, ServerFederation
from fedlabel.data.sets.datasets import Split
from fedlabel.data.skew import shift_features
from fedlabel.devices.clock import Devices
from fedlabel.hardware import memory_bytes, resolve_device
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client, train_server
from fedlabel.learning.evaluation import Evaluation, evaluate
from fedlabel.learning.graphs import Graphs, capture_on_cuda
from fedlabel.learning.plan import Units, bag_units
from fedlabel.learning.stacked import automatic_size, why_not
from fedlabel.learning.step import frozen_model
from fedlabel.learning.task import check_labels, check_recipe
from fedlabel.learning.views import ImageTransform
from fedlabel.methods import recipe_of
from fedlabel.methods.batch import Model, State, StateDict
from fedlabel.methods.recipe import Recipe, Task
from fedlabel.models import (
    Embedded,
    InputShape,
    Net,
    build_model,
    check_size,
    is_foreign,
    is_module,
    running_statistics,
)
from fedlabel.models.pretrained import frozen_names
from fedlabel.models.twins import Twins
from fedlabel.seeding import Draws, derive_seed
from fedlabel.spans import NoSpans, Recorder, Spans
from fedlabel.transfer import to_device

logger = logging.getLogger("fedlabel")

AVERAGES = ("weighted_mean", "FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
"""The strategies whose result is a mean, a median or one of what clients send: right for running statistics, too."""


class EvaluationData(NamedTuple):
    """The samples that models are evaluated on."""

    split: Split
    parts: Sequence[np.ndarray]
    """Rows of the split that each client is evaluated on."""
    bags: Bags | None
    """Bags of the split's samples; None without bags."""


class Experiment:
    """Data on the device, two resident modules (student and teacher), and the steps of a run.

    Args:
        config: of the run.
        nodes: the federation of real nodes with data of their own; None: one that `config` describes.
    """

    def __init__(self, config: ExperimentConfig, nodes: NodesFederation | None = None) -> None:
        self.config = config
        self._nodes = nodes
        self.device = resolve_device(config.device)
        if self.device.type == "cuda":  # the same seed should give the same numbers on a GPU, too
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.spans = self._spans()
        self.federation: Federation = self._federation(config.evaluation.split)
        dataset, skew = self.federation.dataset, config.skew
        noisy = any(part.count_epsilon is not None for part in config.supervision.parts)
        responses = {part.label_epsilon for part in config.supervision.parts if part.has_noisy_labels}
        self.labels = card = self.federation.card
        if self._nodes is None:
            epsilon = next(iter(responses)) if len(responses) == 1 else None
            self.labels = card = card._replace(noisy_counts=noisy, label_epsilon=epsilon)
        self.recipe: Recipe = recipe_of(config.method, Task(dataset.num_classes, config.num_rounds, card))
        check_recipe(config.method.name, self.recipe)
        check_labels(config.method.name, self.recipe, card, at_server=len(self.federation.server_rows) > 0)
        images = shift_features(dataset.train.images, self.federation.parts, skew, config.seed, "train")
        self.images = images.to(self.device)
        self.evaluates_on = self._evaluation_data(config.evaluation.split)
        self.selects_by = self._evaluation_data("validation") if config.evaluation.select is not None else None
        self.transform = ImageTransform(
            mean=torch.tensor(dataset.mean, device=self.device).view(-1, 1, 1),
            std=torch.tensor(dataset.std, device=self.device).view(-1, 1, 1),
            augment=replace(config.augment, jitter=0.0) if dataset.discrete else config.augment,
            allow_flip=dataset.allow_flip,
        )
        seed = derive_seed(config.seed, "model")
        memory = memory_bytes()
        # Others' networks may not be countable without memory for their weights.
        if memory is not None and not is_foreign(config.model.name):
            check_size(lambda: self._network(seed), config.model, memory)
        self.notes: list[str] = []
        """On the network, sentences: see `build_model`."""
        student, self.teacher = self._build_model(seed, self.notes.append), self._build_model(seed)
        self.frozen = frozen_names(student)
        """Names in a state that stay as they are."""
        self.running = running_statistics(student)
        self.transform = replace(self.transform, channels_last=self.device.type == "cuda" and bool(self.running.means))
        self._check_strategy(student)
        graphs = Graphs(capture_on_cuda) if self.device.type == "cuda" and config.grid.cuda_graphs else None
        self.trainer = Trainer(
            student,
            self.teacher,
            self.transform,
            config.training,
            config.method.metrics,
            graphs,
            self.spans,
            config.prior,
            self.frozen,
        )
        self._check_frozen(self.frozen)
        self.stack = self._stack(student)
        """About how many clients in a row train as one stack, at most; 1: none."""
        self.stacks = self.stack > 1
        """Whether stacks work; False once one has failed through no fault of its clients."""
        # Fails here, before anything is started, if the augmentation does not fit the images.
        one = self.images[:1] if len(self.images) else self.images.new_zeros(1, *dataset.input_shape)
        self.transform.views(one, ("weak", "strong"), Draws(torch.Generator()))
        self.initial_state: StateDict = {name: value.clone() for name, value in student.state_dict().items()}
        self.parameters = frozenset(name for name, _ in student.named_parameters())
        """Names in a state that are trained; the others are buffers."""
        self._check_upload(self.parameters)
        weights = frozenset(name for name, _ in student.named_parameters(remove_duplicate=False))
        compression = config.compression
        self.uplink = Codec(compression.up, weights, 1.0 if compression.share is None else compression.share)
        """How clients' updates travel."""
        self.downlink = Codec(compression.down, weights)
        """How the server's models travel."""
        if config.privacy.is_on:
            self._check_privacy()

    @cached_property
    def attackers(self) -> frozenset[int]:
        """The simulated clients that attack."""
        return attackers(self.config.attack, self.config.num_clients, self.config.seed)

    def _check_privacy(self) -> None:
        """Checks that all that clients would send is a model that can be clipped."""
        kind, method, recipe = self.config.privacy.kind, self.config.method.name, self.recipe
        nobody = recipe.memory.start(torch.ones(1, self.federation.dataset.num_classes, dtype=torch.bool))
        if statistics := sorted(recipe.shared.statistics({**nobody, **recipe.shared.start()})):
            raise ValueError(
                f"`privacy.kind` (={kind}) covers models, and method {method} also sends statistics of its shared "
                f"state ({', '.join(statistics)}): take another method, or keys with which it has none (of ill: "
                "method.noise.form=fixed or known, and method.alignment=false)."
            )
        if recipe.helpers is not None:
            raise ValueError(
                f"`privacy.kind` (={kind}) protects what is made of all clients' models, and method {method} sends "
                "single models to other clients: take another method."
            )
        if buffers := sorted(self.initial_state.keys() - self.parameters):
            raise ValueError(
                f"`privacy.kind` (={kind}) covers trained weights, and `model.name` (={self.config.model.name}) has "
                f"further arrays, e.g. BatchNorm's running statistics: {', '.join(buffers[:3])} ({len(buffers)} in "
                "all). Take a network without, e.g. model.name=cnn with model.norm=group."
            )
        if find_spec("dp_accounting") is None:
            raise ValueError(
                f"`privacy.kind` (={kind}) needs the package dp-accounting, which computes epsilon: pip install "
                "'fedlabel[privacy]'."
            )

    @cached_property
    def memory_needed(self) -> int:
        """Bytes that training takes at a client, at least: the received model, the student with its gradient and the
        optimiser's moments, and the teachers of a phase; activations come on top.
        """
        training = self.config.training
        moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
        phases = [stage.phases(1) if callable(stage.phases) else stage.phases for stage in self.recipe.stages]
        teachers = max((len(phase.teachers) for each in phases for phase in each), default=0)
        return (3 + moments + teachers) * sum(value.nbytes for value in self.initial_state.values())

    @cached_property
    def devices(self) -> Devices | None:
        """The clients' simulated devices; None for devices.kind=none.

        Raises:
            ValueError: the trace is missing or damaged, or rare classes are not the data set's.
        """
        config = self.config.devices
        if config.kind == "none":
            return None
        rarity = self.federation.rarity(config.rare_classes) if config.correlation else None
        return Devices.of(config, self.config.num_clients, self.config.seed, rarity)

    def _spans(self) -> Spans:
        if not self.config.grid.profile:
            return NoSpans()
        # Launches on a GPU return at once: without waiting, their time would be that of whatever waits first.
        on_gpu = self.device.type == "cuda"
        return Recorder(partial(torch.cuda.synchronize, self.device) if on_gpu else None)

    def _federation(self, split: str) -> Federation:
        return open_federation(self.config, split) if self._nodes is None else self._nodes

    def _evaluation_data(self, split: str) -> EvaluationData:
        """Returns the samples that models are evaluated on, on the device."""
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
        return EvaluationData(
            Split(images.to(self.device), samples.labels.to(self.device)),
            federation.test_parts,
            None if bags is None else Bags(*(values.to(self.device) for values in bags)),
        )

    def _stack(self, student: nn.Module) -> int:
        asked, reason = self.config.grid.clients_in_stack, why_not(student)
        if reason is not None:
            if asked is not None and asked > 1:
                logger.warning("`grid.stack` (=%d) has no effect: %s. Clients train one by one.", asked, reason)
            return 1
        return automatic_size(student) if asked is None else asked

    def stack_in(self, cohort: int) -> int:
        """Returns about how many clients of a cohort train as one stack. On CPUs, if nobody said how many, a quarter of
        them at most: several workers should find something to do, and how many there are must not matter.
        """
        automatic = self.config.grid.clients_in_stack is None and self.device.type == "cpu"
        return min(self.stack, max(1, cohort // 4)) if automatic else self.stack

    def _check_strategy(self, model: nn.Module) -> None:
        """Checks the strategy's support of buffers: a server's optimiser or noise would treat them as weights."""
        name, weights = self.config.strategy.name, {key for key, _ in model.named_parameters(remove_duplicate=False)}
        buffers = [key for key in model.state_dict() if key not in weights]
        if buffers and name not in AVERAGES:
            raise ValueError(
                f"`strategy.name` (={name}) would apply its optimiser or noise to the buffers of "
                f"`model.name` (={self.config.model.name}), e.g. BatchNorm's running statistics: "
                f"{', '.join(buffers[:3])} ({len(buffers)} in all). Take a network without, e.g. "
                f"model.name=cnn with model.norm=group, or strategy.name={' or '.join(AVERAGES)}."
            )

    def _check_upload(self, parameters: frozenset[str]) -> None:
        """Looks at how many models a client uploads: Flower's strategies combine one. parameters: what is trained."""
        name, method = self.config.strategy.name, self.config.method.name
        parts = self.recipe.upload.send(self.initial_state, [], parameters, 0.0)  # as of a client that did not train
        if len(parts) == 1:
            return
        several = (
            f"`method.name` (={method}) sends {len(parts)} models with separate weights ({', '.join(parts)}), which"
        )
        one = "keys of the method with which it sends one (of fedlabel: method.merge=sum)."
        if name != "weighted_mean":
            raise ValueError(
                f"{several} `strategy.name` (={name}) cannot combine; use strategy.name=weighted_mean, or {one}"
            )
        if self.config.privacy.is_on:
            raise ValueError(f"{several} `privacy.kind` (={self.config.privacy.kind}) cannot clip as one; use {one}")

    def _check_frozen(self, frozen: frozenset[str]) -> None:
        """Checks that something is left to train in every phase, and that no noise is added to what is frozen."""
        if not frozen:
            return
        key = f"`model.trainable` (={self.config.model.trainable})"
        if self.config.privacy.is_on:
            raise ValueError(
                f"{key} freezes {len(frozen)} arrays, to which privacy.kind={self.config.privacy.kind} would add "
                "noise: set privacy.kind=none, or train all (model.trainable=null)."
            )
        names = tuple(self.trainer.parameters)
        for stage in self.recipe.stages:
            for phase in stage.phases(1) if callable(stage.phases) else stage.phases:
                for update in phase.updates:
                    if frozen.issuperset(names if update.trains is None else update.trains(names)):
                        raise ValueError(
                            f"{key} leaves nothing to train to phase `{phase.name}` of method "
                            f"{self.config.method.name}: let it match more."
                        )

    def _build_model(self, seed: int, say: Callable[[str], None] | None = None) -> nn.Module:
        model = self._network(seed, say).to(self.device)
        if self.device.type == "cuda" and running_statistics(model).means:
            model = model.to(memory_format=torch.channels_last)
        return model

    def _network(self, seed: int, say: Callable[[str], None] | None = None) -> nn.Module:
        dataset = self.federation.dataset
        return build_network(self.config, self.recipe, dataset.input_shape, dataset.num_classes, seed, say)

    def fresh_state(self, round_number: int) -> StateDict:
        """Returns the initial weights of a stage that starts in this round (see `Stage.start`)."""
        state = self._build_model(derive_seed(self.config.seed, "model", round_number)).state_dict()
        return {name: value.clone() for name, value in state.items()}

    def client_data(self, client: int) -> ClientData:
        """Returns the data of `client` that training may use."""
        rows = to_device(torch.from_numpy(self.federation.parts[client]), self.device)
        supervision = self.federation.supervision(client)
        if self.config.attack.kind == "label_flip" and client in self.attackers:
            supervision = flipped(supervision)
        return ClientData(self.images[rows], supervision)

    def units(self, client: int, singles: bool) -> Units:
        """Returns what a phase by bags draws at a client, see `bag_units`; of a real node with its numbers and sizes
        alone.
        """
        if not isinstance(self.federation, ServerFederation):
            return bag_units(self.federation.supervision(client), singles)
        held = self.federation.holdings[client]
        alone = held.card.samples - held.in_bags if singles else held.alone
        rows = torch.full((held.card.bags + alone, max(1, held.largest_bag)), -1)
        rows.view(-1)[: held.in_bags + alone] = 0
        return Units(rows, torch.zeros(len(rows), self.federation.dataset.num_classes, dtype=torch.int64))

    def server_data(self) -> ClientData | None:
        """Returns the server's labelled samples, on the device; None if it has none."""
        rows = torch.from_numpy(self.federation.server_rows).to(self.device)
        if len(rows) == 0:
            return None
        return ClientData(self.images[rows], self.federation.server_supervision())

    def train(
        self,
        client: int,
        global_state: StateDict,
        round_number: int,
        memory: State | None = None,
        helpers: Mapping[str, StateDict] = MappingProxyType({}),
    ) -> ClientUpdate:
        """Runs `client`'s part of a round from `global_state`; all tensors on the device, see `train_client`."""
        seed, data = self.client_seed(client, round_number), self.client_data(client)
        return train_client(self.recipe, self.trainer, global_state, data, round_number, seed, memory, helpers)

    def client_seed(self, client: int, round_number: int) -> int:
        """Returns the seed of all random numbers of a client in a round."""
        return derive_seed(self.config.seed, "client", client, "round", round_number)

    def train_server(self, global_state: StateDict, round_number: int) -> StateDict:
        """Trains `global_state` on the server's own labels after a round; returns it as it is if there are none."""
        data = self.server_data()
        if data is None:
            return global_state
        seed = derive_seed(self.config.seed, "server", "round", round_number)
        return train_server(self.recipe, self.trainer, global_state, data, seed)

    def evaluate(
        self,
        round_number: int,
        states: Mapping[str, StateDict],
        shared: State = MappingProxyType({}),  # type: ignore[assignment]
    ) -> Evaluation | None:
        """Evaluates the global model, as the method defines it (`Stage.predict`), on the configured split.

        Args:
            round_number: the last that is done.
            states: weights on the device: "model", and "average" and "previous" where there are such.
            shared: what the server shares.
        """
        return self._evaluate(round_number, states, shared, self.evaluates_on)

    def predictor(self, round_number: int, states: Mapping[str, StateDict], shared: State) -> Model | None:
        """Returns the global model as the method defines it, for normalised images; None where there is none as yet.

        Args:
            round_number: see `evaluate`.
            states: see there.
            shared: see there.
        """
        models = {name: frozen_model(self.teacher, state) for name, state in states.items()}
        return self.recipe.place(round_number).stage.predict(models, shared)

    def embedder(self, state: StateDict) -> Model | None:
        """Returns the embeddings of normalised images by the weights `state`; None of a network without any."""
        if isinstance(self.teacher, Twins) or not any(isinstance(module, Net) for module in self.teacher.modules()):
            return None
        model = frozen_model(self.teacher, state)
        return lambda inputs: model(inputs, "embed")

    def selection_score(self, round_number: int, states: Mapping[str, StateDict], shared: State) -> float | None:
        """Returns the metric of `evaluation.select` for the same model on the validation split; None without a
        selection, or if the metric is not a number.
        """
        select = self.config.evaluation.select
        found = self._evaluate(round_number, states, shared, self.selects_by) if self.selects_by is not None else None
        score = None if found is None or select is None else found.metrics()[SELECT[select]]
        return score if score is not None and math.isfinite(score) else None

    def _evaluate(
        self, round_number: int, states: Mapping[str, StateDict], shared: State, on: EvaluationData
    ) -> Evaluation | None:
        predict = self.predictor(round_number, states, shared)
        if predict is None:
            return None
        return evaluate(predict, on.split, self.transform, self.federation.dataset.num_classes, on.parts, on.bags)


def build_network(
    config: ExperimentConfig,
    recipe: Recipe,
    input_shape: InputShape,
    num_classes: int,
    seed: int,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Returns the student of a run, untrained, on the default device.

    Args:
        config: of the run.
        recipe: of its method.
        input_shape: of one sample.
        num_classes: number of classes.
        seed: of the weights.
        say: gets a note on what was loaded from `model.weights`.

    Raises:
        ValueError: the network does not fit the inputs, or what the method needs of it.
    """
    network, name = recipe.network, config.method.name
    same = "model.weights" if config.model.weights is not None else "a module"
    if network.count > 1 and (config.model.weights is not None or is_module(config.model.name)):
        raise ValueError(
            f"`method.name` (={name}) trains {network.count} networks, which must start from different weights, and "
            f"{same} gives all the same: leave it out" + (", or pass a function." if same == "a module" else ".")
        )

    def build(place: int) -> nn.Module:
        own = derive_seed(seed, "network", place) if place else seed
        model = build_model(config.model, input_shape, num_classes, own, say if place == 0 else None)
        if network.embeds and not isinstance(model, Net):
            raise ValueError(
                f"`model.name` (={config.model.name}) gives no embeddings, which method {name} needs: set "
                "model.embedding to one of its layers, or take a network of our own, e.g. cnn or mlp."
            )
        if network.classifies and isinstance(model, Embedded) and not model.head:
            raise ValueError(
                f"`model.embedding` (={config.model.embedding}): method {name} needs a linear layer that makes the "
                "logits of this layer's output, and there is none: name the layer before the last linear one."
            )
        running = sorted(key.rpartition(".")[0] for key in running_statistics(model).means)
        if network.input_gradients and running:
            raise ValueError(
                f"`model.norm` (={config.model.norm}) of `model.name` (={config.model.name}): its layer "
                f"{running[0]} is BatchNorm, or has running statistics like it, which method {name} cannot "
                "differentiate by its inputs: take model.norm=group and a network of our own."
            )
        return model

    return network.wrap(build, seed)


def open_federation(config: ExperimentConfig, split: str) -> Federation:
    """Returns the simulated federation of a configuration, whatever its model: see `build_federation`.

    Args:
        config: of the run.
        split: the one that clients are evaluated on, "test" or "validation".

    Raises:
        ValueError: the data are missing or damaged, or the partition or the labels asked for are impossible.
    """
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


@lru_cache(maxsize=1)
def open_experiment(text: str) -> Experiment:
    """Returns this process's `Experiment` for a resolved configuration as YAML text (see `config.to_yaml`)."""
    return Experiment(parse_config(text))
