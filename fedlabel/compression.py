"""Compression of the models that travel between server and clients: a model as arrays of fewer bytes, and back.

Weights are compressed; buffers travel as they are (a variance of BatchNorm's would become negative, and a batch counter
is an integer). The server sends its model, a client its update: its model minus the one that it received.

- float16, bfloat16: rounded to the nearest such number. numpy has no bfloat16: its 16 bits travel as an int16.
- int8: the multiple of a scale, max |x| / 127 of each array, below or above, at random such that the expectation is x
  (QSGD with the maximum norm: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
  Encoding", NeurIPS 2017).
- top_k: the share of the update's numbers with the largest absolute values, over all arrays together, as float32, and
  their positions. With error feedback a client adds what it did not send to its next update (Stich et al., "Sparsified
  SGD with Memory", NeurIPS 2018; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
  Schemes", ICML 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.checks import one_of, within
from fedlabel.methods.batch import State, StateDict
from fedlabel.transfer import to_device

DOWN = ("none", "float16", "bfloat16", "int8")
UP = (*DOWN, "top_k")
LEVELS = 127
"""Of int8, on either side of 0."""
SCALES, VALUES, INDICES = ".scales", ".values", ".indices"
"""Names of arrays of an encoded model; no array of a torch module has a name that begins with a dot."""
RESIDUAL = ".residual/"
"""Prefix of what error feedback keeps of a part (see `Upload`), among what a client keeps between rounds."""
LARGEST_UPDATE = 1e12
"""Largest absolute value in an update of which a client keeps the rest: the server refuses a model with larger ones."""
_MOST_FLOAT16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class CompressionConfig:
    """What models look like on their way; `comm/bytes_*` count what is sent."""

    up: str = "none"
    """none | float16 | bfloat16 | int8 | top_k: how the weights of a client's update are sent. Statistics and counts
    are sent as they are."""
    down: str = "none"
    """none | float16 | bfloat16 | int8: how the weights of the server's model are sent, and of all that it sends along
    (the previous stage's model, helpers)."""
    share: float | None = None
    """up=top_k: share of an update's numbers that is sent, in (0, 1]; at least one number."""
    error_feedback: bool = False
    """up=top_k: whether a client adds what it did not send to its next update."""

    def __post_init__(self) -> None:
        one_of(self, "compression", up=UP, down=DOWN)
        if self.up == "top_k":
            if self.share is None:
                raise ValueError("`compression.share` must be given for compression.up=top_k: a number in (0, 1].")
            within(self, "compression", 0, 1, "share", ends="(]")
        elif self.share is not None or self.error_feedback:
            key = "error_feedback" if self.share is None else "share"
            raise ValueError(
                f"`compression.{key}` (={getattr(self, key)}) has an effect with compression.up=top_k only (it is "
                f"{self.up}): take that, or leave it out."
            )


@dataclass(frozen=True)
class Codec:
    """A way to write a model, or an update of one, as arrays."""

    kind: str = "none"
    """Of `UP`."""
    parameters: frozenset[str] = frozenset()
    """Names of the weights; other arrays are left as they are."""
    share: float = 1.0
    """See `CompressionConfig`."""

    def names(self, like: Mapping[str, Tensor]) -> list[str]:
        """Returns the names of the arrays that are compressed, in the model's order."""
        return [name for name, value in like.items() if name in self.parameters and value.is_floating_point()]

    def numbers(self, like: Mapping[str, Tensor]) -> int:
        """Returns how many numbers are compressed."""
        return sum(like[name].numel() for name in self.names(like))

    def sent(self, numbers: int) -> int:
        """Returns how many of an update's numbers top_k sends."""
        return min(max(round(self.share * numbers), 1), numbers)

    def form(self, like: StateDict) -> StateDict:
        """Returns the names, types and shapes of an encoded model, as tensors without numbers.

        Args:
            like: a model.
        """
        names = self.names(like)
        found = {name: torch.empty_like(value, device="meta") for name, value in like.items()}
        if self.kind == "none" or not names:
            return found
        if self.kind == "top_k":
            numbers = self.numbers(like)
            chosen = self.sent(numbers)
            values = torch.empty(chosen, dtype=torch.float32, device="meta")
            indices = torch.empty(chosen, dtype=_index_type(numbers), device="meta")
            return {**_without(found, names), VALUES: values, INDICES: indices}
        dtype = {"float16": torch.float16, "bfloat16": torch.int16, "int8": torch.int8}[self.kind]
        found |= {name: found[name].to(dtype) for name in names}
        if self.kind == "int8":
            found[SCALES] = torch.empty(len(names), dtype=torch.float32, device="meta")
        return found

    def encode(self, values: StateDict, generator: torch.Generator) -> StateDict:
        """Returns the arrays that travel.

        Args:
            values: a model or an update. What is not finite stays so: the other side will see it.
            generator: on the CPU, so that the numbers do not depend on the device; int8 alone draws from it.
        """
        names = self.names(values)
        if self.kind == "none" or not names:
            return values
        if self.kind == "top_k":
            numbers = flat(values, names)
            place = largest(numbers, self.sent(len(numbers)))
            chosen = {VALUES: numbers[place], INDICES: place.to(_index_type(len(numbers)))}
            return {**_without(values, names), **chosen}
        if self.kind == "int8":
            coded = {name: _to_int8(values[name], generator) for name in names}
            scales = torch.stack([scale for _, scale in coded.values()])
            return {**values, **{name: codes for name, (codes, _) in coded.items()}, SCALES: scales}
        rounded = _to_float16 if self.kind == "float16" else _to_bfloat16
        return {**values, **{name: rounded(values[name]) for name in names}}

    def decode(self, arrays: StateDict, like: StateDict) -> StateDict:
        """Returns the model, or the update, that `encode` made arrays from, but for the rounding.

        Args:
            arrays: of the form that `form` gives.
            like: a model with its names, order and types.
        """
        names = self.names(like)
        if self.kind == "none" or not names:
            return arrays
        found = {name: arrays[name] for name in like if name not in names}
        if self.kind == "top_k":
            numbers = arrays[VALUES].new_zeros(self.numbers(like))
            numbers[arrays[INDICES].long()] = arrays[VALUES]
            found |= _apart(numbers, like, names)
        elif self.kind == "int8":
            for name, scale in zip(names, arrays[SCALES].unbind(), strict=True):
                found[name] = (arrays[name].to(scale.dtype) * scale).to(like[name].dtype)
        else:
            bits = self.kind == "bfloat16"
            for name in names:
                found[name] = (arrays[name].view(torch.bfloat16) if bits else arrays[name]).to(like[name].dtype)
        return {name: found[name] for name in like}

    def model(self, arrays: StateDict, received: StateDict) -> StateDict:
        """Returns the model of a client from its encoded update and the model that it received."""
        if self.kind == "none":
            return arrays
        return moved(received, self.decode(arrays, received), self.names(received))


NO_COMPRESSION = Codec()


class SentUpdate(NamedTuple):
    """A client's model on its way to the server."""

    arrays: StateDict
    """What travels."""
    model: StateDict
    """The model as the server will see it."""
    residual: Tensor | None
    """(weights,) float32, what is kept for the next update; None without error feedback."""


def send_update(
    codec: Codec,
    model: StateDict,
    received: StateDict,
    generator: torch.Generator,
    residual: Tensor | None = None,
) -> SentUpdate:
    """Returns a client's update as it is sent.

    Args:
        codec: of updates.
        model: after training.
        received: the model that it was sent.
        generator: see `Codec.encode`.
        residual: (weights,) float32, what was not sent before; None: no error feedback.
    """
    if codec.kind == "none":
        return SentUpdate(model, model, None)
    names = codec.names(received)
    update = {name: value - received[name] if name in names else value for name, value in model.items()}
    if residual is not None and names:
        total = flat(update, names) + to_device(residual, received[names[0]].device)
        update |= _apart(total, received, names)
    arrays = codec.encode(update, generator)
    decoded = codec.decode(arrays, received)
    kept = None
    if residual is not None and names:
        # A client whose training diverged is refused: what it did not send must not spoil all its later updates.
        sound = bool((total.abs() <= LARGEST_UPDATE).all())
        kept = total - flat(decoded, names) if sound else residual
    return SentUpdate(arrays, moved(received, decoded, names), kept)


def moved(start: StateDict, update: StateDict, names: Collection[str]) -> StateDict:
    """Returns a model whose arrays of these names are start + update, and whose others are those of `update`."""
    return {name: value + update[name] if name in names else update[name] for name, value in start.items()}


def residuals(memory: State) -> State:
    """Returns part -> residual from what a client keeps."""
    return {name.removeprefix(RESIDUAL): value for name, value in memory.items() if name.startswith(RESIDUAL)}


def without_residuals(memory: State) -> State:
    """Returns what a client keeps for its method."""
    return {name: value for name, value in memory.items() if not name.startswith(RESIDUAL)}


def flat(values: StateDict, names: Collection[str]) -> Tensor:
    """Returns the numbers of these arrays, one after the other: (n,) float32."""
    return torch.cat([values[name].reshape(-1).float() for name in names])


def largest(numbers: Tensor, count: int) -> Tensor:
    """Returns the (count,) int64 positions, in rising order, of the numbers with the largest absolute values; of equal
    ones the first. NaN counts as infinite.
    """
    size = numbers.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = size.topk(count, sorted=False).values.min()
    chosen = size > least
    ties = (size == least).nonzero().view(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.nonzero().view(-1)


def _index_type(numbers: int) -> torch.dtype:
    """Returns the smallest type that holds the positions of so many numbers."""
    sizes = {torch.uint8: 2**8, torch.uint16: 2**16, torch.uint32: 2**32}
    return next((dtype for dtype, most in sizes.items() if numbers <= most), torch.int64)


def _to_int8(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns codes, int8, and the () scale by which they are multiplied."""
    values = values.float()
    top = values.abs().amax() if values.numel() else values.new_zeros(())
    scale = top / LEVELS
    draws = to_device(torch.rand(values.shape, generator=generator), values.device)
    codes = (values / scale).add(draws).floor()
    # 0 / 0 is 0; another NaN has a scale that says so. And 127 + 0.99999994 is 128 as a float32.
    return codes.nan_to_num(nan=0.0).clamp(-LEVELS, LEVELS).to(torch.int8), scale


def _to_float16(values: Tensor) -> Tensor:
    """Rounds; finite numbers stay finite."""
    return torch.where(values.isfinite(), values.clamp(-_MOST_FLOAT16, _MOST_FLOAT16), values).to(torch.float16)


def _to_bfloat16(values: Tensor) -> Tensor:
    """Rounds; returns the 16 bits as int16."""
    return values.to(torch.bfloat16).view(torch.int16)


def _apart(numbers: Tensor, like: StateDict, names: Collection[str]) -> StateDict:
    """Returns the arrays of `flat`, in the shapes and types of `like`."""
    parts = numbers.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


def _without(values: StateDict, names: Collection[str]) -> StateDict:
    return {name: value for name, value in values.items() if name not in names}
