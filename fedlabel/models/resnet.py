"""Residual networks for images of about 32x32 pixels: stride-1 3x3 stem, no max-pool after it, global pooling.

ResNet (He et al., 2016, https://arxiv.org/abs/1512.03385), ResNet-9 (Coleman et al., 2017, DAWNBench; David Page,
"How to train your ResNet", 2018) and Wide ResNet (Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146).

What differs from the papers, and why: GroupNorm is the default (`docs/decisions/0002-normalization.md`); global average
pooling, so that 28x28 images fit; all shortcuts that change shape are 1x1 convolutions, also in ResNet-8.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fedlabel.models.nets import Net, norm_layer


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: str) -> nn.Conv2d:
    """Returns a convolution that keeps the image size at stride 1; biased only where no normalisation follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=norm == "none")


def _init_convolutions(module: nn.Module) -> None:
    """Draws the weights of all convolutions as He et al. (2015, https://arxiv.org/abs/1502.01852), fan-out mode."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; normalisation and ReLU after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, norm)
        self.norm1 = norm_layer(norm, outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1, norm)
        self.norm2 = norm_layer(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride, norm), norm_layer(norm, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Maps (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        residual = F.relu(self.norm1(self.conv1(features)))
        return F.relu(self.norm2(self.conv2(residual)) + self.shortcut(features))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, 1x1 back, around a shortcut; normalisation after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = _conv(inputs, inner, 1, 1, norm)
        self.norm1 = norm_layer(norm, inner)
        self.conv2 = _conv(inner, inner, 3, stride, norm)
        self.norm2 = norm_layer(norm, inner)
        self.conv3 = _conv(inner, outputs, 1, 1, norm)
        self.norm3 = norm_layer(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride, norm), norm_layer(norm, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Maps (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        residual = F.relu(self.norm1(self.conv1(features)))
        residual = F.relu(self.norm2(self.conv2(residual)))
        return F.relu(self.norm3(self.conv3(residual)) + self.shortcut(features))


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; the first pair also before a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride, norm)
        self.norm2 = norm_layer(norm, outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1, norm)
        self.shortcut = _conv(inputs, outputs, 1, stride, norm) if stride != 1 or inputs != outputs else None

    def forward(self, features: Tensor) -> Tensor:
        """Maps (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        active = F.relu(self.norm1(features))
        skip = features if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(active))))


class ResNet(Net):
    """Stem, stages of residual blocks, global average pooling, one linear layer.

    Every stage but the first halves the image. Parameters for 3x32x32, 10 classes and GroupNorm:

    * ResNet-8, stages (16, 32, 64), one block each: stem 432 + 32; blocks 4,672 + 14,528 + 57,728; linear 650;
      78,042 in all.
    * ResNet-18, stages (64, 128, 256, 512), two blocks each: stem 1,728 + 128; stages 147,968 + 525,568 + 2,099,712
      + 8,393,728; linear 5,130; 11,173,962 in all.
    * ResNet-34, the same stages with 3, 4, 6 and 3 blocks: 21,282,122 in all.
    * ResNet-50, stages of 3, 4, 6 and 3 bottlenecks with (256, 512, 1024, 2048) channels: 23,520,842 in all.

    Args:
        in_channels: channels of the images.
        num_classes: length of the logits.
        norm: see `norm_layer`.
        widths: channels of each stage.
        depths: blocks of each stage.
        block_class: `BasicBlock` or `Bottleneck`; before bottlenecks the stem has a quarter of the first stage's width.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        norm: str,
        widths: Sequence[int],
        depths: Sequence[int],
        block_class: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    ) -> None:
        super().__init__()
        inputs = widths[0] // (4 if block_class is Bottleneck else 1)
        self.stem = _conv(in_channels, inputs, 3, 1, norm)
        self.norm = norm_layer(norm, inputs)
        blocks: list[nn.Module] = []
        for stage, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                blocks.append(block_class(inputs, outputs, 2 if stage > 0 and block == 0 else 1, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(inputs, num_classes)
        _init_convolutions(self)

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        features: Tensor = self.blocks(F.relu(self.norm(self.stem(images))))
        return features.mean((2, 3))


class ResNet9(Net):
    """The network of David Page's DAWNBench entry: wide, shallow, two residual blocks, logits scaled by 1/8.

    Global max-pooling replaces the last 4x4 max-pool, which is the same for 32x32 images.

    Parameters for 3x32x32, 10 classes and GroupNorm: convolutions 1,728 + 73,728 + 294,912 + 294,912 + 1,179,648
    + 4,718,592; normalisation 128 + 768 + 512 + 3,072; linear without bias 5,120; 6,573,120 in all.

    Args:
        in_channels: channels of the images; at least 8x8 pixels.
        num_classes: length of the logits.
        norm: see `norm_layer`.
        width: channels after the stem (64 in the original); doubled three times.
    """

    def __init__(self, in_channels: int, num_classes: int, norm: str, width: int) -> None:
        super().__init__()
        self.stem = _ConvNormRelu(in_channels, width, norm)
        self.layer1 = _ConvNormRelu(width, 2 * width, norm)
        self.residual1 = nn.Sequential(*[_ConvNormRelu(2 * width, 2 * width, norm) for _ in range(2)])
        self.layer2 = _ConvNormRelu(2 * width, 4 * width, norm)
        self.layer3 = _ConvNormRelu(4 * width, 8 * width, norm)
        self.residual2 = nn.Sequential(*[_ConvNormRelu(8 * width, 8 * width, norm) for _ in range(2)])
        self.output = nn.Linear(8 * width, num_classes, bias=False)
        _init_convolutions(self)

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        features = F.max_pool2d(self.layer1(self.stem(images)), 2)
        features = features + self.residual1(features)
        features = F.max_pool2d(self.layer2(features), 2)
        features = F.max_pool2d(self.layer3(features), 2)
        features = features + self.residual2(features)
        return features.amax((2, 3))

    def classify(self, embeddings: Tensor) -> Tensor:
        """Returns logits (batch, classes) of embeddings (batch, features): the linear layer's output / 8."""
        return super().classify(embeddings) * 0.125


class _ConvNormRelu(nn.Module):
    """3x3 convolution, normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, 3, 1, norm)
        self.norm = norm_layer(norm, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (batch, inputs, height, width) to (batch, outputs, height, width)."""
        return F.relu(self.norm(self.conv(features)))


class WideResNet(Net):
    """Wide ResNet of pre-activation blocks, without dropout; WRN-28-2 is the network of MixMatch and FixMatch.

    Parameters of WRN-28-2 for 3x32x32, 10 classes and GroupNorm: stem 432; stages 70,112 + 279,488 + 1,116,032; last
    normalisation 256; linear 1,290; 1,467,610 in all.

    Args:
        in_channels: channels of the images.
        num_classes: length of the logits.
        norm: see `norm_layer`.
        depth: layers, 6 n + 4 for n blocks in each of the three stages.
        widen: multiplies the channels 16, 32, 64 of the stages (not of the stem).
    """

    def __init__(self, in_channels: int, num_classes: int, norm: str, depth: int, widen: int) -> None:
        super().__init__()
        assert depth % 6 == 4, depth
        self.stem = _conv(in_channels, 16, 3, 1, norm)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for block in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm_layer(norm, inputs)
        self.output = nn.Linear(inputs, num_classes)
        _init_convolutions(self)

    def embed(self, images: Tensor) -> Tensor:
        """Returns embeddings (batch, features) of images (batch, channels, height, width)."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return features.mean((2, 3))
