"""Partitions: what always holds, what each recipe promises, and what is said when it cannot be kept."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from fedlabel.data.partition import (
    KINDS,
    LabeledPartitionConfig,
    PartitionConfig,
    classes_per_client,
    dirichlet,
    dirichlet_per_class,
    iid,
    label_histogram,
    partition,
    quantity_skew,
    split_like,
)

SEEDS = (0, 1, 2)
NUM_CLASSES = 10


def make_labels(n: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, n)


def assert_is_partition(parts: list[np.ndarray], n: int) -> None:
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def mean_entropy(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean over clients of the entropy of their class shares, in nats (at most log 10 = 2.303)."""
    counts = label_histogram(labels, parts, NUM_CLASSES)
    share = counts / counts.sum(1, keepdims=True)
    return float(-(share * np.log(np.where(share > 0, share, 1))).sum(1).mean())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_clients", [1, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_goes_to_one_client(kind: str, num_clients: int, seed: int) -> None:
    labels = make_labels(seed=seed)
    k = NUM_CLASSES if num_clients == 1 else 2
    config = PartitionConfig(kind=kind, dirichlet_alpha=1.0, quantity_alpha=2.0, classes_per_client=k)
    parts = partition(labels, num_clients, NUM_CLASSES, config, seed)
    assert len(parts) == num_clients
    assert_is_partition(parts, len(labels))
    assert min(map(len, parts)) >= config.min_samples


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_partition(kind: str) -> None:
    labels, config = make_labels(), PartitionConfig(kind=kind)
    one, again, other = (partition(labels, 10, NUM_CLASSES, config, seed) for seed in (4, 4, 5))
    assert all(map(np.array_equal, one, again))
    assert not all(map(np.array_equal, one, other))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", [dirichlet, dirichlet_per_class])
def test_small_alpha_makes_clients_that_know_few_classes(recipe, seed: int) -> None:
    labels = make_labels(10_000)
    entropy = {
        alpha: mean_entropy(labels, recipe(labels, 20, alpha, NUM_CLASSES, np.random.default_rng(seed)))
        for alpha in (0.1, 1.0, 1e6)
    }
    # Measured over 50 seeds: 0.74 to 1.13 for alpha=0.1, 1.88 to 2.01 for alpha=1.
    assert entropy[0.1] < 1.3
    assert entropy[1.0] > 1.7
    assert entropy[1e6] == pytest.approx(np.log(10), abs=1e-2)


@pytest.mark.parametrize("recipe", [dirichlet, dirichlet_per_class])
def test_infinite_alpha_is_uniform(recipe) -> None:
    labels = np.arange(10_000) % NUM_CLASSES
    counts = label_histogram(labels, recipe(labels, 10, 1e9, NUM_CLASSES, np.random.default_rng(0)), NUM_CLASSES)
    assert np.abs(counts - 100).max() <= 1


def test_dirichlet_cuts_classes_by_columns_of_the_clients_vectors() -> None:
    """The slow derivation: client vectors first, each class column normalised over clients."""
    labels = np.arange(20_000) % NUM_CLASSES
    parts = dirichlet(labels, 6, 0.5, NUM_CLASSES, np.random.default_rng(7))
    p = np.random.default_rng(7).dirichlet(np.full(NUM_CLASSES, 0.5), size=6)
    assert np.abs(label_histogram(labels, parts, NUM_CLASSES) - 2000 * p / p.sum(0)).max() <= 1


def test_dirichlet_per_class_cuts_classes_by_their_own_vectors() -> None:
    labels = np.arange(20_000) % NUM_CLASSES
    parts = dirichlet_per_class(labels, 6, 0.5, NUM_CLASSES, np.random.default_rng(7))
    q = np.random.default_rng(7).dirichlet(np.full(6, 0.5), size=NUM_CLASSES)
    assert np.abs(label_histogram(labels, parts, NUM_CLASSES) - 2000 * q.T).max() <= 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", [dirichlet, dirichlet_per_class])
def test_alpha_so_small_that_probabilities_vanish(recipe, seed: int) -> None:
    labels = make_labels(200)
    assert_is_partition(recipe(labels, 2, 1e-4, NUM_CLASSES, np.random.default_rng(seed)), len(labels))


