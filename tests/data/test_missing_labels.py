"""Data that lack labels: samples of unknown class are trained on and never counted as truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.cohort import Invitation, _audited
from fedlabel.config import load_config
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig
from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import LOADERS, Split, load_dataset
from fedlabel.data.skew import SkewConfig
from fedlabel.experiment import Experiment
from server.observers.base import Round
from server.observers.panel import pseudo_panels

HAS_LABEL = np.arange(1437) % 3 == 0


def forget() -> None:
    load_dataset.cache_clear()
    build_federation.cache_clear()


@pytest.fixture(autouse=True)
def two_thirds_of_digits_lack_a_label(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load_all = LOADERS["digits"]

    def load(config: DataConfig) -> Any:
        whole = load_all(config)
        labels = torch.where(torch.from_numpy(HAS_LABEL), whole.train.labels, -1)
        return whole._replace(train=Split(whole.train.images, labels))

    forget()
    monkeypatch.setitem(LOADERS, "digits", load)
    yield
    forget()


def build(
    num_clients: int = 6,
    partition: PartitionConfig = PartitionConfig(),  # noqa: B008  frozen
    labeled_partition: LabeledPartitionConfig | None = None,
    skew: SkewConfig = SkewConfig(),  # noqa: B008  frozen
    all_labels: bool = False,
    data: DataConfig = DataConfig(),  # noqa: B008  frozen
    **supervision: Any,
) -> Federation:
    told = SupervisionConfig(**supervision)
    return build_federation(data, partition, labeled_partition, told, skew, num_clients, "test", all_labels, 0)


def truth(federation: Federation) -> np.ndarray:
    labels: np.ndarray = federation.dataset.train.labels.numpy()
    return labels


# -------------------------------------------------------------------------------------------------------------- the set


def test_only_samples_with_a_label_are_held_out() -> None:
    data = load_dataset(DataConfig(validation_fraction=0.2), 0)
    assert len(data.validation.labels) == int(0.2 * 479)
    assert (data.validation.labels >= 0).all()
    assert len(data.train.labels) == 1437 - 95
    assert int((data.train.labels < 0).sum()) == 958
    whole = load_dataset(DataConfig(validation_fraction=0.0), 0)
    assert whole.mean[0] == pytest.approx(float(whole.train.images.double().mean() / 255))  # of all samples


def test_a_part_of_the_training_set_is_drawn_from_all_of_it() -> None:
    data = load_dataset(DataConfig(validation_fraction=0.2, train_samples=600), 0)
    assert len(data.train.labels) == 600
    assert 0.6 < float((data.train.labels < 0).float().mean()) < 0.8  # 958 of 1342


def test_an_unknown_class_is_not_the_rest() -> None:
    data = load_dataset(DataConfig(positive_classes=("9", "3")), 0)
    assert data.train.labels.unique().tolist() == [-1, 0, 1]
    assert int((data.train.labels < 0).sum()) == 958


# ----------------------------------------------------------------------------------------------------- who knows what

NAMED_AMOUNTS: list[dict[str, Any]] = [
    {"label_rate": 0.5},
    {"labels_per_class": 5},
    {"labels_total": 70},
    {"labels_per_client": 8},
    {"labels_per_client": 8, "stratified": True},
    {"labels_at": "some_clients", "labeled_clients": 2, "label_rate": None},
    {"labels_at": "server", "labels_total": 100},
    {"kind": "partial", "partial_ratio": 0.3},
    {"kind": "partial", "partial_ratio": 0.3, "candidates": "similar"},
    {"kind": "noisy", "noise_rate": 0.3},
    {"kind": "noisy", "noise_rate": 0.3, "noise": "instance"},
    {"kind": "partial_and_noisy", "partial_ratio": 0.2, "noise_rate": 0.3},
]


@pytest.mark.parametrize("amount", NAMED_AMOUNTS, ids=json.dumps)
def test_labels_are_chosen_and_made_of_those_that_there_are(amount: dict[str, Any]) -> None:
    kind = {} if "kind" not in amount else {"label_rate": None}
    federation = build(**(kind | amount))
    known = federation.record.has_supervision.numpy()
    assert known.any()
    assert (truth(federation)[known] >= 0).all()
    if amount.get("kind") is None:
        assert torch.equal(federation.record.label[known], federation.dataset.train.labels[known])
    everyone = np.concatenate([*federation.parts, federation.server_rows])
    assert sorted(everyone) == list(range(len(truth(federation))))


def test_a_rate_is_of_the_samples_that_have_a_label() -> None:
    federation = build(label_rate=0.5)
    for client, rows in enumerate(federation.parts):
        there = int((truth(federation)[rows] >= 0).sum())
        assert int(federation.supervision(client).labeled.sum()) == there // 2


def test_full_is_every_label_that_there_is_and_so_is_the_upper_bound() -> None:
    there = load_dataset(DataConfig(), 0).train.labels >= 0
    assert torch.equal(build(kind="full").record.labeled, there)
    assert torch.equal(build(all_labels=True, labels_total=5).record.labeled, there)


def test_bags_are_of_samples_whose_classes_can_be_counted() -> None:
    federation = build(kind="bags", bag_size=4, label_rate=None)
    there = federation.dataset.train.labels >= 0
    assert torch.equal(federation.record.bag >= 0, there)
    counts = federation.audit()["bags"]
    assert counts["wrong_counts"] == 0
    assert counts["true_counts_known"] == len(federation.record.bag_counts)


def test_a_mix_over_samples() -> None:
    parts = (MixPart(share=0.4, label_rate=0.5), MixPart("partial", share=0.6, label_rate=None, partial_ratio=0.1))
    federation = build(mix=parts, mix_over="samples")
    known = federation.record.has_supervision.numpy()
    assert (truth(federation)[known] >= 0).all()
    assert federation.kinds()[:, KIND_NAMES.index("candidates")].all()


def test_all_labels_at_the_server_and_all_other_samples_at_the_clients() -> None:
    """The usual setting of semi-supervised learning with labels at the server."""
    federation = build(labels_at="server", kind="full")
    there = np.flatnonzero(truth(federation) >= 0)
    assert np.array_equal(federation.server_rows, there)
    sizes = [len(rows) for rows in federation.parts]
    assert sum(sizes) == 958
    assert max(sizes) - min(sizes) <= 1


def test_a_partition_of_labelled_samples_of_its_own() -> None:
    law = LabeledPartitionConfig(kind="classes_per_client", classes_per_client=2)
    federation = build(labeled_partition=law, kind="full")
    labels = truth(federation)
    assert all(len(set(labels[rows]) - {-1}) <= 2 for rows in federation.parts)


def test_more_labels_than_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"more labels than there are samples that have one: the training set has 432\. "
    ):
        build(labels_total=500)
    with pytest.raises(ValueError, match=r"more labels than there are samples that have one: class 0 has \d+\. Take"):
        build(labels_per_class=100)


@pytest.mark.parametrize("key", ["labeled_imbalance", "unlabeled_imbalance"])
def test_a_tail_by_class_needs_classes(key: str) -> None:
    if key == "labeled_imbalance":
        kept = build(kind="full", skew=SkewConfig(labeled_imbalance=10.0))
        assert kept.num_without_label == 958
        assert kept.labeled.sum() < 300
    else:
        with pytest.raises(
            ValueError, match=r"`skew.unlabeled_imbalance` \(=10\) cuts .* 958 of these \d+ have no label"
        ):
            build(skew=SkewConfig(unlabeled_imbalance=10.0))


def test_classes_that_nobody_labels() -> None:
    federation = build(kind="full", skew=SkewConfig(unlabeled_only_classes=("2", "3")))
    known = truth(federation)[federation.labeled]
    assert sorted(set(known)) == [0, 1, 4, 5, 6, 7, 8, 9]


# --------------------------------------------------------------------------------------------- never counted as truth


def test_the_audit_and_the_figure_tell_unknown_from_known() -> None:
    federation = build(kind="full")
    counts = federation.histograms()
    assert federation.true_classes == (*"0123456789", "unknown")
    assert counts.shape == (len(KIND_NAMES), 6, 11)
    assert counts[0, :, :10].sum() == 0
    assert counts[0, :, 10].sum() == 958
    assert counts[1, :, 10].sum() == 0
    assert counts[1].sum() == federation.labeled.sum()
    assert federation.audit()["without_label"] == 958


def test_noisy_labels_of_unknown_truth_are_no_errors() -> None:
    federation = build(kind="full")
    everywhere = replace(federation.record, annotations=torch.zeros(len(truth(federation)), 1, dtype=torch.int64))
    counts = replace(federation, record=everywhere).noise_counts()
    there = truth(federation)[truth(federation) >= 0]
    assert counts[0, :, 0].tolist() == np.bincount(there, minlength=10).tolist()
    assert counts.sum() == len(there)


def test_who_has_few_labels_and_hides_most_is_told() -> None:
    assert build(kind="full").warnings() == []
    federation = build(label_rate=0.1)
    (said,) = federation.warnings()
    assert said == (
        "958 of 1,390 training samples have no label in the data. "
        f"Of the 432 labels that there are, supervision uses {federation.labeled.sum()} and hides the others; "
        "supervision.kind=full uses all."
    )


def test_nothing_is_said_of_data_that_have_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data.test_missing_labels.HAS_LABEL", np.ones(1437, bool))
    federation = build()
    assert federation.warnings() == []
    assert federation.true_classes == tuple("0123456789")
    assert federation.audit()["without_label"] == 0


def experiment(*overrides: str) -> Experiment:
    shared = ("model.name=mlp", "num_clients=4", "device=cpu", "training.local_steps=3", "partition.kind=iid")
    return Experiment(load_config(overrides=[*shared, *overrides]))


def counted(run: Experiment) -> dict[str, list[float]]:
    update = run.train(0, run.initial_state, 1)
    return _audited(update, run, 0, audit=True)[1]


def test_the_panel_shows_samples_whose_class_nobody_knows() -> None:
    run = experiment("method.name=fixmatch", "method.confidence_threshold=0", "supervision.kind=full")
    tally: Any = SimpleNamespace(client_counts={0: {}}, invitation=Invitation(1, run.initial_state, {}, {}))
    figures = pseudo_panels(run, Round(1, tally, lambda client: {}, 0.0, is_evaluated=True), remarkable=False)
    (figure,) = figures.values()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles
    assert all(title.endswith("true: unknown") for title in titles)


def test_pseudo_labels_are_compared_with_known_classes_alone() -> None:
    told = ("method.name=fixmatch", "method.confidence_threshold=0", "supervision.label_rate=0.5")
    counts = counted(experiment(*told))
    run = experiment(*told)
    update = run.train(0, run.initial_state, 1)
    assert update.pseudo is not None
    drawn = run.federation.hidden_labels(0)[update.pseudo_index]
    assert sum(counts["drawn"]) == int((drawn >= 0).sum()) < len(drawn)
    assert "drawn" not in counted(experiment(*told[:2], "supervision.kind=full"))
