"""Networks that are not ours: a function of the user's own, a module passed from Python, torchvision's and timm's.

A factory is called with the keywords `num_classes` and `input_shape` as far as it has parameters of these names, and
with `model.args`; it returns a module that maps normalised inputs (batch, channels, height, width) to logits.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fedlabel.importing import describe_error, form_hint, import_attribute, names_file
from fedlabel.models.nets import InputShape, Net, Part
from fedlabel.names import did_you_mean

TORCHVISION, TIMM, PYTHON = "torchvision:", "timm:", "python:"
"""Prefixes of `model.name`: of torchvision's and timm's networks, and of what was passed from Python."""

Factory = Callable[..., nn.Module]

_PASSED: dict[str, nn.Module | Factory] = {}
"""`model.name` -> what was passed from Python in this process."""


def is_foreign(name: str) -> bool:
    """Returns whether a `model.name` is code that is neither ours nor torchvision's."""
    return ":" in name and not name.startswith(TORCHVISION)


def pass_model(model: nn.Module | Factory) -> str:
    """Keeps a module or a factory for this process and returns its `model.name`, which has a fingerprint of it: a run
    is resumed only with the same one. Of a factory the fingerprint has its code, defaults, and what it closes over, but
    not the global variables that it reads.

    Raises:
        ValueError: it is neither, or a module whose state is not tensors of known shapes.
    """
    if not isinstance(model, nn.Module) and not callable(model):
        raise ValueError(
            f"`model` (={type(model).__name__}) must be a torch.nn.Module, or a function that returns one from "
            "num_classes and input_shape."
        )
    own = type(model) if isinstance(model, nn.Module) else model
    label = getattr(own, "__qualname__", type(own).__name__).rpartition(".")[2].strip("<>")
    if isinstance(model, nn.Module):
        _check_state(model, label)
    name = f"{PYTHON}{label}#{_fingerprint(model)}"
    _PASSED[name] = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    return name


def is_module(name: str) -> bool:
    """Returns whether a `model.name` is a module that was passed from Python, whose weights are given."""
    return isinstance(_PASSED.get(name), nn.Module)


def passed(name: str) -> dict[str, nn.Module | Factory]:
    """Returns what a worker process needs to know of a `model.name`, for `receive` there."""
    return {name: _PASSED[name]} if name in _PASSED else {}


def receive(models: Mapping[str, nn.Module | Factory]) -> None:
    """Keeps what another process passes on, see `passed`."""
    _PASSED.update(models)


def _fingerprint(model: nn.Module | Factory) -> str:
    """Returns 8 hex digits of a module's structure and weights, or of a factory's code and of the values in it."""
    return hashlib.sha256("\n".join(_described(model, {})).encode()).hexdigest()[:8]


