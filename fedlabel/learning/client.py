"""A client's round: its phases on its data, one after the other; the server's own training uses the same loop."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.batches import BatchMaker, Samples
from fedlabel.learning.graphs import Graph, Graphs, Students
from fedlabel.learning.meter import Meter
from fedlabel.learning.plan import Pool, count_steps, plan_phase, sample_pool
from fedlabel.learning.prior import NO_PRIOR, PriorConfig, all_with_prior, client_prior
from fedlabel.learning.stacked import Stack, stack_states, why_not
from fedlabel.learning.step import Alone, Taken, counted, frozen_model
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, State, StateDict, Survey, Votes
from fedlabel.methods.losses import pseudo_metrics
from fedlabel.methods.recipe import Phase, Recipe, Select
from fedlabel.methods.uploads import ModelPart, PhaseResult
from fedlabel.metric_tags import Tag, client_tags
from fedlabel.seeding import Draws, derive_seed, torch_generator
from fedlabel.spans import NoSpans, Spans
from fedlabel.transfer import to_device

SURVEY_BATCH = 500
"""Samples a model sees at once when a client's whole data are looked at."""

_NO_STATES: Mapping[str, StateDict] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class ClientData:
    """The data of one client that training may use. Hidden labels are not included."""

    images: Tensor
    """(n, channels, height, width) uint8, on the device."""
    supervision: Supervision
    """n rows, on the CPU, where steps are planned."""


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
    steps: int
    """Batches that it trained on."""
    pairs: Tensor | None
    """See `Prepared.pairs`."""
    votes: Votes | None
    """See `Prepared.votes`."""
    times: int = 0
    """How often one sample can have been counted by a metric: how often one was drawn or looked at, at most."""
    stacked: bool = False
    """Whether a phase or more ran in a stack of several clients."""


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
    graphs: Graphs | None = None
    """Captures steps on a GPU; None: steps run one kernel after the other."""
    spans: Spans = field(default_factory=NoSpans)
    """Takes note of where the time goes."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """How clients' class priors are estimated."""
    frozen: frozenset[str] = frozenset()
    """Names of the student's parameters that stay as they are."""

    def phases(self, phases: Sequence[Phase]) -> Sequence[Phase]:
        """Returns phases that train nothing that is frozen."""
        return [_unfrozen(phase, self.frozen) for phase in phases] if self.frozen else phases

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the student's parameters."""
        return frozenset(name for name, _ in self.student.named_parameters())

    @cached_property
    def tags(self) -> Mapping[str, Tag]:
        """Name -> tag of each metric that a client may send."""
        return client_tags(self.metrics)


class LocalRound(NamedTuple):
    """What a client's round starts from, besides the received weights."""

    data: ClientData
    seed: int
    """The client's for this round; all random numbers derive from it."""
    memory: State
    """What the client kept, and what the server shares."""
    further: Mapping[str, StateDict] = _NO_STATES
    """Further weights that came along ("previous", "helper0", ...)."""
    client: int | None = None
    """Its number, by which it is found in a trace; None: it has none."""
    work: float = 1.0
    """Share of the planned steps that it takes, see `Invitation.work`."""


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
    """Runs one client's round, see `train_clients`.

    Args:
        recipe: the method's.
        trainer: modules, views and optimiser.
        global_state: the received weights; not changed.
        data: the client's samples and their supervision.
        round_number: 1-based.
        seed: see `LocalRound`.
        memory: likewise; None: as for a client that never trained.
        extra_states: see `LocalRound.further`.
    """
    client = LocalRound(data, seed, memory or {}, extra_states)
    return train_clients(recipe, trainer, global_state, [client], round_number)[0]


