"""Finds duplicate images in a data set."""

from __future__ import annotations

from hashlib import blake2b

from torch import Tensor

from fedlabel.data.sets.loaders import Split


def repeated_images(train: Split, test: Split, where: str) -> list[str]:
    """Returns notes on images that are equal in every pixel: in both sets, or with two labels."""
    label_of: dict[bytes, int] = {}
    contradicting = 0
    for key, label in zip(_keys(train.images), train.labels.tolist(), strict=True):
        first = label_of.setdefault(key, label)
        contradicting += first >= 0 and label >= 0 and first != label
        if first < 0:
            label_of[key] = label
    shared = sum(key in label_of for key in _keys(test.images))
    notes = []
    if shared:
        notes.append(
            f"{where}: {shared} of the {len(test.labels)} test images are training images, too; what is measured on "
            "them says nothing about new ones."
        )
    if contradicting:
        notes.append(
            f"{where}: {contradicting} of the {len(train.labels)} training images repeat one under another label."
        )
    return notes


def _keys(images: Tensor) -> list[bytes]:
    return [blake2b(memoryview(image), digest_size=16).digest() for image in images.flatten(1).numpy()]
