"""Who holds what, put together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedlabel.data.datasets import DataConfig
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