def train_clients(
    recipe: Recipe, trainer: Trainer, global_state: StateDict, clients: Sequence[LocalRound], round_number: int
) -> list[ClientUpdate]:
    """Runs the round of several clients; those whose steps have the same shapes train as one stack.

    Args:
        recipe: the method's.
        trainer: modules, views and optimiser.
        global_state: the received weights; not changed.
        clients: who trains.
        round_number: 1-based.

    Raises:
        ValueError: the method makes a metric that is not declared, see `Method.metrics`, or keeps what `Memory.like`
            does not name.

    Returns:
        The updates. A phase without samples, or with 0 steps, does not run; a step that uses no sample moves nothing.
        Weights may share memory with those of other clients.
    """
    runs = []
    for client in clients:
        candidates = to_device(client.data.supervision.candidates, client.data.images.device)
        memory = {**recipe.memory.start(candidates), **client.memory}
        states = {"global": global_state, **recipe.memory.models(global_state, memory), **client.further}
        runs.append(_Run(trainer, trainer.config, client.data, states, client.seed, memory, client.client, client.work))
    if trainer.prior.kind != "none":
        for run in runs:
            with trainer.spans.part("e_step", "prior", client=run.client):
                run.estimate_prior(trainer.prior, round_number)
    for phase in trainer.phases(recipe.phases(round_number)):
        run_phase(runs, phase)
    with trainer.spans.part("reduce", "upload"):
        return [_update(recipe, run, global_state) for run in runs]


@dataclass(frozen=True)
class _Unfrozen:
    """Selects what an update trains, without what is frozen."""

    trains: Select | None
    frozen: frozenset[str]

    def __call__(self, names: Sequence[str]) -> list[str]:
        return [name for name in (names if self.trains is None else self.trains(names)) if name not in self.frozen]


@lru_cache(maxsize=64)  # the same phase is the same object again, by which graphs know it
def _unfrozen(phase: Phase, frozen: frozenset[str]) -> Phase:
    then = tuple(replace(update, trains=_Unfrozen(update.trains, frozen)) for update in phase.then)
    return replace(phase, trains=_Unfrozen(phase.trains, frozen), then=then)


