"""Who holds what, put together."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlabel.data.federation
from fedlabel.config import load_config
from fedlabel.data.federation import Federation, build_federation, shown_clients
from fedlabel.data.labels.supervision import KIND_NAMES, build_supervision
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig
from fedlabel.data.partition import LabeledPartitionConfig, PartitionConfig
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import Split, load_dataset
from fedlabel.data.skew import SkewConfig, client_shift, tail_sizes
from fedlabel.experiment import Experiment


def build(
    num_clients: int = 8,
    all_labels: bool = False,
    seed: int = 0,
    data: DataConfig = DataConfig(),  # noqa: B008  frozen
    partition: PartitionConfig = PartitionConfig(dirichlet_alpha=0.5),  # noqa: B008  frozen
    labeled_partition: LabeledPartitionConfig | None = None,
    skew: SkewConfig = SkewConfig(),  # noqa: B008  frozen
    **supervision: object,
) -> Federation:
    told = SupervisionConfig(**({"label_rate": 0.2} | supervision))  # type: ignore[arg-type]
    return build_federation(data, partition, labeled_partition, told, skew, num_clients, "test", all_labels, seed)


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
    unlabeled, labeled = federation.histograms()[:2]
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


def test_rarity_counts_true_classes_of_everyones_samples() -> None:
    federation = build()
    rare = [3, 8]
    by_hand = []
    for client in range(8):
        truth = federation.hidden_labels(client)
        by_hand.append(sum(int(label) in rare for label in truth) / len(truth))
    assert federation.rarity(("3", "8")).tolist() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match=r"`devices.rare_classes` \(=\[3, x\]\): x is none of the classes"):
        federation.rarity(("3", "x"))


def test_rare_classes_are_the_half_with_the_fewest_samples() -> None:
    """Of 10 digits 5; by a tail that halves each next class the last ones, whatever class has how many by nature."""
    federation = build(skew=SkewConfig(labeled_imbalance=500, unlabeled_imbalance=500))
    assert federation.rarity().tolist() == federation.rarity(tuple("56789")).tolist()
    train = federation.dataset.train
    even = torch.arange(len(train.labels)) % 10  # up to three samples of each class more
    counts = np.bincount(even[federation.parts.rows].numpy(), minlength=10)
    tied = replace(federation, dataset=replace(federation.dataset, train=Split(train.images, even)))
    first = np.sort(np.argsort(counts, kind="stable")[:5])
    assert tied.rarity().tolist() == tied.rarity(tuple(map(str, first))).tolist()


def test_samples_without_a_label_are_not_rare_and_nothing_is_no_share() -> None:
    federation = build()
    train = federation.dataset.train
    unknown = replace(federation, dataset=replace(federation.dataset, train=Split(train.images, train.labels * 0 - 1)))
    assert unknown.rarity(("1",)).tolist() == [0] * 8
    empty = replace(federation, parts=Ragged.of([*list(federation.parts)[:7], np.zeros(0, dtype=np.int64)]))
    assert empty.rarity()[7] == 0


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
    unlabeled, labeled = federation.histograms()[:2]
    assert (labeled.sum(), unlabeled.sum()) == (0, 1294 - count)
    assert json.loads(federation.to_json())["server"] == federation.server_rows.tolist()


def test_clients_hold_the_class_mix_that_is_promised_also_beside_a_server() -> None:
    """With infinite alpha every client has an eighth of each class of what the server left."""
    federation = build(partition=PartitionConfig(dirichlet_alpha=1e9), labels_at="server", labels_per_class=50)
    labels = federation.dataset.train.labels.numpy()
    left = np.bincount(labels, minlength=10) - 50
    counts = federation.histograms()[0]
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


@pytest.mark.parametrize(
    ("amount", "total"),
    [({}, None), ({"labels_total": 40}, 40), ({"labels_per_class": 2}, 20), ({"label_rate": 0.5}, None)],
)
def test_some_clients_have_labels(amount: dict, total: int | None) -> None:
    settings = {"labels_at": "some_clients", "labeled_clients": 2, "label_rate": None} | amount
    federation = build(**settings)
    counts = [int(federation.supervision(client).labeled.sum()) for client in range(8)]
    rate = amount.get("label_rate", 1)
    shared = [int(rate * len(rows)) for rows, count in zip(federation.parts, counts, strict=True) if count]
    assert len(shared) == 2
    assert sum(counts) == (sum(shared) if total is None else total)
    assert build(all_labels=True, **settings).labeled.all()


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
    [
        {},
        {"labels_at": "server"},
        {"labels_at": "some_clients", "labeled_clients": 3, "label_rate": None},
        {"labeled_partition": LabeledPartitionConfig(kind="iid")},
        {"skew": SkewConfig(labeled_imbalance=5, unlabeled_imbalance=9, unlabeled_only_classes=("1",))},
    ],
)
def test_supervision_never_reads_a_hidden_label(supervision: dict) -> None:
    federation = build(**supervision)
    poisoned = poison(federation)
    for client in range(8):
        assert torch.equal(federation.supervision(client).candidates, poisoned.supervision(client).candidates)
    assert torch.equal(federation.server_supervision().candidates, poisoned.server_supervision().candidates)


# ---------------------------------------------------------------------------------- labelled and unlabelled: two laws


def test_labelled_and_unlabelled_follow_laws_of_their_own() -> None:
    """Labels: 12 of each class, dealt evenly to 8 clients (15 each). Unlabelled: two classes per client."""
    federation = build(
        partition=PartitionConfig(kind="classes_per_client", classes_per_client=2),
        labeled_partition=LabeledPartitionConfig(kind="iid"),
        labels_per_class=12,
    )
    unlabeled, labeled = federation.histograms()[:2]
    assert labeled.sum(0).tolist() == [12] * 10
    assert labeled.sum(1).tolist() == [15] * 8
    assert ((unlabeled > 0).sum(1) == 2).all()
    assert ((labeled > 0).sum(1) > 2).all()
    assert sorted(np.concatenate(federation.parts)) == list(range(1294))
    assert all((np.diff(rows) > 0).all() for rows in federation.parts)


def test_rate_beside_a_law_for_labels_is_of_the_training_set() -> None:
    federation = build(labeled_partition=LabeledPartitionConfig(dirichlet_alpha=0.1), label_rate=0.1)
    assert federation.labeled.sum() == int(0.1 * 1294)
    assert sorted(np.concatenate(federation.parts)) == list(range(1294))


def test_same_law_for_both_is_drawn_twice() -> None:
    """With alpha 0.05 a client has a class or not; two draws give the classes to different clients."""
    law = {"kind": "dirichlet", "dirichlet_alpha": 0.05}
    federation = build(
        partition=PartitionConfig(**law), labeled_partition=LabeledPartitionConfig(**law), labels_per_class=50
    )
    unlabeled, labeled = federation.histograms()[:2]
    assert (labeled.argmax(0) == unlabeled.argmax(0)).sum() < 6


@pytest.mark.parametrize("seed", range(5))
def test_smallest_client_counts_labelled_and_unlabelled_together(seed: int) -> None:
    """800 labels for 8 clients are 100 each, so 103 samples in all ask for 3 of the 494 unlabelled ones, not for 103.

    For at least 0 the first draw is taken; its smallest client has 0 to 2 of them with these seeds.
    """
    law = PartitionConfig(kind="quantity_skew", quantity_alpha=0.3)
    for min_samples, least, most in ((1, 0, 2), (103, 3, 20)):
        federation = build(
            seed=seed,
            partition=replace(law, min_samples=min_samples),
            labeled_partition=LabeledPartitionConfig(kind="iid", min_samples=100),
            labels_total=800,
        )
        unlabeled, labeled = federation.histograms()[:2]
        assert (labeled.sum(1) == 100).all()
        assert least <= unlabeled.sum(1).min() <= most


def test_upper_bound_of_two_laws_keeps_everyones_samples() -> None:
    law = LabeledPartitionConfig(kind="iid")
    bound, run = (build(all_labels=all_labels, labeled_partition=law) for all_labels in (True, False))
    assert all(map(np.array_equal, bound.parts, run.parts))
    assert bound.labeled.all()


# ----------------------------------------------------------------------------------------------------------------- skew

TAILS = SkewConfig(labeled_imbalance=10.0, unlabeled_imbalance=50.0)


@pytest.mark.parametrize(
    "supervision",
    [
        {"labels_per_class": 30},
        {"labels_total": 300},
        {"label_rate": 0.3},
        {"labels_per_client": 30},
        {"labels_at": "server", "labels_per_class": 30},
        {"labels_at": "some_clients", "labeled_clients": 3, "label_rate": None},
    ],
)
def test_tails_are_exact_over_the_federation_however_labels_are_chosen(supervision: dict) -> None:
    """Without the tails a run chooses the same labels, so the sizes are `tail_sizes` of that run's.

    But for labels inside parts, where a draw that leaves a client too little is repeated: here the first is taken.
    """
    without, run = build(**supervision), build(skew=TAILS, **supervision)
    labels = run.dataset.train.labels.numpy()
    held = np.isin(np.arange(1294), np.concatenate([run.server_rows, *run.parts]))
    for name, factor in (("labeled", 10.0), ("unlabeled", 50.0)):
        subset, everyone = ((f.labeled if name == "labeled" else ~f.labeled) for f in (run, without))
        expected = tail_sizes(np.bincount(labels[everyone], minlength=10), factor)
        assert np.bincount(labels[held & subset], minlength=10).tolist() == expected.tolist()
    if supervision.get("labels_per_class"):  # 30 * 10^(-c/9)
        expected = [30, 23, 18, 14, 11, 8, 6, 5, 4, 3]
        assert np.bincount(labels[run.labeled], minlength=10).tolist() == expected
    assert not run.labeled[~held].any()
    assert min(map(len, run.parts)) >= 2


def test_partition_is_drawn_anew_if_a_tail_leaves_a_client_too_little() -> None:
    """Of the first draw the smallest client keeps 37 samples (with 40 the next draws are tried); 100 none meets."""
    skew = SkewConfig(unlabeled_imbalance=1000.0)
    law = PartitionConfig(dirichlet_alpha=0.2)
    first = build(partition=law, skew=skew)
    assert min(map(len, first.parts)) < 40
    again = build(partition=replace(law, min_samples=40), skew=skew)
    assert min(map(len, again.parts)) >= 40
    with pytest.raises(ValueError, match=r"`partition.min_samples` \(=100\) could not .*skew.unlabeled_imbalance"):
        build(partition=replace(law, min_samples=100), skew=skew)


def test_upper_bound_has_the_samples_that_the_tails_leave() -> None:
    run, bound = (build(skew=TAILS, all_labels=all_labels) for all_labels in (False, True))
    assert all(map(np.array_equal, run.parts, bound.parts))
    assert np.flatnonzero(bound.labeled).tolist() == sorted(np.concatenate(run.parts))


@pytest.mark.parametrize(
    "supervision",
    [
        {"labels_per_class": 5},
        {"labels_total": 300},
        {"label_rate": 0.3},
        {"labels_per_client": 10},
        {"kind": "full"},
        {"labels_at": "server"},
        {"labels_at": "some_clients", "labeled_clients": 3, "label_rate": None},
    ],
)
def test_labels_of_unlabelled_only_classes_are_told_to_nobody(supervision: dict) -> None:
    federation = build(skew=SkewConfig(unlabeled_only_classes=("8", "3")), **supervision)
    labels = federation.dataset.train.labels.numpy()
    told = np.bincount(labels[federation.labeled], minlength=10)
    assert told[[3, 8]].tolist() == [0, 0]
    assert (np.delete(told, [3, 8]) > 0).all()
    held = np.bincount(labels[np.concatenate(federation.parts)], minlength=10)
    assert held[[3, 8]].tolist() == np.bincount(labels)[[3, 8]].tolist()
    if "labels_total" in supervision:
        assert told.sum() == 300
    if "labels_per_class" in supervision:
        assert told.sum() == 40
    if "labels_per_client" in supervision:
        assert [int(federation.labeled[rows].sum()) for rows in federation.parts] == [10] * 8
    if supervision.get("label_rate"):
        others = [int((~np.isin(labels[rows], (3, 8))).sum()) for rows in federation.parts]
        assert [int(federation.labeled[rows].sum()) for rows in federation.parts] == [int(0.3 * n) for n in others]


def test_upper_bound_is_told_all_classes() -> None:
    assert build(skew=SkewConfig(unlabeled_only_classes=("8", "3")), all_labels=True).labeled.all()


@pytest.mark.parametrize("classes", [("10",), tuple("0123456789")])
def test_classes_that_do_not_fit_the_data(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="`skew.unlabeled_only_classes`"):
        build(skew=SkewConfig(unlabeled_only_classes=classes))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_client_learns_from_and_is_evaluated_on_its_own_kind_of_images(split: str) -> None:
    """With `inversion` the images of a client are the stored ones or their negatives, in training and evaluation."""
    overrides = ["skew.feature_shift=inversion", "num_clients=8", "device=cpu", f"evaluation.split={split}"]
    experiment = Experiment(load_config([], overrides))
    federation = experiment.federation
    stored = getattr(federation.dataset, split).images
    assert torch.equal(stored, getattr(load_dataset(DataConfig(), 0), split).images)
    inverted = []
    for client, (rows, evaluated) in enumerate(zip(federation.parts, federation.test_parts, strict=True)):
        inverted.append(client_shift(client, 8, experiment.config.skew, 0).kind == "inversion")
        for images, own in (
            (federation.dataset.train.images[rows], experiment.client_data(client).images),
            (stored[evaluated], experiment.evaluates_on.split.images[evaluated]),
        ):
            assert torch.equal(own, 255 - images if inverted[-1] else images)
    assert 0 < sum(inverted) < 8


def test_the_servers_images_are_not_changed() -> None:
    overrides = ["skew.feature_shift=noise", "supervision.labels_at=server", "num_clients=8", "device=cpu"]
    experiment = Experiment(load_config([], overrides))
    data, train = experiment.server_data(), experiment.federation.dataset.train
    assert data is not None
    assert torch.equal(data.images, train.images[experiment.federation.server_rows])
    assert torch.equal(data.supervision.label, train.labels[experiment.federation.server_rows])
    assert Experiment(load_config([], ["num_clients=8", "device=cpu"])).server_data() is None


# ------------------------------------------------------------------------------------------------------- kinds of label

NOISY = {"kind": "noisy", "noise_rate": 0.3, "label_rate": None}
PARTIAL = {"kind": "partial", "partial_ratio": 0.3, "label_rate": None}
BOTH = {"kind": "partial_and_noisy", "partial_ratio": 0.2, "noise_rate": 0.4, "label_rate": None}
ALL_KINDS: dict[str, Any] = {
    "label_rate": 0.1,  # as without: the parts have their own
    "mix_over": "samples",
    "mix": (
        MixPart(share=0.1, kind="full"),
        MixPart(share=0.2, **NOISY),
        MixPart(share=0.2, **PARTIAL),
        MixPart(share=0.2, **PARTIAL, noise_rate=0.4),
        MixPart(share=0.2, **BOTH),
    ),
}


def crowd(folder: Path) -> dict[str, Any]:
    """Settings of a federation with three annotators: b saw half of the samples, c nothing."""
    labels = np.random.default_rng(0).integers(0, 10, 1437)
    np.savez(folder / "crowd.npz", a=labels, b=np.where(np.arange(1437) % 2, -1, (labels + 1) % 10), c=0 * labels - 1)
    keys = {"kind": "noisy", "noise": "file", "labels_file": "crowd.npz", "labels_keys": ("a", "b", "c")}
    return {**keys, "label_rate": None, "data": DataConfig(root=str(folder))}


def slow_counts(federation: Federation, annotators: int) -> list[list[list[int]]]:
    counts = [[[0] * 10 for _ in range(10)] for _ in range(annotators)]
    record, truth = federation.record, federation.dataset.train.labels.tolist()
    for i, y in enumerate(truth):
        if record.noisy[i] and record.candidates[i].sum() == 1:
            counts[0][y][int(record.candidates[i].nonzero())] += 1
        for annotator, label in enumerate(record.annotations[i].tolist()):
            if label >= 0:
                counts[annotator if annotators > 1 else 0][y][label] += 1
    return counts


@pytest.mark.parametrize("settings", [ALL_KINDS, NOISY, PARTIAL, {}])
def test_noise_is_counted_by_true_class(settings: dict[str, Any]) -> None:
    federation = build(**settings)
    counts = federation.noise_counts()
    assert counts.tolist() == slow_counts(federation, 1)
    assert (counts.sum() > 0) == (settings in (ALL_KINDS, NOISY))


def test_noise_is_counted_by_annotator(tmp_path: Path) -> None:
    federation = build(**crowd(tmp_path))
    each, together = federation.noise_counts(3), federation.noise_counts()
    assert each.tolist() == slow_counts(federation, 3)
    assert together.tolist() == slow_counts(federation, 1)
    assert each.sum((1, 2))[0] == 1294
    assert 500 < each.sum((1, 2))[1] < 800
    assert each.sum((1, 2))[2] == 0
    assert federation.audit()["noisy_labels"]["annotators"] == each.tolist()
    assert federation.audit()["kinds"]["clients"] == [
        [0] * 5 + [len(rows)] + [0] * (len(KIND_NAMES) - 6) for rows in federation.parts
    ]


@pytest.mark.parametrize(
    "settings", [ALL_KINDS, {**ALL_KINDS, "mix_over": "clients"}, NOISY, PARTIAL, {}, {"labels_at": "server"}]
)
def test_the_audit_is_what_slow_counting_gives(settings: dict[str, Any]) -> None:
    federation = build(**settings)
    record, truth = federation.record, federation.dataset.train.labels
    audit = federation.audit()
    assert audit["classes"] == list(federation.dataset.class_names)
    assert json.loads(json.dumps(audit)) == audit
    assert audit["kinds"]["names"] == list(KIND_NAMES)
    clients = []
    for rows in federation.parts:
        counts = dict.fromkeys(KIND_NAMES, 0)
        for row in rows:
            size, several = int(record.candidates[row].sum()), bool((record.annotations[row] >= 0).any())
            name = "nothing" if size == 10 else "label" if size == 1 else "candidates"
            if record.noisy[row] and name != "nothing":
                name = f"noisy {name}"
            if several:
                name = "annotators" if name == "nothing" else "candidates and labels"
            counts[name] += 1
        clients.append(list(counts.values()))
    assert audit["kinds"]["clients"] == clients == federation.kinds().tolist()
    sizes, holds = [0] * 11, 0
    for row in sorted(np.concatenate([*federation.parts, federation.server_rows])):
        several = 1 < int(record.candidates[row].sum()) < 10
        assert federation.in_sets[row] or not several
        if federation.in_sets[row]:  # a set may also be of one class, or of all
            sizes[int(record.candidates[row].sum())] += 1
            holds += bool(record.candidates[row, truth[row]])
    assert audit["candidate_sets"] == {"sizes": sizes, "hold_the_truth": holds}
    assert "annotators" not in audit["noisy_labels"]
    counts = np.array(slow_counts(federation, 1)[0])
    assert audit["noisy_labels"]["counts"] == counts.tolist()
    assert audit["noisy_labels"]["wrong"] == counts[~np.eye(10, dtype=bool)].sum()


def test_the_audit_shows_the_noise_that_was_asked_for() -> None:
    """Pair flip, .4: of each class of n labels round(.4 n) are the next class, the others right."""
    federation = build(**{**NOISY, "noise": "pair_flip", "noise_rate": 0.4})
    counts = np.array(federation.audit()["noisy_labels"]["counts"])
    sizes = np.bincount(federation.dataset.train.labels.numpy())
    wrong = [round(0.4 * size) for size in sizes]
    expected = np.diag(sizes - wrong) + np.roll(np.diag(wrong), 1, 1)
    assert counts.tolist() == expected.tolist()


def test_the_tails_leave_nothing_of_those_they_cut_in_the_audit() -> None:
    federation = build(**ALL_KINDS, skew=TAILS)
    held = np.concatenate(federation.parts)
    assert len(held) < 1294
    audit = federation.audit()
    assert np.sum(audit["kinds"]["clients"]) == len(held)
    others = np.setdiff1d(np.arange(1294), held)
    assert not federation.record.has_supervision[others].any()
    assert np.sum(audit["noisy_labels"]["counts"]) == np.sum(slow_counts(federation, 1))


def test_the_hash_tells_federations_apart_that_differ_in_what_is_known_alone() -> None:
    """The same samples, of all of them a label: who holds what is the same, and so is that something is known."""
    ways = [
        {"kind": "full"},
        NOISY,
        {**NOISY, "noise_rate": 0.31},
        {**NOISY, "noise": "pair_flip"},
        PARTIAL,
        {**PARTIAL, "noise_rate": 0.1},
        BOTH,
    ]
    federations = [build(**way) for way in ways]
    texts = [json.loads(federation.to_json()) for federation in federations]
    assert len({json.dumps(text["clients"]) for text in texts}) == 1
    assert len({text["sha256"] for text in texts}) == len(ways)
    record = federations[1].record
    marked = replace(federations[1], record=replace(record, noisy=torch.zeros_like(record.noisy)))
    assert marked.sha256 != federations[1].sha256


def test_the_upper_bound_has_true_labels_whatever_the_kinds() -> None:
    federation = build(**ALL_KINDS, all_labels=True)
    assert torch.equal(federation.record.label, federation.dataset.train.labels)
    assert not federation.record.noisy.any()
    assert federation.noise_counts().sum() == 0


@pytest.mark.parametrize(
    "settings",
    [
        ALL_KINDS,
        {**ALL_KINDS, "mix_over": "clients"},
        {**NOISY, "labels_at": "some_clients", "labeled_clients": 3},
        {**NOISY, "noise": "instance", "labels_total": 200},
        {**PARTIAL, "candidates": "similar", "labels_per_class": 10},
        {**BOTH, "candidates": "instance", "label_rate": 0.3},
        {**PARTIAL, "skew": SkewConfig(unlabeled_only_classes=("1", "2"))},
        {
            "kind": "bags",
            "label_rate": None,
            "bag_size": 7,
            "labels_at": "some_clients",
            "labeled_clients": 2,
        },
    ],
)
def test_what_is_known_is_made_without_a_look_at_what_is_hidden(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that nobody is told are set to -1 where the record is made: it comes out the same to the bit.

    The choice of the samples and the law that spreads them are the experimenter's and see all labels.
    """
    build_federation.cache_clear()
    clear = build(**settings)
    blinded = []

    def blind(labels: np.ndarray, kinds: np.ndarray, parts: Any, classes: int, like: Any, *others: Any) -> Any:
        shown = np.where(kinds >= 0, labels, -1)
        train = Split(like.dataset.train.images, torch.from_numpy(shown))
        blinded.append(int((kinds < 0).sum()))
        return build_supervision(
            shown, kinds, parts, classes, replace(like, dataset=replace(like.dataset, train=train)), *others
        )

    monkeypatch.setattr(fedlabel.data.federation, "build_supervision", blind)
    build_federation.cache_clear()
    again = build(**settings)
    build_federation.cache_clear()
    assert blinded[0] > 0
    for name in ("candidates", "noisy", "annotations", "bag", "bag_counts"):
        assert torch.equal(getattr(clear.record, name), getattr(again.record, name)), name
    assert clear.sha256 == again.sha256


