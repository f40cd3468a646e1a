"""Audits of a run's labels: what is trained on what, what goes to the server, and what is left after a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlabel
import fedlabel.data.federation
from fedlabel.config import ConfigError, ExperimentConfig, load_config, to_yaml
from fedlabel.data.labels.suspects import read_suspects
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.learning.step import frozen_model
from fedlabel.methods.batch import Model
from fedlabel.study.audit import (
    FOLDS,
    METHODS,
    audit,
    by_confidence,
    check_request,
    find,
    fold_config,
    predict_folds,
    read_audit,
    read_run,
)
from tests.data.test_federation import build
from tests.inference.test_confident import simulate, split
from tests.integration.tiny import TINY, assert_same_weights, final_weights

NOISY = [
    *(override for override in TINY if not override.startswith(("method.", "supervision."))),
    "method.name=supervised",
    "supervision.kind=noisy",
    "supervision.noise_rate=0.4",
    "evaluation.figures=false",
]


@pytest.fixture
def config() -> ExperimentConfig:
    return load_config([], NOISY)


def untrained(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
    """Leaves out the training, which takes longest."""
    path.mkdir(parents=True)
    experiment = open_experiment(to_yaml(config))
    return experiment, frozen_model(experiment.teacher, experiment.initial_state)


@pytest.mark.parametrize("method", METHODS)
def test_clients_get_their_suspects_and_the_server_numbers(
    method: str, config: ExperimentConfig, tmp_path: Path
) -> None:
    audit(config, tmp_path / "a", 3, method, untrained)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["audit.json", "suspects"]
    federation = open_experiment(to_yaml(config)).federation
    names, total = federation.dataset.class_names, np.zeros((10, 10), dtype=np.int64)
    for client, rows in enumerate(federation.parts):
        suspects = read_suspects(tmp_path / "a" / f"suspects/client-{client:03d}.csv", names)
        assert (federation.record.label[rows[suspects.rows]].numpy() == suspects.given).all()
        assert (suspects.given != suspects.suggested).all()
        assert ((suspects.score >= 0) & (suspects.score <= 1)).all()
        np.add.at(total, (suspects.given, suspects.suggested), 1)
    made = read_audit(tmp_path / "a")
    assert made is not None
    assert made["suspects_by_given_and_suggested"] == total.tolist()
    assert made["suspects"] == total.sum() > 20
    assert made["labels"] == len(federation.record.label)
    assert (made["method"], made["folds"]) == (method, 3)
    longest = max(np.size(value) for value in made.values() if isinstance(value, list))
    assert longest == 100  # no number per sample, or per client
    if method != "prototypes":
        assert np.sum(made["joint"]) == pytest.approx(1)
        assert (made["exchanges"] == 2) == (method == "confident")


def test_a_federation_and_the_union_of_its_data_find_the_same() -> None:
    data = simulate(3)
    order = data[1].argsort(stable=True).numpy()
    for method in METHODS:
        (central,) = find([data], method).suspects
        federated = find(split(data, 7), method).suspects
        starts = np.cumsum([0, *(len(part[1]) for part in split(data, 7))])
        rows = np.concatenate([start + each.rows for start, each in zip(starts, federated, strict=False)])
        assert sorted(order[rows]) == central.rows.tolist()
    numbers, central_numbers = (by_confidence(each, "both").server for each in (split(data, 7), [data]))
    for key, value in numbers.items():
        assert torch.allclose(torch.as_tensor(value), torch.as_tensor(central_numbers[key]), rtol=0, atol=1e-12)


def test_what_is_withheld_cannot_reach_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels in the withheld fold give the same weights, to the bit; in another fold they do not."""
    dataset = build().dataset
    labels = np.arange(dataset.own_size) % 10
    fold = np.arange(len(dataset.train.labels)) % 3
    monkeypatch.setattr(fedlabel.data.federation, "fold_of_samples", lambda *_: fold)
    overrides = [override for override in NOISY if not override.startswith("supervision.noise_rate")]
    overrides += [f"data.root={tmp_path}", "supervision.noise=file", "supervision.labels_file=labels.npy"]

    def trained(name: str, poisoned: int | None) -> dict[str, torch.Tensor]:
        given = labels.copy()
        if poisoned is not None:
            rows = dataset.train_rows.numpy()[fold == poisoned]
            given[rows] = (given[rows] + 1) % 10
        np.save(tmp_path / "labels.npy", given)
        config = fold_config(load_config([], overrides), 3, 1)
        return final_weights(fedlabel.run(config, name=name, out=tmp_path).path)

    normal = trained("normal", None)
    assert_same_weights(trained("withheld", 1), normal)
    with pytest.raises(AssertionError):
        assert_same_weights(trained("seen", 2), normal)


