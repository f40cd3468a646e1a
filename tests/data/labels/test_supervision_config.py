"""What the configuration may say of labels, alone and in a mix, and with which words the rest is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedlabel.data.labels.supervision_config import LabelKind, MixPart, SupervisionConfig, fill_amounts

PARTIAL = {"kind": "partial", "partial_ratio": 0.3}
NOISY = {"kind": "noisy", "noise_rate": 0.2}
FILE = {"kind": "noisy", "noise": "file", "labels_file": "a.npz", "labels_keys": ("x",)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"kind": "partially"},
            r"`supervision.kind` \(=partially\) must be one of few_labels, full, partial, noisy, part",
        ),
        (
            {**PARTIAL, "candidates": "near"},
            r"`supervision.candidates` \(=near\) must be one of uniform, similar, inst",
        ),
        (
            {**NOISY, "noise": "pair"},
            r"`supervision.noise` \(=pair\) must be one of symmetric, asymmetric, pair_flip, ",
        ),
        ({**NOISY, "noise_rate": 1.2}, r"`supervision.noise_rate` \(=1.2\) must lie in \[0, 1\]"),
        ({**NOISY, "noise_rate": -0.1}, r"`supervision.noise_rate` \(=-0.1\) must lie in \[0, 1\]"),
        ({**NOISY, "noise_rate": float("nan")}, r"`supervision.noise_rate` \(=nan\) must lie in"),
        ({**NOISY, "noise_rate": 0.0}, r"`supervision.noise_rate` \(=0.0\) must be above 0 for supervision.kind=noisy"),
        ({"kind": "partial"}, r"`supervision.partial_ratio` \(=None\) must be given for supervision.kind=partial:"),
        (
            {"kind": "partial_and_noisy", "noise_rate": 0.2},
            r"`supervision.partial_ratio` \(=None\) must be given for supervision.kind=partial_and_noisy:",
        ),
        (
            {"kind": "partial_and_noisy", "partial_ratio": 0.2},
            r"`supervision.noise_rate` \(=0.0\) must be above 0 for supervision.kind=partial_and_noisy",
        ),
        (
            {**NOISY, "partial_ratio": 0.3},
            r"`supervision.partial_ratio` \(=0.3\) cannot be combined with supervision.kind=noisy: take",
        ),
        (
            {"partial_ratio": 0.3},
            r"`supervision.partial_ratio` \(=0.3\) cannot be combined with supervision.kind=few_labels",
        ),
        ({**PARTIAL, "partial_ratio": 1.3}, r"`supervision.partial_ratio` \(=1.3\) must lie in \[0, 1\]"),
        ({**PARTIAL, "partial_ratio": float("nan")}, r"`supervision.partial_ratio` \(=nan\) must lie in"),
        (
            {**NOISY, "candidates": "similar"},
            r"`supervision.candidates` \(=similar\) cannot be combined .*kind=noisy: take .*kind=partial",
        ),
        (
            {"noise_rate": 0.2},
            r"`supervision.noise_rate` \(=0.2\) cannot be combined with supervision.kind=few_labels: take .*kind=noisy",
        ),
        ({"kind": "full", "noise_rate": 0.2}, r"\(=0.2\) cannot be combined with supervision.kind=full"),
        ({"noise": "instance"}, r"`supervision.noise` \(=instance\) and .* cannot be combined with .*kind=few_labels"),
        (
            {**PARTIAL, "noise": "instance"},
            r"`supervision.noise` \(=instance\) and .* cannot be combined with .*kind=partial",
        ),
        ({**FILE, "noise_rate": 0.1}, r"`supervision.noise_rate` \(=0.1\) .* is not given for supervision.noise=file"),
        (
            {**FILE, "labels_file": None},
            r"`supervision.noise` \(=file\) and `supervision.labels_file` \(=None\) belong together",
        ),
        (
            {**NOISY, "labels_file": "a.npz"},
            r"`supervision.noise` \(=symmetric\) and .*labels_file` \(=a.npz\) belong together",
        ),
        (
            {**NOISY, "labels_keys": ["x"]},
            r"`supervision.labels_keys` \(=\['x'\]\) is for labels from a file: take supervision.noise=file",
        ),
        ({**NOISY, "vote": True}, r"`supervision.vote` \(=True\) is for labels from a file"),
        (
            {**FILE, "kind": "partial", "partial_ratio": 0.1},
            r"`supervision.noise` \(=file\) .*cannot be combined .*kind=partial",
        ),
        ({**PARTIAL, "labels_total": 0}, r"`supervision.labels_total` \(=0\) must be at least 1"),
        ({**NOISY, "label_rate": 2.0}, r"`supervision.label_rate` \(=2.0\) must lie in \[0, 1\]"),
        (
            {"label_rate": None},
            r"`supervision.label_rate` \(=None\) does not define the amount: give it, or one of sup",
        ),
        (
            {**NOISY, "labels_total": 3, "labels_per_client": 2},
            r"`supervision.labels_per_client` \(=2\) and `supervision.labels_total` \(=3\) exclude each other",
        ),
        (
            {"kind": "full", "labels_per_class": 3},
            r"`supervision.labels_per_class` \(=3\) cannot be combined .*kind=full",
        ),
    ],
)
def test_a_kind_that_cannot_be_names_key_value_and_what_can(keys: dict[str, Any], message: str) -> None:
    """The same words alone, in the federation's one kind, and in a part of a mix."""
    for make in (LabelKind, SupervisionConfig, lambda **keys: MixPart(**keys, share=0.5)):
        with pytest.raises(ValueError, match=message):
            make(**keys)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_part_of_a_mix_needs_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=rf"`supervision.mix\[\].share` \(={share}\) must lie in \(0, 1\]: give each"):
        MixPart(share=share)
    with pytest.raises(ValueError, match=r"`supervision.mix\[\].share` \(=0.0\)"):
        MixPart(**PARTIAL)  # type: ignore[arg-type]


