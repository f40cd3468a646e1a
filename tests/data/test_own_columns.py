"""Columns that say whose a sample is, and in which bag: real clients, and published counts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.config import load_config
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig
from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.skew import SkewConfig
from fedlabel.experiment import Experiment

CLASSES = ("benign", "malignant")
TRUTH = np.random.default_rng(3).integers(0, 2, 120)
BAG_SIZE = 6
"""Rows 0 to 5 are bag 0, and so on; bags 0, 4, 8, ... are of hospital 10, the next ones of hospital 2."""
SITES = ("10", "2", "33", "04")


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def row(place: int, truth: int, label: bool = True) -> list[Any]:
    bag = place // BAG_SIZE
    return [3 * truth + place % 7, place % 5, CLASSES[truth] if label else "", f"ward {bag}", SITES[bag % 4]]


HEADER = ["size", "age", "outcome", "bag", "site"]


def counts() -> np.ndarray:
    ones = TRUTH.reshape(-1, BAG_SIZE).sum(1)
    return np.stack([BAG_SIZE - ones, ones], 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training rows without any label, labelled test rows of two hospitals and one that nobody trains for."""
    write(tmp_path / "train.csv", HEADER, [row(i, int(y), label=False) for i, y in enumerate(TRUTH)])
    write(tmp_path / "labelled.csv", HEADER, [row(i, int(y)) for i, y in enumerate(TRUTH)])
    test = [row(i, i % 2) for i in range(30)]
    for place, line in enumerate(test):
        line[4] = ("2", "33", "77")[place % 3]
    write(tmp_path / "test.csv", HEADER, test)
    rows = [[f"ward {bag}", int(two), int(one)] for bag, (one, two) in enumerate(counts())]
    write(tmp_path / "bags.csv", ["bag", "malignant", "Benign "], rows)
    return tmp_path


BAGS = {"kind": "bags", "label_rate": None, "bags_file": "bags.csv", "bag_column": "bag"}
BY_SITE = PartitionConfig(kind="column", column="site")


def build(
    folder: Path,
    file: str = "train.csv",
    partition: PartitionConfig = BY_SITE,
    num_clients: int = 4,
    skew: SkewConfig = SkewConfig(),  # noqa: B008  frozen
    told: dict[str, Any] = BAGS,
    labeled_partition: LabeledPartitionConfig | None = None,
    **data: Any,
) -> Federation:
    options = {"test_file": "test.csv", "validation_fraction": 0.0} | data
    config = DataConfig("table", str(folder / file), label_column="outcome", **options)
    supervision = SupervisionConfig(**told)
    return build_federation(config, partition, labeled_partition, supervision, skew, num_clients, "test", False, 0)


# -------------------------------------------------------------------------------------------------------------- clients