def test_tails_are_exact_over_a_mix_too() -> None:
    """Labelled: of which something is known, whatever."""
    without, run = build(**ALL_KINDS), build(skew=TAILS, **ALL_KINDS)
    labels = run.dataset.train.labels.numpy()
    expected = tail_sizes(np.bincount(labels[without.labeled], minlength=10), 10.0)
    assert np.bincount(labels[run.labeled], minlength=10).tolist() == expected.tolist()


def test_a_federation_that_a_file_says_nothing_of_is_an_error(tmp_path: Path) -> None:
    settings = {**crowd(tmp_path), "labels_keys": ("c",)}
    with pytest.raises(ValueError, match="leaves no label at any of"):
        build(**settings)


def test_sets_of_one_class_and_of_all_are_in_the_audit() -> None:
    """1294 sets with q = .1: a share of .9^9 = .387 has one class; with few labels there is none."""
    federation = build(**{**PARTIAL, "partial_ratio": 0.1})
    sizes = federation.audit()["candidate_sets"]["sizes"]
    assert sum(sizes) == 1294
    assert abs(sizes[1] - 1294 * 0.9**9) < 3 * math.sqrt(1294 * 0.387 * 0.613)
    assert not build().in_sets.any()


@pytest.mark.parametrize("told", [{"kind": "full"}, {"label_rate": 1.0}])
def test_a_server_with_every_sample_leaves_none_to_the_clients(told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"beside supervision.labels_at=server leave no sample to the clients"):
        build(labels_at="server", **told)


