"""Chooses which samples are labelled: how many labels each client, each class or the server has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedlabel.data.labels.supervision_config import LabelKind, SupervisionConfig
from fedlabel.data.ragged import Ragged
from fedlabel.data.streams import choose, permute
from fedlabel.seeding import numpy_generator


def labeled_clients(num_clients: int, config: SupervisionConfig, seed: int) -> np.ndarray:
    """Returns the sorted ids of the clients that have labels: none, all, or those drawn from `seed`."""
    if config.labels_at == "server":
        return np.arange(0)
    if config.labels_at == "clients":
        return np.arange(num_clients)
    assert config.labeled_clients is not None
    assert config.labeled_clients <= num_clients
    rng = numpy_generator(seed, "supervision", "labeled_clients")
    return np.sort(rng.choice(num_clients, config.labeled_clients, replace=False))


def kind_of_samples(
    labels: np.ndarray,
    parts: Sequence[np.ndarray],
    num_classes: int,
    config: SupervisionConfig,
    seed: int,
    unlabeled_only: Sequence[int] = (),
) -> np.ndarray:
    """Chooses the samples that get a label, and the kind of label of each.

    Args:
        labels: (n,) integers in [0, num_classes), the truth; -1 where the data have none.
        parts: the samples of each client, or a single part, of all samples, where the choice is not the clients'.
        num_classes: how many classes.
        config: how many, and how.
        seed: the experiment's seed. Each client (each class for `labels_per_class`) has a generator of its own, so
            the choice does not depend on the order in which they are visited.
        unlabeled_only: classes whose labels are never used. The choice is made as if there were no such samples.

    Kinds of label that are made of the true one are chosen as if there were no samples without it.

    Returns:
        (n,) int64, a place in `config.parts`, or -1 without a label.

    Raises:
        ValueError: more labels are asked for than there are samples.
    """
    kind = np.full(len(labels), -1, dtype=np.int64)
    held = Ragged.of(parts)
    if len(unlabeled_only):
        held = held.where(~np.isin(labels[held.rows], unlabeled_only))
    for place, holders in enumerate(_holders(held, config, seed)):
        scope = (place,) if config.mix else ()
        choice = _Choice(labels, sorted(set(range(num_classes)) - set(unlabeled_only)), config, seed, scope)
        if config.parts[place].from_true_labels:
            holders = holders._replace(parts=holders.parts.where(labels[holders.parts.rows] >= 0))
        kind[choice.choose(config.parts[place], holders)] = place
    return kind


class _Holders(NamedTuple):
    """Clients, and the rows that may get a kind of label."""

    clients: np.ndarray
    """(m,) int64."""
    parts: Ragged
    """Of each of these clients."""


def _holders(parts: Ragged, config: SupervisionConfig, seed: int) -> list[_Holders]:
    """Returns for every part of the mix the rows that may get its kind of label."""
    everyone = np.arange(len(parts))
    if not config.mix:
        chosen = everyone if config.labels_at == "server" else labeled_clients(len(parts), config, seed)
        return [_Holders(chosen, parts.take(chosen))]
    shares = [part.share for part in config.mix]
    if config.mix_over == "samples":
        places = Ragged(np.arange(len(parts.rows)), parts.offsets)
        order = permute(places, everyone, seed, "supervision", "mix").rows
        part_of, lengths = parts.part_of_row, parts.lengths
        drawn_as = np.arange(len(order)) - parts.offsets[part_of]  # the first, the second, ... of its client
        place = np.zeros(len(order), dtype=np.int64)
        for share in np.cumsum(shares):
            place[order] += drawn_as >= np.rint(share * lengths).astype(np.int64)[part_of]
        return [_Holders(everyone, parts.where(place == number)) for number in range(len(shares))]
    order = numpy_generator(seed, "supervision", "mix").permutation(len(parts))
    split = np.split(order, _borders(shares, len(parts)))
    empty = [place for place in range(len(shares)) if len(split[place]) == 0]
    if empty:
        raise ValueError(
            f"`supervision.mix[{empty[0]}].share` (={shares[empty[0]]:g}) of {len(parts)} clients is none of them: "
            "give it more, take more clients, or supervision.mix_over=samples."
        )
    groups = [np.sort(split[place]) for place in range(len(shares))]
    return [_Holders(clients, parts.take(clients)) for clients in groups]


def _borders(shares: Sequence[float], count: int) -> np.ndarray:
    """Returns where to cut `count` items into shares; items beyond the last border belong to no share."""
    return np.rint(np.cumsum(shares) * count).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Choice:
    """Chooses rows that get a label of one kind."""

    labels: np.ndarray
    classes: Sequence[int]
    """The classes whose samples may be labelled."""
    config: SupervisionConfig
    seed: int
    scope: tuple[int, ...]
    """The index in the mix, so that each part draws its own random numbers."""

    def choose(self, kind: LabelKind, holders: _Holders) -> np.ndarray:
        """Returns the chosen ones of the holders' rows."""
        everyone = np.sort(holders.parts.rows)
        labels, chosen = self.labels, [np.arange(0)]
        who = "the clients with labels have" if self.config.labels_at == "some_clients" else "the training set has"
        if self.config.mix:
            who = f"part {self.scope[0]} of the mix has"
        lacking = kind.from_true_labels and bool((labels < 0).any())
        if kind.everything:
            return everyone
        if kind.labels_per_class is not None:
            for label in self.classes:
                samples = everyone[labels[everyone] == label]
                whose = f"class {label} in part {self.scope[0]} of the mix has" if self.scope else f"class {label} has"
                _check_enough("labels_per_class", kind.labels_per_class, len(samples), whose, lacking)
                rng = self._generator("class", label)
                chosen.append(rng.choice(samples, kind.labels_per_class, replace=False))
        elif kind.labels_total is not None:
            _check_enough("labels_total", kind.labels_total, len(everyone), who, lacking)
            chosen.append(_choose(everyone, labels, kind.labels_total, kind.stratified, self._generator("total")))
        else:
            chosen.append(self._of_each(kind, holders, lacking))
        return np.concatenate(chosen)

    def _of_each(self, kind: LabelKind, holders: _Holders, lacking: bool) -> np.ndarray:
        """Returns rows of each client, as many as `labels_per_client` or `label_rate` says."""
        clients, parts = holders
        sizes = parts.lengths
        if kind.labels_per_client is not None:
            counts = np.full_like(sizes, kind.labels_per_client)
            for place in np.flatnonzero(sizes < counts)[:1].tolist():
                whose = f"client {clients[place]} has"
                _check_enough("labels_per_client", kind.labels_per_client, int(sizes[place]), whose, lacking)
        else:
            assert kind.label_rate is not None
            counts = (kind.label_rate * sizes).astype(np.int64)
        if not kind.stratified:
            return choose(parts, counts, clients, self.seed, "supervision", *self.scope, "client")
        chosen = [np.arange(0)]
        for place in np.flatnonzero(counts).tolist():
            rng = self._generator("client", int(clients[place]))
            chosen.append(_choose(parts[place], self.labels, int(counts[place]), True, rng))
        return np.concatenate(chosen)

    def _generator(self, *purpose: str | int) -> np.random.Generator:
        return numpy_generator(self.seed, "supervision", *self.scope, *purpose)


def _check_enough(name: str, count: int, available: int, who: str, lacking: bool) -> None:
    if count > available:
        raise ValueError(
            f"`supervision.{name}` (={count}) asks for more labels than there are samples"
            f"{' that have one' * lacking}: {who} {available}. "
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