def _described(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yields texts that are equal for equal values in any process: no address of memory is in them.

    Args:
        value: what a network or a function consists of; of an object that is none of these, its class and attributes.
        seen: `id` -> each object that was described already, which also keeps the object alive.
    """
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        yield repr(value)
        return
    if not isinstance(value, (tuple, frozenset)):  # of which Python may make one or several
        if id(value) in seen:
            return
        seen[id(value)] = value
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad} {hashlib.sha256(array.tobytes()).hexdigest()}"
    elif isinstance(value, (np.ndarray, np.generic)):
        yield f"{value.dtype} {value.shape}"
        yield from _described(value.tolist() if value.dtype.hasobject else value.tobytes(), seen)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (*_described(key, seen), *_described(each, seen))
    elif isinstance(value, (list, tuple, set, frozenset)):
        made = ["\n".join(_described(each, seen)) for each in value]
        yield from sorted(made) if isinstance(value, (set, frozenset)) else made
    elif isinstance(value, functools.partial):
        yield from _described([value.func, value.args, value.keywords], seen)
    elif isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield from _described([value.co_consts, value.co_names], seen)
    elif isinstance(value, types.MethodType):
        yield from _described([value.__func__, value.__self__], seen)
    elif isinstance(value, types.FunctionType):
        yield from _source(value) or _described(value.__code__, seen)
        cells = [_content(cell) for cell in value.__closure__ or ()]
        yield from _described([value.__defaults__, value.__kwdefaults__, cells], seen)
    elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        yield getattr(value, "__qualname__", value.__name__)
        if isinstance(value, type):
            yield from _source(value)
    else:
        yield from _source(kind)
        parts = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            parts = {key: part for key, part in parts.items() if key in _PARTS or (key[0] != "_" and key != "training")}
        yield from _described(parts, seen)


_PARTS = ("_parameters", "_buffers", "_modules")
"""Attributes of a torch module that make it what it is; others with an underscore are torch's own."""


def _source(value: Any) -> list[str]:
    """Returns the source text of a function or class; [] of one that was typed into a prompt, or is torch's."""
    if value.__module__ is None or value.__module__.partition(".")[0] in ("torch", "builtins"):
        return []
    try:
        return [inspect.getsource(value)]
    except (OSError, TypeError):
        return []


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value as yet
        return None


def _check_state(model: nn.Module, name: str) -> None:
    """Raises a ValueError unless a network's state is tensors, which is what clients and server exchange."""
    lazy = [key for key, value in model.named_parameters() if isinstance(value, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"`model` (={name}) has a lazy layer without a shape as yet ({lazy[0]}): call it once on an input before "
            "passing it, or pass a function that makes it."
        )
    odd = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(
            f"`model` (={name}): {odd[0]} of its state dict is no tensor (get_extra_state), and clients and server "
            "exchange tensors only: keep it in a buffer, or outside of the state."
        )


def check_name(name: str) -> None:
    """Raises a ValueError unless a foreign `model.name` has a possible form; imports nothing."""
    prefix, _, rest = name.partition(":")
    if name.startswith((TIMM, PYTHON)):
        if not rest:
            raise ValueError(f"`model.name` (={name}) must have a name behind {prefix}:, e.g. {TIMM}resnet18.")
    elif not all(part.isidentifier() for part in (*prefix.split("."), rest)) or names_file(name):
        raise ValueError(
            f"`model.name` (={name}) must have the form package.module:function, with the names that Python imports."
            f"{form_hint(name, ast.ClassDef, ast.FunctionDef)}"
        )


def build_foreign(
    name: str,
    args: Mapping[str, Any],
    input_shape: InputShape,
    num_classes: int,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Returns a user's network, checked on one input of zeros.

    Args:
        name: `model.name`.
        args: further keywords of the factory.
        input_shape: of one sample.
        num_classes: length of the logits.
        say: gets a note where the outputs look like probabilities.

    Raises:
        ValueError: it cannot be imported or built, or what it returns are no logits.
    """
    if name.startswith(TIMM):
        model = _timm(name, args, input_shape, num_classes)
    else:
        model = _call(name, _find(name), args, input_shape, num_classes)
    found = probe(model, name, input_shape)
    if found.shape != (1, num_classes):
        raise ValueError(
            f"`model.name` (={name}) gives outputs of shape {tuple(found.shape)} for one input; they must be logits, "
            f"(batch, {num_classes}): a number for each of {num_classes} classes."
        )
    _check_state(model, name)
    if say is not None and bool((found >= 0).all()) and abs(float(found.sum()) - 1) < 1e-3:
        say(
            f"The outputs of `model.name` (={name}) look like probabilities: for one input they are not negative and "
            "sum to 1. Logits are expected, of which losses take the softmax themselves: leave it out of the network."
        )
    return model.train()


def _find(name: str) -> nn.Module | Factory:
    if not name.startswith(PYTHON):
        made: Factory = import_attribute("model.name", name)
        return made
    if name not in _PASSED:
        raise ValueError(
            f"`model.name` (={name}) was passed from Python, and this process has not got it: give the same one again, "
            "fedlabel.run(..., model=...) or fedlabel.load_run(..., model=...). One that any process finds is named by "
            "its place, model.name=package.module:function."
        )
    return _PASSED[name]


def _call(
    name: str, factory: nn.Module | Factory, args: Mapping[str, Any], input_shape: InputShape, num_classes: int
) -> nn.Module:
    if isinstance(factory, nn.Module):
        if args:
            raise ValueError(f"`model.args` (={dict(args)}) are for a function that makes a module, not for a module.")
        return copy.deepcopy(factory)
    if not callable(factory):
        raise ValueError(f"`model.name` (={name}) is no function or class, but {type(factory).__name__}.")
    offered = {"num_classes": num_classes, "input_shape": input_shape}
    try:
        parameters = inspect.signature(factory).parameters.values()
        any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        known = {each.name for each in parameters if each.kind not in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL)}
        given = {key: value for key, value in offered.items() if any_name or key in known}
        model = factory(**{**given, **args})
    except Exception as error:  # whatever a function of the user's own does
        raise ValueError(
            f"`model.name` (={name}) cannot be built: {describe_error(error)}. It is called with num_classes="
            f"{num_classes} and input_shape={input_shape}, as far as it has such parameters, and model.args."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model.name` (={name}) returns {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def _timm(name: str, args: Mapping[str, Any], input_shape: InputShape, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"`model.name` (={name}) needs the package timm, which is not installed: pip install timm."
        ) from error
    net = name.removeprefix(TIMM)
    known = timm.list_models()
    if net not in known:  # others may be names of files or addresses
        raise ValueError(
            f"`model.name` (={name}) must be one of timm's {len(known)} networks.{did_you_mean(net, known)}"
        )
    try:
        built = timm.create_model(net, pretrained=False, num_classes=num_classes, in_chans=input_shape[0], **args)
    except Exception as error:
        raise ValueError(f"`model.name` (={name}) cannot be built: {describe_error(error)}; see model.args.") from error
    assert isinstance(built, nn.Module)
    return built


def probe(model: nn.Module, name: str, input_shape: InputShape) -> Tensor:
    """Returns a network's output for one input of zeros, in eval mode.

    Raises:
        ValueError: it fails, or gives something else than a tensor.
    """
    training = model.training
    try:
        with torch.no_grad():
            found = model.eval()(torch.zeros(1, *input_shape))
    except Exception as error:  # whatever a network of the user's own does
        raise ValueError(
            f"`model.name` (={name}) fails on an input of shape {(1, *input_shape)} (batch, channels, height, width; "
            f"float32): {describe_error(error)}. Rows of a table are (features, 1, 1)."
        ) from error
    finally:
        model.train(training)
    if not isinstance(found, Tensor):
        raise ValueError(f"`model.name` (={name}) gives {type(found).__name__}; it must give one tensor of logits.")
    return found


class Embedded(Net):
    """A network whose embeddings are the output of one of its layers, each sample's as a vector.

    Args:
        net: maps inputs to logits.
        layer: the name of the layer, as `net.named_modules()` has it.
        input_shape: of one sample.
        name: `model.name`, for messages.

    Raises:
        ValueError: there is no such layer, or it is not run once and gives a tensor with a row per sample.
    """

    def __init__(self, net: nn.Module, layer: str, input_shape: InputShape, name: str) -> None:
        super().__init__()
        self.net, self.layer, self.head = net, layer, ""
        """`head`: the linear layer that makes logits of embeddings, if there is one."""
        modules = dict(net.named_modules())
        if not layer or layer not in modules:
            names = [each for each in modules if each]
            raise ValueError(
                f"`model.embedding` (={layer}) is no layer of `model.name` (={name}); the last ones are "
                f"{', '.join(names[-8:])}.{did_you_mean(layer, names)}"
            )
        device = next((value.device for value in net.parameters()), torch.device("cpu"))
        training = net.training
        inputs = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            with torch.no_grad():
                net.eval()
                logits, outputs = self._run(inputs)
        finally:
            net.train(training)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].dim() < 2 or len(outputs[0]) != 2:
            raise ValueError(
                f"`model.embedding` (={layer}): this layer of `model.name` (={name}) runs {len(outputs)} times for a "
                "batch; it must run once, and give one tensor (batch, ...): name another layer."
            )
        embeddings = outputs[0].flatten(1)
        self._sizes = (embeddings.shape[1], logits.shape[1])
        for key, module in modules.items():
            if isinstance(module, nn.Linear) and (module.in_features, module.out_features) == self._sizes:
                with torch.no_grad():
                    if device.type != "meta" and torch.allclose(module(embeddings), logits, atol=1e-6):
                        self.head = key

    @property
    def embedding_size(self) -> int:
        """See `Net`."""
        return self._sizes[0]

    @property
    def num_classes(self) -> int:
        """See `Net`."""
        return self._sizes[1]

    def forward(self, inputs: Tensor, part: Part = "all") -> Tensor:
        """See `Net`."""
        if part == "classify":
            made: Tensor = self.net.get_submodule(self.head)(inputs)
            return made
        if part == "all":
            logits: Tensor = self.net(inputs)
            return logits
        return self._run(inputs)[1][0].flatten(1)

    def _run(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits, and what the layer gave."""
        outputs: list[Tensor] = []
        hook = self.net.get_submodule(self.layer).register_forward_hook(
            lambda _, inputs, output: outputs.append(output)
        )
        try:
            logits: Tensor = self.net(inputs)
        finally:
            hook.remove()
        return logits, outputs
