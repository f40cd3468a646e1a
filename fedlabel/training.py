"""The local loop that all methods share: run the phases of one round on one client's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlabel.data.augment import AugmentConfig, strong, weak
from fedlabel.data.supervision import Supervision
from fedlabel.methods.base import (
    Batch,
    Method,
    Model,
    ModelPart,
    Part,
    Phase,
    PhaseResult,
    PseudoLabels,
    StateDict,
    Step,
)
from fedlabel.seeding import derive_seed, torch_generator

WEIGHT_BY = ("processed", "size", "uniform")


@dataclass(frozen=True)
class TrainingConfig:
    """How a client trains in one round. Optimiser: SGD, fresh in every phase of every round."""

    lr: float = 0.1
    """Learning rate."""
    batch_size: int = 32
    """Samples per step; a client with fewer uses all it has."""
    local_steps: int | None = 15
    """Steps per phase. Set to null to count in `local_epochs` instead."""
    local_epochs: int | None = None
    """Passes per phase over the samples that the phase draws from (unlabelled ones if it draws both)."""
    momentum: float = 0.0
    """SGD momentum."""
    weight_decay: float = 0.0
    """SGD weight decay."""
    weight_by: str = "processed"
    """A client's weight in the server's mean (FedLabel's merge=mean has its own). processed: samples its losses used
    this round, over all steps (FedLabel's r_k); size: how many samples it holds of the kinds the method draws from;
    uniform: 1."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"`training.lr` (={self.lr}) must be a positive number.")
        if self.batch_size < 1:
            raise ValueError(f"`training.batch_size` (={self.batch_size}) must be at least 1.")
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                f"`training.local_steps` (={self.local_steps}) and `training.local_epochs` (={self.local_epochs}): "
                "exactly one must be set; set the other to null."
            )
        for key in ("local_steps", "local_epochs"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"`training.{key}` (={value}) must be at least 0.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`training.momentum` (={self.momentum}) must lie in [0, 1).")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"`training.weight_decay` (={self.weight_decay}) must be at least 0.")
        if self.weight_by not in WEIGHT_BY:
            raise ValueError(f"`training.weight_by` (={self.weight_by}) must be one of {', '.join(WEIGHT_BY)}.")


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
        """Returns (batch, channels, height, width) uint8 as float32 with zero mean and unit variance per channel."""
        return (images.float() / 255 - self.mean) / self.std

    def views(self, images: Tensor, names: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns the named views ("clean", "weak", "strong") of uint8 images, each with random numbers of its own."""
        makers = {
            "clean": lambda: images,
            "weak": lambda: weak(images, generator, self.augment, self.allow_flip),
            "strong": lambda: strong(images, generator, self.augment, self.allow_flip),
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
    pseudo_index: Tensor
    """(draws,) positions in the client's data of the pseudo-labelled draws, for the evaluator."""
    pseudo: PseudoLabels | None
    """The pseudo-labels of these draws; None if there were none."""
    passes: int
    """Student forward + backward passes, in samples: every step counts the samples it sent through the student."""


def frozen_model(module: nn.Module, state: Mapping[str, Tensor]) -> Model:
    """Returns `images -> logits` of `module` (left in eval mode) with the weights `state`, without gradients."""
    module.eval()

    def model(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = torch.func.functional_call(module, dict(state), (images,))
        return logits

    return model


def draw_batches(index: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields `steps` batches of min(batch_size, n) positions: shuffled passes over `index` (n,), cut without a gap."""
    size = min(batch_size, len(index))
    order = index[:0]
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, index[torch.randperm(len(index), generator=generator)]])
        yield order[:size]
        order = order[size:]


def count_steps(phase: Phase, config: TrainingConfig, num_samples: int) -> int:
    """Returns how many steps a phase takes over `num_samples` samples."""
    if phase.steps is not None:
        return phase.steps
    if config.local_steps is not None:
        return config.local_steps
    assert config.local_epochs is not None
    return config.local_epochs * -(-num_samples // config.batch_size)


def train_client(
    method: Method,
    student: nn.Module,
    teacher: nn.Module,
    global_state: StateDict,
    data: ClientData,
    transform: ImageTransform,
    config: TrainingConfig,
    round_number: int,
    seed: int,
) -> ClientUpdate:
    """Runs one client's round.

    Args:
        method: the algorithm.
        student: a module whose weights may be overwritten; trained.
        teacher: a second module of the same architecture; only its code is used, for frozen teachers.
        global_state: the received weights; not changed.
        data: the client's samples and what it knows of their labels.
        transform: makes the views.
        config: optimiser and step counts.
        round_number: 1-based.
        seed: the client's seed for this round; all random numbers derive from it.

    Returns:
        The update. A phase without samples, or with 0 steps, does not run; a step that uses no sample moves nothing.
    """
    labeled = data.supervision.labeled.nonzero().squeeze(1).cpu()
    unlabeled = (~data.supervision.labeled).nonzero().squeeze(1).cpu()
    parameters = frozenset(name for name, _ in student.named_parameters())
    states = {"global": global_state}
    results: list[PhaseResult] = []
    log = _Log()
    size = 0
    for phase in method.phases(round_number):
        index = (labeled if phase.labeled else labeled[:0], unlabeled if phase.unlabeled else unlabeled[:0])
        size += len(index[0]) + len(index[1])
        if count_steps(phase, config, len(index[1]) or len(index[0])) > 0 and len(index[0]) + len(index[1]) > 0:
            teachers = {name: frozen_model(teacher, states[name]) for name in phase.teachers}
            with _seeded(derive_seed(seed, phase.name, "model"), data.images.device):
                result = _run_phase(phase, student, teachers, global_state, data, index, transform, config, seed, log)
            results.append(result)
        states[phase.name] = results[-1].state if results and results[-1].name == phase.name else global_state
    weight = {"processed": sum(result.examples for result in results), "size": float(size), "uniform": 1.0}
    return ClientUpdate(
        parts=method.upload(global_state, results, parameters, weight[config.weight_by]),
        sums={name: value.tolist() for name, value in log.sums.items()},
        pseudo_index=torch.cat(log.rows) if log.rows else unlabeled[:0],
        pseudo=PseudoLabels(*map(torch.cat, zip(*log.pseudo, strict=True))) if log.pseudo else None,
        passes=log.passes,
    )


@dataclass
class _Log:
    """What the phases of one round observe; stays on the device until the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    pseudo: list[PseudoLabels] = field(default_factory=list)
    passes: int = 0

    def add(self, step: Step, batch: Batch, unlabeled_rows: Tensor) -> None:
        self.passes += sum(len(view) for part in batch for view in part.views.values())
        for name, pair in step.metrics.items():
            self.sums[name] = self.sums[name] + pair.double() if name in self.sums else pair.double()
        if step.pseudo is not None:
            self.rows.append(unlabeled_rows)
            self.pseudo.append(step.pseudo)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Models with dropout draw from torch's global generator: gives it a seed inside and puts it back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _run_phase(
    phase: Phase,
    student: nn.Module,
    teachers: Mapping[str, Model],
    start: StateDict,
    data: ClientData,
    index: tuple[Tensor, Tensor],
    transform: ImageTransform,
    config: TrainingConfig,
    seed: int,
    log: _Log,
) -> PhaseResult:
    """Trains `student` from `start` on the labelled and unlabelled positions `index`."""
    student.load_state_dict(start)
    student.train()
    optimizer = torch.optim.SGD(
        student.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps = count_steps(phase, config, len(index[1]) or len(index[0]))
    labeled = draw_batches(index[0], config.batch_size, steps, torch_generator(seed, phase.name, "labeled"))
    unlabeled = draw_batches(index[1], config.batch_size, steps, torch_generator(seed, phase.name, "unlabeled"))
    generator = torch_generator(seed, phase.name, "augment", device=data.images.device)
    examples = torch.zeros((), dtype=torch.float64, device=data.images.device)
    for labeled_rows, unlabeled_rows in zip(labeled, unlabeled, strict=True):
        batch = Batch(
            _part(data, labeled_rows, phase.labeled, transform, generator),
            _part(data, unlabeled_rows, phase.unlabeled, transform, generator),
        )
        buffers = [buffer.clone() for buffer in student.buffers()]
        step = phase.loss(student, teachers, batch)
        log.add(step, batch, unlabeled_rows)
        if not step.examples:  # nothing to learn from: no step, not even of momentum, the proximal term or BatchNorm
            for buffer, value in zip(student.buffers(), buffers, strict=True):
                buffer.copy_(value)
            continue
        examples += step.examples
        optimizer.zero_grad(set_to_none=True)
        step.loss.backward()
        if phase.proximal is not None:
            for name, parameter in student.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=phase.proximal(parameter))
        optimizer.step()
    state = {name: value.detach().clone() for name, value in student.state_dict().items()}
    return PhaseResult(phase.name, state, float(examples))


def _part(
    data: ClientData, rows: Tensor, views: tuple[str, ...], transform: ImageTransform, generator: torch.Generator
) -> Part:
    rows = rows.to(data.images.device)
    return Part(transform.views(data.images[rows], views, generator), data.supervision.candidates[rows])
