"""Small networks for simulating many clients on a CPU, and the normalisation layer that all our networks share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

InputShape = tuple[int, int, int]
"""(channels, height, width) of one image; a row of a table is (features, 1, 1)."""

Part = Literal["all", "embed", "classify"]
"""What of a `Net` is run: from images to logits, from images to embeddings, or from embeddings to logits."""

MAX_GROUPS = 8
"""GroupNorm splits channels into the largest number of equal groups that does not exceed this."""

HEAD_SIDE = 4
"""`Cnn` averages feature maps down to at most this many pixels a side."""


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Returns the layer that normalises `channels` feature maps.

    Args:
        norm: "group" (Wu & He, 2018, https://arxiv.org/abs/1803.08494; see `MAX_GROUPS`), "batch" (Ioffe & Szegedy,
            2015, https://arxiv.org/abs/1502.03167) or "none".
        channels: number of feature maps.
    """
    if norm == "group":
        groups = max(count for count in range(1, MAX_GROUPS + 1) if channels % count == 0)
        return nn.GroupNorm(groups, channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    assert norm == "none", norm
    return nn.Identity()


class Net(nn.Module):
    """A network that ends in the linear layer `output`, whose input is the image's embedding.

    Both halves can be run alone through `forward`, because `torch.func.functional_call`, which runs a network with
    weights that are handed in, reaches nothing else: `functional_call(net, state, (images, "embed"))`.
    """

    output: nn.Linear

    @property
    def embedding_size(self) -> int:
        """The number of features of an embedding."""
        return self.output.in_features

    @property
    def num_classes(self) -> int:
        """The length of the logits."""
        return self.output.out_features

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        raise NotImplementedError

    def classify(self, embeddings: Tensor) -> Tensor:
        """Returns logits (batch, classes) of embeddings (batch, features)."""
        logits: Tensor = self.output(embeddings)
        return logits

    def forward(self, inputs: Tensor, part: Part = "all") -> Tensor:
        """Returns logits (batch, classes) of images (batch, channels, height, width), or the output that `part`
        selects.
        """
        if part == "classify":
            return self.classify(inputs)
        embeddings = self.embed(inputs)
        return embeddings if part == "embed" else self.classify(embeddings)


class Mlp(Net):
    """Linear layers with ReLU between them; with one hidden layer the smallest net that is not linear.

    Parameters for 1x28x28, 10 classes and one hidden layer of 128: 784 * 128 + 128 + 128 * 10 + 10 = 101,770.

    Args:
        input_shape: (channels, height, width).
        num_classes: length of the logits.
        widths: of the hidden layers, at least one.
    """

    def __init__(self, input_shape: InputShape, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.hidden = nn.Linear(channels * height * width, widths[0])
        self.deeper = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.output = nn.Linear(widths[-1], num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        features = F.relu(self.hidden(images.flatten(1)))
        for layer in self.deeper:
            features = F.relu(layer(features))
        return features


class Cnn(Net):
    """Two convolutions and two linear layers, in the manner of LeNet-5 (LeCun et al., 1998).

    Chosen for the time of a training step on one CPU core: the first convolution has stride 2 in place of a max-pool,
    which was the most expensive layer of all; the second pools first and then normalises a quarter of the pixels.

    Parameters for 1x28x28 and 10 classes: convolutions 25 * 16 + 9 * 16 * 32 = 5,008, GroupNorm 2 * (16 + 32) = 96,
    linear 512 * 128 + 128 + 128 * 10 + 10 = 66,954; 72,058 in all.

    Args:
        input_shape: (channels, height, width); at least 4x4 pixels.
        num_classes: length of the logits.
        norm: see `norm_layer`.
        width: multiplies the 16 and 32 channels of the convolutions.
        hidden: width of the hidden linear layer.
    """

    def __init__(self, input_shape: InputShape, num_classes: int, norm: str, width: int, hidden: int) -> None:
        super().__init__()
        channels, *sides = input_shape
        sides = [(side + 1) // 2 // 2 for side in sides]  # after the stride and the max-pool
        # A fixed window, not adaptive pooling: the backward pass of the latter is not deterministic on a GPU.
        self.window = (-(-sides[0] // HEAD_SIDE), -(-sides[1] // HEAD_SIDE))
        pixels = -(-sides[0] // self.window[0]) * -(-sides[1] // self.window[1])
        bias = norm == "none"
        self.conv1 = nn.Conv2d(channels, 16 * width, 5, stride=2, padding=2, bias=bias)
        self.norm1 = norm_layer(norm, 16 * width)
        self.conv2 = nn.Conv2d(16 * width, 32 * width, 3, padding=1, bias=bias)
        self.norm2 = norm_layer(norm, 32 * width)
        self.hidden = nn.Linear(32 * width * pixels, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        features = F.relu(self.norm1(self.conv1(images)))
        # Channels last in memory: max-pooling is several times faster so. `contiguous` itself cannot do it under vmap.
        features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        features = F.relu(self.norm2(F.max_pool2d(self.conv2(features), 2)))
        features = F.avg_pool2d(features, self.window, ceil_mode=True)
        return F.relu(self.hidden(features.flatten(1)))


class GreyToRgb(nn.Module):
    """Feeds grey images to a network that expects three channels, as three equal channels.

    Args:
        net: takes images (batch, 3, height, width).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes) of images (batch, 1, height, width)."""
        logits: Tensor = self.net(images.expand(-1, 3, -1, -1))
        return logits
