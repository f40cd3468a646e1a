"""Bytes that travel: what Flower counts in the records that it would send."""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict

from clients.client_app import _reply
from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from server.flower import set_identity
from server.grids.flower import messages_to
from server.schema import ResultSchema
from server.traffic import ResultBytes, invitation_bytes

set_identity()
TINY = ("num_clients=3", "data.train_samples=150", "training.local_steps=1", "training.batch_size=16", "device=cpu")
LABELS = ("supervision.label_rate=0.3", "model.name=mlp", "model.hidden_layers=[8]")
SETTINGS = {
    "pseudo-labels": ("method.name=fedlabel", *LABELS),
    "parts": ("method.name=fedlabel", "method.merge=mean", *LABELS),
    "statistics": ("method.name=ill", "method.noise.warmup_rounds=0", "supervision.kind=noisy", *LABELS[1:]),
    "claims": ("method.name=fedmatch", *LABELS),
    "batch norm": ("method.name=supervised", "model.name=cnn", "model.norm=batch", LABELS[0]),
}


def flowers(content: RecordDict) -> int:
    return sum(record.count_bytes() for name, record in content.items() if name != "config")


@pytest.mark.parametrize("setting", SETTINGS)
def test_bytes_are_those_of_flowers_records(setting: str) -> None:
    options = SETTINGS[setting]
    rate = ["supervision.noise_rate=0.3", "supervision.label_rate=null"] if setting == "statistics" else []
    experiment = Experiment(load_config([], [*TINY, *options, *rate]))
    model, shared = experiment.initial_state, experiment.recipe.shared.start()
    helper = {name: value for name, value in model.items() if name.startswith(next(iter(model)))}
    helpers = {1: {"helper0": helper, "helper1": helper}}
    sent = Invitation(1, model, experiment.recipe.shared.broadcast(shared), {"old": torch.ones(3, 4)}, helpers)
    messages = messages_to([0, 1], {0: 5, 1: 6}, sent, "any text")
    assert invitation_bytes(sent, [0, 1]) == sum(flowers(message.content) for message in messages)
    plain = Invitation(1, model, experiment.recipe.shared.broadcast(shared), {})
    (result,) = train_cohort(experiment, plain, [0], [{}])
    assert isinstance(result, ClientResult)
    size = ResultBytes(ResultSchema.of(experiment))
    assert size.of(result) == flowers(_reply(result))
    assert size.of(result._replace(parts={})) == size.of(result)
    assert bool(result.statistics) == (setting == "statistics")
