"""The views of a batch: normalised, weakly and strongly augmented, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlabel.data.augment import (
    AugmentConfig,
    Numbers,
    strong_numbers,
    strong_with,
    weak_numbers,
    weak_with,
)
from fedlabel.seeding import Draws


@dataclass(frozen=True, eq=False)
class ImageTransform:
    """Makes the views of a batch from uint8 images, on their device."""

    mean: Tensor
    """(channels, 1, 1) on the [0, 1] scale."""
    std: Tensor
    """(channels, 1, 1)."""
    augment: AugmentConfig
    allow_flip: bool
    channels_last: bool = False
    """Whether channels are innermost in memory: on a GPU, convolutions and BatchNorm then take half the time, but
    GroupNorm more."""

    def normalize(self, images: Tensor) -> Tensor:
        """Returns (batch, channels, height, width) uint8 as float32 with zero mean and unit variance per channel.

        Rows of tables (float32) are not pixels of [0, 255]: of them only mean and std are taken.
        """
        values = images - self.mean if images.is_floating_point() else images.float().div_(255).sub_(self.mean)
        values = values.div_(self.std)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    def views(self, images: Tensor, names: tuple[str, ...], draws: Draws) -> dict[str, Tensor]:
        """Returns the named views of uint8 images ("clean", "weak", "strong", "strong2"), each drawn independently."""
        return self.views_with(images, self.numbers(images, len(images), names, draws))

    def numbers(self, images: Tensor, count: int, names: tuple[str, ...], draws: Draws) -> dict[str, Numbers]:
        """Returns the random numbers for the named views of `count` images of the type and shape of `images`."""
        found: dict[str, Numbers] = {}
        for name in names:
            draw = weak_numbers if name == "weak" and not self.augment.weak_as_strong else strong_numbers
            found[name] = () if name == "clean" else draw(images, count, draws, self.augment, self.allow_flip)
        return found

    def views_with(self, images: Tensor, numbers: Mapping[str, Numbers]) -> dict[str, Tensor]:
        """Returns views of images with the result of `numbers`."""
        found = {}
        for name, drawn in numbers.items():
            make = weak_with if name == "weak" and not self.augment.weak_as_strong else strong_with
            view = images if name == "clean" else make(images, drawn, self.augment, self.allow_flip)
            found[name] = self.normalize(view)
        return found


def joined(numbers: Sequence[Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """Returns the random numbers for the views of several batches, joined."""
    return {
        name: tuple(torch.cat(parts) for parts in zip(*(each[name] for each in numbers), strict=True))
        for name in numbers[0]
    }
