"""Images that are there twice."""

from __future__ import annotations

import torch

from fedlabel.data.sets.loaders import Split
from fedlabel.data.sets.repeats import repeated_images


def split(values: list[int], labels: list[int]) -> Split:
    return Split(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2), torch.tensor(labels))


def test_images_of_both_sets_and_with_two_labels_are_counted() -> None:
    """Training: 1 has the label 0 twice; 2 the labels 0, 1, 0; 3 none and then 1, which is no contradiction."""
    train = split([1, 1, 2, 2, 2, 3, 3, 4], [0, 0, 0, 1, 0, -1, 1, -1])
    assert repeated_images(train, split([3, 4, 5, 4], [1, 1, 1, 1]), "f") == [
        "f: 3 of the 4 test images are training images, too; what is measured on them says nothing about new ones.",
        "f: 1 of the 8 training images repeat one under another label.",
    ]
    assert repeated_images(split([1, 2], [0, 1]), split([3], [0]), "f") == []
