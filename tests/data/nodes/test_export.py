"""A simulated federation as folders: each record is read back as it was, and no true label is in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlabel.config import load_config, to_yaml
from fedlabel.data.federation import Federation
from fedlabel.data.nodes.export import client_folder, export_federation
from fedlabel.data.nodes.folder import read_node_folder, read_test_folder
from fedlabel.experiment import Experiment, open_experiment

OPTIONS = ["num_clients=3", "model.name=mlp", "device=cpu"]
FUNCTIONS = """
def bright(image):
    return 8 if image.mean() > 80 else None

def dark(image):
    return "1" if image.mean() < 70 else None
"""
KINDS = {
    "few labels": ["supervision.label_rate=0.1", "method.name=supervised"],
    "sets": ["supervision.kind=partial", "supervision.partial_ratio=0.4", "method.name=ill"],
    "sets that may miss the truth": [
        *("supervision.kind=partial", "supervision.partial_ratio=0.9", "supervision.noise_rate=0.2", "method.name=ill"),
    ],
    "noisy labels": ["supervision.kind=noisy", "supervision.noise_rate=0.4", "method.name=ill"],
    "bags": ["supervision.kind=bags", "supervision.bag_size=8", "method.name=dllp"],
    "bags with noise": [
        *("supervision.kind=bags", "supervision.bag_size=8", "supervision.count_epsilon=2", "method.name=dllp"),
    ],
    "mixed samples": [
        "method.name=ill",
        "supervision.mix_over=samples",
        "supervision.mix=[{share: 0.3, kind: full}, {share: 0.2, kind: noisy, noise_rate: 0.2}, "
        "{share: 0.4, kind: bags, bag_size: 8}]",
    ],
    "shifted images": ["skew.feature_shift=rotation", "method.name=supervised"],
}


def opened(*overrides: str) -> Experiment:
    return open_experiment(to_yaml(load_config([], [*OPTIONS, *overrides])))


def export(experiment: Experiment, path: Path, held_out: bool = True, federation: Federation | None = None) -> Path:
    noisy = 2.0 if experiment.labels.noisy_counts else None
    own = federation or experiment.federation
    images, test = experiment.images, experiment.evaluates_on.split.images
    export_federation(own, images, test, path, held_out, noisy, experiment.labels.label_epsilon)
    return path


def assert_read_back(experiment: Experiment, path: Path) -> None:
    from fedlabel.data.nodes.schema import load_schema

    schema, federation = load_schema(path / "schema.yaml"), experiment.federation
    for client, rows in enumerate(federation.parts):
        data, record = read_node_folder(path / client_folder(client), schema), federation.supervision(client)
        assert torch.equal(data.inputs, experiment.images[rows])
        for name in ("candidates", "noisy", "annotations", "bag", "bag_counts", "votes"):
            assert torch.equal(getattr(data.record, name), getattr(record, name)), name
        assert torch.equal(data.held_out.labels, federation.dataset.test.labels[federation.test_parts[client]])
        assert data.noisy_counts == (experiment.labels.noisy_counts and len(record.bag_counts) > 0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_record_is_read_back(kind: str, tmp_path: Path) -> None:
    experiment = opened(*KINDS[kind])
    assert_read_back(experiment, export(experiment, tmp_path / "nodes"))


def test_votes_and_annotators_are_read_back_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    module = f"supervision.module={tmp_path / 'functions.py'}"
    experiment = opened(
        "supervision.kind=labeling_functions",
        module,
        "method.name=dp_ssl",
        "method.functions=written",
        "method.num_functions=2",
    )
    path = export(experiment, tmp_path / "votes")
    assert_read_back(experiment, path)
    assert "- bright\n- dark\n" in (path / "schema.yaml").read_text()
    annotated = torch.full((len(experiment.federation.record.candidates), 2), -1)
    annotated[::2, 1] = 3
    record = replace(experiment.federation.record, annotations=annotated)
    federation = replace(experiment.federation, record=record)
    export(experiment, tmp_path / "annotated", federation=federation)
    text = (tmp_path / "annotated" / "client-000" / "labels.csv").read_text()
    assert text.startswith("sample,label,annotator:annotator 2,split\n")


def test_the_servers_test_set_is_read_back(tmp_path: Path) -> None:
    from fedlabel.data.nodes.schema import load_schema

    experiment = opened(*KINDS["few labels"])
    path = export(experiment, tmp_path / "nodes", held_out=False)
    found = read_test_folder(path / "test", load_schema(path / "schema.yaml"))
    assert torch.equal(found.images, experiment.federation.dataset.test.images)
    assert torch.equal(found.labels, experiment.federation.dataset.test.labels)
    assert not (path / "client-000" / "labels.csv").read_text().count("test")


@pytest.mark.parametrize("kind", ["few labels", "sets", "noisy labels", "bags"])
def test_true_labels_are_not_in_a_folder(kind: str, tmp_path: Path) -> None:
    """The folders are the same to the byte when all true labels of the training set are others."""
    experiment = opened(*KINDS[kind])
    dataset = experiment.federation.dataset
    poisoned = replace(dataset, train=replace(dataset.train, labels=(dataset.train.labels + 1) % 10))
    paths = [
        export(experiment, tmp_path / "true"),
        export(experiment, tmp_path / "poisoned", federation=replace(experiment.federation, dataset=poisoned)),
    ]
    files = sorted(path.relative_to(paths[0]) for path in paths[0].rglob("*.csv"))
    assert len(files) >= 3
    for file in (*files, "schema.yaml"):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()


def test_what_cannot_be_deployed_is_refused(tmp_path: Path) -> None:
    experiment = opened("supervision.labels_at=server", "method.name=semifl")
    with pytest.raises(ValueError, match="The server holds 129 labelled samples"):
        export(experiment, tmp_path / "nodes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="the folder is not empty"):
        export(opened(*KINDS["few labels"]), tmp_path / "full")