def test_a_class_that_nobody_drew_is_spread_evenly() -> None:
    class Zeros(np.random.Generator):
        def dirichlet(self, alpha, size=None):
            shares = np.full((size, len(alpha)), 1 / (len(alpha) - 1))
            shares[:, 3] = 0
            return shares

    labels = np.arange(400) % NUM_CLASSES
    parts = dirichlet(labels, 4, 1.0, NUM_CLASSES, Zeros(np.random.PCG64(0)))
    assert_is_partition(parts, len(labels))
    assert label_histogram(labels, parts, NUM_CLASSES)[:, 3].tolist() == [10] * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_does_not_always_hit_the_same_clients(seed: int) -> None:
    """With 10 samples a class, 40 clients are due a quarter each: in a fixed order the same 30 never get any."""
    labels = np.repeat(np.arange(NUM_CLASSES), 10)
    sizes = [len(part) for part in dirichlet(labels, 40, 1e9, NUM_CLASSES, np.random.default_rng(seed))]
    # Each gets Binomial(10, 1/4) samples, hence none with probability 0.056: 2.3 of 40 expected.
    assert sizes.count(0) < 8


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet_per_class", "quantity_skew"])
def test_samples_of_a_class_are_shuffled(kind: str) -> None:
    parts = partition(np.zeros(1000, dtype=np.int64), 4, 1, PartitionConfig(kind=kind, dirichlet_alpha=5.0), 0)
    for part in parts:
        # Uniform on [0, 1000): standard deviation 289 / sqrt(size); a run of neighbours would lie elsewhere.
        assert abs(part.mean() - 500) < 4 * 289 / np.sqrt(len(part))
        assert part.std() > 200


@pytest.mark.parametrize("seed", SEEDS)
def test_iid_sizes_differ_by_at_most_one(seed: int) -> None:
    parts = iid(make_labels(1003), 10, np.random.default_rng(seed))
    assert sorted(map(len, parts)) == [100] * 7 + [101] * 3
    assert mean_entropy(make_labels(1003), parts) > 2.15


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_clients", "k"), [(5, 2), (4, 3), (30, 2), (10, 1), (3, 10)])
def test_classes_per_client(num_clients: int, k: int, seed: int) -> None:
    labels = make_labels(6000)
    parts = classes_per_client(labels, num_clients, k, NUM_CLASSES, np.random.default_rng(seed))
    assert_is_partition(parts, len(labels))
    counts = label_histogram(labels, parts, NUM_CLASSES)
    assert (counts > 0).sum(1).tolist() == [k] * num_clients
    holders = (counts > 0).sum(0)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1
    for label in range(NUM_CLASSES):
        held = counts[counts[:, label] > 0, label]
        assert held.max() - held.min() <= 1


def test_classes_per_client_makes_varied_pairs() -> None:
    labels = make_labels(6000)
    counts = label_histogram(labels, classes_per_client(labels, 50, 2, 10, np.random.default_rng(0)), NUM_CLASSES)
    assert len({tuple(row) for row in counts > 0}) > 15


def test_classes_per_client_passes_over_classes_without_samples() -> None:
    labels = make_labels(600) // 2 * 2
    parts = classes_per_client(labels, 5, 2, NUM_CLASSES, np.random.default_rng(0))
    assert ((label_histogram(labels, parts, NUM_CLASSES) > 0).sum(1) == 2).all()


def test_quantity_skew_has_uneven_sizes_and_even_classes() -> None:
    labels = make_labels(20_000)
    parts = quantity_skew(labels, 5, 1.0, np.random.default_rng(1))
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 2 * sizes.min()
    shares = label_histogram(labels, parts, NUM_CLASSES) / sizes[:, None]
    # Every share lies within four standard deviations of a binomial with p = 0.1.
    assert (np.abs(shares - 0.1) < 4 * np.sqrt(0.09 / sizes)[:, None]).all()
    even = [len(part) for part in quantity_skew(labels, 5, 1e9, np.random.default_rng(1))]
    assert max(even) - min(even) <= 2


