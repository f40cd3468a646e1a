"""One local step: a loss on a batch, and one step of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedlabel.learning.checked_loss import checked_updates
from fedlabel.learning.meter import FROM_INPUTS, Passes
from fedlabel.learning.prior import all_with_prior, with_prior
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, Model, PseudoLabels, State, StateDict, Step
from fedlabel.methods.recipe import Phase, Update


class Taken(NamedTuple):
    """The result of one optimiser step; of a stack of clients every tensor has a first dimension, which counts them."""

    metrics: dict[str, Tensor]
    """Metric -> (2,), see `Step.metrics`."""
    examples: Tensor
    """() number of samples that the loss used."""
    pseudo: PseudoLabels | None
    memory: State | None
    forward: int
    """See `Passes`; of one client."""
    backward: Tensor | int
    """()."""


def in_precision(precision: str, device: torch.device) -> torch.autocast | nullcontext[None]:
    """Returns the context in which networks run; see `TrainingConfig.precision`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def frozen_model(
    module: nn.Module, state: Mapping[str, Tensor], lender: nn.Module | None = None, precision: str = "float32"
) -> Model:
    """Returns the `Model` of `module` (left in eval mode) with the weights `state`, without gradients.

    Args:
        module: gives the architecture.
        state: weights and buffers by name.
        lender: a module that lends, as they are at each call, the weights that `state` lacks; None: it lacks none.
        precision: see `TrainingConfig.precision`.
    """
    module.eval()

    def model(inputs: Tensor, *part: str) -> Tensor:
        borrowed = lender.state_dict() if lender is not None else {}
        with torch.no_grad(), in_precision(precision, inputs.device):
            outputs: Tensor = torch.func.functional_call(module, {**borrowed, **state}, (inputs, *part))
        return outputs if precision == "float32" else outputs.float()

    return model


def counted(model: Model, passes: Passes) -> Model:
    """Returns a teacher that counts its passes."""

    def count(inputs: Tensor, *part: str) -> Tensor:
        passes.count(inputs, part, with_gradient=False)
        return model(inputs, *part)

    return count