def test_predictions_are_of_the_model_that_did_not_see_the_label(config: ExperimentConfig, tmp_path: Path) -> None:
    """A model that always answers with its number: each sample gets that of its own fold."""
    asked = []

    def numbered(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
        number = config.supervision.withheld_fold
        assert number is not None
        asked.append((number, path.name))
        answer = torch.eye(10)[number] * 50
        return open_experiment(to_yaml(config)), lambda images: answer.expand(len(images), 10)

    predicted = predict_folds(config, tmp_path, 3, ("probabilities",), numbered)
    assert asked == [(0, "fold-0"), (1, "fold-1"), (2, "fold-2")]
    for rows, (probabilities, labels) in zip(
        predicted.federation.parts, predicted.clients["probabilities"], strict=True
    ):
        assert probabilities.argmax(1).tolist() == predicted.fold[rows].tolist()
        assert torch.equal(labels, predicted.federation.record.label[rows])


def test_prototypes_are_of_the_other_folds(config: ExperimentConfig, tmp_path: Path) -> None:
    """Each sample's embedding names it: with its own fold among the prototypes it would find itself."""

    def by_itself(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
        experiment = open_experiment(to_yaml(config))
        place = {image.numpy().tobytes(): number for number, image in enumerate(experiment.images)}

        def model(images: torch.Tensor, *part: str) -> torch.Tensor:
            inverse = images * experiment.transform.std + experiment.transform.mean
            found = [place[each.mul(255).round().to(torch.uint8).numpy().tobytes()] for each in inverse]
            return torch.eye(len(place))[torch.tensor(found)]

        return experiment, model

    predicted = predict_folds(config, tmp_path, 3, ("similarities",), by_itself)
    similarity = torch.cat([each for each, _ in predicted.clients["similarities"]])
    # Digits that are twins of each other would be found; there are none.
    assert float(similarity.max()) == 0


def interrupted(at: int) -> Callable[[ExperimentConfig, Path], tuple[Experiment, Model]]:
    def train(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
        if config.supervision.withheld_fold == at:
            raise KeyboardInterrupt
        if path.exists():
            path.rmdir()
        return untrained(config, path)

    return train


def test_an_interrupted_audit_leaves_folds_to_go_on_with(config: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        audit(config, tmp_path / "a", 3, "confident", interrupted(1))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FOLDS]
    assert read_audit(tmp_path / "a") is None
    (tmp_path / "a" / "suspects").mkdir()  # as if it were killed between its two last files
    audit(config, tmp_path / "a", 3, "confident", interrupted(-1))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["audit.json", "suspects"]
    with pytest.raises(ConfigError, match=r"holds an audit already: give another --out"):
        audit(config, tmp_path / "a", 3, "confident", untrained)


def test_nothing_half_written_stays(config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(path: Path, *data: str) -> None:
        written.append(path)
        if len(written) == 3:
            raise ValueError("the disk is full")
        path.write_text("".join(data))

    monkeypatch.setattr(fedlabel.study.audit, "write_atomic", full)
    with pytest.raises(ValueError, match="the disk is full"):
        audit(config, tmp_path / "a", 3, "confident", untrained)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FOLDS]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["supervision.labels_total=2"], r"`--folds` \(=3\): each needs a sample .* and there are 2;"),
        (["supervision.kind=partial", "supervision.partial_ratio=1.0"], r"leaves no label"),
        (["model.name=resnet18_torchvision"], r"`model.name`"),
    ],
)
def test_federations_that_cannot_be_audited(overrides: list[str], message: str, tmp_path: Path) -> None:
    given = [override for override in NOISY if not override.startswith("supervision.")]
    with pytest.raises(ValueError, match=message):
        audit(load_config([], [*given, *overrides]), tmp_path / "a", 3, "prototypes", untrained)
    assert not (tmp_path / "a" / "audit.json").exists()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ((1, "confident", None), r"`--folds` \(=1\) must be at least 2"),
        ((2, "prototype", None), r"`--method` \(=prototype\) must be one of confident, .* Did you mean prototypes\?"),
        ((2, "confident", "delete"), r"`--then` \(=delete\) must be one of drop, relabel, weight, candidates"),
    ],
)
def test_requests_that_cannot_be(request_: tuple[int, str, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(*request_)


def test_which_runs_can_be_audited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml does not exist: .* is not the folder of a run"):
        read_run(tmp_path / "none")
    run = fedlabel.run(overrides=[*NOISY, "num_rounds=1"], name="run", out=tmp_path).path
    assert read_run(run, ["num_rounds=7"]).num_rounds == 7
    assert read_run(run) == load_config([run / "config.yaml"])
    assert read_run(run, ["method.name=ill", "method.noise.form=gradient"]).method.noise.form == "gradient"
    with pytest.raises(ConfigError, match=r"`supervision` cannot be changed in an audit"):
        read_run(run, ["supervision.noise_rate=0.1"])
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("audit: null", "audit: somewhere"))
    with pytest.raises(ConfigError, match=r"labels that an audit had changed or withheld"):
        read_run(run)
    (run / "config.yaml").write_text(text.replace("oracle_labels: false", "oracle_labels: true"))
    with pytest.raises(ConfigError, match=r"true labels of all samples \(method.oracle_labels\): nothing to audit"):
        read_run(run)
    (run / "config.yaml").write_text(text)
    there = json.loads((run / "partition.json").read_text())
    (run / "partition.json").write_text(json.dumps({**there, "sha256": "0"}))
    with pytest.raises(ConfigError, match=r"are no longer those of .*run"):
        read_run(run)
    (run / "partition.json").write_text("{")
    with pytest.raises(ConfigError, match=r"partition.json is damaged"):
        read_run(run)


def test_a_damaged_audit(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text('{"method": 1}')
    with pytest.raises(ConfigError, match=r"audit.json is damaged: move .* away"):
        read_audit(tmp_path)
