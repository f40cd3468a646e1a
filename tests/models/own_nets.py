"""Networks of a user's own, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Module):
    """A convolution and two linear layers, which know nothing of fedlabel."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], hidden: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(4 * input_shape[1] * input_shape[2], hidden), nn.ReLU())
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(F.relu(self.norm(self.conv(images)))))
        return logits


def linear(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes))


def named_otherwise(**about: object) -> nn.Module:
    assert set(about) == {"num_classes", "input_shape"}
    return linear(10, (1, 8, 8))


def without_arguments() -> nn.Module:
    return linear(10, (1, 8, 8))


class Dropping(nn.Module):
    """Cannot be stacked: a Python branch on a value, and random numbers."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = linear(num_classes, input_shape)

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 1e9:
            images = images * 0
        logits: Tensor = F.dropout(self.net(images), 0.1, self.training)
        return logits


class Words(nn.Module):
    """Mean of token embeddings, then a linear layer; tokens come as numbers in the channels."""

    def __init__(self, num_classes: int, vocabulary: int = 20, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.words(tokens.flatten(1).long()).mean(1))
        return logits


def fails(num_classes: int) -> nn.Module:
    raise KeyError("no such thing")


def no_module() -> str:
    return "text"


def wrong_size(input_shape: tuple[int, int, int]) -> nn.Module:
    return linear(3, input_shape)


def tuples() -> nn.Module:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    return Pair()


def wants_more(depth: int) -> nn.Module:
    return linear(10, (1, 8, 8))


def twice() -> nn.Module:
    layer = nn.Linear(10, 10)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), layer, layer)


def probabilities() -> nn.Module:
    return nn.Sequential(linear(10, (1, 8, 8)), nn.Softmax(-1))


NOT_CALLABLE = torch.zeros(1)