HALVES = (MixPart(share=0.5), MixPart(**PARTIAL, label_rate=None, share=0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"mix": (*HALVES, MixPart(share=0.1))},
            r"The shares of `supervision.mix` sum to 1.1; they must sum to at most 1",
        ),
        ({"mix": HALVES, "mix_over": "rounds"}, r"`supervision.mix_over` \(=rounds\) must be one of clients, samples"),
        (
            {"mix_over": "samples"},
            r"`supervision.mix_over` \(=samples\) needs supervision.mix: give it, or leave it out",
        ),
        (
            {"mix": HALVES, "kind": "full"},
            r"`supervision.kind` \(=full\) cannot be combined with supervision.mix.*leave it",
        ),
        (
            {"mix": HALVES, "label_rate": 0.2},
            r"`supervision.label_rate` \(=0.2\) cannot be combined with supervision.mix",
        ),
        (
            {"mix": HALVES, "labels_total": 9},
            r"`supervision.labels_total` \(=9\) cannot be combined with supervision.mix",
        ),
        (
            {"mix": HALVES, "noise_rate": 0.2},
            r"`supervision.noise_rate` \(=0.2\) cannot be combined with supervision.mix",
        ),
        (
            {"mix": HALVES, "stratified": True},
            r"`supervision.stratified` \(=True\) cannot be combined with supervision.mix",
        ),
        (
            {"mix": HALVES, "labels_keys": ["x"]},
            r"`supervision.labels_keys` \(=\('x',\)\) cannot be combined with .*mix",
        ),
        ({"mix": HALVES, "labels_at": "server"}, r"`supervision.labels_at` \(=server\) cannot be combined with .*mix"),
        (
            {"mix": HALVES, "labels_at": "some_clients", "labeled_clients": 2, "label_rate": None},
            r"`supervision.labels_at` \(=some_clients\) cannot be combined with supervision.mix",
        ),
        ({"mix": HALVES, "labeled_clients": 2}, r"`supervision.labeled_clients` \(=2\) cannot be combined with"),
        (
            {**PARTIAL, "labels_at": "server"},
            r"`supervision.kind` \(=partial\) must be few_labels for .*labels_at=server",
        ),
        ({**NOISY, "labels_at": "server"}, r"`supervision.kind` \(=noisy\) must be few_labels for .*labels_at=server"),
    ],
)
def test_a_federation_that_cannot_be_names_key_value_and_what_can(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**keys)


