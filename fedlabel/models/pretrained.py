"""Pretrained weights from a file, and parts of a network that are not trained."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlabel.errors import naming
from fedlabel.names import counted

NESTED = ("state_dict", "model", "model_state_dict", "weights")
"""Keys under which files hold a state dict beside other things."""
PREFIX = "module."
"""Of all names, where `nn.DataParallel` wrote the file."""


def load_weights(model: nn.Module, path: Path) -> str:
    """Puts the weights of a file into a network, those whose name and shape are the network's.

    Args:
        model: is changed.
        path: of a state dict, as `torch.save` writes it; nothing in it is executed.

    Returns:
        A sentence on what was loaded, what is missing or of another shape, and what the network has no place for.

    Raises:
        ValueError: there is no such file, it is no state dict, or nothing in it fits.
    """
    state, own = _read(path), model.state_dict()
    if all(name.startswith(PREFIX) for name in state) and not any(name in own for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    other = [name for name in state if name in own and name not in fits]
    missing, further = [name for name in own if name not in state], [name for name in state if name not in own]
    if not fits:
        raise ValueError(
            f"`model.weights` (={path}) has no weight that fits the network: it has {_some(list(state))}, and the "
            f"network {_some(list(own))}. Take the weights of this network (model.name)."
        )
    with torch.no_grad():
        for name, value in fits.items():
            own[name].copy_(value)
    parts = [
        f"{len(fits)} of {len(own)} arrays were loaded",
        *([f"not in the file, so drawn at random: {_some(missing)}"] if missing else []),
        *([f"of another shape, so drawn at random: {_some(other)}"] if other else []),
        *([f"not in the network, so left out: {_some(further)}"] if further else []),
    ]
    return f"{path}: {'; '.join(parts)}."


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"`model.weights` (={path}): there is no such file. Give one that torch.save wrote.")
    try:
        with naming(path), open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # torch's reader has many ways to fail, and its words are for those who wrote the file
        raise ValueError(
            f"`model.weights` (={path}) cannot be read ({type(error).__name__}): it must be a state dict, "
            "`torch.save(model.state_dict(), file)`, and no pickled module, which could run code."
        ) from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()) or not found:
        raise ValueError(
            f"`model.weights` (={path}) holds no state dict, name -> array: `torch.save(model.state_dict(), file)`."
        )
    return {str(name): value for name, value in found.items()}


def weights_hash(path: Path) -> str:
    """Returns a hash (SHA-256) of the file."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def train_only(model: nn.Module, pattern: str) -> None:
    """Freezes the parameters whose name does not match.

    Args:
        model: is changed.
        pattern: a regular expression that is searched for in the names of `model.named_parameters()`.

    Raises:
        ValueError: none matches.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"`model.trainable` (={pattern}) matches none of the network's {counted(len(names), 'parameter')}, "
            f"{_some(names[::-1])}: nothing would be trained."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)


def hold_statistics(model: nn.Module) -> None:
    """Has layers with running statistics, such as BatchNorm, use and keep these in training, too, if all of their own
    parameters are frozen and there are such.
    """
    for layer in model.modules():
        own = list(layer.parameters(recurse=False))
        if getattr(layer, "running_mean", None) is not None and own and not any(each.requires_grad for each in own):
            kind = type(layer)
            layer.__class__ = type(f"Frozen{kind.__name__}", (kind,), {"train": _stay, "__module__": __name__})
            layer.eval()


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Returns the names of a model's state that training leaves as they are."""
    held = {
        f"{key}.{name}".lstrip(".")
        for key, layer in model.named_modules()
        if type(layer).__module__ == __name__
        for name, _ in layer.named_buffers(recurse=False)
    }
    return frozenset(held | {name for name, value in model.named_parameters() if not value.requires_grad})


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` of a layer that stays in eval mode."""
    return nn.Module.train(layer, False)
