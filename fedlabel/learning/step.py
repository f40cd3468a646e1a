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

    @classmethod
    def of(
        cls,
        student: nn.Module,
        update: Update,
        proximal: Callable[[Tensor], float] | None,
        received: StateDict,
        config: TrainingConfig,
        meter: Meter,
    ) -> Stepper:
        """Returns a stepper with a fresh optimiser."""
        named = dict(student.named_parameters())
        names = frozenset(named if update.trains is None else update.trains(tuple(named)))
        moved = [parameter for name, parameter in named.items() if name in names]
        buffers = list(student.buffers())
        return cls(student, named, buffers, update, names, _optimizer(moved, config), config, proximal, received, meter)

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
        if not found.examples:
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)
            return found
        self.optimizer.zero_grad(set_to_none=True)
        loss = found.loss if self.update.penalty is None else found.loss + self.update.penalty(self.named)
        loss.backward()
        self.meter.backward += with_gradient
        self._pull_and_clip({n: p for n, p in self.named.items() if n in self.names and p.grad is not None})
        self.optimizer.step()
        return found

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
