"""A client's round: its phases on its data, one after the other; the server's own training uses the same loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.batches import BatchMaker
from fedlabel.learning.meter import Meter
from fedlabel.learning.plan import Plan, Pool, count_steps, plan_phase, sample_pool
from fedlabel.learning.step import Stepper, counted, frozen_model
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Model, Prepared, PseudoLabels, State, StateDict, Survey, Votes
from fedlabel.methods.losses import pseudo_metrics
from fedlabel.methods.recipe import Phase, Recipe
from fedlabel.methods.uploads import ModelPart, PhaseResult
from fedlabel.metric_tags import Tag, client_tags
from fedlabel.seeding import derive_seed, torch_generator

SURVEY_BATCH = 500
"""Samples a model sees at once when a client's whole data are looked at."""

_NO_STATES: Mapping[str, StateDict] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class ClientData:
    """The data of one client that training may use. Hidden labels are not included."""

    images: Tensor
    """(n, channels, height, width) uint8."""
    supervision: Supervision
    """n rows."""


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """The result of one client's round."""

    parts: dict[str, ModelPart]
    """The uploaded parts of the model (see `Upload.send`)."""
    sums: dict[str, list[float]]
    """Metric name -> (sum, count) over all steps."""
    statistics: State
    """See `Shared.statistics`."""
    kept: State
    """See `Memory.keep`."""
    pseudo_index: Tensor
    """(draws,) positions in the client's data of the pseudo-labelled draws, for the evaluator."""
    pseudo: PseudoLabels | None
    """The pseudo-labels of these draws; None without any."""
    forward: int
    """Samples passed forward through a model, student's and teachers' alike; counted once for each of its networks."""
    backward: int
    """Samples in the backward pass."""
    pairs: Tensor | None
    """See `Prepared.pairs`."""
    votes: Votes | None
    """See `Prepared.votes`."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """The parts of training besides recipe and data: modules, views and configuration."""

    student: nn.Module
    """A module whose weights may be overwritten."""
    teacher: nn.Module
    """A second module of the same architecture, whose code runs frozen teachers; its own weights are not used."""
    transform: ImageTransform
    config: TrainingConfig
    metrics: tuple[Tag, ...] = ()
    """See `Method.metrics`."""


def train_client(
    recipe: Recipe,
    trainer: Trainer,
    global_state: StateDict,
    data: ClientData,
    round_number: int,
    seed: int,
    memory: State | None = None,
    extra_states: Mapping[str, StateDict] = _NO_STATES,
) -> ClientUpdate:
    """Runs one client's round.

    Args:
        recipe: the method's.
        trainer: modules, views and optimiser.
        global_state: the received weights; not changed.
        data: the client's samples and their supervision.
        round_number: 1-based.
        seed: the client's seed for this round; all random numbers derive from it.
        memory: what the client kept and the server shares; None: as for a client that never trained.
        extra_states: further weights that came along ("previous", "helper0", ...).

    Raises:
        ValueError: the method makes a metric that is not declared, see `Method.metrics`, or keeps what `Memory.like`
            does not name.

    Returns:
        The update. A phase without samples, or with 0 steps, does not run; a step that uses no sample moves nothing.
    """
    memory = {**recipe.memory.start(data.supervision.candidates), **(memory or {})}
    states = {"global": global_state, **recipe.memory.models(global_state, memory), **extra_states}
    run = _Run(trainer, trainer.config, data, states, seed, memory)
    for phase in recipe.phases(round_number):
        run.phase(phase)
    parameters = frozenset(name for name, _ in trainer.student.named_parameters())
    examples = sum(result.examples for result in run.results)
    weight = weight_in_mean(trainer.config, examples, int(run.drawn_from.sum()))
    rows, pseudo = run.meter.pseudo_labels()
    kept = recipe.memory.keep(run.memory, run.results)
    if further := sorted(kept.keys() - recipe.memory.like(memory, global_state).keys()):
        raise ValueError(
            f"The method keeps {', '.join(further[:3])}, which `Memory.like` does not name, so that no run could be "
            "resumed: give `Memory` a function `like` that names it."
        )
    return ClientUpdate(
        parts=recipe.upload.send(global_state, run.results, parameters, weight),
        sums={name: value.tolist() for name, value in run.meter.sums.items()},
        statistics=recipe.shared.statistics(run.memory),
        kept=kept,
        pseudo_index=rows,
        pseudo=pseudo,
        forward=recipe.network.count * run.meter.forward,
        backward=recipe.network.count * int(run.meter.backward),
        pairs=run.meter.pairs,
        votes=run.meter.votes,
    )


def weight_in_mean(config: TrainingConfig, examples: float, drawn_from: int) -> float:
    """Returns a client's weight in the server's mean, see `TrainingConfig.weight_by`.

    Args:
        config: how clients train.
        examples: samples that its losses used.
        drawn_from: samples that its phases drew from.
    """
    return {"processed": examples, "size": float(drawn_from), "uniform": 1.0}[config.weight_by] if examples else 0.0


def train_server(recipe: Recipe, trainer: Trainer, global_state: StateDict, data: ClientData, seed: int) -> StateDict:
    """Runs the server's own training on its labels after a round (`Recipe.server_phases`); returns its weights."""
    config = replace(
        trainer.config, batch_size=trainer.config.server_batch_size or trainer.config.batch_size, prox_mu=0.0
    )
    if trainer.config.server_steps is not None:
        config = replace(config, local_steps=trainer.config.server_steps, local_epochs=None)
    memory = recipe.memory.start(data.supervision.candidates)
    run = _Run(trainer, config, data, {"global": global_state}, seed, memory)
    for phase in recipe.server_phases:
        run.phase(phase)
    return run.results[-1].state if run.results else global_state