def test_too_small_clients_are_drawn_anew() -> None:
    labels = make_labels(300)
    config = PartitionConfig(kind="quantity_skew", quantity_alpha=1.0, min_samples=10)
    loose = replace(config, min_samples=1)
    seeds = range(20)
    assert min(min(map(len, partition(labels, 10, NUM_CLASSES, loose, seed))) for seed in seeds) < 10
    assert min(min(map(len, partition(labels, 10, NUM_CLASSES, replace(config, min_samples=5), s))) for s in seeds) >= 5


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_minimum_that_cannot_be_met_says_why() -> None:
    config = PartitionConfig(kind="dirichlet_per_class", dirichlet_alpha=0.1, min_samples=15)
    with pytest.raises(ValueError, match="could not be met in 100 draws") as caught:
        partition(make_labels(1000), 50, NUM_CLASSES, config, 0)
    for part in (
        "`partition.min_samples` (=15)",
        "at best 3 (",
        "partition.kind=dirichlet_per_class",
        "partition.dirichlet_alpha=0.1",
        "1000 samples",
        "num_clients=50",
        "fewer clients",
        "a larger partition.dirichlet_alpha",
        "a smaller partition.min_samples",
    ):
        assert part in str(caught.value)


def test_a_minimum_that_can_never_be_met_is_not_tried() -> None:
    with pytest.raises(ValueError, match=r"need 1010 samples, but there are 1000"):
        partition(make_labels(1000), 101, NUM_CLASSES, PartitionConfig(min_samples=10), 0)


def test_more_clients_than_samples() -> None:
    with pytest.raises(ValueError, match=r"`num_clients` \(=11\) .*number of training samples \(=10\)"):
        partition(make_labels(10), 11, NUM_CLASSES, PartitionConfig(), 0)


def test_no_clients() -> None:
    with pytest.raises(ValueError, match=r"`num_clients` \(=0\) must be at least 1"):
        partition(make_labels(10), 0, NUM_CLASSES, PartitionConfig(), 0)


