"""A way to "train" a cohort without training, for the grids' own tests; workers import it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State
from fedlabel.methods.uploads import ModelPart


def orders(**values: int | str) -> State:
    """Returns what clients are to do, as a shared state: numbers, and texts as bytes."""
    return {
        name: torch.tensor(list(value.encode()), dtype=torch.uint8) if isinstance(value, str) else torch.tensor(value)
        for name, value in values.items()
    }


def train(
    experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
) -> list[ClientResult | Exception]:
    """Every client answers with the model, has the process's id as its first number, and counts its calls."""
    found: list[ClientResult | Exception] = []
    for client, memory in zip(clients, memories, strict=True):
        try:
            _misbehave(client, invitation.shared)
            found.append(_answer(client, invitation.model, memory))
        except Exception as error:
            found.append(error)
    return found


def _answer(client: int, model: Mapping[str, torch.Tensor], memory: State) -> ClientResult:
    calls = int(memory.get("early_target", torch.tensor([0]))) + 1
    name, *_ = model
    marked = model[name].clone()
    marked.view(-1)[0] = os.getpid()
    part = ModelPart({**model, name: marked}, 1.0)
    kept = {"early_target": torch.tensor([calls])}
    return ClientResult(client, {"model": part}, {"train/loss": [float(calls), 1.0]}, {"passes": [1.0, 1.0]}, {}, kept)


def _misbehave(client: int, order: State) -> None:
    if order.get("dies") == client:
        marks = Path(bytes(order["marks"].tolist()).decode())
        deaths = len(list(marks.iterdir()))
        if deaths < int(order["deaths"]):
            (marks / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if order.get("raises") == client:
        raise KeyError("told to")
    if order.get("fills") == client:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if order.get("sleeps") == client:
        time.sleep(60)
