"""The local loop that all methods share: run the phases of one round on one client's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fedlabel.batches import Units, bag_units, count_steps, draw_batches
from fedlabel.data.augment import AugmentConfig, strong, weak
from fedlabel.data.supervision import Supervision
from fedlabel.methods.base import Method, ModelPart, Phase, PhaseResult, Prepared, Survey, Update, Votes
from fedlabel.methods.steps import Batch, Model, Part, PseudoLabels, State, StateDict, Step, pseudo_metrics
from fedlabel.metric_tags import client_tags
from fedlabel.seeding import derive_seed, numpy_generator, torch_generator
from fedlabel.training_config import TrainingConfig

SURVEY_BATCH = 500
"""Samples a model sees at once when a client's whole data are looked at."""

_ZERO = torch.zeros(())
_NOTHING: Mapping[str, StateDict] = MappingProxyType({})
_FROM_IMAGES = ((), ("all",), ("embed",), ("heads",))
"""The parts of a network that begin with images: a pass through the rest is not counted as another."""


@dataclass(frozen=True, eq=False)
class ImageTransform:
    """Makes the views of a batch from uint8 images, on their device."""

    mean: Tensor
    """(channels, 1, 1) on the [0, 1] scale."""
    std: Tensor
    """(channels, 1, 1)."""
    augment: AugmentConfig
    allow_flip: bool

    def normalize(self, images: Tensor) -> Tensor:
        """Returns (batch, channels, height, width) uint8 as float32 with zero mean and unit variance per channel.

        Rows of tables (float32) are not pixels of [0, 255]: of them only mean and std are taken.
        """
        values = images if images.is_floating_point() else images.float() / 255
        return (values - self.mean) / self.std

    def views(self, images: Tensor, names: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns the named views of uint8 images ("clean", "weak", "strong", "strong2"), each drawn for itself."""
        mild = strong if self.augment.weak_as_strong else weak
        makers = {
            "clean": lambda: images,
            "weak": lambda: mild(images, generator, self.augment, self.allow_flip),
            "strong": lambda: strong(images, generator, self.augment, self.allow_flip),
            "strong2": lambda: strong(images, generator, self.augment, self.allow_flip),
        }
        return {name: self.normalize(makers[name]()) for name in names}


@dataclass(frozen=True, eq=False)
class ClientData:
    """What training may see of one client. Hidden labels are not in it."""

    images: Tensor
    """(n, channels, height, width) uint8."""
    supervision: Supervision
    """n rows."""


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """The result of one client's round."""

    parts: dict[str, ModelPart]
    """What is uploaded (see `Method.upload`)."""
    sums: dict[str, list[float]]
    """Metric name -> (sum, count) over all steps."""
    statistics: State
    """See `Method.statistics`."""
    kept: State
    """See `Method.keep`."""
    pseudo_index: Tensor
    """(draws,) positions in the client's data of the pseudo-labelled draws, for the evaluator."""
    pseudo: PseudoLabels | None
    """The pseudo-labels of these draws; None if there were none."""
    forward: int
    """Samples sent through a model, student's and teachers' alike; once for each network that it is made of."""
    backward: int
    """Samples whose gradient was propagated back."""
    pairs: Tensor | None
    """See `Prepared.pairs`."""
    votes: Votes | None
    """See `Prepared.votes`."""


def frozen_model(module: nn.Module, state: Mapping[str, Tensor], lender: nn.Module | None = None) -> Model:
    """Returns the `Model` of `module` (left in eval mode) with the weights `state`, without gradients.

    Args:
        module: gives the architecture.
        state: weights and buffers by name.
        lender: a module that lends, as they are at each call, the weights that `state` lacks; None: it lacks none.
    """
    module.eval()

    def model(*inputs: Any) -> Tensor:
        borrowed = lender.state_dict() if lender is not None else {}
        with torch.no_grad():
            outputs: Tensor = torch.func.functional_call(module, {**borrowed, **state}, inputs)
        return outputs

    return model


@dataclass(frozen=True, eq=False)
class Trainer:
    """What training needs beside a method and data."""

    student: nn.Module
    """A module whose weights may be overwritten."""
    teacher: nn.Module
    """A second module of the same architecture; only its code is used, for frozen teachers."""
    transform: ImageTransform
    config: TrainingConfig


def train_client(
    method: Method,
    trainer: Trainer,
    global_state: StateDict,
    data: ClientData,
    round_number: int,
    seed: int,
    memory: State | None = None,
    extra_states: Mapping[str, StateDict] = _NOTHING,
) -> ClientUpdate:
    """Runs one client's round.

    Args:
        method: the algorithm.
        trainer: modules, views and optimiser.
        global_state: the received weights; not changed.
        data: the client's samples and what it knows of their labels.
        round_number: 1-based.
        seed: the client's seed for this round; all random numbers derive from it.
        memory: what the client kept and the server shares; None: as for a client that never trained.
        extra_states: further weights that came along (see `Method.helpers`).

    Raises:
        ValueError: the method makes a metric that is not declared, see `Method.metrics`.

    Returns:
        The update. A phase without samples, or with 0 steps, does not run; a step that uses no sample moves nothing.
    """
    candidates = data.supervision.candidates
    memory = {**method.initial_memory(candidates), **(memory or {})}
    states = {"global": global_state, **method.states(global_state, memory), **extra_states}
    run = _Run(method, trainer, data, states, seed, memory)
    for phase in method.phases(round_number):
        run.phase(phase, trainer.config)
    parameters = frozenset(name for name, _ in trainer.student.named_parameters())
    examples = sum(result.examples for result in run.results)
    weight = weight_in_mean(trainer.config, examples, int(run.drawn_from.sum()))
    return ClientUpdate(
        parts=method.upload(global_state, run.results, parameters, weight),
        sums={name: value.tolist() for name, value in run.sums.items()},
        statistics=method.statistics(run.memory),
        kept=method.keep(run.memory, run.results),
        pseudo_index=torch.cat(run.rows) if run.rows else torch.zeros(0, dtype=torch.int64),
        pseudo=PseudoLabels(*map(torch.cat, zip(*run.pseudo, strict=True))) if run.pseudo else None,
        forward=method.networks * run.forward,
        backward=method.networks * run.backward,
        pairs=run.pairs,
        votes=run.votes,
    )


def weight_in_mean(config: TrainingConfig, examples: float, drawn_from: int) -> float:
    """Returns a client's weight in the server's mean, see `TrainingConfig.weight_by`.

    Args:
        config: how clients train.
        examples: samples that its losses used.
        drawn_from: samples that its phases drew from.
    """
    return {"processed": examples, "size": float(drawn_from), "uniform": 1.0}[config.weight_by] if examples else 0.0


def train_server(
    method: Method, trainer: Trainer, global_state: StateDict, data: ClientData, round_number: int, seed: int
) -> StateDict:
    """Runs the server's own training on its labels after a round (see `Method.server_phases`); returns its weights."""
    config = replace(trainer.config, batch_size=trainer.config.server_batch_size or trainer.config.batch_size)
    if trainer.config.server_steps is not None:
        config = replace(config, local_steps=trainer.config.server_steps, local_epochs=None)
    memory = method.initial_memory(data.supervision.candidates)
    run = _Run(method, trainer, data, {"global": global_state}, seed, memory)
    for phase in method.server_phases(round_number):
        run.phase(phase, replace(config, prox_mu=0.0))
    return run.results[-1].state if run.results else global_state


class _Run:
    """The phases of one round on one client's data, and what they observe; tensors stay on the device until the end."""

    def __init__(
        self,
        method: Method,
        trainer: Trainer,
        data: ClientData,
        states: dict[str, StateDict],
        seed: int,
        memory: State,
    ) -> None:
        self.method = method
        self.trainer = trainer
        self.data = data
        self.states = states
        self.seed = seed
        self.memory = memory
        self.results: list[PhaseResult] = []
        self.sums: dict[str, Tensor] = {}
        self.rows: list[Tensor] = []
        self.pseudo: list[PseudoLabels] = []
        self.drawn_from = torch.zeros(len(data.images), dtype=torch.bool)
        self.forward = 0
        self.backward = 0
        self.pairs: Tensor | None = None
        self.votes: Votes | None = None
        self._with_gradient = 0
        """Samples sent through the student in this step whose gradient may be asked for."""

    def phase(self, phase: Phase, config: TrainingConfig) -> None:
        """Runs a phase, if it has samples and steps; its end goes to `results` and `states`."""
        units = bag_units(self.data.supervision, bool(phase.unlabeled)) if phase.bags else None
        labeled, unlabeled = self._index(phase, config, units)
        self.drawn_from[torch.cat([labeled, unlabeled])] = True
        self.states[phase.name] = self.states[phase.start]
        idle = count_steps(phase, config, 1, 1) == 0
        if len(labeled) + len(unlabeled) == 0 or (idle and phase.prepare is None):
            return
        # Models of other clients come along only in some rounds.
        present = [name for name in phase.teachers if name in self.states or not name.startswith("helper")]
        teachers = {name: self._teacher(self.states[name]) for name in present}
        with _seeded(derive_seed(self.seed, phase.name, "model"), self.data.images.device):
            self.trainer.student.load_state_dict(self.states[phase.start])
            targets: dict[str, Tensor] = {}
            drawn = unlabeled
            if phase.prepare is not None:
                prepared = self._prepare(phase, teachers)
                targets, self.memory = prepared.targets, prepared.memory or self.memory
                self.pairs, self.votes = prepared.pairs, prepared.votes
                self._log(Step(_ZERO, dict(prepared.metrics), _ZERO), unlabeled)
                if prepared.pseudo is not None:
                    labels = PseudoLabels(*(values[unlabeled.to(values.device)] for values in prepared.pseudo))
                    self._log(Step(_ZERO, pseudo_metrics(labels), _ZERO, labels), unlabeled)
                if prepared.draw is not None:
                    drawn = unlabeled[prepared.draw.cpu()[unlabeled]]
                if idle or len(labeled) + len(drawn) == 0:
                    return
            over_labeled = count_steps(phase, config, len(labeled), config.batch_size)
            over_drawn = count_steps(phase, config, len(drawn), config.batch_size * config.unlabeled_ratio)
            steps = over_drawn if len(drawn) else over_labeled
            if units is not None:
                labeled = torch.arange(len(units.rows))
                steps = count_steps(phase, config, len(labeled), units.per_step(config.batch_size, phase.least_bags))
                drawn = drawn[:0]
            elif phase.informed:  # a single sample of which nothing is known must not end the epoch after a step
                steps = max(over_labeled, over_drawn)
            examples = self._steps(phase, config, steps, (labeled, drawn, unlabeled), targets, teachers, units)
        state = {name: value.detach().clone() for name, value in self.trainer.student.state_dict().items()}
        self.results.append(PhaseResult(phase.name, state, examples, phase.start))
        self.states[phase.name] = state

    def _index(self, phase: Phase, config: TrainingConfig, units: Units | None) -> tuple[Tensor, Tensor]:
        """Returns the positions of labelled and of unlabelled samples that a phase draws from, on the CPU."""
        supervision = self.data.supervision
        if units is not None:
            samples, known = units.samples(), supervision.labeled.cpu()
            return samples[known[samples]], samples[~known[samples]]
        known = (supervision.informed if phase.informed else supervision.labeled).cpu()
        labeled, unlabeled = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
        if config.unlabeled_includes_labeled:
            unlabeled = torch.arange(len(known))
        return labeled if phase.labeled else labeled[:0], unlabeled if phase.unlabeled else unlabeled[:0]

    def _teacher(self, state: StateDict) -> Model:
        partial = len(state) < len(self.states["global"])
        frozen = frozen_model(self.trainer.teacher, state, self.trainer.student if partial else None)

        def counted(inputs: Tensor, *part: str) -> Tensor:
            self.forward += len(inputs) if part in _FROM_IMAGES else 0
            return frozen(inputs, *part)

        return counted

    def _student(self, inputs: Tensor, *part: str) -> Tensor:
        count = len(inputs) if part in _FROM_IMAGES else 0
        self.forward += count
        self._with_gradient += count if torch.is_grad_enabled() else 0
        outputs: Tensor = self.trainer.student(inputs, *part)
        return outputs

    def _prepare(self, phase: Phase, teachers: Mapping[str, Model]) -> Prepared:
        assert phase.prepare is not None
        images, transform = self.data.images, self.trainer.transform

        def predict(teacher: str, view: str, *part: str) -> Tensor:
            generator = torch_generator(self.seed, phase.name, "prepare", teacher, view, device=images.device)
            chunks = images.split(SURVEY_BATCH)
            return torch.cat([teachers[teacher](transform.views(c, (view,), generator)[view], *part) for c in chunks])

        def inputs() -> Tensor:
            return transform.normalize(images)

        return phase.prepare(Survey(predict, self.data.supervision, self.memory, inputs))

    def _steps(
        self,
        phase: Phase,
        config: TrainingConfig,
        steps: int,
        index: tuple[Tensor, Tensor, Tensor],
        targets: Mapping[str, Tensor],
        teachers: Mapping[str, Model],
        units: Units | None,
    ) -> float:
        """Trains the student on positions `index` (labelled, unlabelled, to mix); returns how many samples it used.

        With `units` the first are places in it.
        """
        student, device = self.trainer.student, self.data.images.device
        student.train()
        named, buffers = dict(student.named_parameters()), list(student.buffers())
        updates = [(update, *self._optimizer(update, named, config)) for update in phase.updates]
        size = config.batch_size * config.unlabeled_ratio
        per_step = config.batch_size if units is None else units.per_step(config.batch_size, phase.least_bags)
        sources = {
            "labeled": (index[0], per_step, phase.labeled),
            "unlabeled": (index[1], size, phase.unlabeled),
            "mix": (index[2] if phase.mix else index[2][:0], min(size, len(index[1])), phase.mix),
        }
        streams = [
            draw_batches(rows, count, steps, torch_generator(self.seed, phase.name, kind))
            for kind, (rows, count, _) in sources.items()
        ]
        generator = torch_generator(self.seed, phase.name, "augment", device=device)
        mixing = numpy_generator(self.seed, phase.name, "mixing")
        known = self.data.supervision
        # Nothing is guessed where the label is certain, nor of a sample that is drawn without what is known of it.
        unsure, unknown = (~known.labeled | known.noisy).cpu(), ~known.informed.cpu()
        examples = torch.zeros((), dtype=torch.float64, device=device)
        empty: dict[str, Part] = {}

        def part(kind: str, rows: Tensor, bags: Units | None = None) -> Part:
            if kind in empty:
                return empty[kind]
            own, _, views = sources[kind]
            made = self._part(rows, len(own), views, phase, targets, generator, kind == "labeled", bags)
            if not len(rows):  # so it is in every step
                empty[kind] = made
            return made

        for labeled, unlabeled, mix in zip(*streams, strict=True):
            share = mixing.beta(phase.mix_alpha, phase.mix_alpha) if phase.mix else 1.0
            bags = None if units is None else Units(units.rows[labeled], units.counts[labeled])
            labeled = labeled if bags is None else bags.rows[bags.rows >= 0]
            batch = Batch(
                labeled=part("labeled", labeled, bags),
                unlabeled=part("unlabeled", unlabeled),
                mix=part("mix", mix),
                mixing=torch.tensor(share, dtype=torch.float32, device=device),
                memory=self.memory,
            )
            for update, optimizer, names in updates:
                for name, parameter in named.items():
                    parameter.requires_grad_(name in names)
                before = [buffer.clone() for buffer in buffers]
                self._with_gradient = 0
                step = update.loss(self._student, teachers, batch._replace(memory=self.memory))
                if phase.informed:
                    self._log(step, torch.cat([labeled, unlabeled]), torch.cat([unsure[labeled], unknown[unlabeled]]))
                elif bags is not None:
                    self._log(step, labeled, unsure[labeled])
                else:
                    self._log(step, unlabeled)
                if not step.examples:  # nothing to learn from: no step, not even of momentum, a penalty or BatchNorm
                    for buffer, value in zip(buffers, before, strict=True):
                        buffer.copy_(value)
                    continue
                examples += step.examples
                self._descend(step, update, optimizer, named, names, phase, config)
        student.requires_grad_(True)
        return float(examples)

    def _optimizer(
        self, update: Update, named: Mapping[str, nn.Parameter], config: TrainingConfig
    ) -> tuple[torch.optim.Optimizer, frozenset[str]]:
        """Returns a fresh optimiser and the names of the parameters that it moves."""
        names = frozenset(named if update.trains is None else update.trains(tuple(named)))
        moved = [parameter for name, parameter in named.items() if name in names]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(moved, config.lr, weight_decay=config.weight_decay, fused=True), names
        optimizer = torch.optim.SGD(
            moved,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        return optimizer, names

    def _descend(
        self,
        step: Step,
        update: Update,
        optimizer: torch.optim.Optimizer,
        named: dict[str, nn.Parameter],
        names: frozenset[str],
        phase: Phase,
        config: TrainingConfig,
    ) -> None:
        """Takes one optimiser step down a loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = step.loss if update.penalty is None else step.loss + update.penalty(named)
        loss.backward()
        self.backward += self._with_gradient
        moved = {name: parameter for name, parameter in named.items() if name in names and parameter.grad is not None}
        for name, parameter in moved.items():
            pull = config.prox_mu + (phase.proximal(parameter) if phase.proximal is not None else 0.0)
            if pull > 0:
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - self.states["global"][name], alpha=pull)
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(moved.values()), config.max_grad_norm)
        optimizer.step()

    def _part(
        self,
        rows: Tensor,
        size: int,
        views: tuple[str, ...],
        phase: Phase,
        targets: Mapping[str, Tensor],
        generator: torch.Generator,
        labeled: bool = False,
        bags: Units | None = None,
    ) -> Part:
        device = self.data.images.device
        members = torch.zeros(0, 0, dtype=torch.int64, device=device)
        counts = self.data.supervision.bag_counts[:0]
        if bags is not None:
            members = bags.rows.masked_scatter(bags.rows >= 0, torch.arange(len(rows))).to(device)
            counts = bags.counts.to(device)
        rows = rows.to(device)
        known = self.data.supervision
        candidates, noisy, annotations = known.candidates[rows], known.noisy[rows], known.annotations[rows]
        if not labeled:  # a labelled sample drawn as an unlabelled one keeps its label to itself
            hidden = torch.ones_like(noisy) if phase.informed else candidates.sum(1) == 1
            candidates, noisy = candidates | hidden[:, None], noisy & ~hidden
            annotations = torch.where(hidden[:, None], -1, annotations)
        made = self.trainer.transform.views(self.data.images[rows], views, generator)
        drawn = {name: values[rows] for name, values in targets.items()}
        amount = torch.tensor(float(size), device=device)
        return Part(made, candidates, drawn, noisy, annotations, rows, amount, members, counts)

    def _log(self, step: Step, rows: Tensor, guessed: Tensor | None = None) -> None:
        for name, pair in step.metrics.items():
            if name not in self.sums:
                self._check_declared(name)
            self.sums[name] = self.sums[name] + pair.double() if name in self.sums else pair.double()
        if step.pseudo is not None:
            guessed = torch.ones(len(rows), dtype=torch.bool) if guessed is None else guessed
            self.rows.append(rows[guessed])
            here = guessed.to(step.pseudo.label.device)
            self.pseudo.append(PseudoLabels(*(values[here] for values in step.pseudo)))
        if step.memory is not None:
            self.memory = step.memory

    def _check_declared(self, name: str) -> None:
        """Raises a ValueError if the server would refuse a metric."""
        if name not in client_tags(self.method.metrics):
            raise ValueError(
                f"Method {self.method.name} makes the metric {name}, which nobody declared, so the server would refuse "
                f'it. Declare it: metrics = (Tag("{name}", title, unit, page, least=0.0, largest=1.0),) in the '
                "method's class, with Tag of fedlabel.metric_tags."
            )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Models with dropout draw from torch's global generator: gives it a seed inside and puts it back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