@dataclass(frozen=True, eq=False)
class Stepper:
    """Runs the steps of one `Update` of a phase: student, optimiser and proximal terms."""

    student: nn.Module
    named: dict[str, nn.Parameter]
    """All of its parameters."""
    buffers: list[Tensor]
    update: Update
    names: frozenset[str]
    """Names of the parameters that it trains."""
    moved: list[nn.Parameter]
    """The parameters of these names."""
    optimizer: Sgd | Fused
    config: TrainingConfig
    proximal: Callable[[Tensor], float] | None
    """See `Phase.proximal`."""
    received: StateDict
    """The global state."""
    passes: Passes
    masked: bool
    """Whether a step without samples is taken and taken back, which needs no look at a number on the device; else it is
    left out. Both give the same."""

    @classmethod
    def of(
        cls,
        student: nn.Module,
        update: Update,
        proximal: Callable[[Tensor], float] | None,
        received: StateDict,
        config: TrainingConfig,
        passes: Passes,
        masked: bool | None = None,
    ) -> Stepper:
        """Returns one with a fresh optimiser; masked: see there, None: where the student is not on the CPU."""
        named = dict(student.named_parameters())
        names = frozenset(named if update.trains is None else update.trains(tuple(named)))
        moved = [parameter for name, parameter in named.items() if name in names]
        if masked is None:
            masked = any(parameter.device.type != "cpu" for parameter in moved)
        return cls(
            student=student,
            named=named,
            buffers=list(student.buffers()),
            update=update,
            names=names,
            moved=moved,
            optimizer=optimizer_of(moved, config),
            config=config,
            proximal=proximal,
            received=received,
            passes=passes,
            masked=masked,
        )

    def begin(self) -> None:
        """Has gradients flow to what it trains, and to nothing else; to be called before `step` whenever another one
        may have taken a step of the same student.
        """
        for name, parameter in self.named.items():
            parameter.requires_grad_(name in self.names)

    def step(self, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the loss of a batch, after one step on it. A step that used no sample changes nothing: no parameter,
        momentum or running statistic of BatchNorm, and no penalty.
        """
        statistics = Kept(self.buffers)
        with_gradient = 0

        def student(inputs: Tensor, *part: str) -> Tensor:
            nonlocal with_gradient
            count = len(inputs) if part in FROM_INPUTS else 0
            self.passes.forward += count
            with_gradient += count if torch.is_grad_enabled() else 0
            with in_precision(self.config.precision, inputs.device):
                outputs: Tensor = self.student(inputs, *part)
            return outputs if self.config.precision == "float32" else outputs.float()

        log_prior = batch.log_prior
        found = self.update.loss(with_prior(student, log_prior), all_with_prior(teachers, log_prior), batch)
        if not isinstance(found.examples, Tensor):
            raise ValueError(
                f"`Step.examples` (={found.examples}) must be a tensor on the device of the loss: "
                "e.g. loss.new_tensor(float(number))."
            )
        active = found.examples > 0
        if (self.masked and found.loss.requires_grad) or (not self.masked and active):
            self._descend(found.loss, active if self.masked else None)
            self.passes.backward += with_gradient * active if self.masked else with_gradient
        if self.masked or not active:
            statistics.put_back_unless(active)
        return found

    def _descend(self, loss: Tensor, active: Tensor | None) -> None:
        """Takes one step of the optimiser; see `Sgd.step`."""
        for parameter in self.moved:
            parameter.grad = None
        if self.update.penalty is not None:
            loss = loss + self.update.penalty(self.named)
        loss.backward()
        self._pull_and_clip()
        self.optimizer.step(active)

    def _pull_and_clip(self) -> None:
        if self.config.prox_mu > 0 or self.proximal is not None:
            for name, parameter in self.named.items():
                if name not in self.names or parameter.grad is None:
                    continue
                pull = self.config.prox_mu + (self.proximal(parameter) if self.proximal is not None else 0.0)
                if pull > 0:
                    parameter.grad.add_(parameter.detach() - self.received[name], alpha=pull)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.moved, self.config.max_grad_norm)


class Kept:
    """The values that some tensors have now, to be put back later. All are moved at once: a network has many small
    tensors, and on a GPU an operation on one of them takes longer to start than to run.

    Args:
        tensors: on any devices.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            self._alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        self._values = {kind: _one_after_the_other(alike) for kind, alike in self._alike.items()}

    @torch.no_grad()
    def put_back_unless(self, condition: Tensor) -> None:
        """Puts the values back where `condition`, () bool on any device, is False, without a look at it."""
        for (dtype, device), alike in self._alike.items():
            chosen = torch.where(condition.to(device), _one_after_the_other(alike), self._values[dtype, device])
            parts = chosen.split([tensor.numel() for tensor in alike])
            torch._foreach_copy_(alike, [part.view(t.shape) for part, t in zip(parts, alike, strict=True)])


def _one_after_the_other(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the numbers of some tensors as one new tensor (n,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Alone:
    """The student of one client during a phase.

    Args:
        student: its weights are overwritten.
        teacher: gives the architecture of teachers.
        phase: the phase.
        config: how clients train.
        received: the global weights.
        starts: the student's initial ones, in a list of one; so that it is built as a `Stack` is.
        teachers: name -> weights, likewise.
        fixed: whether other clients will take this one's place in the same memory (see `restart`), as a CUDA graph
            needs it.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        phase: Phase,
        config: TrainingConfig,
        received: StateDict,
        starts: Sequence[StateDict],
        teachers: Mapping[str, Sequence[StateDict]],
        fixed: bool = False,
    ) -> None:
        self._student, self._passes = student.train(), Passes()
        copy_into(student.state_dict(), starts[0])
        self._received, self._states = received, {name: each[0] for name, each in teachers.items()}
        if fixed:
            self._received, self._states = tree_map(torch.clone, (self._received, self._states))
        models = {
            name: frozen_model(teacher, state, student if len(state) < len(received) else None, config.precision)
            for name, state in self._states.items()
        }
        self._teachers = {name: counted(model, self._passes) for name, model in models.items()}
        self._steppers = [
            Stepper.of(student, update, phase.proximal, self._received, config, self._passes, masked=fixed or None)
            for update in checked_updates(phase)
        ]
        for stepper in self._steppers[:1]:
            stepper.begin()

    def take(self, batch: Batch) -> list[Taken]:
        """Takes all optimiser steps on a batch."""
        taken, memory = [], batch.memory
        for stepper in self._steppers:
            self._passes.forward, self._passes.backward = 0, 0
            if len(self._steppers) > 1:
                stepper.begin()
            step = stepper.step(self._teachers, batch if memory is batch.memory else batch._replace(memory=memory))
            memory = step.memory if step.memory is not None else memory
            passes, examples = self._passes, step.examples.detach()
            taken.append(Taken(step.metrics, examples, step.pseudo, step.memory, passes.forward, passes.backward))
        return taken

    def restart(
        self, received: StateDict, starts: Sequence[StateDict], teachers: Mapping[str, Sequence[StateDict]]
    ) -> None:
        """Puts the weights of another client in place of these, in the same memory; momentum starts at 0."""
        copy_into(self._student.state_dict(), starts[0])
        copy_into(self._received, received)
        copy_into(self._states, {name: each[0] for name, each in teachers.items()})
        for stepper in self._steppers:
            for moment in stepper.optimizer.moments().values():
                moment.zero_()

    def results(self) -> list[StateDict]:
        """Returns the student's weights, in memory of their own."""
        self._student.requires_grad_(True)
        return [{name: value.detach().clone() for name, value in self._student.state_dict().items()}]


def tensors_in(value: Any) -> list[Tensor]:
    """Returns all tensors in dictionaries (in the order of their keys), lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    parts = [value[name] for name in sorted(value)] if isinstance(value, Mapping) else value
    return [tensor for part in parts for tensor in tensors_in(part)]


def copy_into(targets: Any, sources: Any) -> None:
    """Copies tensors into those of the same structure, see `tensors_in`."""
    pairs = list(zip(tensors_in(targets), tensors_in(sources), strict=True))
    filled = [(target, source) for target, source in pairs if target.numel()]
    if filled:  # in one launch
        torch._foreach_copy_([target for target, _ in filled], [source for _, source in filled])


class Sgd:
    """SGD, equal to `torch.optim.SGD` to the bit. That one spends longer on its hooks, checks and groups than on the
    arithmetic of a small network.

    Args:
        parameters: what it moves.
        config: how clients train.
    """

    def __init__(self, parameters: Sequence[Tensor], config: TrainingConfig) -> None:
        self._parameters, self._config = parameters, config
        self._momentum: dict[Hashable, Tensor] = {}
        """Place of a parameter -> its momentum, from its first gradient on."""

    def moments(self) -> dict[Hashable, Tensor]:
        """Returns what it remembers from step to step, by a name for each tensor."""
        return dict(self._momentum)

    def step(self, active: Tensor | None = None) -> None:
        """Moves the parameters that have a gradient.

        Args:
            active: () bool; where it is False, nothing changes, whatever the gradients are. None: True.
        """
        if active is None:
            self._move()
            return
        parameters, before = Kept(self._parameters), self.moments()
        moments = Kept(list(before.values()))
        self._move()
        parameters.put_back_unless(active)
        moments.put_back_unless(active)
        for place, momentum in self._momentum.items():
            if place not in before:  # made by this step
                momentum.copy_(torch.where(active, momentum, 0.0))

    @torch.no_grad()
    def _move(self) -> None:
        config = self._config
        places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        parameters = [self._parameters[place] for place in places]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        if config.weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=config.weight_decay))
        if config.momentum:
            begun = [(self._momentum[p], g) for p, g in zip(places, gradients, strict=True) if p in self._momentum]
            if begun:
                torch._foreach_mul_([momentum for momentum, _ in begun], config.momentum)
                torch._foreach_add_([momentum for momentum, _ in begun], [gradient for _, gradient in begun])
            for place, gradient in zip(places, gradients, strict=True):
                if place not in self._momentum:
                    self._momentum[place] = gradient.clone()
            moved = [self._momentum[place] for place in places]
            gradients = list(torch._foreach_add(gradients, moved, alpha=config.momentum)) if config.nesterov else moved
        torch._foreach_add_(parameters, gradients, alpha=-config.lr)


class Fused:
    """An optimiser of torch that is one kernel, used as `Sgd` is: SGD on a GPU, AdamW anywhere.

    Args:
        parameters: what it moves.
        config: how clients train.
    """

    def __init__(self, parameters: Sequence[Tensor], config: TrainingConfig) -> None:
        shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
        self._of_torch: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self._of_torch = torch.optim.AdamW(parameters, **shared)
        else:
            self._of_torch = torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **shared)
            if config.momentum:  # torch's first step would leave it undefined if it is not to be taken
                for parameter in parameters:
                    self._of_torch.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def moments(self) -> dict[Hashable, Tensor]:
        """See `Sgd`; of AdamW the counter of steps is among them."""
        states = self._of_torch.state.items()
        return {(id(p), key): value for p, state in states for key, value in state.items() if isinstance(value, Tensor)}

    def step(self, active: Tensor | None = None) -> None:
        """See `Sgd.step`."""
        if active is not None:  # as a gradient scaler has a step left out on the device
            self._of_torch.found_inf = (~active).float()  # type: ignore[attr-defined]
        self._of_torch.step()


def optimizer_of(parameters: Sequence[Tensor], config: TrainingConfig) -> Sgd | Fused:
    """Returns the optimiser of some parameters."""
    on_gpu = any(parameter.device.type == "cuda" for parameter in parameters)
    return Fused(parameters, config) if on_gpu or config.optimizer == "adamw" else Sgd(parameters, config)
