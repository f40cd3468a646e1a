"""Labels at the server: it trains after each aggregation, clients on what they believe; every method but for bags."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.methods import METHODS
from fedlabel.methods.batch import StateDict
from fedlabel.methods.recipe import ByBag, LabelKinds
from fedlabel.record import figures
from fedlabel.record.event_file import EventFile
from server.checkpoint import load_checkpoint
from server.simulation import simulate
from tests.methods.recipes import task

RECIPES = {name: METHODS[name]().recipe(task(2)) for name in sorted(METHODS)}
EVERY = [
    name
    for name, recipe in RECIPES.items()
    if LabelKinds.AT_SERVER in recipe.uses and not any(isinstance(phase.draw, ByBag) for phase in recipe.phases(1))
]
"""Who learns from bags learns nothing from clients without any."""
TINY = (
    *("supervision.labels_at=server", "supervision.label_rate=0.1", "num_clients=3", "num_rounds=2"),
    *("fraction_train=1", "partition.kind=iid", "model.name=mlp", "device=cpu", "evaluation.panel_samples=0"),
    *("training.local_steps=2", "training.batch_size=8", "training.lr=0.01"),
)


def options(method: str, sure: bool) -> list[str]:
    """Every pseudo-label is believed, or none; who takes part in the mean then has the same weight as others."""
    name = [f"method.name={method}", "training.weight_by=uniform"]
    if method == "forward":
        return [*name, "method.kind=symmetric"]  # a warm-up would take more rounds
    if method == "fedtrinet":
        return [*name, "method.warmup_rounds=0", "method.ramp_end=0", f"method.quality_start={float(not sure)}"]
    if "confidence_threshold" not in METHODS[method].__dataclass_fields__:
        return name
    return [*name, f"method.confidence_threshold={float(not sure)}"]


def open_tiny(method: str, sure: bool) -> tuple[Experiment, StateDict]:
    experiment = Experiment(load_config([], [*TINY, *options(method, sure)]))
    return experiment, {name: value.clone() for name, value in experiment.initial_state.items()}


def draws_unlabeled(method: str) -> bool:
    """Whether a method uses samples of which nothing is known, in some phase after all warm-ups."""
    draws = [phase.draw for phase in RECIPES[method].phases(1000)]
    return any(draw.unlabeled for draw in draws if not isinstance(draw, ByBag))


def differing(first: StateDict, second: StateDict) -> set[str]:
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


@pytest.mark.parametrize("method", EVERY)
def test_the_server_moves_the_model_from_round_to_round_differently(method: str) -> None:
    """FedMatch's server moves sigma only; in all others every parameter moves."""
    experiment, received = open_tiny(method, sure=True)
    names = {name for name, _ in experiment.trainer.student.named_parameters()}
    moved = {name for name in names if name.startswith("sigma.")} if method == "fedmatch" else names
    first = experiment.train_server(received, 1)
    assert differing(first, received) == moved
    assert differing(experiment.train_server(received, 1), first) == set()
    assert differing(experiment.train_server(received, 2), first) == moved  # other batches
    assert differing(received, experiment.initial_state) == set()


# FreeMatch learns its threshold, which starts low; ILL has none and believes all, to a degree.
@pytest.mark.parametrize("method", sorted(set(EVERY) - {"freematch", "ill"}))
def test_a_client_that_believes_nothing_sits_out(method: str) -> None:
    experiment, received = open_tiny(method, sure=False)
    update = experiment.train(0, received, 1, experiment.recipe.shared.start())
    assert not experiment.client_data(0).supervision.labeled.any()
    for part in update.parts.values():
        assert part.weight == 0
        assert differing(part.state, received) == set()


@pytest.mark.parametrize("method", [name for name in EVERY if draws_unlabeled(name)])
def test_a_client_that_believes_something_trains(method: str) -> None:
    """FedMatch's clients move psi only."""
    experiment, received = open_tiny(method, sure=True)
    update = experiment.train(0, received, 1, experiment.recipe.shared.start())
    (part,) = update.parts.values()
    names = {name for name, _ in experiment.trainer.student.named_parameters()}
    moved = {name for name in names if name.startswith("psi.")} if method == "fedmatch" else names
    assert part.weight > 0
    assert differing(part.state, received) == moved


@pytest.mark.parametrize("method", ["semifl", "fedmatch"])
def test_in_a_run_without_belief_the_server_trains_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has a weight, so the model stays, and the server's two rounds are all there is, to the bit."""
    monkeypatch.setattr(figures, "save_png", lambda figure, path: None)
    monkeypatch.setattr(EventFile, "add_figure", lambda self, tag, figure, step: None)
    experiment, state = open_tiny(method, sure=False)
    for round_number in (1, 2):
        state = experiment.train_server(state, round_number)
    path = simulate([], [*TINY, *options(method, sure=False)], name="alone", out=tmp_path).path
    assert differing(load_checkpoint(path / "checkpoints" / "round_000002.ckpt").model, state) == set()
    path = simulate([], [*TINY, *options(method, sure=True)], name="both", out=tmp_path).path
    assert differing(load_checkpoint(path / "checkpoints" / "round_000002.ckpt").model, state)
