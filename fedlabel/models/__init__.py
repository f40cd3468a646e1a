"""Models by name: `build_model` returns a module that maps images to logits, initialised from a seed alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fedlabel.checks import one_of, within
from fedlabel.importing import form_hint
from fedlabel.models.nets import Cnn, GreyToRgb, InputShape, Mlp, Net, Part
from fedlabel.models.own import (
    TIMM,
    TORCHVISION,
    Embedded,
    build_foreign,
    check_name,
    is_foreign,
    is_module,
    pass_model,
    passed,
    receive,
)
from fedlabel.models.pretrained import hold_statistics, load_weights, train_only
from fedlabel.models.resnet import Bottleneck, ResNet, ResNet9, WideResNet
from fedlabel.names import did_you_mean

NORMS = ("group", "batch", "none")

MAX_WIDTH, MAX_HIDDEN, MAX_LAYERS = 2**16, 2**20, 100
"""Of `model.width`, of hidden layers, and of their number: a network of these can be counted; see `check_size`."""

COPIES = 8
"""Of a network's weights that a run in one process holds at least, in single precision: student, teacher, initial and
global model, gradient, and a reply, and their sum in double precision (2)."""

AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
"""Networks of torchvision that return more than logits in training, so they are not offered."""


@dataclass(frozen=True)
class ModelConfig:
    """The network and its size."""

    name: str = "cnn"
    """A network that `fedlabel list` names; torchvision:NAME, a classifier of `torchvision.models` (untrained);
    timm:NAME, one of timm, if that is installed (untrained); or package.module:function, a function or class of your
    own that returns a torch module: it is called with num_classes and input_shape, as far as it has such parameters. A
    module or function passed to `fedlabel.run(model=...)` gets a name with its fingerprint, python:NAME#HASH."""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further keyword arguments of a function of your own, or of timm, e.g. {dropout: 0.1}."""
    embedding: str | None = None
    """The layer (as `named_modules` has it) whose output is an input's embedding, which some methods and the projector
    need; null: our own networks have one, others none."""
    weights: str | None = None
    """A file with pretrained weights (a state dict that torch.save wrote): those whose name and shape fit are loaded
    before the first round, the others are drawn at random, and a note says which. Real nodes get them from the server.
    null: all are drawn."""
    trainable: str | None = None
    """A regular expression: only parameters in whose name it is found are trained, e.g. "^(fc|layer4)"; the others stay
    as they are, and BatchNorm in them keeps its statistics. null: all, but for those that a module of your own has
    frozen itself."""
    norm: str = "group"
    """group | batch | none. Networks that are not ours keep their own (mostly batch); mlp has none."""
    width: int = 1
    """Multiplies the channels of the convolutions (WRN: on top of its 2); mlp and networks that are not ours ignore
    it."""
    hidden: int = 128
    """Width of the hidden linear layer of cnn and mlp; the others have none."""
    hidden_layers: tuple[int, ...] = ()
    """Widths of mlp's hidden layers, the first next to the input, e.g. [256, 128, 64]; empty: one, of `hidden`. Only
    for mlp."""

    def __post_init__(self) -> None:
        # YAML gives a list; configurations must be hashable.
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))
        if is_foreign(self.name):
            check_name(self.name)
        else:
            self._check_known()
        self._check_own()
        one_of(self, "model", norm=NORMS)
        within(self, "model", 1, MAX_WIDTH, "width")
        within(self, "model", 1, MAX_HIDDEN, "hidden")
        layers = list(self.hidden_layers)
        if not all(1 <= width <= MAX_HIDDEN for width in layers) or len(layers) > MAX_LAYERS:
            raise ValueError(
                f"`model.hidden_layers` (={layers}) must be at most {MAX_LAYERS} widths in [1, {MAX_HIDDEN}], e.g. "
                "[256, 128, 64]."
            )
        if layers and self.name != "mlp":
            raise ValueError(
                f"`model.hidden_layers` (={layers}) is for model.name=mlp, not {self.name}; take model.name=mlp, or "
                "leave it empty."
            )

    def _check_known(self) -> None:
        if self.name.startswith(TORCHVISION):
            import torchvision  # here: it takes as long to import as torch

            nets = torchvision.models.list_models(module=torchvision.models)
            allowed = [TORCHVISION + net for net in nets if net not in AUXILIARY_OUTPUTS]
            expected = f"{TORCHVISION}<name> of a classifier in torchvision.models whose only output is logits"
        else:
            allowed = list(MODELS)
            expected = f"one of {', '.join(MODELS)}, {TORCHVISION}<name>, {TIMM}<name> or package.module:function"
        if self.name not in allowed:
            hint = form_hint(self.name, ast.ClassDef, ast.FunctionDef) or did_you_mean(self.name, allowed, 3)
            raise ValueError(f"`model.name` (={self.name}) must be {expected}.{hint}")

    def _check_own(self) -> None:
        if self.args and not is_foreign(self.name):
            raise ValueError(
                f"`model.args` (={dict(self.args)}) are for a function of your own or timm, not for {self.name}: leave "
                "them out."
            )
        if self.embedding is not None and self.name in MODELS:
            raise ValueError(
                f"`model.embedding` (={self.embedding}) is for networks that are not ours; {self.name} has embeddings: "
                "leave it out."
            )
        if self.trainable is not None:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise ValueError(
                    f"`model.trainable` (={self.trainable}) must be a regular expression, e.g. ^fc: {error}."
                ) from error


