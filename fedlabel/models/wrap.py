"""Builds a method's network from the user's: unchanged, with heads, several copies, or a sum of parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fedlabel.models.additive import Additive
from fedlabel.models.bag_head import BagHead
from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.nets import Net
from fedlabel.models.twins import Twins
from fedlabel.seeding import derive_seed

Build = Callable[[int], nn.Module]
"""Place -> the user's network with weights drawn for that place; 0 is what a method of one network starts from."""


@dataclass(frozen=True)
class Network:
    """How a method's network is built from the user's."""

    wrap: Callable[[Build, int], nn.Module]
    """(build, the seed of the weights) -> the network."""
    count: int = 1
    """Number of the user's networks in one forward pass."""
    embeds: bool = False
    """Whether the user's network must provide embeddings, see `Net`."""
    classifies: bool = False
    """Whether it must also make logits of embeddings (`part="classify"`)."""
    input_gradients: bool = False
    """Whether gradients by its inputs are needed, which BatchNorm in training does not allow."""


def _one(build: Build, seed: int) -> nn.Module:
    return build(0)


def _twins(build: Build, seed: int, count: int) -> nn.Module:
    return Twins([build(place) for place in range(count)])


def _sum(build: Build, seed: int, scales: Mapping[str, float]) -> nn.Module:
    return Additive(build(0), scales)


def _headed(build: Build, seed: int, name: str, size: int) -> nn.Module:
    net = build(0)
    assert isinstance(net, Net), "who has heads of its own needs embeddings"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, name))  # and no GPU's
        return BagHead(net, size) if name == "bag_head" else LabelingHeads(net, size)


one_network = Network(_one)
one_network_with_embeddings = Network(_one, embeds=True)


def twins(count: int = 2) -> Network:
    """Returns several networks side by side, see `Twins`."""
    return Network(partial(_twins, count=count), count)


def sum_of_parts(scales: Mapping[str, float]) -> Network:
    """Returns a network whose weights are a sum of parts, see `Additive`; scales: part -> scale of its start."""
    return Network(partial(_sum, scales=scales))


def with_bag_head(hidden: int) -> Network:
    """Returns the network with a second output for means of embeddings, see `BagHead`; hidden: its hidden width."""
    return Network(partial(_headed, name="bag_head", size=hidden), embeds=True, classifies=True)


def with_labeling_heads(heads: int) -> Network:
    """Returns the network with heads that vote for a class or abstain, see `LabelingHeads`."""
    return Network(partial(_headed, name="labeling_heads", size=heads), embeds=True)