@pytest.mark.parametrize("labels", [np.array([0, 1, -2]), np.array([0, 10, 1]), np.zeros((3, 1), int)])
def test_labels_that_are_none(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"`labels` of shape .* must be \(n,\) integers in \[0, 9\]"):
        partition(labels, 1, NUM_CLASSES, PartitionConfig(), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_unknown_class_are_dealt_evenly_beside_a_recipe_by_class(kind: str) -> None:
    labels = make_labels()
    lacking = np.where(np.arange(2000) % 4 == 0, labels, -1)
    config = PartitionConfig(kind=kind, min_samples=1)
    parts = partition(lacking, 8, NUM_CLASSES, config, 0)
    assert_is_partition(parts, 2000)
    if kind in ("iid", "quantity_skew"):  # they never look
        assert all(map(np.array_equal, parts, partition(labels, 8, NUM_CLASSES, config, 0)))
    else:
        unknown = [int((lacking[part] < 0).sum()) for part in parts]
        assert max(unknown) - min(unknown) <= 1
        # those of known class are spread as if there were no others
        known = np.flatnonzero(lacking >= 0)
        alone = partition(labels[known], 8, NUM_CLASSES, config, 0)
        assert all(
            np.array_equal(part[lacking[part] >= 0], known[mine]) for part, mine in zip(parts, alone, strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_unknown_classes_is_spread(kind: str) -> None:
    assert_is_partition(partition(np.full(50, -1), 5, NUM_CLASSES, PartitionConfig(kind=kind), 0), 50)


def test_samples_of_unknown_class_count_as_a_share_of_each_when_another_set_follows() -> None:
    """Client 0 knows of 10 cats, client 1 of 10 dogs; each 20 unknown samples count as 10 cats and 10 dogs: shares of
    the cats are 20:10, of the dogs 10:20. Client 2 has only unknown ones, as many as half of these.
    """
    labels = np.array([0] * 10 + [1] * 10 + [-1] * 20 * 2 + [-1] * 10)
    parts = [np.r_[0:10, 20:40], np.r_[10:20, 40:60], np.r_[60:70]]
    test = np.repeat([0, 1], 350)
    spread = split_like(labels, parts, test, 2, np.random.default_rng(0))
    assert label_histogram(test, spread, 2).tolist() == [[200, 100], [100, 200], [50, 50]]
    nothing = split_like(np.full(6, -1), [np.arange(4), np.arange(4, 6)], test, 2, np.random.default_rng(0))
    assert label_histogram(test, nothing, 2) == pytest.approx(np.array([[233, 233], [117, 117]]), abs=1)


def test_too_few_places_for_all_classes() -> None:
    with pytest.raises(ValueError, match=r"4 clients .* with 2 classes each .* cannot hold all 10 classes"):
        partition(make_labels(), 4, NUM_CLASSES, PartitionConfig(kind="classes_per_client"), 0)


def test_more_classes_per_client_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"`partition.classes_per_client` \(=11\) .*number of classes \(=10\)"):
        partition(make_labels(), 4, NUM_CLASSES, PartitionConfig(kind="classes_per_client", classes_per_client=11), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dirichelt"}, r"`partition.kind` \(=dirichelt\) must be one of iid, .*Did you mean dirichlet\?"),
        ({"dirichlet_alpha": 0.0}, r"`partition.dirichlet_alpha` \(=0.0\) must be positive"),
        ({"dirichlet_alpha": float("inf")}, r"`partition.dirichlet_alpha` \(=inf\) must be positive and finite"),
        ({"quantity_alpha": -1.0}, r"`partition.quantity_alpha` \(=-1.0\)"),
        ({"classes_per_client": 0}, r"`partition.classes_per_client` \(=0\) must be at least 1"),
        ({"min_samples": 0}, r"`partition.min_samples` \(=0\) must be at least 1"),
        ({"partitioner_args": "alpha=1"}, r"`partition.partitioner_args` \(=alpha=1\) must be a JSON object"),
        ({"partitioner_args": "[1]"}, r"must be a JSON object"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartitionConfig(**changes)


def test_config_is_hashable() -> None:
    assert hash(PartitionConfig()) == hash(PartitionConfig())


# ---------------------------------------------------------------------------------------------- histogram, split_like


def test_label_histogram() -> None:
    parts = [np.array([0, 1, 3]), np.array([2]), np.array([], dtype=np.int64)]
    counts = label_histogram(np.array([2, 0, 1, 2]), parts, 4)
    assert counts.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_split_like_gives_each_client_its_share_of_each_class(seed: int) -> None:
    labels, others = make_labels(5000, seed), make_labels(1700, seed + 100)
    parts = dirichlet(labels, 8, 0.3, NUM_CLASSES, np.random.default_rng(seed))
    counts = label_histogram(labels, parts, NUM_CLASSES)
    test_parts = split_like(labels, parts, others, NUM_CLASSES, np.random.default_rng(seed))
    assert_is_partition(test_parts, len(others))
    expected = counts / counts.sum(0) * np.bincount(others, minlength=NUM_CLASSES)
    test_counts = label_histogram(others, test_parts, NUM_CLASSES)
    assert np.abs(test_counts - expected).max() <= 1
    assert (test_counts[counts == 0] == 0).all()


def test_split_like_spreads_unknown_classes_evenly_and_is_deterministic() -> None:
    labels, others = make_labels(500) % 9, np.full(40, 9)
    parts = iid(labels, 4, np.random.default_rng(0))
    one, again = (split_like(labels, parts, others, NUM_CLASSES, np.random.default_rng(1)) for _ in range(2))
    assert [len(part) for part in one] == [10] * 4
    assert all(map(np.array_equal, one, again))


# ------------------------------------------------------------------------------------------------------ flwr-datasets

needs_flwr_datasets = pytest.mark.skipif(
    importlib.util.find_spec("flwr_datasets") is None, reason="the optional package flwr-datasets is not installed"
)


def test_flwr_datasets_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flwr_datasets.partitioner", None)
    config = PartitionConfig(kind="flwr_datasets:IidPartitioner")
    with pytest.raises(
        ValueError, match=r"IidPartitioner\) needs the package flwr-datasets: `pip install flwr-datasets`"
    ):
        partition(make_labels(), 4, NUM_CLASSES, config, 0)


@needs_flwr_datasets
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IidPartitioner", "{}"),
        ("DirichletPartitioner", '{"alpha": 0.5}'),
        ("PathologicalPartitioner", '{"num_classes_per_partition": 3}'),
    ],
)
def test_flwr_datasets(name: str, arguments: str) -> None:
    labels = make_labels()
    config = PartitionConfig(kind=f"flwr_datasets:{name}", partitioner_args=arguments)
    parts, again = (partition(labels, 10, NUM_CLASSES, config, 3) for _ in range(2))
    assert_is_partition(parts, len(labels))
    assert all(map(np.array_equal, parts, again))


@needs_flwr_datasets
@pytest.mark.filterwarnings("ignore:The sum of partition sizes")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("NoSuchPartitioner", "{}", "must name one of .*IidPartitioner"),
        ("DirichletPartitioner", "{}", r"does not take `partition.partitioner_args` \(=\{\}\).*alpha"),
        ("IidPartitioner", '{"num_partitions": 3}', r"makes 3 parts, not `num_clients` \(=10\)"),
        ("SizePartitioner", f'{{"partition_sizes": {[50] * 10}}}', "leaves out 1500 samples"),
    ],
)
def test_flwr_datasets_errors(name: str, arguments: str, message: str) -> None:
    config = PartitionConfig(kind=f"flwr_datasets:{name}", partitioner_args=arguments)
    with pytest.raises(ValueError, match=message):
        partition(make_labels(), 10, NUM_CLASSES, config, 0)


