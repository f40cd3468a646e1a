"""Trains several clients as one program: their weights, batches and memories carry a first dimension, over which
`torch.func.vmap` runs the loss. Each client's result is that of its training alone, up to the rounding of matrix
products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fedlabel.learning.checked_loss import checked_updates
from fedlabel.learning.meter import Passes
from fedlabel.learning.prior import all_with_prior, with_prior
from fedlabel.learning.step import Taken, copy_into, in_precision
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, Model, PseudoLabels, StateDict
from fedlabel.methods.recipe import Phase, Update

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8
"""torch's defaults."""


def why_not(module: nn.Module) -> str | None:
    """Returns why clients with this network cannot be stacked; None if they can."""
    random = [
        name for name, part in module.named_modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.p
    ]
    if random:
        return f"layer {random[0]} draws random numbers, which must be each client's own"
    every, once = (len(list(module.named_parameters(remove_duplicate=each))) for each in (False, True))
    return "layers share weights" if every > once else None


IN_CACHE = 4 * 2**20
"""Bytes of a stack's weights on a CPU: beyond it, every pass over them waits for the memory."""
SMALL = 8 * 2**20
"""Bytes of a network that pays in a stack on a GPU: a larger one fills the card by itself."""
LARGEST = {"cpu": 32, "cuda": 64}
"""Clients in a stack at most, by device."""


