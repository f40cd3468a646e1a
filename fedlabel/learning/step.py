"""One local step: a loss on a batch, and one step of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlabel.learning.meter import Meter
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, Model, StateDict, Step
from fedlabel.methods.recipe import Update

FROM_INPUTS = ((), ("all",), ("embed",), ("heads",))
"""The parts of a network that begin with its inputs: a pass through the rest is not counted as another."""


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


def counted(model: Model, meter: Meter) -> Model:
    """Returns a teacher that counts its passes."""

    def count(inputs: Tensor, *part: str) -> Tensor:
        meter.forward += len(inputs) if part in FROM_INPUTS else 0
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
    optimizer: torch.optim.Optimizer
    config: TrainingConfig
    proximal: Callable[[Tensor], float] | None
    """See `Phase.proximal`."""
    received: StateDict
    """The global state."""
    meter: Meter
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
        meter: Meter,
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
            optimizer=_optimizer(moved, config),
            config=config,
            proximal=proximal,
            received=received,
            meter=meter,
            masked=masked,
        )

    def step(self, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the loss of a batch, after one step on it. A step that used no sample changes nothing: no parameter,
        momentum or running statistic of BatchNorm, and no penalty.
        """
        for name, parameter in self.named.items():
            parameter.requires_grad_(name in self.names)
        before = [buffer.clone() for buffer in self.buffers]
        with_gradient = 0

        def student(inputs: Tensor, *part: str) -> Tensor:
            nonlocal with_gradient
            count = len(inputs) if part in FROM_INPUTS else 0
            self.meter.forward += count
            with_gradient += count if torch.is_grad_enabled() else 0
            outputs: Tensor = self.student(inputs, *part)
            return outputs

        found = self.update.loss(student, teachers, batch)
        if not isinstance(found.examples, Tensor):
            raise ValueError(
                f"`Step.examples` (={found.examples}) must be a tensor on the device of the loss: "
                "e.g. loss.new_tensor(float(number))."
            )
        active = found.examples > 0
        if (self.masked and found.loss.requires_grad) or (not self.masked and active):
            undo = self._undo() if self.masked else None
            self._descend(found.loss)
            self.meter.backward += with_gradient * active if self.masked else with_gradient
            if undo is not None:
                undo(active)
        for buffer, value in zip(self.buffers, before, strict=True) if self.masked or not active else ():
            buffer.copy_(torch.where(active, buffer, value))
        return found

    def _descend(self, loss: Tensor) -> None:
        """Takes one step of the optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.update.penalty is not None:
            loss = loss + self.update.penalty(self.named)
        loss.backward()
        self._pull_and_clip({n: p for n, p in self.named.items() if n in self.names and p.grad is not None})
        self.optimizer.step()

    def _undo(self) -> Callable[[Tensor], None]:
        """Remembers parameters and momentum; returns a function () bool -> nothing that puts them back where False."""
        moved = [parameter for name, parameter in self.named.items() if name in self.names]
        parameters = [parameter.detach().clone() for parameter in moved]
        states = [dict(self.optimizer.state.get(parameter, {})) for parameter in moved]
        kept = [{key: v.clone() for key, v in state.items() if isinstance(v, Tensor)} for state in states]

        def undo(active: Tensor) -> None:
            with torch.no_grad():
                for parameter, value, old in zip(moved, parameters, kept, strict=True):
                    parameter.copy_(torch.where(active, parameter, value))
                    for key, state in self.optimizer.state.get(parameter, {}).items():
                        if isinstance(state, Tensor):
                            start = old.get(key, torch.zeros_like(state))  # as no step has been taken
                            state.copy_(torch.where(active.to(state.device), state, start))

        return undo

    def _pull_and_clip(self, moved: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in moved.items():
            pull = self.config.prox_mu + (self.proximal(parameter) if self.proximal is not None else 0.0)
            if pull > 0:
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - self.received[name], alpha=pull)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(moved.values()), self.config.max_grad_norm)


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