def _update(recipe: Recipe, run: _Run, global_state: StateDict) -> ClientUpdate:
    examples = sum(result.examples for result in run.results)
    weight = weight_in_mean(run.config, examples, int(run.drawn_from.sum()))
    rows, pseudo = run.meter.pseudo_labels()
    kept = recipe.memory.keep(run.memory, run.results)
    if further := sorted(kept.keys() - recipe.memory.like(run.first_memory, global_state).keys()):
        raise ValueError(
            f"The method keeps {', '.join(further[:3])}, which `Memory.like` does not name, so that no run could be "
            "resumed: give `Memory` a function `like` that names it."
        )
    return ClientUpdate(
        parts=recipe.upload.send(global_state, run.results, run.trainer.parameters, weight),
        sums=run.meter.sums(),
        statistics=recipe.shared.statistics(run.memory),
        kept=kept,
        pseudo_index=rows,
        pseudo=pseudo,
        forward=recipe.network.count * run.meter.forward,
        backward=recipe.network.count * int(run.meter.backward),
        steps=run.steps,
        pairs=run.meter.pairs,
        votes=run.meter.votes,
        times=recipe.network.count * run.times,
        stacked=run.stacked,
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
    memory = recipe.memory.start(data.supervision.candidates.to(data.images.device))
    run = _Run(trainer, config, data, {"global": global_state}, seed, memory)
    for phase in trainer.phases(recipe.server_phases):
        run_phase([run], phase)
    return run.results[-1].state if run.results else global_state


class _Ready(NamedTuple):
    """A client before the steps of a phase."""

    run: _Run
    samples: Samples
    teachers: Mapping[str, StateDict]
    """Name -> weights."""

    @property
    def steps(self) -> tuple[Hashable, ...]:
        """The shapes of its steps, each once."""
        parts = ((*step[:3], step.pseudo, *(step.units or ())) for step in self.samples.plan.steps)
        return tuple({tuple(tuple(part.shape) for part in each) for each in parts})

    @property
    def shapes(self) -> Hashable:
        """What clients that are stacked have in common: the shapes of their steps and memories."""
        unique = self.steps if len(self.steps) == 1 else id(self)
        memory = tuple((name, tuple(value.shape)) for name, value in self.run.memory.items())
        return unique, memory, tuple(self.teachers), tuple(map(len, self.teachers.values()))


def run_phase(runs: Sequence[_Run], phase: Phase) -> None:
    """Runs a phase of several clients, of those that have samples and steps."""
    alike: dict[Hashable, list[_Ready]] = {}
    for run in runs:
        with run.trainer.spans.part("plan", phase=phase.name, client=run.client):
            ready = run.prepare(phase)
        if ready is not None:
            alike.setdefault(ready.shapes if len(runs) > 1 else None, []).append(ready)
    for group in alike.values():
        clients = [ready.run.client for ready in group]
        with group[0].run.trainer.spans.part("steps", phase=phase.name, clients=clients, stack=len(group)):
            if len(group) == 1:
                (ready,) = group
                with _seeded(derive_seed(ready.run.seed, phase.name, "model"), ready.samples.images.device):
                    _take_steps(group, phase)
            else:
                for ready in group:
                    ready.run.stacked = True
                _take_steps(sorted(group, key=lambda ready: -len(ready.samples.plan.steps)), phase)


def _take_steps(group: Sequence[_Ready], phase: Phase) -> None:
    """Runs the steps of a phase of a client, or of a stack of clients whose steps have the same shapes, though their
    number may differ; those with more steps come first.
    """
    run, stacked = group[0].run, len(group) > 1
    lengths = [len(ready.samples.plan.steps) for ready in group]
    spans = run.trainer.spans
    with spans.part("views"):
        batches = BatchMaker(phase.draw, [ready.samples for ready in group], run.trainer.transform, stacked)
    memory = stack_states([ready.run.memory for ready in group]) if stacked else run.memory
    students: Students | None = None
    graph: Graph | None = None
    taken: list[tuple[int, Taken]] = []
    """Number of the step, and its result."""
    clients = len(group)
    for place in range(lengths[0]):
        left = sum(length > place for length in lengths)
        for number in range(left, clients):  # they took their last step before
            group[number].run.memory = _of(memory, number)
        memory, clients = ({name: value[:left] for name, value in memory.items()} if stacked else memory), left
        with spans.part("views", step=place):
            batch = batches.make(place, memory)
        if students is None:
            students, graph = _students(group, phase, batch)
        for each in (graph if graph is not None and clients == len(group) else students).take(batch):
            memory = each.memory if each.memory is not None else memory
            taken.append((place, each))
    assert students is not None, "a phase without steps is not run"
    for number in range(clients):
        group[number].run.memory = _of(memory, number) if stacked else memory
    examples = _record_stack(group, taken) if stacked else _record(group[0], taken)
    for ready, state, count in zip(group, students.results(), examples, strict=True):
        ready.run.finish(phase, state, count)


def _of(stacked: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Returns one client's part of a stack's state."""
    return {name: value[number] for name, value in stacked.items()}


def _students(group: Sequence[_Ready], phase: Phase, batch: Batch) -> tuple[Students, Graph | None]:
    """Returns the students of a phase with their weights in place, and a graph of their steps if there is one."""
    run, trainer = group[0].run, group[0].run.trainer
    kind: type[Alone] | type[Stack] = Stack if len(group) > 1 else Alone
    modules = (trainer.student, trainer.teacher, phase, run.config)
    teachers = {name: [ready.teachers[name] for ready in group] for name in group[0].teachers}
    weights = (run.states["global"], [ready.run.states[phase.start] for ready in group], teachers)
    graph = None
    if (
        trainer.graphs is not None
        and len(group[0].steps) == 1
        and run.config.optimizer == "sgd"
        and why_not(trainer.student) is None
    ):
        common = tuple(all(state is each[0] for state in each) for each in teachers.values())
        key = (kind, run.config, tuple(teachers), common, tuple(len(each[0]) for each in teachers.values()))
        graph = trainer.graphs.find(
            phase,
            key,
            batch,
            build=lambda: kind(*modules, *weights, fixed=True),
            restart=lambda students: students.restart(*weights),
        )
    students: Students = kind(*modules, *weights) if graph is None else graph.students
    return students, graph


def _record(ready: _Ready, taken: Sequence[tuple[int, Taken]]) -> list[float]:
    """Records the steps of a client; returns how many samples they used, as a list of one number."""
    meter, steps = ready.run.meter, ready.samples.plan.steps
    for place, each in taken:
        meter.add(each.metrics)
        meter.add_pseudo(each.pseudo, steps[place].pseudo, steps[place].guessed)
        meter.forward += each.forward
    meter.backward += int(sum(each.backward for _, each in taken))
    return [float(sum(torch.stack([each.examples.double() for _, each in taken]).tolist()))]


def _record_stack(group: Sequence[_Ready], taken: Sequence[tuple[int, Taken]]) -> list[float]:
    """Records the steps of a stack; returns how many samples each client's used."""
    device = group[0].samples.images.device
    examples = torch.zeros(len(group), dtype=torch.float64, device=device)
    backward, sums = torch.zeros_like(examples), dict[str, Tensor]()
    for _, each in taken:
        clients = len(each.examples)
        examples[:clients] += each.examples
        backward[:clients] += each.backward
        for name, pairs in each.metrics.items():
            if name not in sums:
                sums[name] = torch.zeros(len(group), 2, dtype=torch.float64, device=device)
            sums[name][:clients] += pairs
    numbers = torch.stack([examples, backward, *(each for total in sums.values() for each in total.unbind(1))]).cpu()
    used, propagated, *columns = numbers.unbind()
    pairs_of = dict(zip(sums, zip(columns[::2], columns[1::2], strict=True), strict=True))
    for number, ready in enumerate(group):
        meter = ready.run.meter
        meter.add({name: torch.stack([total[number], count[number]]) for name, (total, count) in pairs_of.items()})
        meter.forward += sum(each.forward for _, each in taken if number < len(each.examples))
        meter.backward += int(propagated[number])
    _record_pseudo(group, [(place, each.pseudo) for place, each in taken if each.pseudo is not None])
    return used.tolist()


def _record_pseudo(group: Sequence[_Ready], found: Sequence[tuple[int, PseudoLabels]]) -> None:
    """Records a stack's pseudo-labels, each (clients, m), of the steps with these numbers."""
    if not found:
        return
    sizes = [labels.label.numel() for _, labels in found]
    fields = zip(*(labels for _, labels in found), strict=True)
    flat = [torch.cat([values.flatten() for values in each]).cpu().split(sizes) for each in fields]
    for (place, labels), *values in zip(found, *flat, strict=True):
        of_clients = [part.view(labels.label.shape) for part in values]
        for number, ready in enumerate(group[: len(labels.label)]):
            drawn = ready.samples.plan.steps[place]
            own = PseudoLabels(*(part[number] for part in of_clients))
            ready.run.meter.add_pseudo(own, drawn.pseudo, drawn.guessed)


class _Run:
    """One client's round: its states, memory and measurements so far."""

    def __init__(
        self,
        trainer: Trainer,
        config: TrainingConfig,
        data: ClientData,
        states: dict[str, StateDict],
        seed: int,
        memory: State,
        client: int | None = None,
        work: float = 1.0,
    ) -> None:
        self.results: list[PhaseResult] = []
        self.steps = 0
        """Batches so far."""
        self.times = 0
        """How often one sample was looked at so far, at most."""
        self.memory = self.first_memory = memory
        self.meter = Meter(trainer.tags)
        self.drawn_from = torch.zeros(len(data.images), dtype=torch.bool)
        """Samples that a phase could draw."""
        self.trainer, self.config, self.states, self.seed = trainer, config, states, seed
        self._data, self.client, self._work = data, client, work
        self._log_prior = NO_PRIOR
        self.stacked = False

    def estimate_prior(self, config: PriorConfig, round_number: int) -> None:
        """Estimates the client's class prior, which all phases of the round use."""
        logits = None
        if config.kind == "em" and round_number > config.warmup_rounds and len(self._data.images):
            model, transform = self.model(self.states["global"]), self.trainer.transform
            chunks = self._data.images.split(SURVEY_BATCH)
            logits = torch.cat([model(transform.normalize(chunk)) for chunk in chunks])
        prior = client_prior(config, self._data.supervision, logits)
        self._log_prior = config.strength * prior.log().to(self._data.images.device)

    def prepare(self, phase: Phase) -> _Ready | None:
        """Runs the E step of a phase and draws its steps; returns None if it has none."""
        pool = sample_pool(phase.draw, self._data.supervision, self.config)
        self.drawn_from[torch.cat([pool.labeled, pool.unlabeled])] = True
        self.states[phase.name] = self.states[phase.start]
        idle = count_steps(phase, self.config, 1, 1) == 0
        if len(pool) == 0 or (idle and phase.prepare is None):
            return None
        # Models of other clients come along only in some rounds.
        present = [name for name in phase.teachers if name in self.states or not name.startswith("helper")]
        teachers = {name: self.states[name] for name in present}
        prepared = self._prepared(phase, teachers, pool)
        self.times += phase.prepare is not None
        plan = plan_phase(phase, pool, prepared.draw, self._data.supervision, self.config, self.seed)
        if idle or sum(plan.sizes) == 0:
            return None
        if self._work < 1:
            plan = plan._replace(steps=plan.steps[: max(1, int(self._work * len(plan.steps)))])
        self.steps += len(plan.steps)
        self.times += len(phase.updates) * plan.most_drawn
        generator = torch_generator(self.seed, phase.name, "augment")
        data = self._data
        samples = Samples(data.images, data.supervision, prepared.targets, plan, generator, self._log_prior)
        return _Ready(self, samples, teachers)

    def finish(self, phase: Phase, state: StateDict, examples: float) -> None:
        """Adds the final state of a phase to `results`, for later phases, and the number of samples it used."""
        self.results.append(PhaseResult(phase.name, state, examples, phase.start))
        self.states[phase.name] = state

    def model(self, state: StateDict) -> Model:
        """Returns a teacher; weights that it lacks are the student's, as they are at each call."""
        partial_state = len(state) < len(self.states["global"])
        lender, precision = (self.trainer.student if partial_state else None), self.config.precision
        return counted(frozen_model(self.trainer.teacher, state, lender, precision), self.meter)

    def _prepared(self, phase: Phase, states: Mapping[str, StateDict], pool: Pool) -> Prepared:
        """Runs the phase's E step over all of the client's samples, if it has one."""
        if phase.prepare is None:
            return Prepared({})
        images, transform = self._data.images, self.trainer.transform
        self.trainer.student.load_state_dict(self.states[phase.start])
        teachers = all_with_prior({name: self.model(state) for name, state in states.items()}, self._log_prior)

        def predict(teacher: str, view: str, *part: str) -> Tensor:
            draws = Draws(torch_generator(self.seed, phase.name, "prepare", teacher, view))
            chunks = images.split(SURVEY_BATCH)
            return torch.cat([teachers[teacher](transform.views(c, (view,), draws)[view], *part) for c in chunks])

        def inputs() -> Tensor:
            return transform.normalize(images)

        with self.trainer.spans.part("e_step", phase=phase.name, client=self.client):
            supervision = self._data.supervision.to(images.device)
            with _seeded(derive_seed(self.seed, phase.name, "prepare"), images.device):
                prepared = phase.prepare(Survey(predict, supervision, self.memory, inputs))
        self.memory = prepared.memory or self.memory
        self.meter.pairs, self.meter.votes = prepared.pairs, prepared.votes
        self.meter.add(prepared.metrics)
        if prepared.pseudo is not None:
            rows = pool.unlabeled
            labels = PseudoLabels(*(values[rows.to(values.device)] for values in prepared.pseudo))
            self.meter.add(pseudo_metrics(labels))
            self.meter.add_pseudo(labels, rows, torch.ones(len(rows), dtype=torch.bool))
        return prepared


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generator, which dropout uses, inside the context, and restores it after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