def test_every_value_of_a_column_is_a_client_in_the_order_of_numbers(folder: Path) -> None:
    federation = build(folder, "labelled.csv", told={"kind": "full"})
    assert federation.names == ("2", "4", "10", "33")  # 04 is the number 4
    sites = np.array(SITES)[np.arange(120) // BAG_SIZE % 4]
    for rows, name in zip(federation.parts, ("2", "04", "10", "33"), strict=True):
        assert rows.tolist() == np.flatnonzero(sites == name).tolist()
    clients = json.loads(federation.to_json())["clients"]
    assert [client["name"] for client in clients] == ["2", "4", "10", "33"]
    assert "site" not in federation.dataset.tables["train"].names  # no feature
    assert federation.dataset.tables["train"].names == ("size", "age", "bag")


def test_a_client_is_judged_on_its_own_rows(folder: Path) -> None:
    federation = build(folder, "labelled.csv", told={"kind": "full"})
    assert [rows.tolist() for rows in federation.test_parts] == [
        list(range(0, 30, 3)),
        [],
        [],
        list(range(1, 30, 3)),
    ]


@pytest.mark.parametrize("change", ["no column", "other sites"])
def test_where_no_test_row_is_of_a_client_they_are_spread_by_class(change: str, folder: Path) -> None:
    lines = read(folder / "test.csv")
    lines = [line[:4] for line in lines] if change == "no column" else [[*line[:4], "x"] for line in lines]
    write(folder / "test.csv", HEADER[: len(lines[0])], lines[1:])
    federation = build(folder, "labelled.csv", told={"kind": "full"})
    assert sorted(np.concatenate(federation.test_parts)) == list(range(30))


def test_labels_at_the_server_and_sites_at_the_clients(folder: Path) -> None:
    federation = build(folder, "labelled.csv", told={"labels_at": "server", "labels_total": 20})
    assert len(federation.server_rows) == 20
    site = np.array(SITES)[np.arange(120) // BAG_SIZE % 4]
    assert all(len(set(site[rows])) == 1 for rows in federation.parts)


def test_an_array_of_an_npz_file_says_whose_a_sample_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    labels, site = np.arange(60) % 2, np.arange(60) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images + 1, "y_test": labels, "site": site}
    np.savez(tmp_path / "set.npz", **arrays)
    config = DataConfig("npz", str(tmp_path / "set.npz"))
    full = SupervisionConfig(kind="full")

    def parts(held_out: float) -> Federation:  # a new fraction each time, or the file would not be read again
        data = replace(config, validation_fraction=held_out)
        return build_federation(data, BY_SITE, None, full, SkewConfig(), 3, "test", False, 0)

    federation = parts(0.2)
    for client, rows in enumerate(federation.parts):
        assert (federation.dataset.train_rows[rows] % 3 == client).all()
    np.savez(tmp_path / "set.npz", **(arrays | {"site": site[:50]}))
    with pytest.raises(ValueError, match=r"`partition.column` \(=site\): .*of shape \(50,\); it must hold .* \(60,\)"):
        parts(0.1)
    del arrays["site"]
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=r"`partition.column` \(=site\): .*no such array, only x_train, y_train"):
        parts(0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_clients": 3},
            r"`partition.column` \(=site\) has 4 different values \(2, 4, 10, 33\), .*num_clients=4 \(=3",
        ),
        (
            {"partition": PartitionConfig(kind="column", column="size")},
            r"`partition.column` \(=size\) has \d+ different values \(0, 1, 2, 3, 4, … ",
        ),
        (
            {"partition": PartitionConfig(kind="column", column="sites")},
            r"`partition.column`: .*has no column sites, only .*Did you mean site\?",
        ),
        (
            {"partition": PartitionConfig(kind="column", column="outcome")},
            r"`partition.column` \(=outcome\) is the column of the labels",
        ),
        (
            {"partition": replace(BY_SITE, min_samples=31)},
            r"`partition.min_samples` \(=31\): one of the clients that `partition.column` .* makes has 30",
        ),
    ],
)
def test_columns_that_make_no_clients(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(folder, "labelled.csv", **({"told": {"kind": "full"}} | changes))


def test_a_row_of_nobody(folder: Path) -> None:
    lines = [row(i, int(y)) for i, y in enumerate(TRUTH)]
    lines[7][4] = lines[9][4] = "NA"
    write(folder / "labelled.csv", HEADER, lines)
    with pytest.raises(ValueError, match=r"says nothing of 2 of 120 training samples \(the first is number 8\): write"):
        build(folder, "labelled.csv", told={"kind": "full"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "column"}, r"`partition.kind` \(=column\) and `partition.column` \(=None\) belong together"),
        ({"column": "site"}, r"`partition.kind` \(=dirichlet\) and `partition.column` \(=site\) belong together"),
        ({"kind": "colum"}, r"`partition.kind` \(=colum\) must be one of .*Did you mean column\?"),
    ],
)
def test_kind_and_column_belong_together(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartitionConfig(**keys)


def test_images_have_no_columns() -> None:
    with pytest.raises(
        ValueError, match=r"`partition.column` \(=site\) is for tables and data.name=npz or arrays, not for digits"
    ):
        build_federation(DataConfig(), BY_SITE, None, SupervisionConfig(), SkewConfig(), 4, "test", False, 0)


# ----------------------------------------------------------------------------------------------------------------- bags


@pytest.mark.parametrize("partition", [BY_SITE, PartitionConfig(kind="iid"), PartitionConfig(dirichlet_alpha=0.5)])
def test_published_counts_of_data_without_any_label(partition: PartitionConfig, folder: Path) -> None:
    federation = build(folder, partition=partition)
    assert federation.num_without_label == 120
    assert not federation.record.has_supervision.any()
    bag = federation.record.bag
    assert (bag >= 0).all()
    ones = federation.record.bag_counts[bag][:, 1]
    assert ones.tolist() == np.repeat(counts()[:, 1], BAG_SIZE).tolist()
    for client, rows in enumerate(federation.parts):  # whole bags: their counts hold at a client
        mine = federation.supervision(client)
        assert int(mine.bag_counts.sum()) == len(rows)
        assert len(mine.bag_counts) == len(rows) // BAG_SIZE
    audit = federation.audit()["bags"]
    assert audit == {"sizes": [0] * BAG_SIZE + [20], "true_counts_known": 0, "wrong_counts": 0}
    assert federation.test_bags is not None  # of the test rows' labels
    assert federation.test_bags.counts.sum() == 30


def test_where_labels_are_there_published_counts_are_compared_with_them(folder: Path) -> None:
    lines = read(folder / "bags.csv")
    lines[3][1:] = lines[3][:0:-1] if lines[3][1] != lines[3][2] else ["0", str(BAG_SIZE)]
    write(folder / "bags.csv", lines[0], lines[1:])
    audit = build(folder, "labelled.csv").audit()["bags"]
    assert (audit["true_counts_known"], audit["wrong_counts"]) == (20, 1)


def test_clients_are_judged_on_the_class_mix_that_the_counts_tell(folder: Path) -> None:
    write(folder / "test.csv", HEADER[:3], [row(i, i % 2)[:3] for i in range(60)])
    federation = build(folder)
    assert federation.test_bags is None
    labels = federation.dataset.test.labels.numpy()
    for client, rows in enumerate(federation.test_parts):
        share = federation.supervision(client).bag_counts.numpy().sum(0) / counts().sum(0) * 30
        assert np.abs(np.bincount(labels[rows], minlength=2) - share).max() <= 1


def test_rows_in_no_bag_are_rows_of_which_nothing_is_known(folder: Path) -> None:
    lines = [row(i, int(y), label=False) for i, y in enumerate(TRUTH)]
    for line in lines[:BAG_SIZE]:
        line[3] = ""
    write(folder / "train.csv", HEADER, lines)
    write(folder / "bags.csv", ["bag", *CLASSES], [[f"ward {bag}", *pair] for bag, pair in enumerate(counts()) if bag])
    federation = build(folder, partition=PartitionConfig(kind="iid"))
    assert federation.record.bag[:BAG_SIZE].tolist() == [-1] * BAG_SIZE
    assert len(federation.record.bag_counts) == 19


def test_a_mix_of_clients_with_published_bags_and_with_labels(folder: Path) -> None:
    bags = MixPart(share=0.5, **BAGS)
    federation = build(folder, "labelled.csv", told={"mix": (bags, MixPart("full", share=0.5, label_rate=None))})
    known = federation.kinds()
    assert sorted((known > 0).sum(1)) == [1, 1, 1, 1]
    assert sorted(known[:, 7]) == [0, 0, 30, 30]


def change(name: str, place: int, column: int, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = read(folder / name)
        lines[place][column] = str(value)
        write(folder / name, lines[0], lines[1:])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("bags.csv", 3, 1, 9), r"the counts of bag ward 2 .* sum to \d+, but 6 training samples are in it\.$"),
        (
            change("bags.csv", 3, 1, -1),
            r"bag ward 2 has -1 in column malignant; it must be how many .* whole number from 0",
        ),
        (change("bags.csv", 3, 1, 1.5), r"bag ward 2 has 1.5 in column malignant"),
        (change("bags.csv", 3, 1, ""), r"bag ward 2 has nothing in column malignant"),
        (change("bags.csv", 3, 1, "1e400"), r"bag ward 2 has 1e400 in column malignant"),
        (change("bags.csv", 3, 1, "nan"), r"bag ward 2 has nan in column malignant"),
        (change("bags.csv", 3, 0, "ward 1"), r"bag ward 1 has two rows"),
        (change("bags.csv", 3, 0, ""), r"data row 3 names no bag in its first column, bag"),
        (change("bags.csv", 3, 0, "ward x"), r"it has no row of 1 bags that training samples are in: ward 2"),
        (change("bags.csv", 0, 1, "malign"), r"column malign is none of the classes benign, malignant, or a number"),
        (change("bags.csv", 0, 1, "0"), r"columns 0 and Benign are of one class"),
        (change("train.csv", 3, 3, "ward 99"), r"has no row of 1 bags that training samples are in: ward 99"),
        (change("train.csv", 3, 3, ""), r"bag ward 0 .* but 5 training samples are in it\.$"),
        (change("train.csv", 3, 3, "ward 1"), r"bag ward 0 .*but 5 training .* 1 other bags do not agree, either\.$"),
        (lambda folder: (folder / "bags.csv").unlink(), r"there is no file .*bags.csv. It must lie below data.root"),
        (lambda folder: write(folder / "bags.csv", ["bag"], [["ward 0"]]), "it has no column of a class"),
        (lambda folder: (folder / "bags.csv").write_bytes(b"\xff\x00\x01"), r"cannot be read as CSV"),
    ],
)
def test_counts_that_do_not_hold_are_named(edit: Callable[[Path], object], message: str, folder: Path) -> None:
    edit(folder)
    with pytest.raises(ValueError, match=rf"`supervision.bags_file` \(=bags.csv\): .*{message}"):
        build(folder)


