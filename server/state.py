"""The server's state between two rounds: the content of a checkpoint, and all that the next round depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlabel.errors import RunError
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import Recipe

TENSORS = ("model", "shared", "previous", "average", "selected")
"""Fields that hold tensors by name."""


@dataclass(frozen=True)
class ServerState:
    """All that a round depends on besides the configuration."""

    round_number: int
    """The last completed round."""
    model: StateDict
    """Global weights."""
    config: str
    """Resolved configuration, YAML."""
    strategy: dict[str, Any] = field(default_factory=dict)
    """See `strategy.strategy_state`."""
    clients: dict[int, bytes] = field(default_factory=dict)
    """Client -> what it keeps between rounds, serialised; only of simulated clients, only what is not empty."""
    shared: State = field(default_factory=dict)
    """See `Shared`."""
    helpers: dict[str, Any] = field(default_factory=dict)
    """See `HelperPool.dump`."""
    previous: StateDict = field(default_factory=dict)
    """The final model of the previous stage (see `Stage`); empty in the first."""
    average: StateDict = field(default_factory=dict)
    """See `Stage.averaging`."""
    observers: dict[str, Any] = field(default_factory=dict)
    """Name of an observer -> its state."""
    selected: StateDict = field(default_factory=dict)
    """The stage's best weights so far (see `evaluation.select`); empty if no round was scored."""
    pace: dict[str, Any] = field(default_factory=dict)
    """See `Pacing.dump`."""

    def to(self, device: torch.device) -> ServerState:
        """Returns the state with its tensors on a device."""
        moved = {name: {key: v.to(device) for key, v in getattr(self, name).items()} for name in TENSORS}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def models(self) -> dict[str, StateDict]:
        """The available models, as `Stage.predict` names them."""
        found = {"model": self.model, "average": self.average, "previous": self.previous}
        return {name: state for name, state in found.items() if state}

    def next(self, model: StateDict, shared: State, recipe: Recipe, moved: bool) -> ServerState:
        """Returns the state after one more round.

        Args:
            model: the new global weights.
            shared: the new shared state.
            recipe: the method's.
            moved: whether clients moved the model.
        """
        number = self.round_number + 1
        decay = recipe.place(number).stage.averaging
        average = self.average if decay else {}  # of the stage before, where a stage without one continues
        if moved:
            average = moving_average(average, model, decay)
        return replace(self, round_number=number, model=model, shared=shared, average=average)


def moving_average(average: StateDict, model: StateDict, decay: float) -> StateDict:
    """Returns decay * average + (1 - decay) * model, the model itself without an average, and {} for decay 0."""
    if not decay:
        return {}
    return {
        name: torch.lerp(value, average[name], decay) if average and value.is_floating_point() else value
        for name, value in model.items()
    }


def check_model(model: StateDict, variances: Iterable[str], who: str, round_number: int, what: str) -> None:
    """Raises if a model has non-finite values, so that it is neither saved nor sent.

    Args:
        model: the global one.
        variances: names of its arrays that are variances.
        who: made it, for the message.
        round_number: of the round.
        what: of the server's may be too large, likewise.

    Raises:
        RunError: it holds NaN, infinity or a negative variance.
    """
    squares = sorted(variances)
    flags = [value.isfinite().all() for value in model.values()] + [(model[name] < 0).any() for name in squares]
    found = torch.stack(flags).tolist() if flags else []  # one look at a device
    finite = all(found[: len(model)])
    negative = [name for name, is_negative in zip(squares, found[len(model) :], strict=True) if is_negative]
    if not finite or negative:
        wrong = f"a negative variance ({negative[0]})" if finite else "NaN or infinity"
        raise RunError(
            f"{who} a model with {wrong} in round {round_number}; the last checkpoint is of a round before. "
            f"Lower the server's {what}, or training.lr."
        )


def check_shared(method: str, recipe: Recipe, shared: State, round_number: int) -> None:
    """Raises if a shared state is invalid, so that it is neither saved nor sent.

    Raises:
        RunError: it is one.
    """
    start = recipe.shared.start()
    other = sorted(start.keys() ^ shared.keys()) or [
        name for name, value in start.items() if (value.dtype, value.shape) != (shared[name].dtype, shared[name].shape)
    ]
    if other:
        raise RunError(
            f"Method {method} changed the names, types or shapes of its shared state in round {round_number} "
            f"({', '.join(other[:3])}), so that no run could be resumed: `Shared.update` must return what "
            "`Shared.start` does."
        )
    wrong = [name for name, value in shared.items() if not value.isfinite().all()]
    try:
        if not wrong:
            return recipe.shared.check(shared)
        reason = f"{', '.join(wrong)} holds NaN or infinity"
    except ValueError as error:
        reason = str(error)
    raise RunError(
        f"Method {method} made a shared state to go on from no more in round {round_number}: {reason}. The last "
        "checkpoint is of a round before."
    )