# ------------------------------------------------------------------------------------------------------- many clients


MIX = [MixPart(share=0.5, label_rate=0.5), MixPart(share=0.3, kind="partial", partial_ratio=0.3, label_rate=None)]


@pytest.fixture
def nothing_cached() -> Iterator[None]:
    """What is cached was made for other limits."""
    build_federation.cache_clear()
    yield
    build_federation.cache_clear()


def calls(num_clients: int, partition: str, **supervision: object) -> int:
    """Returns how many functions are called, Python's own included, to build a federation and to describe it."""
    load_dataset(DataConfig(), 0)
    build_federation.cache_clear()
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        federation = build(num_clients, partition=PartitionConfig(kind=partition, min_samples=1), **supervision)
        federation.to_json()
        federation.audit_json()
        federation.warnings()
        federation.histograms(shown_clients(num_clients))
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize("kind", ["iid", "classes_per_client"])
@pytest.mark.parametrize(
    ("supervision", "per_client"),
    [
        ({"kind": "full", "label_rate": None}, 0),
        ({"label_rate": None, "labels_total": 100}, 0),
        ({"kind": "partial", "partial_ratio": 0.3, "label_rate": None}, 0),
        ({"label_rate": 0.5}, 4),  # each client has numbers of its own: a hash
        ({"kind": "bags", "bag_size": 2, "label_rate": None}, 4),
        ({"mix": MIX, "mix_over": "samples", "label_rate": SupervisionConfig().label_rate}, 8),
    ],
)
def test_further_clients_cost_next_to_nothing(
    kind: str, supervision: dict[str, object], per_client: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 further clients, with the same samples: no loop over the clients, in which arrays would be made for each."""
    monkeypatch.setattr(fedlabel.data.federation, "LISTED_CLIENTS", 50)
    monkeypatch.setattr(fedlabel.data.federation, "SHOWN_CLIENTS", 20)
    calls(60, kind, **supervision)  # what is imported and cached
    few, many = (calls(number, kind, **supervision) for number in (60, 360))
    assert many - few < 300 * per_client + 250


@pytest.mark.usefixtures("nothing_cached")
def test_of_many_clients_a_part_is_written_and_all_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = build(10, label_rate=0.5)
    all_lists = json.loads(federation.to_json())
    monkeypatch.setattr(fedlabel.data.federation, "LISTED_CLIENTS", 9)
    monkeypatch.setattr(fedlabel.data.federation, "SHOWN_CLIENTS", 4)
    build_federation.cache_clear()
    federation = build(10, label_rate=0.5)
    found, audit = json.loads(federation.to_json()), federation.audit()
    assert [client.pop("client") for client in found["clients"]] == [0, 2, 5, 7]
    assert found["clients"] == [all_lists["clients"][client] for client in (0, 2, 5, 7)]
    assert (found["num_clients"], found["server"], found["data"]) == (10, [], all_lists["data"])
    assert "Index lists of 4 of 10 clients, evenly spaced; above 9 clients not all are written" in found["note"]
    for name, keys in {"labeled": ["labeled"], "samples": ["labeled", "unlabeled"]}.items():
        sizes = [sum(len(client[key]) for key in keys) for client in all_lists["clients"]]
        assert found["per_client"][name] == {
            "smallest": min(sizes),
            "mean": pytest.approx(sum(sizes) / 10),
            "largest": max(sizes),
        }
    kinds = federation.kinds()
    assert audit["kinds"]["clients"] == kinds[[0, 2, 5, 7]].tolist()
    assert audit["kinds"]["shown_clients"] == [0, 2, 5, 7]
    assert audit["kinds"]["total"] == kinds.sum(0).tolist()
    # Of one sample of a client whose lists are not written the holder changes, or another one is judged by it.
    for name in ("parts", "test_parts"):
        parts = getattr(federation, name)
        offsets = parts.offsets.copy()
        offsets[2] += 1
        changed = replace(federation, **{name: Ragged(parts.rows, offsets)})
        assert changed.sha256 != federation.sha256
    assert replace(federation).sha256 == federation.sha256


def test_shown_clients_are_all_or_evenly_spaced() -> None:
    assert shown_clients(1).tolist() == [0]
    assert shown_clients(1000).tolist() == list(range(1000))
    assert shown_clients(1_000_000).tolist() == list(range(0, 1_000_000, 1000))
    steps = np.diff(shown_clients(1999))
    assert (len(steps), steps.min(), steps.max()) == (999, 1, 2)


def test_counts_of_some_clients_are_those_of_all() -> None:
    federation = build(8, mix=MIX, label_rate=SupervisionConfig().label_rate)
    some = np.array([6, 1])
    assert np.array_equal(federation.histograms(some), federation.histograms()[:, some])
    assert np.array_equal(federation.kinds(some), federation.kinds()[some])
    assert np.array_equal(federation.kinds(), federation.histograms().sum(2).T)
    for kind in range(3):
        mask = federation.record.kind.numpy() == kind
        assert np.array_equal(federation.class_counts(mask), federation.histograms()[kind])


def test_the_audit_counts_classes_of_clients_with_and_without_supervision() -> None:
    federation = build(num_clients=3)
    counts, kind = federation.audit()["class_counts"], federation.record.kind
    truth = federation.dataset.train.labels
    assert (counts["clients"], counts["classes"]) == ([0, 1, 2], list(federation.dataset.class_names))
    for client, rows in enumerate(federation.parts):
        for name, mask in (("with_supervision", kind[rows] > 0), ("without", kind[rows] == 0)):
            assert counts[name][client] == torch.bincount(truth[rows][mask], minlength=10).tolist()