# ---------------------------------------------------------------------------------------------- beside other samples


def test_samples_held_already_count_for_the_smallest_client() -> None:
    """Two samples for three clients of at least 2, who hold 1, 2 and 2: only the first client lacks one.

    Without what they hold, 6 samples would be needed. Of the draws of an iid deal, one that gives client 0 something
    is taken.
    """
    labels, config = np.array([0, 1]), PartitionConfig(kind="iid", min_samples=2)
    for seed in range(20):
        parts = partition(labels, 3, 2, config, seed, held=[1, 2, 2])
        assert len(parts[0]) == 1
        assert_is_partition(parts, 2)
    with pytest.raises(ValueError, match=r"need 6 samples, but there are 2"):
        partition(labels, 3, 2, config, 0, held=[0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_spread(kind: str) -> None:
    parts = partition(np.array([], dtype=np.int64), 3, 10, PartitionConfig(kind=kind), 0, held=[2, 2, 2])
    assert [len(part) for part in parts] == [0, 0, 0]


def test_few_labelled_samples_may_leave_clients_without() -> None:
    config = LabeledPartitionConfig(kind="iid")
    parts = partition(np.arange(4), 9, NUM_CLASSES, config, 0)
    assert sorted(map(len, parts)) == [0] * 5 + [1] * 4
    with pytest.raises(ValueError, match=r"\(`labeled_partition.min_samples`\) need 9 samples, but there are 4\. Take"):
        partition(np.arange(4), 9, NUM_CLASSES, replace(config, min_samples=1), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "iidd"}, r"`labeled_partition.kind` \(=iidd\)"),
        ({"dirichlet_alpha": 0.0}, r"`labeled_partition.dirichlet_alpha` \(=0.0\)"),
        ({"min_samples": -1}, r"`labeled_partition.min_samples` \(=-1\) must be at least 0"),
        ({"partitioner_args": "1"}, r"`labeled_partition.partitioner_args` \(=1\)"),
    ],
)
def test_errors_of_the_labelled_law_name_its_key(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabeledPartitionConfig(**changes)


def test_recipes_name_the_key_of_the_labelled_law() -> None:
    config = LabeledPartitionConfig(kind="classes_per_client", classes_per_client=11)
    with pytest.raises(ValueError, match=r"`labeled_partition.classes_per_client` \(=11\)"):
        partition(make_labels(), 4, NUM_CLASSES, config, 0)
    unequal = LabeledPartitionConfig(kind="quantity_skew", quantity_alpha=0.01, min_samples=200)
    with pytest.raises(
        ValueError, match=r"`labeled_partition.min_samples` \(=200\).*larger labeled_partition.quantity"
    ):
        partition(make_labels(), 9, NUM_CLASSES, unequal, 0)