def test_a_bag_without_a_sample_is_passed_over_if_its_counts_are_0(folder: Path) -> None:
    with (folder / "bags.csv").open("a") as file:
        file.write("ward 50,0,0\n")
    assert len(build(folder).record.bag_counts) == 20


@pytest.mark.parametrize("options", [{"validation_fraction": 0.1}, {"test_file": None}])
def test_bags_are_not_held_out(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"held out: set data.validation_fraction=0, and data.test_file to a file of its"
    ):
        build(folder, "labelled.csv", **options)


def test_a_bag_of_two_clients_is_refused(folder: Path) -> None:
    change("train.csv", 2, 4, "33")(folder)
    with pytest.raises(
        ValueError, match=r"`partition.column` \(=site\): 1 bags of supervision.bags_file have samples of several"
    ):
        build(folder)


def test_the_tail_of_a_bag_is_not_cut(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"some samples, but not all, have gone elsewhere.*leave out skew"):
        build(folder, "labelled.csv", skew=SkewConfig(labeled_imbalance=4.0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bag_column": None}, r"`supervision.bags_file` \(=bags.csv\) and `supervision.bag_column` \(=None\) belong"),
        ({"bag_size": 4}, r"`supervision.bag_size` \(=4\) cannot be combined with supervision.bags_file"),
        ({"labels_total": 4}, r"`supervision.labels_total` \(=4\) cannot be combined with supervision.bags_file"),
        ({"label_rate": 0.5}, r"`supervision.label_rate` \(=0.5\) cannot be combined with supervision.bags_file"),
        ({"kind": "full"}, r"`supervision.bags_file` \(=bags.csv\) cannot be combined with supervision.kind=full"),
        (
            {"bags_file": None, "bag_column": None},
            r"`supervision.bag_size` \(=None\) must be at least 1 .*bags_file, with",
        ),
    ],
)
def test_published_bags_stand_alone(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**(BAGS | keys))


