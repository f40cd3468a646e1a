"""Bags: who is in which, what is counted, noise on counts, and how the record holds them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.config import load_config
from fedlabel.data.federation import build_federation
from fedlabel.data.labels.bags import draw_bags, noisy_counts
from fedlabel.data.labels.supervision import KIND_NAMES, Supervision
from fedlabel.data.labels.supervision_config import LabelKind, MixPart, SupervisionConfig
from fedlabel.data.partition import PartitionConfig
from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.data.skew import SkewConfig

LABELS = np.random.default_rng(0).integers(0, 3, 1000)
HOLDERS = [np.arange(0, 503), np.arange(503, 1000)]
BAGS = LabelKind(kind="bags", label_rate=None, bag_size=8)


def draw(part: LabelKind = BAGS, seed: int = 0, place: int = 0):
    return draw_bags(LABELS, HOLDERS, 3, part, None, seed, place)


def test_bags_have_their_size_lie_in_one_client_and_count_its_classes() -> None:
    bag, counts = draw()
    sizes = torch.bincount(bag)
    assert sizes.tolist() == [8] * 62 + [7] + [8] * 62 + [1]
    assert bag[:503].max() < bag[503:].min()
    for number in range(len(counts)):
        assert counts[number].tolist() == np.bincount(LABELS[bag.numpy() == number], minlength=3).tolist()


def test_bags_are_drawn_from_the_seed() -> None:
    assert torch.equal(draw(seed=1).bag, draw(seed=1).bag)
    assert not torch.equal(draw(seed=1).bag, draw(seed=2).bag)


def test_random_sizes() -> None:
    sizes = torch.bincount(draw(replace(BAGS, bag_size=5, bag_size_max=9)).bag)
    whole = sizes[sizes >= 5]
    assert whole.unique().tolist() == [5, 6, 7, 8, 9]
    assert len(sizes) - len(whole) <= 2


def test_sorted_bags_hold_neighbouring_values() -> None:
    dataset = load_dataset(DataConfig(name="digits"), 0)
    labels, pixel = dataset.train.labels.numpy(), 36
    holder = np.arange(len(labels))
    values = dataset.train.images.flatten(1)[:, pixel].numpy()
    assert np.array_equal(dataset.feature(str(pixel), "train"), values)
    bag = draw_bags(labels, [holder], 10, replace(BAGS, bag_size=50), values, 0).bag.numpy()
    for number in range(bag.max()):
        assert values[bag == number].max() <= values[bag == number + 1].min()
    for wrong in ("64", "-1", "left"):
        with pytest.raises(DataError, match=rf"`supervision.bag_feature` \(={wrong}\) must .* 64 pixels .*: 0 to 63"):
            dataset.feature(wrong, "train")


def test_sorted_bags_of_tables_go_by_a_column(tmp_path: Path) -> None:
    """In training as in evaluation, by number or by name."""
    rows = [f"{(7 * i) % 40},{'abcd'[i % 4]},{'yes' if i % 3 else 'no'}" for i in range(40)]
    (tmp_path / "people.csv").write_text("\n".join(["age,ward,ill", *rows]))
    overrides = [
        *("data.name=table", f"data.root={tmp_path}/people.csv", "data.label_column=ill", "num_clients=1"),
        *("data.validation_fraction=0.25", "supervision.kind=bags", "supervision.bag_size=4", "method.name=dllp"),
    ]
    for column in ("age", "ward"):
        config = load_config(overrides=[*overrides, f"supervision.bag_feature={column}"])
        federation = build_federation(
            config.data, config.partition, None, config.supervision, config.skew, 1, "test", False, 0
        )
        assert federation.test_bags is not None
        for part, bag in (("train", federation.record.bag), ("test", federation.test_bags.bag)):
            values = federation.dataset.tables[part].column(column)
            groups = [values[(bag == number).numpy()] for number in range(int(bag.max()) + 1)]
            assert len(groups) > 1
            assert all(max(one) <= min(after) for one, after in pairwise(groups)), (column, groups)
    with pytest.raises(DataError, match=r"`supervision.bag_feature` \(=wards\) .* age, ward\. Did you mean ward\?"):
        federation.dataset.feature("wards", "train")


@pytest.mark.parametrize("exact", [[20, 12], [0, 5], [7, 0, 3], [0, 0, 0, 4]])
def test_noisy_counts_stay_counts(exact: list[int]) -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([noisy_counts(np.array(exact), 0.5, rng) for _ in range(500)])
    assert (drawn >= 0).all()
    assert (drawn.sum(1) == sum(exact)).all()
    assert len(np.unique(drawn, axis=0)) > 3
    exactly = np.stack([noisy_counts(np.array(exact), 1e9, rng) for _ in range(20)])
    assert (exactly == exact).all()


def test_noise_of_two_classes_is_epsilon_private() -> None:
    """P(k + 1) / P(k) = exp(-epsilon) for k >= 0, so one sample more or less changes no probability by more."""
    rng = np.random.default_rng(1)
    error = np.array([noisy_counts(np.array([500, 500]), 0.5, rng)[1] - 500 for _ in range(40_000)])
    shares = np.array([(error == k).mean() for k in range(-3, 4)])
    assert shares[3] == pytest.approx((1 - np.exp(-0.5)) / (1 + np.exp(-0.5)), rel=0.05)
    np.testing.assert_allclose(shares[4:] / shares[3:-1], np.exp(-0.5), rtol=0.1)
    np.testing.assert_allclose(shares[:3], shares[:3:-1], rtol=0.1)


def test_parts_of_a_mix_have_noise_of_their_own() -> None:
    """Equal bags twice: the difference of their counts would else be exact."""
    labels, holders = np.ones(400, dtype=np.int64), [np.arange(400)]
    part = replace(BAGS, count_epsilon=0.3)
    first, second = (draw_bags(labels, holders, 2, part, None, 0, place).counts[:, 1] for place in (0, 1))
    assert not torch.equal(first, second)
    one, two = draw(place=0), draw(place=1)
    assert not torch.equal(one.bag, two.bag)


def federation(supervision: SupervisionConfig, **changes: bool):
    return build_federation(
        DataConfig(name="digits"),
        PartitionConfig(dirichlet_alpha=0.5),
        None,
        supervision,
        SkewConfig(),
        5,
        "test",
        changes.get("all_labels", False),
        0,
    )


IN_BAGS = SupervisionConfig(kind="bags", label_rate=None, bag_size=8)


def test_a_federation_in_bags() -> None:
    fed = federation(IN_BAGS)
    assert not fed.record.has_supervision.any()
    for client in range(5):
        known, truth = fed.supervision(client), fed.hidden_labels(client)
        assert (known.bag >= 0).all()
        assert known.kind.unique().tolist() == [KIND_NAMES.index("bag")]
        for number in range(len(known.bag_counts)):
            expected = torch.bincount(truth[known.bag == number], minlength=10)
            assert torch.equal(known.bag_counts[number], expected)
    audit = fed.audit()["bags"]
    assert sum(size * number for size, number in enumerate(audit["sizes"])) == sum(map(len, fed.parts))
    assert audit["wrong_counts"] == 0
    assert federation(replace(IN_BAGS, count_epsilon=0.5)).audit()["bags"]["wrong_counts"] > 0


def test_the_hash_sees_bags() -> None:
    hashes = {federation(config).sha256 for config in (IN_BAGS, replace(IN_BAGS, bag_size=9))}
    assert len(hashes) == 2


def test_upper_bound_of_bags_is_all_labels() -> None:
    fed = federation(IN_BAGS, all_labels=True)
    assert len(fed.record.bag_counts) == 0
    assert fed.record.labeled.all()


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_bags_beside_labels(over: str) -> None:
    bags = MixPart(kind="bags", label_rate=None, bag_size=6, share=0.6)
    few = MixPart(kind="few_labels", label_rate=0.5, share=0.4)
    kinds = federation(SupervisionConfig(mix=(bags, few), mix_over=over)).kinds()
    in_bag, labeled = kinds[:, KIND_NAMES.index("bag")], kinds[:, KIND_NAMES.index("label")]
    if over == "clients":
        assert ((in_bag > 0) != (labeled > 0)).all()
        assert (in_bag > 0).sum() == 3
    else:
        assert (in_bag > 0).all()
        assert (labeled > 0).all()


def test_a_record_cannot_cut_a_bag() -> None:
    record = federation(IN_BAGS).supervision(0)
    some = (record.bag == 1) | (record.bag == 4)
    taken = record.rows(some)
    assert sorted(taken.bag.unique().tolist()) == [0, 1]
    assert torch.equal(taken.bag_counts, record.bag_counts[[1, 4]])
    with pytest.raises(ValueError, match="must be non-negative and sum to the number of its samples"):
        record.rows(torch.arange(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag": torch.tensor([0, 0, 1])}, r"bag of sample 2 \(=1\) must lie in \[0, 0\], or be -1"),
        ({"bag": torch.tensor([0.0, 0, -1])}, r"`bag` \(torch.float32 of shape \(3,\)\)"),
        ({"bag": torch.tensor([[0, 1], [0, -1], [-1, -1]])}, "each sample is in one bag, or in none"),
        ({"bag_counts": torch.tensor([[1, 2, 0]])}, r"counts of bag 0 \(=\[1, 2, 0\]\) must .* sum to .* samples, 2"),
        ({"bag_counts": torch.tensor([[3, -1, 0]])}, r"counts of bag 0 \(=\[3, -1, 0\]\) must be non-negative"),
        ({"bag_counts": torch.tensor([[1, 1, 0], [0, 0, 0]])}, r"counts of bag 1 .* at least 1"),
        ({"bag_counts": torch.tensor([[1.0, 0.5, 0.5]])}, r"`bag_counts` \(torch.float32 .* must be int64"),
        ({"bag_counts": torch.tensor([[1, 1]])}, r"`bag_counts` .* of shape \(bags, 3\)"),
    ],
)
def test_malformed_bags_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    good = vars(Supervision.certain(torch.ones(3, 3, dtype=torch.bool)))
    good |= {"bag": torch.tensor([0, 0, -1]), "bag_counts": torch.tensor([[1, 1, 0]])}
    Supervision(**good)
    with pytest.raises(ValueError, match=message):
        Supervision(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_size": None}, r"`supervision.bag_size` \(=None\) must be at least 1 for supervision.kind=bags"),
        ({"bag_size": 0}, r"`supervision.bag_size` \(=0\)"),
        ({"bag_size_max": 7}, r"`supervision.bag_size_max` \(=7\) must be at least supervision.bag_size \(=8\)"),
        ({"count_epsilon": 0.0}, r"`supervision.count_epsilon` \(=0.0\) must be a positive number"),
        (
            {"kind": "few_labels", "label_rate": 0.1},
            r"`supervision.bag_size` \(=8\) cannot be combined with .*few_labels",
        ),
    ],
)
def test_bad_configurations_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BAGS, **changes)  # type: ignore[arg-type]
