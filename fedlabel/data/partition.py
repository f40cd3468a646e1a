"""Partitions of labelled samples over clients, as pure functions of labels and a random generator.

Every recipe returns the sorted sample indices of each client; they are disjoint and together hold every sample. None
of ours loops over the clients in Python. `partition` chooses the recipe, deals out evenly the samples that a recipe by
class says nothing of, since nobody knows their class, and sees to it that no client is left with too few samples.

`dirichlet` is FedLabel's recipe (released code of Cho et al., ICCV 2023, https://arxiv.org/abs/2307.08809): a Dirichlet
vector over *classes* per client. `dirichlet_per_class` is the more common one (Yurochkin et al., ICML 2019,
https://arxiv.org/abs/1905.12022): a Dirichlet vector over *clients* per class; client sizes differ far more.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.names import in_order, listed
from fedlabel.names import did_you_mean
from fedlabel.seeding import derive_seed, numpy_generator

KINDS = ("iid", "dirichlet", "dirichlet_per_class", "classes_per_client", "quantity_skew")
COLUMN = "column"
"""The partition that the data have: nothing is drawn."""
CLASSLESS = ("iid", "quantity_skew")
"""Recipes that do not look at classes."""
FLWR_DATASETS = "flwr_datasets:"
MAX_DRAWS = 100
"""How often a partition that leaves a client with too few samples is drawn anew."""


@dataclass(frozen=True)
class PartitionConfig:
    """How the training set is spread over the clients."""

    key: ClassVar[str] = "partition"
    """The name in the configuration, for errors."""
    least_min_samples: ClassVar[int] = 1
    """What `min_samples` must be at least."""

    kind: str = "dirichlet"
    """iid, dirichlet (FedLabel's), dirichlet_per_class (the common one), classes_per_client, quantity_skew, column
    (every different value of `column` is a client), or `flwr_datasets:<Class>` for a partitioner of the flwr-datasets
    package, e.g. `flwr_datasets:ShardPartitioner`. Samples without a label in the data, which partitions by class
    cannot place, are distributed evenly."""
    dirichlet_alpha: float = 0.5
    """For dirichlet and dirichlet_per_class: the smaller, the fewer classes a client holds."""
    classes_per_client: int = 2
    """For classes_per_client: number of classes that each client holds."""
    quantity_alpha: float = 1.0
    """For quantity_skew: the smaller, the more the numbers of samples differ."""
    column: str | None = None
    """For column: the column of a table that names the client of each row, e.g. a site, or in an npz file an array
    with a value for each training sample (and another, `<column>_test`, for each test sample). It is not a feature.
    Clients are sorted by the values; num_clients must be their number. If the test set has the column, too, a
    client is evaluated on its own rows."""
    min_samples: int = 2
    """The smallest number of samples of a client; up to `MAX_DRAWS` partitions are drawn to meet it."""
    partitioner_args: str = "{}"
    """For flwr_datasets: the partitioner's arguments as a JSON object, e.g. '{"alpha": 0.3}'. `num_partitions`,
    `partition_by` and `seed` are filled in if it takes them. It is called once, not redrawn."""

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, COLUMN) and not self.kind.startswith(FLWR_DATASETS):
            hint = did_you_mean(self.kind, (*KINDS, COLUMN))
            raise ValueError(
                f"`{self.key}.kind` (={self.kind}) must be one of {', '.join(KINDS)}, {COLUMN}, "
                f"{FLWR_DATASETS}<Class>.{hint}"
            )
        if (self.kind == COLUMN) != (self.column is not None):
            raise ValueError(
                f"`{self.key}.kind` (={self.kind}) and `{self.key}.column` (={self.column}) belong together: give both "
                f"({self.key}.kind={COLUMN}, and which column), or none."
            )
        for name in ("dirichlet_alpha", "quantity_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{self.key}.{name}` (={value}) must be positive and finite.")
        for name, least in (("classes_per_client", 1), ("min_samples", self.least_min_samples)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"`{self.key}.{name}` (={value}) must be at least {least}.")
        try:
            is_object = isinstance(json.loads(self.partitioner_args), dict)
        except json.JSONDecodeError:
            is_object = False
        if not is_object:
            raise ValueError(
                f"`{self.key}.partitioner_args` (={self.partitioner_args}) must be a JSON object, "
                "e.g. '{\"alpha\": 0.3}'."
            )


@dataclass(frozen=True)
class LabeledPartitionConfig(PartitionConfig):
    """Partition of the labelled samples if it differs from that of the others."""

    key: ClassVar[str] = "labeled_partition"
    least_min_samples: ClassVar[int] = 0

    min_samples: int = 0
    """The smallest number of labelled samples of a client; `partition.min_samples` counts all its samples."""


def partition(
    labels: np.ndarray,
    num_clients: int,
    num_classes: int,
    config: PartitionConfig,
    seed: int,
    held: Sequence[int] | np.ndarray | None = None,
) -> Ragged:
    """Spreads samples over clients.

    Args:
        labels: (n,) integers in [0, num_classes), or -1 where nobody knows the class: recipes that go by class spread
            the others, and these are dealt evenly at random.
        num_clients: how many clients.
        num_classes: how many classes.
        config: the recipe.
        seed: the experiment's seed. Draw i uses the generator of (seed, "partition", i), i = 0 .. `MAX_DRAWS` - 1; the
            first in which every client has `config.min_samples` is taken.
        held: (num_clients,) how many other samples each client holds already, which count for `config.min_samples`.

    Returns:
        The sorted indices of each client; disjoint, together all of range(n).

    Raises:
        ValueError: there are too few samples, labels out of range, or the smallest size could not be met.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or (len(labels) and (labels.min() < -1 or labels.max() >= num_classes)):
        raise ValueError(
            f"`labels` of shape {labels.shape} must be (n,) integers in [0, {num_classes - 1}], or -1 for none."
        )
    if num_clients < 1:
        raise ValueError(f"`num_clients` (={num_clients}) must be at least 1.")
    if len(labels) < num_clients and held is None and config.least_min_samples > 0:
        raise ValueError(
            f"`num_clients` (={num_clients}) must not exceed the number of training samples (={len(labels)})."
        )
    already = np.zeros(num_clients, dtype=np.int64) if held is None else np.asarray(held)
    total = len(labels) + int(already.sum())
    if total < num_clients * config.min_samples:
        raise ValueError(
            f"{num_clients} clients (`num_clients`) with at least {config.min_samples} samples each "
            f"(`{config.key}.min_samples`) need {num_clients * config.min_samples} samples, but there are {total}. "
            f"Take fewer clients or a smaller {config.key}.min_samples."
        )
    best = 0
    draws = 1 if config.kind.startswith(FLWR_DATASETS) else MAX_DRAWS
    for draw in range(draws):
        parts = _draw(labels, num_clients, num_classes, config, seed, draw)
        smallest = int((parts.lengths + already).min())
        if smallest >= config.min_samples:
            return parts
        best = max(best, smallest)
    raise ValueError(too_small(total, num_clients, config, best, draws))


def _draw(
    labels: np.ndarray, num_clients: int, num_classes: int, config: PartitionConfig, seed: int, draw: int
) -> Ragged:
    owner = np.full(len(labels), -1)
    if len(labels) == 0:
        return Ragged.by_owner(owner, num_clients)
    if config.kind not in CLASSLESS and (labels < 0).any():
        labeled, unlabeled = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        dealt = iid(unlabeled, num_clients, numpy_generator(seed, "partition", "without_label", draw))
        spread = _draw(labels[labeled], num_clients, num_classes, config, seed, draw)
        owner[labeled], owner[unlabeled] = spread.owner(len(labeled)), dealt.owner(len(unlabeled))
        return Ragged.by_owner(owner, num_clients)
    rng = numpy_generator(seed, "partition", draw)
    match config.kind:
        case "iid":
            return iid(labels, num_clients, rng)
        case "dirichlet":
            return dirichlet(labels, num_clients, config.dirichlet_alpha, num_classes, rng)
        case "dirichlet_per_class":
            return dirichlet_per_class(labels, num_clients, config.dirichlet_alpha, num_classes, rng)
        case "classes_per_client":
            return classes_per_client(labels, num_clients, config.classes_per_client, num_classes, rng, config.key)
        case "quantity_skew":
            return quantity_skew(labels, num_clients, config.quantity_alpha, rng)
    name = config.kind.removeprefix(FLWR_DATASETS)
    return flwr_datasets_partition(labels, num_clients, name, json.loads(config.partitioner_args), seed, config.key)


def column_owners(values: np.ndarray, num_clients: int, config: PartitionConfig) -> tuple[np.ndarray, list[str]]:
    """Makes a client of every different value of a column.

    Args:
        values: (n,) texts, "" where there is none.
        num_clients: how many clients there are to be.
        config: names the column.

    Returns:
        (n,) int64, the client of each sample; and the clients' names, in the order of numbers or of the alphabet.

    Raises:
        ValueError: a sample has no value, or there are not `num_clients` different ones.
    """
    key = f"`{config.key}.column` (={config.column})"
    missing = np.flatnonzero(values == "")
    if len(missing):
        raise ValueError(
            f"{key} says nothing of {len(missing)} of {len(values)} training samples (the first is number "
            f"{missing[0] + 1}): write whose they are, or delete them."
        )
    names = in_order(sorted(set(values.tolist())))
    if len(names) != num_clients:
        raise ValueError(
            f"{key} has {len(names)} different values ({listed(names, 5)}), and each is a client: set "
            f"num_clients={len(names)} (={num_clients}), or name another column."
        )
    place = {name: client for client, name in enumerate(names)}
    return np.array([place[value] for value in values.tolist()], dtype=np.int64), names


def too_small(num_samples: int, num_clients: int, config: PartitionConfig, best: int, draws: int) -> str:
    """Returns the error message if `config.min_samples` was not met: the smallest client had at most `best` samples."""
    field = {
        "dirichlet": "dirichlet_alpha",
        "dirichlet_per_class": "dirichlet_alpha",
        "classes_per_client": "classes_per_client",
        "quantity_skew": "quantity_alpha",
    }.get(config.kind, "partitioner_args")
    change = "other" if field == "partitioner_args" else "a larger"
    return (
        f"`{config.key}.min_samples` (={config.min_samples}) could not be met in {draws} draws: the smallest client "
        f"had at best {best} ({config.key}.kind={config.kind}, {config.key}.{field}={getattr(config, field)}, "
        f"{num_samples} samples, num_clients={num_clients}). "
        f"Take fewer clients, {change} {config.key}.{field} or a smaller {config.key}.min_samples."
    )


# -------------------------------------------------------------------------------------------------------------- recipes


def iid(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Ragged:
    """Deals samples uniformly at random; sizes differ by at most one. For arguments see `partition`."""
    return Ragged.by_owner(rng.permutation(np.arange(len(labels)) % num_clients), num_clients)


def dirichlet(labels: np.ndarray, num_clients: int, alpha: float, num_classes: int, rng: np.random.Generator) -> Ragged:
    """FedLabel's recipe: client i draws p_i ~ Dir(alpha 1); class c is cut by p_.c, normalised over clients."""
    return _by_class(labels, rng.dirichlet(np.full(num_classes, alpha), size=num_clients).T, num_clients, rng)


def dirichlet_per_class(
    labels: np.ndarray, num_clients: int, alpha: float, num_classes: int, rng: np.random.Generator
) -> Ragged:
    """The common recipe: class c draws q_c ~ Dir(alpha 1) over the clients, and is cut by it."""
    return _by_class(labels, rng.dirichlet(np.full(num_clients, alpha), size=num_classes), num_clients, rng)


def classes_per_client(
    labels: np.ndarray, num_clients: int, k: int, num_classes: int, rng: np.random.Generator, key: str = "partition"
) -> Ragged:
    """Gives each client k classes at random; a class is split evenly among its clients.

    Classes go to as equally many clients as possible. Classes without samples are not given out. Errors name the
    configuration's `key`.

    Raises:
        ValueError: there are fewer than k classes, or num_clients * k of them are too few to hold them all.
    """
    present = np.flatnonzero(np.bincount(labels, minlength=num_classes))
    if k > len(present):
        raise ValueError(f"`{key}.classes_per_client` (={k}) must not exceed the number of classes (={len(present)}).")
    if num_clients * k < len(present):
        raise ValueError(
            f"{num_clients} clients (`num_clients`) with {k} classes each (`{key}.classes_per_client`) cannot hold "
            f"all {len(present)} classes. Take more clients or a larger {key}.classes_per_client."
        )
    # The classes fewest clients hold, ties at random: so every class is held before one is held twice. After `block`
    # clients all classes are held equally often again, so that the blocks do not depend on each other.
    block = len(present) // math.gcd(len(present), k)
    ties = np.zeros((-(-num_clients // block), block, len(present)))
    ties.reshape(-1, len(present))[:num_clients] = rng.random((num_clients, len(present)))
    chosen = np.empty((*ties.shape[:2], k), dtype=np.int64)
    used = np.zeros((len(ties), len(present)), dtype=np.int64)
    for place in range(block):
        chosen[:, place] = np.lexsort((ties[:, place], used), axis=-1)[:, :k]
        used[np.arange(len(used))[:, None], chosen[:, place]] += 1
    holds = np.zeros((num_clients, num_classes))
    np.put_along_axis(holds, present[chosen.reshape(-1, k)[:num_clients]], 1, axis=1)
    return _by_class(labels, holds.T, num_clients, rng)


def quantity_skew(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator) -> Ragged:
    """Draws the clients' sizes from Dir(alpha 1), the samples of each uniformly at random."""
    owner = np.empty(len(labels), dtype=np.int64)
    _cut(np.arange(len(labels)), rng.dirichlet(np.full(num_clients, alpha)), rng, owner)
    return Ragged.by_owner(owner, num_clients)


def flwr_datasets_partition(
    labels: np.ndarray,
    num_clients: int,
    name: str,
    arguments: dict[str, Any],
    seed: int,
    key: str = "partition",
) -> Ragged:
    """Partitions by a partitioner of the optional flwr-datasets package.

    Args:
        labels: (n,) integers; the partitioner sees them as the column "label".
        num_clients: given as `num_partitions` where the partitioner takes it.
        name: a class of `flwr_datasets.partitioner`.
        arguments: its arguments; they win over `num_partitions`, `partition_by="label"` and a seed derived from `seed`.
        seed: the experiment's seed.
        key: how errors call the configuration.

    Returns:
        As `partition`.

    Raises:
        ValueError: the package or the class is missing, or what it returns is not a partition over `num_clients`.
    """
    kind = f"`{key}.kind` (={FLWR_DATASETS}{name})"
    try:
        # The package is optional, hence no import statement.
        module = importlib.import_module("flwr_datasets.partitioner")
        arrow = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"{kind} needs the package flwr-datasets: `pip install flwr-datasets`.") from error
    if not name.endswith("Partitioner") or not hasattr(module, name):
        available = ", ".join(key for key in dir(module) if key.endswith("Partitioner") and key != "Partitioner")
        raise ValueError(f"{kind} must name one of {available}.")
    partitioner_class = getattr(module, name)
    accepted = inspect.signature(partitioner_class).parameters
    defaults = {
        "num_partitions": num_clients,
        "partition_by": "label",
        "seed": derive_seed(seed, "partition", name) % 2**32,
    }
    filled = {key: value for key, value in defaults.items() if key in accepted} | arguments
    try:
        partitioner = partitioner_class(**filled)
    except TypeError as error:
        raise ValueError(f"{kind} does not take `{key}.partitioner_args` (={arguments}): {error}") from error
    partitioner.dataset = arrow.Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
    if partitioner.num_partitions != num_clients:
        raise ValueError(f"{kind} makes {partitioner.num_partitions} parts, not `num_clients` (={num_clients}).")
    parts = Ragged.of(
        np.sort(np.array(partitioner.load_partition(k)["index"], dtype=np.int64)) for k in range(num_clients)
    )
    times = np.bincount(parts.rows, minlength=len(labels))
    if (times != 1).any():
        raise ValueError(
            f"{kind} with {arguments} leaves out {(times == 0).sum()} samples and gives {(times > 1).sum()} to several "
            "clients. Every sample must go to one client: choose other " + key + ".partitioner_args."
        )
    return parts


# ------------------------------------------------------------------------------------------------- counting, following


def label_histogram(labels: np.ndarray, parts: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Returns (clients, classes) int64: how many samples of each class each client holds; labels of -1 do not count."""
    held = Ragged.of(parts)
    given = labels[held.rows]
    place = held.part_of_row * num_classes + given
    return np.bincount(place[given >= 0], minlength=len(held) * num_classes).reshape(len(held), num_classes)


def split_like(
    reference_labels: np.ndarray,
    reference_parts: Sequence[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    rng: np.random.Generator,
) -> Ragged:
    """Partitions another set (the test set) so that each client's share of a class equals its share in the reference.

    Args:
        reference_labels: (m,) integers, of the set that is already spread. Samples of the label -1 count as if they
            had the classes of all the others, each in its share (or, without any other, each class alike).
        reference_parts: one array of indices into it per client.
        labels: (n,) integers, of the set to spread.
        num_classes: how many classes.
        rng: decides which sample goes where and, where shares round to halves of a sample, to whom.

    Returns:
        The sorted indices of each client; disjoint, together all of range(n). Each client holds its share of each
        class within one sample; classes that the reference lacks are spread evenly. A client may hold nothing.
    """
    held = Ragged.of(reference_parts)
    part, given = held.part_of_row, reference_labels[held.rows]
    total = np.bincount(given[given >= 0], minlength=num_classes)
    unlabeled = held.sums(given < 0)
    mix = total / total.sum() if total.any() else np.full(num_classes, 1 / num_classes)
    # One class at a time: of a million clients, a matrix of all would be the largest thing in memory.
    counts = (np.bincount(part[given == label], minlength=len(held)) for label in range(num_classes))
    shares = (of_class + unlabeled * mix[label] for label, of_class in enumerate(counts))
    return _by_class(labels, shares, len(held), rng)


def _by_class(labels: np.ndarray, shares: Iterable[np.ndarray], num_clients: int, rng: np.random.Generator) -> Ragged:
    """Cuts every class by its `shares`, (clients,) for each class, which need not be normalised."""
    owner = np.empty(len(labels), dtype=np.int64)
    for label, of_class in enumerate(shares):
        _cut(np.flatnonzero(labels == label), of_class, rng, owner)
    return Ragged.by_owner(owner, num_clients)


def _cut(indices: np.ndarray, shares: np.ndarray, rng: np.random.Generator, owner: np.ndarray) -> None:
    """Writes the client of each sample to `owner[indices]`: shuffled samples, cut by the cumulated `shares` (clients,)
    >= 0.

    Shares of 0 for all (a class nobody drew) count as equal ones. Clients stand in random order: otherwise the same
    ones would lose by rounding in every class.
    """
    order = rng.permutation(len(shares))
    cumulated = np.cumsum(shares[order]) if shares.sum() > 0 else np.arange(1, len(shares) + 1)
    # Dividing by the last value, and not by the sum, makes it exactly 1.
    bounds = np.rint(cumulated / cumulated[-1] * len(indices)).astype(np.int64)
    owner[rng.permutation(indices)] = np.repeat(order, np.diff(bounds, prepend=0))
