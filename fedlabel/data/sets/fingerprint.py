"""Hashes of a data set, which a resumed run compares."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from fedlabel.data.sets.datasets import Dataset

PARTS = ("train", "validation", "test")


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Returns hashes (BLAKE2b, 256 bits) of "inputs" and of "labels" with the names of their classes.

    Wherever the files are; of tables the cells, not the features that are computed from them, which may differ in the
    last bit from machine to machine. 180 MB take 0.3 s.
    """
    inputs, labels = blake2b(digest_size=32), blake2b(digest_size=32)
    labels.update(repr(dataset.class_names).encode())
    for part in PARTS:
        split = getattr(dataset, part)
        labels.update(repr(tuple(split.labels.shape)).encode() + split.labels.numpy().tobytes())
        if dataset.tables:
            table = dataset.tables[part]
            for name in table.names:
                column = table.column(name)
                inputs.update(f"{name}, {len(column)} {'numbers' if column.dtype.kind == 'f' else 'texts'}:".encode())
                inputs.update(column.tobytes() if column.dtype.kind == "f" else _text_bytes(column))
        else:
            inputs.update(repr(tuple(split.images.shape)).encode())
            inputs.update(memoryview(split.images.contiguous().numpy()).cast("B") if len(split.images) else b"")
    return {"inputs": inputs.hexdigest(), "labels": labels.hexdigest()}


def _text_bytes(column: np.ndarray) -> bytes:
    """Returns the same bytes for the same texts, whatever the item size of the array."""
    return "".join(f"{len(text)}:{text}" for text in map(str, column)).encode("utf-8", "surrogatepass")