def test_shares_may_leave_something_and_may_be_thirds() -> None:
    third = MixPart(share=1 / 3)
    assert len(SupervisionConfig(mix=(third, third, third)).parts) == 3
    assert SupervisionConfig(mix=(replace(third, share=0.1),)).parts[0].share == 0.1  # type: ignore[attr-defined]
    whole = tuple(replace(third, share=share) for share in (0.05, 0.55, 0.3, 0.1))  # 1.0000000000000002
    assert SupervisionConfig(mix=whole).parts == whole


def test_without_a_mix_the_federation_is_its_one_part() -> None:
    config = SupervisionConfig(**NOISY)  # type: ignore[arg-type]
    assert list(config.parts) == [config]


def test_lists_of_yaml_are_made_hashable() -> None:
    parts = [MixPart(**{**FILE, "labels_keys": ["x", "y"]}, label_rate=None, share=0.5)]
    config = SupervisionConfig(mix=parts, labels_keys=[])  # type: ignore[arg-type]
    assert config.mix[0].labels_keys == ("x", "y")
    assert hash(config) == hash(SupervisionConfig(mix=tuple(parts)))
    assert config == SupervisionConfig(mix=tuple(parts))


@pytest.mark.parametrize(
    ("keys", "candidates", "noisy", "everything"),
    [
        ({}, False, False, False),
        ({"label_rate": 1.0}, False, False, True),
        ({"kind": "full"}, False, False, True),
        ({**PARTIAL, "label_rate": None}, True, False, True),
        ({**PARTIAL, "label_rate": 0.5}, True, False, False),
        ({**PARTIAL, "label_rate": None, "labels_total": 5}, True, False, False),
        ({**NOISY, "label_rate": None}, False, True, True),
        ({**PARTIAL, "kind": "partial_and_noisy", "noise_rate": 0.1, "label_rate": None}, True, True, True),
    ],
)
def test_what_a_kind_is(keys: dict[str, Any], candidates: bool, noisy: bool, everything: bool) -> None:
    kind = LabelKind(**keys)
    assert (kind.has_candidates, kind.has_noisy_labels, kind.everything) == (candidates, noisy, everything)


@pytest.mark.parametrize(
    ("user", "filled"),
    [
        ({}, {}),
        ({"kind": "few_labels"}, {"kind": "few_labels"}),
        ({"kind": "full"}, {"kind": "full"}),
        ({"kind": "partial"}, {"kind": "partial", "label_rate": None}),
        ({"kind": "noisy", "label_rate": 0.2}, {"kind": "noisy", "label_rate": 0.2}),
        ({"labels_total": 4, "label_rate": 0.2}, {"labels_total": 4, "label_rate": None}),
        ({"labels_total": None}, {"labels_total": None}),
        ({"labels_at": "some_clients"}, {"labels_at": "some_clients", "label_rate": None}),
        (
            {"mix": [{"kind": "noisy"}, {"labels_per_class": 2}, {}, "odd"]},
            {"mix": [{"kind": "noisy", "label_rate": None}, {"labels_per_class": 2, "label_rate": None}, {}, "odd"]},
        ),
        ({"mix": None}, {"mix": None}),
    ],
)
def test_one_way_to_say_an_amount_replaces_the_default_of_the_other(
    user: dict[str, Any], filled: dict[str, Any]
) -> None:
    fill_amounts(user)
    assert user == filled