def automatic_size(module: nn.Module) -> int:
    """Returns how many clients with this network make a stack if nobody says; 1: none.

    A rule, measured once, not a probe: what is stacked rounds differently, and the same configuration should give the
    same numbers whatever else the machine is doing. On a CPU, a convolution with weights of each client's own takes
    longer than one client after the other.
    """
    size = sum(value.nbytes for value in module.parameters())
    device = next(module.parameters()).device.type
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    if device not in LARGEST or (device == "cpu" and convolves) or (device == "cuda" and size > SMALL):
        return 1
    return LARGEST[device] if device == "cuda" else max(1, min(LARGEST[device], IN_CACHE // size))


def stack_states(states: Sequence[Mapping[str, Tensor]], by_columns: bool = False) -> StateDict:
    """Returns states with the same names and shapes as one, with a first dimension, in memory of its own.

    Args:
        states: of the clients.
        by_columns: whether matrices lie column by column in memory, as their gradients will. Else an optimiser reads
            one of both across, and a step takes twice as long.
    """

    def together(values: Sequence[Tensor]) -> Tensor:
        if not common:
            return torch.stack(list(values))
        return values[0].contiguous().expand(len(states), *values[0].shape).clone()

    common = all(state is states[0] for state in states)
    first = states[:1] if common else states
    return {
        name: together([state[name].mT for state in first]).mT
        if by_columns and example.dim() == 2
        else together([state[name] for state in first])
        for name, example in states[0].items()
    }


class Stack:
    """The students of several clients during a phase.

    Args:
        student: gives the architecture; its own weights are not used.
        teacher: likewise for teachers.
        phase: the phase.
        config: how clients train.
        received: the global weights.
        starts: each client's initial weights.
        teachers: name -> each client's weights of this teacher.
        fixed: whether other clients will take the place of these in the same memory (see `restart`), as a CUDA graph
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
        self._fixed = fixed
        self._student, self._teacher, self._phase, self._config = student.train(), teacher.eval(), phase, config
        self._received = received
        self.state = stack_states(starts, by_columns=True)
        """Name -> (clients, ...), of all clients."""
        self._parameters = [name for name, _ in student.named_parameters()]
        self._common = {name: each[0] for name, each in teachers.items() if all(state is each[0] for state in each)}
        """Teachers with the same weights for all clients."""
        self._own = {name: stack_states(each) for name, each in teachers.items() if name not in self._common}
        if fixed:
            self._received, self._common = tree_map(torch.clone, (self._received, self._common))
        self._teachers = tuple(teachers)
        self._optimizers = [StackedOptimizer(update, self._parameters, config) for update in checked_updates(phase)]

    def take(self, batch: Batch) -> list[Taken]:
        """Takes all optimiser steps on a batch of the first clients; those behind took their last step before."""
        taken, memory = [], batch.memory
        for optimizer in self._optimizers:
            found = self._update(optimizer, batch._replace(memory=memory), len(batch.mixing))
            memory = found.memory if found.memory is not None else memory
            taken.append(found)
        return taken

    def results(self) -> list[StateDict]:
        """Returns each client's weights; views, in memory that no other stack writes to."""
        state = {name: value.clone() for name, value in self.state.items()} if self._fixed else self.state
        count = len(next(iter(state.values())))
        return [{name: value[place] for name, value in state.items()} for place in range(count)]

    def restart(
        self, received: StateDict, starts: Sequence[StateDict], teachers: Mapping[str, Sequence[StateDict]]
    ) -> None:
        """Puts the weights of other clients in place of these, in the same memory; moments start at 0."""
        copy_into(self._received, received)
        copy_into(self.state, stack_states(starts))
        copy_into(self._common, {name: teachers[name][0] for name in self._common})
        copy_into(self._own, {name: stack_states(teachers[name]) for name in self._own})
        for optimizer in self._optimizers:
            optimizer.reset()

    def _update(self, optimizer: StackedOptimizer, batch: Batch, clients: int) -> Taken:
        current = {name: value[:clients] for name, value in self.state.items()}
        weights = {name: current[name].detach().requires_grad_(name in optimizer.names) for name in self._parameters}
        buffers = {name: value for name, value in current.items() if name not in weights}
        before = {name: value.clone() for name, value in buffers.items()}
        own = {name: {key: value[:clients] for key, value in state.items()} for name, state in self._own.items()}
        passes = Passes()
        leaves, form = tree_flatten((weights, buffers, own, batch))
        loss = self._loss(optimizer.update, passes)
        # As one list: vmap goes through what it is given several times.
        found = vmap(lambda given: loss(*tree_unflatten(given, form)))(leaves)
        active = found["examples"] > 0
        everyone = active.device.type == "cpu" and bool(active.all())  # elsewhere nobody waits for the device
        if found["loss"].requires_grad:
            moved = [name for name in self._parameters if name in optimizer.names]
            gradients = torch.autograd.grad(found["loss"].sum(), [weights[name] for name in moved], allow_unused=True)
            with torch.no_grad():
                of = {name: g for name, g in zip(moved, gradients, strict=True) if g is not None}
                optimizer.move(weights, of, self._received, self._phase.proximal, None if everyone else active)
        for name, value in before.items() if not everyone else ():
            buffers[name].copy_(torch.where(_per_client(active, value), buffers[name], value))
        return Taken(
            metrics=found["metrics"],
            examples=found["examples"].detach(),
            pseudo=PseudoLabels(*found["pseudo"]) if "pseudo" in found else None,
            memory=found.get("memory"),
            forward=passes.forward,
            backward=passes.backward * active,
        )

    def _loss(self, update: Update, passes: Passes) -> Callable[..., dict[str, Any]]:
        """Returns the loss of one client as a function of its tensors."""

        def loss(weights: StateDict, buffers: StateDict, own: dict[str, StateDict], batch: Batch) -> dict[str, Any]:
            def student(inputs: Tensor, *part: str) -> Tensor:
                passes.count(inputs, part, torch.is_grad_enabled())
                with in_precision(self._config.precision, inputs.device):
                    outputs: Tensor = functional_call(self._student, {**weights, **buffers}, (inputs, *part))
                return outputs if self._config.precision == "float32" else outputs.float()

            def frozen(state: StateDict) -> Model:
                def model(inputs: Tensor, *part: str) -> Tensor:
                    passes.count(inputs, part, False)
                    weights_of_all = {**weights, **buffers, **state}  # those that the state lacks are the student's
                    with torch.no_grad(), in_precision(self._config.precision, inputs.device):
                        outputs: Tensor = functional_call(self._teacher, weights_of_all, (inputs, *part))
                    return outputs if self._config.precision == "float32" else outputs.float()

                return model

            states = {**self._common, **own}
            teachers, log_prior = {name: frozen(states[name]) for name in self._teachers}, batch.log_prior
            found = update.loss(with_prior(student, log_prior), all_with_prior(teachers, log_prior), batch)
            value = found.loss if update.penalty is None else found.loss + update.penalty(weights)
            result = {"loss": value, "examples": found.examples, "metrics": found.metrics}
            if found.pseudo is not None:
                result["pseudo"] = tuple(found.pseudo)
            if found.memory is not None:
                result["memory"] = found.memory
            return result

        return loss


class StackedOptimizer:
    """The optimiser of one `Update` for a stack of clients, with torch's formulas for SGD and AdamW. A client without a
    sample in a step keeps its weights, moments and step counter.

    Args:
        update: says which parameters it trains.
        parameters: names of all.
        config: how clients train.
    """

    def __init__(self, update: Update, parameters: Sequence[str], config: TrainingConfig) -> None:
        self.update = update
        self.names = frozenset(parameters if update.trains is None else update.trains(tuple(parameters)))
        self._config = config
        self._moments: dict[str, list[Tensor]] = {}
        """Parameter -> momentum; or the two moments of AdamW and (clients,) numbers of steps."""

    def move(
        self,
        weights: StateDict,
        gradients: StateDict,
        received: StateDict,
        proximal: Callable[[Tensor], float] | None,
        active: Tensor | None,
    ) -> None:
        """Moves weights in place.

        Args:
            weights: (clients, ...) by name.
            gradients: likewise, of those that the loss depends on.
            received: the global weights, without the first dimension.
            proximal: see `Phase.proximal`.
            active: (clients,) bool, who moves; None: all.
        """
        for name, gradient in gradients.items():
            pull = self._config.prox_mu + (proximal(weights[name][0]) if proximal is not None else 0.0)
            if pull > 0:
                gradients[name] = gradient + pull * (weights[name] - received[name])
        if self._config.max_grad_norm is not None:
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
            scale = (self._config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            gradients = {name: gradient * _per_client(scale, gradient) for name, gradient in gradients.items()}
        step = self._adamw if self._config.optimizer == "adamw" else self._sgd
        for name, gradient in gradients.items():
            step(name, weights[name], gradient, active)

    def _sgd(self, name: str, weight: Tensor, gradient: Tensor, active: Tensor | None) -> None:
        config = self._config
        if config.weight_decay:
            gradient = gradient.add(weight, alpha=config.weight_decay)
        if config.momentum:
            (momentum,) = self._moments_of(name, weight, 1)
            new = momentum * config.momentum + gradient
            _keep(momentum, new, active)
            gradient = gradient + config.momentum * new if config.nesterov else new
        if active is None:
            weight.add_(gradient, alpha=-config.lr)
        else:  # chosen, not multiplied by 0: the gradient of a loss without samples need not be finite
            _keep(weight, weight.add(gradient, alpha=-config.lr), active)

    def _adamw(self, name: str, weight: Tensor, gradient: Tensor, active: Tensor | None) -> None:
        config, (first, second) = self._config, ADAM_BETAS
        mean, square, steps = self._moments_of(name, weight, 2)
        steps += 1 if active is None else active
        _keep(mean, mean.lerp(gradient, 1 - first), active)
        _keep(square, square * second + (1 - second) * gradient * gradient, active)
        count = steps.clamp_min(1)
        of_mean, of_square = (_per_client((1 - beta**count).to(weight.dtype), weight) for beta in ADAM_BETAS)
        width = (square / of_square).sqrt() + ADAM_EPSILON
        new = weight * (1 - config.lr * config.weight_decay) - config.lr * (mean / of_mean) / width
        _keep(weight, new, active)

    def reset(self) -> None:
        """Sets all moments and step counters to 0."""
        for moments in self._moments.values():
            for moment in moments:
                moment.zero_()

    def _moments_of(self, name: str, weight: Tensor, number: int) -> list[Tensor]:
        """Returns the moments of the clients of `weight`, and of AdamW their numbers of steps; views."""
        if name not in self._moments:
            moments = [torch.zeros_like(weight) for _ in range(number)]
            # In float32 the first steps' 1 - 0.999^n would be wrong in the fifth digit.
            steps = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
            self._moments[name] = moments if number == 1 else [*moments, steps]
        return [moment[: len(weight)] for moment in self._moments[name]]


def _per_client(values: Tensor, like: Tensor) -> Tensor:
    """Returns (clients,) values with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _keep(old: Tensor, new: Tensor, active: Tensor | None) -> None:
    """Writes `new` into `old`, in place, for active clients."""
    old.copy_(new if active is None else torch.where(_per_client(active, old), new, old))
