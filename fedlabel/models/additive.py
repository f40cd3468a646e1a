"""A model whose weights are a sum of parts, each with its own parameters (FedMatch's decomposition)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlabel.models.nets import Part


class Additive(nn.Module):
    """Uses the sum of its parts' weights; buffers (BatchNorm's statistics) are those of the first part.

    Args:
        model: gives the architecture and the initial weights w.
        scales: part name -> s, where the part starts at s * w. At least one.
    """

    def __init__(self, model: nn.Module, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.parts = tuple(scales)
        for name, scale in scales.items():
            part = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.mul_(scale)
            self.add_module(name, part)

    def forward(self, inputs: Tensor, part: Part = "all") -> Tensor:
        """Returns logits (batch, classes) of images (batch, channels, height, width); `part` as in `Net`."""
        first, *others = (self.get_submodule(name) for name in self.parts)
        terms = [dict(part.named_parameters()) for part in others]
        total = {name: sum((term[name] for term in terms), weight) for name, weight in first.named_parameters()}
        arguments = (inputs,) if part == "all" else (inputs, part)  # torchvision's networks know no parts
        outputs: Tensor = torch.func.functional_call(first, total, arguments)  # type: ignore[arg-type]
        return outputs
