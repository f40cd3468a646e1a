"""What a run says before its first round."""

from __future__ import annotations

import pytest

from fedlabel.cli.opening import LABELS, WIDTH, opening
from fedlabel.config import load_config
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.experiment import Experiment

SMALL = ["model.name=mlp", "model.hidden_layers=[8]", "device=cpu", "partition.kind=iid", "num_clients=4"]


def said(*overrides: str) -> str:
    lines = opening(Experiment(load_config(overrides=[*SMALL, *overrides])))
    assert max(map(len, lines)) <= WIDTH
    return " ".join(" ".join(lines).split())


def test_few_labels() -> None:
    text = said("num_rounds=7", "fraction_train=0.5", "supervision.labels_per_class=4", "partition.kind=dirichlet")
    assert "method fedlabel: local or global model as expert" in text
    assert "(Cho et al., ICCV 2023)" in text
    assert "digits: 1,294 samples of 10 classes to train on, 360 to evaluate on (test), 143 held out" in text
    assert "143 held out for validation (data.validation_fraction)" in text
    assert "4 clients, classes spread by Dirichlet 0.5; 2 of them train in each of 7 rounds" in text
    assert "4 clients hold true labels of" in text
    assert "of 1,294 samples at clients 40 (3.1%) have a true label, 1,254 (96.9%) have nothing" in text
    assert text.endswith("samples with labels, a class 4 labels")


def test_a_mix_says_who_holds_which_kind() -> None:
    mix = "[{share: 0.25, kind: noisy, noise_rate: 0.4}, {share: 0.25, kind: bags, bag_size: 8}]"
    text = said(f"supervision.mix={mix}", "method.name=ill", "fraction_train=1.0", "evaluation.split=validation")
    assert "all of them train in each of" in text
    assert "143 to evaluate on (validation) clients" in text  # and none held out besides
    holders = "1 client holds labels that may be wrong, 1 client holds bags with class counts, 2 clients hold none"
    assert f"labels {holders} of" in text
    assert "have a bag with class counts" in text
    assert "a client has 0 to 324 samples with labels" in text


def test_labels_at_the_server() -> None:
    text = said("supervision.labels_at=server", "supervision.labels_total=70")
    assert "labels 4 clients hold none, the server holds 70 labelled samples of 1,224 samples at clients" in text


@pytest.mark.parametrize("kind", [["bags", "supervision.bag_size=8"], ["partial", "supervision.partial_ratio=0.5"]])
def test_classes_are_counted_only_where_single_labels_tell(kind: list[str]) -> None:
    """Of sets some have one class only, which is a label; of bags no sample has one."""
    method = "dllp" if kind[0] == "bags" else "ill"
    text = said(f"supervision.kind={kind[0]}", *kind[1:], f"method.name={method}")
    assert ("a class" in text.split("a client has")[1]) is (kind[0] != "bags")


def test_every_kind_of_label_has_words() -> None:
    assert set(LABELS) == set(KIND_NAMES) - {"nothing"}
