"""Supervised learning with one client is plain SGD on its labelled samples, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import fedlabel
from fedlabel.config import load_config, to_yaml
from fedlabel.experiment import open_experiment
from fedlabel.learning.plan import draw_batches
from fedlabel.models import build_model
from fedlabel.seeding import Draws, derive_seed, torch_generator
from tests.integration.tiny import TINY, assert_same_weights, final_weights

OVERRIDES = [
    *(override for override in TINY if not override.startswith("method.")),
    "method.name=supervised",
    "num_clients=1",
    "num_rounds=2",
    "fraction_train=1.0",
    "training.local_steps=7",
]


@pytest.mark.parametrize("labels", ["supervision.label_rate=0.3", "method.oracle_labels=true"])
def test_one_client_is_centralised_sgd(labels: str, tmp_path: Path) -> None:
    config = load_config([], [*OVERRIDES, labels])
    experiment = open_experiment(to_yaml(config))
    federation = experiment.federation
    dataset = federation.dataset
    known = torch.from_numpy(federation.labeled).nonzero().squeeze(1)
    assert len(known) == (len(dataset.train.labels) if "oracle" in labels else int(0.3 * len(dataset.train.labels)))

    torch.set_num_threads(config.grid.threads_per_worker)  # sums of several threads differ in the last bit
    # The loop that a newcomer would write, over the data set as it is loaded.
    seed = derive_seed(config.seed, "model")
    model = build_model(config.model, dataset.input_shape, dataset.num_classes, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.training.lr)
    for round_number in (1, 2):
        seed = derive_seed(config.seed, "client", 0, "round", round_number)
        augmentation = Draws(torch_generator(seed, "supervised", "augment"))
        for rows in draw_batches(known, 8, 7, torch_generator(seed, "supervised", "labeled")):
            images = experiment.transform.views(dataset.train.images[rows], ("weak",), augmentation)["weak"]
            optimizer.zero_grad()
            cross_entropy(model(images), dataset.train.labels[rows]).backward()
            optimizer.step()

    path = fedlabel.run(overrides=[*OVERRIDES, labels], name="run", out=tmp_path).path
    assert_same_weights(final_weights(path), dict(model.state_dict()))