def test_mixes_keep_bags_whole() -> None:
    part = MixPart(share=0.4, **BAGS)
    with pytest.raises(ValueError, match=r"several parts with a bags_file \(bags.csv, bags.csv\)"):
        SupervisionConfig(mix=(part, part))
    with pytest.raises(ValueError, match=r"`supervision.mix_over` \(=samples\) would take bags of bags.csv apart"):
        SupervisionConfig(mix=(part,), mix_over="samples")


def test_a_method_for_bags_learns_from_them(folder: Path) -> None:
    overrides = [
        *(
            "data.name=table",
            f"data.root={folder / 'train.csv'}",
            "data.test_file=test.csv",
            "data.label_column=outcome",
        ),
        *("supervision.kind=bags", "supervision.bags_file=bags.csv", "supervision.bag_column=bag", "num_clients=4"),
        *("partition.kind=column", "partition.column=site", "method.name=count_likelihood", "model.name=mlp"),
        *("device=cpu", "training.local_steps=20", "training.lr=0.1", "training.batch_size=12"),
    ]
    run = Experiment(load_config(overrides=overrides))
    state = run.initial_state
    losses = []
    for round_number in range(1, 4):
        update = run.train(0, state, round_number)
        losses.append(update.sums["train/loss"][0] / update.sums["train/loss"][1])
        (part,) = update.parts.values()
        state = part.state
    assert losses[-1] < losses[0]
    assert not any(torch.equal(state[name], run.initial_state[name]) for name in state)