class _Run:
    """The phases of one round on one client's data."""

    def __init__(
        self,
        trainer: Trainer,
        config: TrainingConfig,
        data: ClientData,
        states: dict[str, StateDict],
        seed: int,
        memory: State,
    ) -> None:
        self.results: list[PhaseResult] = []
        self.memory = memory
        self.meter = Meter(client_tags(trainer.metrics))
        self.drawn_from = torch.zeros(len(data.images), dtype=torch.bool)
        """Samples that a phase could draw."""
        self._trainer, self._config, self._data, self._states, self._seed = trainer, config, data, states, seed

    def phase(self, phase: Phase) -> None:
        """Runs a phase, if it has samples and steps; adds its final state to `results`, for later phases."""
        pool = sample_pool(phase.draw, self._data.supervision, self._config)
        self.drawn_from[torch.cat([pool.labeled, pool.unlabeled])] = True
        self._states[phase.name] = self._states[phase.start]
        idle = count_steps(phase, self._config, 1, 1) == 0
        if len(pool) == 0 or (idle and phase.prepare is None):
            return
        # Models of other clients come along only in some rounds.
        present = [name for name in phase.teachers if name in self._states or not name.startswith("helper")]
        teachers = {name: self._teacher(self._states[name]) for name in present}
        with _seeded(derive_seed(self._seed, phase.name, "model"), self._data.images.device):
            self._trainer.student.load_state_dict(self._states[phase.start])
            prepared = self._prepare(phase, teachers, pool)
            plan = plan_phase(phase, pool, prepared.draw, self._data.supervision, self._config, self._seed)
            if idle or sum(plan.sizes) == 0:
                return
            examples = self._steps(phase, plan, prepared.targets, teachers)
        state = {name: value.detach().clone() for name, value in self._trainer.student.state_dict().items()}
        self.results.append(PhaseResult(phase.name, state, examples, phase.start))
        self._states[phase.name] = state

    def _teacher(self, state: StateDict) -> Model:
        partial = len(state) < len(self._states["global"])
        frozen = frozen_model(self._trainer.teacher, state, self._trainer.student if partial else None)
        return counted(frozen, self.meter)

    def _prepare(self, phase: Phase, teachers: Mapping[str, Model], pool: Pool) -> Prepared:
        """Runs the phase's E step over all of the client's samples, if it has one."""
        if phase.prepare is None:
            return Prepared({})
        images, transform = self._data.images, self._trainer.transform

        def predict(teacher: str, view: str, *part: str) -> Tensor:
            generator = torch_generator(self._seed, phase.name, "prepare", teacher, view, device=images.device)
            chunks = images.split(SURVEY_BATCH)
            return torch.cat([teachers[teacher](transform.views(c, (view,), generator)[view], *part) for c in chunks])

        def inputs() -> Tensor:
            return transform.normalize(images)

        prepared = phase.prepare(Survey(predict, self._data.supervision, self.memory, inputs))
        self.memory = prepared.memory or self.memory
        self.meter.pairs, self.meter.votes = prepared.pairs, prepared.votes
        self.meter.add(prepared.metrics)
        if prepared.pseudo is not None:
            rows = pool.unlabeled
            labels = PseudoLabels(*(values[rows.to(values.device)] for values in prepared.pseudo))
            self.meter.add(pseudo_metrics(labels))
            self.meter.add_pseudo(labels, rows, torch.ones(len(rows), dtype=torch.bool))
        return prepared

    def _steps(self, phase: Phase, plan: Plan, targets: Mapping[str, Tensor], teachers: Mapping[str, Model]) -> float:
        """Trains the student; returns the number of samples that its steps used."""
        student, images = self._trainer.student, self._data.images
        student.train()
        steppers = [
            Stepper.of(student, update, phase.proximal, self._states["global"], self._config, self.meter)
            for update in phase.updates
        ]
        generator = torch_generator(self._seed, phase.name, "augment", device=images.device)
        batches = BatchMaker(
            phase.draw, plan, images, self._data.supervision, targets, self._trainer.transform, generator
        )
        examples = torch.zeros((), dtype=torch.float64, device=images.device)
        for drawn in plan.steps:
            batch = batches.make(drawn, self.memory)
            for stepper in steppers:
                step = stepper.step(teachers, batch._replace(memory=self.memory))
                self.meter.add(step.metrics)
                self.meter.add_pseudo(step.pseudo, drawn.pseudo, drawn.guessed)
                self.memory = step.memory if step.memory is not None else self.memory
                examples += step.examples
        student.requires_grad_(True)
        return float(examples)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generator, which dropout uses, inside the context, and restores it after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