@dataclass(frozen=True)
class ModelEntry:
    """One row of `MODELS`."""

    description: str
    """One-line description."""
    min_side: int
    """Smallest height and width of an image."""
    builder: Callable[[ModelConfig, InputShape, int], nn.Module]
    """(configuration, input shape, classes) -> module."""


def _build_cnn(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    return Cnn(input_shape, num_classes, config.norm, config.width, config.hidden)


def _build_mlp(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    return Mlp(input_shape, num_classes, config.hidden_layers or (config.hidden,))


def _build_resnet8(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    widths = [config.width * channels for channels in (16, 32, 64)]
    return ResNet(input_shape[0], num_classes, config.norm, widths, (1, 1, 1))


def _build_resnet9(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    return ResNet9(input_shape[0], num_classes, config.norm, 64 * config.width)


def _build_resnet18(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    widths = [config.width * channels for channels in (64, 128, 256, 512)]
    return ResNet(input_shape[0], num_classes, config.norm, widths, (2, 2, 2, 2))


def _build_resnet34(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    widths = [config.width * channels for channels in (64, 128, 256, 512)]
    return ResNet(input_shape[0], num_classes, config.norm, widths, (3, 4, 6, 3))


def _build_resnet50(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    widths = [config.width * channels for channels in (256, 512, 1024, 2048)]
    return ResNet(input_shape[0], num_classes, config.norm, widths, (3, 4, 6, 3), Bottleneck)


def _build_wrn28_2(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    return WideResNet(input_shape[0], num_classes, config.norm, depth=28, widen=2 * config.width)


def _build_torchvision(config: ModelConfig, input_shape: InputShape, num_classes: int) -> nn.Module:
    if input_shape[0] not in (1, 3):
        raise _shape_error(config.name, input_shape, "1 or 3 channels")
    import torchvision

    net = config.name.removeprefix(TORCHVISION)
    built: nn.Module = torchvision.models.get_model(net, weights=None, num_classes=num_classes)
    model = GreyToRgb(built) if input_shape[0] == 1 else built
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, AssertionError) as error:  # torchvision's own complaints; ViT asserts its 224x224
        raise _shape_error(config.name, input_shape, f"another image size ({error})") from error
    return model.train()


MODELS: dict[str, ModelEntry] = {
    "cnn": ModelEntry("two convolutions, two linear layers; fast on a CPU", 4, _build_cnn),
    "mlp": ModelEntry("linear layers: one hidden layer, or model.hidden_layers; for tables, too", 1, _build_mlp),
    "resnet8": ModelEntry("ResNet-8, widths 16-32-64", 4, _build_resnet8),
    "resnet9": ModelEntry("DAWNBench ResNet-9", 8, _build_resnet9),
    "resnet18": ModelEntry("ResNet-18 in the form for CIFAR, widths 64-128-256-512", 8, _build_resnet18),
    "resnet34": ModelEntry("ResNet-34 in the form for CIFAR, widths 64-128-256-512", 8, _build_resnet34),
    "resnet50": ModelEntry("ResNet-50 in the form for CIFAR, bottlenecks of 256 to 2048", 8, _build_resnet50),
    "wrn28_2": ModelEntry("Wide ResNet 28-2, pre-activation", 4, _build_wrn28_2),
}

TORCHVISION_ENTRY = ModelEntry("any classifier of torchvision", 1, _build_torchvision)
FOREIGN = {
    f"{TIMM}NAME": "untrained, by timm's NAME, if that is installed; its arguments in model.args",
    "package.module:function": "your own: a function of num_classes and input_shape that returns a torch module",
}
"""Descriptions of the networks that are neither ours nor torchvision's."""


def build_model(
    config: ModelConfig,
    input_shape: InputShape,
    num_classes: int,
    seed: int,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Returns a model on the CPU, in training mode; parameters that are not to be trained need no gradient.

    The weights depend on the arguments only; torch's global random state is neither used nor changed. Our own models
    draw nothing at random later either; those of torchvision that have dropout do, from torch's global state.

    Args:
        config: which model.
        input_shape: (channels, height, width) of one image.
        num_classes: length of the logits.
        seed: any integer torch accepts as a seed.
        say: gets notes: on what was loaded from `model.weights`, and on outputs that are no logits.

    Returns:
        A module that maps images (batch, channels, height, width) to logits (batch, num_classes). Our own are a `Net`,
        which also gives embeddings; they accept an empty batch, and with `norm="group"` have no buffers and treat every
        sample by itself. Those of others are a `Net` with `model.embedding`.

    Raises:
        ValueError: the model does not accept images of this shape, or a user's own one is not as needed.
    """
    entry = TORCHVISION_ENTRY if config.name.startswith(TORCHVISION) else MODELS.get(config.name)
    if entry is not None and min(input_shape[1:]) < entry.min_side:
        raise _shape_error(config.name, input_shape, f"at least {entry.min_side}x{entry.min_side} pixels")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the generators of all GPUs.
        torch.default_generator.manual_seed(seed)
        if entry is None:
            model = build_foreign(config.name, config.args, input_shape, num_classes, say)
        else:
            model = entry.builder(config, input_shape, num_classes)
    if config.weights is not None and next(model.parameters()).device.type != "meta":
        note = load_weights(model, Path(config.weights))
        if say is not None:
            say(note)
    if config.trainable is not None:
        train_only(model, config.trainable)
    hold_statistics(model)
    return model if config.embedding is None else Embedded(model, config.embedding, input_shape, config.name)


class RunningStatistics(NamedTuple):
    """Names of the running statistics in a model's state: of BatchNorm, or InstanceNorm that tracks statistics."""

    means: frozenset[str] = frozenset()
    variances: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    """Names of the counters of batches seen in training."""


def running_statistics(model: nn.Module) -> RunningStatistics:
    """Returns the running statistics of a model."""
    layers = [name for name, layer in model.named_modules() if getattr(layer, "running_mean", None) is not None]
    state = model.state_dict().keys()

    def named(kind: str) -> frozenset[str]:
        return frozenset(f"{layer}.{kind}".lstrip(".") for layer in layers) & state

    return RunningStatistics(named("running_mean"), named("running_var"), named("num_batches_tracked"))


NO_STATISTICS = RunningStatistics()
"""Of a network without such layers."""


def check_size(build: Callable[[], nn.Module], config: ModelConfig, memory: int) -> None:
    """Counts a network's parameters before allocating them.

    Args:
        build: makes the network.
        config: says how large, for the message.
        memory: of the machine, in bytes.

    Raises:
        ValueError: `COPIES` of the weights do not fit into `memory`.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    needed = COPIES * 4 * count
    if needed > memory:
        raise ValueError(
            f"`model.name` (={config.name}), `model.width` (={config.width}), `model.hidden` (={config.hidden}) and "
            f"`model.hidden_layers` (={list(config.hidden_layers)}) make, with what the method adds, a network of "
            f"{count:,} parameters. A run needs {COPIES} times their size or more, {needed / 2**30:,.1f} GiB, and this "
            f"machine has {memory / 2**30:,.1f}: take a smaller one."
        )


def _shape_error(name: str, input_shape: InputShape, needs: str) -> ValueError:
    if input_shape[1:] == (1, 1):
        return ValueError(
            f"`model.name` (={name}) is for images, and the data set has rows of a table ({input_shape[0]} features "
            "each): take model.name=mlp."
        )
    shape = "x".join(map(str, input_shape))
    return ValueError(
        f"`model.name` (={name}) does not accept images of shape {shape} (channels x height x width): "
        f"it needs {needs}. Choose another model or data set."
    )


__all__ = [
    "MODELS",
    "Embedded",
    "InputShape",
    "ModelConfig",
    "ModelEntry",
    "Net",
    "Part",
    "build_model",
    "check_size",
    "is_foreign",
    "is_module",
    "pass_model",
    "passed",
    "receive",
]
