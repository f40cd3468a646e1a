"""What clients know of the labels of their samples: the record, and how it is made from true labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlabel.seeding import numpy_generator

KINDS = ("few_labels", "full")
COUNTS = ("labels_per_class", "labels_per_client", "labels_total")
HOLDERS = ("clients", "server", "some_clients")


@dataclass(frozen=True, eq=False)
class Supervision:
    """What a client knows of the labels of its n samples."""

    candidates: Tensor
    """(n, classes) bool: one True = a label, all True = nothing known, several = a set that holds the truth."""

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.candidates.shape), self.candidates.dtype
        if dtype != torch.bool or len(shape) != 2:
            raise ValueError(f"`candidates` ({dtype} of shape {shape}) must be bool of shape (n, classes).")
        impossible = (~self.candidates.any(1)).nonzero()
        if len(impossible):
            raise ValueError(
                f"`candidates` of sample {int(impossible[0])} are all False: no class is possible. "
                "At least one must be True; all True means that nothing is known."
            )

    @property
    def labeled(self) -> Tensor:
        """(n,) bool, the class is known."""
        return self.candidates.sum(1) == 1

    @property
    def label(self) -> Tensor:
        """(n,) int64, the class where it is known, else -1."""
        return torch.where(self.labeled, self.candidates.int().argmax(1), -1)


@dataclass(frozen=True)
class SupervisionConfig:
    """Who is told what about the labels.

    The amount is one of four. `label_rate` is the default; a count replaces it, and at most one count may be given.
    """

    kind: str = "few_labels"
    """few_labels: some samples have their true label, nothing is known of the others. full: all samples have it."""
    labels_at: str = "clients"
    """clients: every client has labels of its own samples. server: the labelled samples are chosen over the whole
    training set and are the server's; the clients share the others and have no label. some_clients: `labeled_clients`
    clients have labels as the amount says, or all of theirs where no amount is given; the others have none."""
    labeled_clients: int | None = None
    """Of labels_at=some_clients: how many clients have labels; which ones is drawn from the seed."""
    label_rate: float | None = 0.1
    """Part of the n samples of each client with labels (of the training set for labels_at=server), in [0, 1]: exactly
    int(label_rate * n). A configuration with labels_at=some_clients that does not give it has null there: all n."""
    labels_per_class: int | None = None
    """Samples with a label per class, in the whole federation, whoever holds them (of those who have labels)."""
    labels_per_client: int | None = None
    """Samples with a label per client."""
    labels_total: int | None = None
    """Samples with a label in the whole federation, whoever holds them (of those who have labels)."""
    stratified: bool = False
    """Whether the labelled samples have the class shares of what they are drawn from: the client's samples, or for
    `labels_total` and labels_at=server all samples. False (FedLabel's paper): uniformly at random. No effect on
    `labels_per_class`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`supervision.kind` (={self.kind}) must be one of {', '.join(KINDS)}.")
        given = [name for name in COUNTS if getattr(self, name) is not None]
        values = " and ".join(f"`supervision.{name}` (={getattr(self, name)})" for name in given)
        if len(given) > 1:
            raise ValueError(f"{values} exclude each other: give one of them.")
        if self.kind == "full" and given:
            raise ValueError(f"{values} has no place beside supervision.kind=full: take supervision.kind=few_labels.")
        for name in given:
            if getattr(self, name) < 1:
                raise ValueError(f"`supervision.{name}` (={getattr(self, name)}) must be at least 1.")
        self._check_holder()
        if self.label_rate is None:
            if not given and self.kind == "few_labels" and self.labels_at != "some_clients":
                raise ValueError(
                    "`supervision.label_rate` (=None) says nothing of the amount: "
                    f"give it, or one of {', '.join(f'supervision.{name}' for name in COUNTS)}."
                )
        elif not 0 <= self.label_rate <= 1:
            raise ValueError(f"`supervision.label_rate` (={self.label_rate}) must lie in [0, 1].")

    def _check_holder(self) -> None:
        if self.labels_at not in HOLDERS:
            raise ValueError(f"`supervision.labels_at` (={self.labels_at}) must be one of {', '.join(HOLDERS)}.")
        if self.labels_at == "some_clients":
            if self.labeled_clients is None or self.labeled_clients < 1:
                raise ValueError(
                    f"`supervision.labeled_clients` (={self.labeled_clients}) must be at least 1 for "
                    "supervision.labels_at=some_clients: say how many clients have labels."
                )
        elif self.labeled_clients is not None:
            raise ValueError(
                f"`supervision.labeled_clients` (={self.labeled_clients}) has no place beside "
                f"supervision.labels_at={self.labels_at}: take supervision.labels_at=some_clients, or leave it out."
            )
        if self.labels_at == "server":
            if self.labels_per_client is not None:
                raise ValueError(
                    f"`supervision.labels_per_client` (={self.labels_per_client}) has no place beside "
                    "supervision.labels_at=server, where no client has a label: take labels_per_class or labels_total."
                )
            if self.everything:
                raise ValueError(
                    f"`supervision.kind` (={self.kind}) and `supervision.label_rate` (={self.label_rate}) beside "
                    "supervision.labels_at=server leave no sample to the clients: take supervision.kind=few_labels and "
                    "a smaller amount."
                )

    @property
    def everything(self) -> bool:
        """Whether those who have labels have all labels of their samples."""
        return self.kind == "full" or (self.label_rate in (None, 1) and all(getattr(self, c) is None for c in COUNTS))


def labeled_clients(num_clients: int, config: SupervisionConfig, seed: int) -> np.ndarray:
    """Returns the sorted numbers of the clients with labels of their own: none, all, or those drawn from `seed`."""
    if config.labels_at == "server":
        return np.arange(0)
    if config.labels_at == "clients":
        return np.arange(num_clients)
    assert config.labeled_clients is not None
    assert config.labeled_clients <= num_clients
    rng = numpy_generator(seed, "supervision", "labeled_clients")
    return np.sort(rng.choice(num_clients, config.labeled_clients, replace=False))


def labeled_mask(
    labels: np.ndarray,
    parts: Sequence[np.ndarray],
    num_classes: int,
    config: SupervisionConfig,
    seed: int,
    unlabeled_only: Sequence[int] = (),
) -> np.ndarray:
    """Chooses the samples whose label is known.

    Args:
        labels: (n,) integers in [0, num_classes), the truth.
        parts: one array of indices per client, or a single one, of all samples, where the choice is not the clients'.
        num_classes: how many classes.
        config: how many, and how.
        seed: the experiment's seed. Each client (each class for `labels_per_class`) has a generator of its own, so
            the choice does not depend on the order in which they are visited.
        unlabeled_only: classes whose labels are never known. The choice is made as if there were no such samples.

    Returns:
        (n,) bool.

    Raises:
        ValueError: more labels are asked for than there are samples.
    """
    mask = np.zeros(len(labels), dtype=bool)
    chosen = range(len(parts)) if config.labels_at == "server" else labeled_clients(len(parts), config, seed)
    parts = [part[~np.isin(labels[part], unlabeled_only)] for part in parts] if len(unlabeled_only) else parts
    everyone = np.sort(np.concatenate([parts[client] for client in chosen]))
    who = "the clients with labels have" if config.labels_at == "some_clients" else "the training set has"
    if config.everything:
        mask[everyone] = True
    elif config.labels_per_class is not None:
        for label in sorted(set(range(num_classes)) - set(unlabeled_only)):
            samples = everyone[labels[everyone] == label]
            _check_enough("labels_per_class", config.labels_per_class, len(samples), f"class {label} has")
            rng = numpy_generator(seed, "supervision", "class", label)
            mask[rng.choice(samples, config.labels_per_class, replace=False)] = True
    elif config.labels_total is not None:
        _check_enough("labels_total", config.labels_total, len(everyone), who)
        rng = numpy_generator(seed, "supervision", "total")
        mask[_choose(everyone, labels, config.labels_total, config.stratified, rng)] = True
    else:
        for client in chosen:
            part = parts[client]
            if config.labels_per_client is not None:
                count = config.labels_per_client
                _check_enough("labels_per_client", count, len(part), f"client {client} has")
            else:
                assert config.label_rate is not None
                count = int(config.label_rate * len(part))
            rng = numpy_generator(seed, "supervision", "client", int(client))
            mask[_choose(part, labels, count, config.stratified, rng)] = True
    return mask


def supervise(labels: np.ndarray | Tensor, mask: np.ndarray | Tensor, num_classes: int) -> Supervision:
    """Reveals the labels under `mask`, and nothing else.

    Args:
        labels: (n,) integers; never looked at where `mask` is False.
        mask: (n,) bool, where the label is known.
        num_classes: how many classes.

    Returns:
        The record: one candidate where `mask` is True, all classes elsewhere.

    Raises:
        ValueError: a label under `mask` is not in [0, num_classes).
    """
    known = torch.as_tensor(mask).nonzero().squeeze(1)
    revealed = torch.as_tensor(labels)[known]
    wrong = ((revealed < 0) | (revealed >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"the label of sample {int(known[first])} (={int(revealed[first])}) must lie in [0, {num_classes - 1}]."
        )
    candidates = torch.ones(len(mask), num_classes, dtype=torch.bool)
    candidates[known] = revealed[:, None] == torch.arange(num_classes)
    return Supervision(candidates)


def _check_enough(name: str, count: int, available: int, who: str) -> None:
    if count > available:
        raise ValueError(
            f"`supervision.{name}` (={count}) asks for more labels than there are samples: {who} {available}. "
            f"Take supervision.{name}={available} or less."
        )


def _choose(
    samples: np.ndarray, labels: np.ndarray, count: int, stratified: bool, rng: np.random.Generator
) -> np.ndarray:
    """Returns `count` of `samples` without repetition; stratified: by largest remainder, ties at random."""
    if not stratified or len(samples) == 0:
        return rng.choice(samples, count, replace=False)
    classes, sizes = np.unique(labels[samples], return_counts=True)
    quota, remainder = np.divmod(count * sizes, len(samples))
    by_remainder = np.lexsort((rng.random(len(classes)), -remainder))
    quota[by_remainder[: count - quota.sum()]] += 1
    return np.concatenate(
        [
            rng.choice(samples[labels[samples] == label], size, replace=False)
            for label, size in zip(classes, quota, strict=True)
        ]
    )
