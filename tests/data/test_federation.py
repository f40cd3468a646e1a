"""Who holds what, put together."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlabel.data.datasets import DataConfig, Split
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.partition import PartitionConfig
from fedlabel.data.supervision import SupervisionConfig


def build(num_clients: int = 8, all_labels: bool = False, seed: int = 0, **supervision: object) -> Federation:
    return build_federation(
        DataConfig(),
        PartitionConfig(dirichlet_alpha=0.5),
        SupervisionConfig(**({"label_rate": 0.2} | supervision)),  # type: ignore[arg-type]
        num_clients,
        "test",
        all_labels,
        seed,
    )


def test_every_sample_has_one_owner_and_its_label_is_known_or_hidden() -> None:
    federation = build()
    n = len(federation.dataset.train.labels)
    assert sorted(np.concatenate(federation.parts)) == list(range(n))
    for client, rows in enumerate(federation.parts):
        supervision = federation.supervision(client)
        assert int(supervision.labeled.sum()) == int(0.2 * len(rows))
        truth = federation.hidden_labels(client)
        assert torch.equal(supervision.label[supervision.labeled], truth[supervision.labeled])
        assert supervision.candidates[~supervision.labeled].all()
    labeled, unlabeled = federation.histograms()
    assert labeled.sum() + unlabeled.sum() == n
    assert (labeled.sum(1) == [int(0.2 * len(rows)) for rows in federation.parts]).all()


def test_clients_are_judged_on_their_own_class_mix() -> None:
    federation = build()
    train, test = federation.dataset.train.labels.numpy(), federation.dataset.test.labels.numpy()
    assert sorted(np.concatenate(federation.test_parts)) == list(range(len(test)))
    for rows, test_rows in zip(federation.parts, federation.test_parts, strict=True):
        own = np.bincount(train[rows], minlength=10) / len(rows)
        judged = np.bincount(test[test_rows], minlength=10) / max(len(test_rows), 1)
        assert np.abs(own - judged).max() < 0.1


def test_upper_bound_sees_every_label() -> None:
    assert build(all_labels=True).labeled.all()


def test_json_lists_everyone_and_its_hash_tells_federations_apart() -> None:
    first, again, other = (json.loads(build(seed=seed).to_json()) for seed in (0, 0, 1))
    assert first == again
    assert first["sha256"] != other["sha256"]
    assert len(first["clients"]) == 8
    assert sum(len(c["labeled"]) + len(c["unlabeled"]) for c in first["clients"]) == 1294


def test_federation_without_a_label_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"leaves no label at any of `num_clients` \(=8\).*raise supervision.label_rate"
    ):
        build(label_rate=0.0)
    with pytest.raises(ValueError, match="leaves no label"):
        build(num_clients=100, label_rate=0.01)


# ---------------------------------------------------------------------------------------------- who holds the labelled


@pytest.mark.parametrize(
    ("amount", "count"), [({}, int(0.2 * 1294)), ({"labels_total": 70}, 70), ({"labels_per_class": 6}, 60)]
)
def test_labels_at_the_server_are_taken_out_before_the_partition(amount: dict, count: int) -> None:
    federation = build(labels_at="server", **amount)
    assert len(federation.server_rows) == federation.labeled.sum() == count
    everyone = np.concatenate([federation.server_rows, *federation.parts])
    assert sorted(everyone) == list(range(1294))
    assert (np.diff(federation.server_rows) > 0).all()
    supervision = federation.server_supervision()
    assert torch.equal(supervision.label, federation.dataset.train.labels[federation.server_rows])
    assert not any(federation.supervision(client).labeled.any() for client in range(8))
    labeled, unlabeled = federation.histograms()
    assert (labeled.sum(), unlabeled.sum()) == (0, 1294 - count)
    assert json.loads(federation.to_json())["server"] == federation.server_rows.tolist()


def test_clients_hold_the_class_mix_that_is_promised_also_beside_a_server() -> None:
    """With infinite alpha every client has an eighth of each class of what the server left."""
    federation = build_federation(
        DataConfig(),
        PartitionConfig(dirichlet_alpha=1e9),
        SupervisionConfig(labels_at="server", labels_per_class=50),
        8,
        "test",
        False,
        0,
    )
    labels = federation.dataset.train.labels.numpy()
    left = np.bincount(labels, minlength=10) - 50
    counts = federation.histograms()[1]
    assert np.abs(counts - left / 8).max() <= 1


def test_without_labels_at_the_server_it_holds_nothing() -> None:
    federation = build()
    assert len(federation.server_rows) == 0
    assert len(federation.server_supervision().labeled) == 0
    assert json.loads(federation.to_json())["server"] == []


def test_upper_bound_gives_the_clients_what_the_server_held() -> None:
    federation = build(all_labels=True, labels_at="server")
    assert len(federation.server_rows) == 0
    assert federation.labeled.all()
    assert sorted(np.concatenate(federation.parts)) == list(range(1294))


def test_some_clients_have_labels() -> None:
    federation = build(labels_at="some_clients", labeled_clients=2, label_rate=None)
    shares = [float(federation.supervision(client).labeled.float().mean()) for client in range(8)]
    assert sorted(shares) == [0.0] * 6 + [1.0] * 2
    assert build(all_labels=True, labels_at="some_clients", labeled_clients=2).labeled.all()


def test_a_server_that_takes_all_leaves_the_clients_nothing() -> None:
    with pytest.raises(ValueError, match=r"`partition.min_samples`\) need 16 samples, but there are 14"):
        build(labels_at="server", labels_total=1280)


def poison(federation: Federation) -> Federation:
    """The labels that nobody knows are set to -1."""
    train = federation.dataset.train
    labels = torch.where(torch.from_numpy(federation.labeled), train.labels, -1)
    return replace(federation, dataset=replace(federation.dataset, train=Split(train.images, labels)))


@pytest.mark.parametrize(
    "supervision",
    [{}, {"labels_at": "server"}, {"labels_at": "some_clients", "labeled_clients": 3, "label_rate": None}],
)
def test_supervision_never_reads_a_hidden_label(supervision: dict) -> None:
    federation = build(**supervision)
    poisoned = poison(federation)
    for client in range(8):
        assert torch.equal(federation.supervision(client).candidates, poisoned.supervision(client).candidates)
    assert torch.equal(federation.server_supervision().candidates, poisoned.server_supervision().candidates)
