"""Helpers: whose models go to whom, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedlabel.cohort
import server.simulation
from fedlabel.cohort import ClientResult, Invitation
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import Helpers
from fedlabel.methods.uploads import ModelPart
from fedlabel.record.json_files import read_metrics
from server.blocks import BlockResult
from server.checkpoint import load_checkpoint, save_checkpoint
from server.grids.in_process import InProcessGrid
from server.helpers import HelperPool
from server.simulation import simulate
from server.state import ServerState

OUTPUTS = {
    7: [0.8, 0.1, 0.1],
    2: [0.7, 0.2, 0.1],
    5: [0.6, 0.2, 0.2],
    0: [0.1, 0.8, 0.1],
    9: [0.1, 0.1, 0.8],
}
"""Client -> what its model says of any image."""


class Biased(nn.Module):
    """Says softmax(psi.bias + sigma.bias) of every image, and remembers the images."""

    def __init__(self) -> None:
        super().__init__()
        self.psi = nn.Linear(4, 3)
        self.sigma = nn.Linear(4, 3)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return (self.psi.bias + self.sigma.bias).expand(len(images), -1)


def make_pool(
    count: int = 2, every: int = 1, seed: int = 0, shape: tuple[int, ...] = (1, 2, 2), tabular: bool = False
) -> HelperPool:
    teacher = Biased()
    experiment: Any = SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        federation=SimpleNamespace(dataset=SimpleNamespace(input_shape=shape, tabular=tabular)),
        device=torch.device("cpu"),
        transform=SimpleNamespace(normalize=lambda images: images if tabular else images.float() / 255),
        initial_state=teacher.state_dict(),
        teacher=teacher,
    )
    return HelperPool(experiment, Helpers(count, every, "psi."))


def block(client: int, probs: list[float], mark: float = 0.0) -> BlockResult:
    """A client with the model that says `probs`; half of the logits are sigma's, and a constant changes nothing."""
    bias = (torch.tensor(probs, dtype=torch.float64).log() / 2).float()
    model = {
        "psi.weight": torch.full((3, 4), mark),
        "psi.bias": bias + mark,
        "sigma.weight": torch.zeros(3, 4),
        "sigma.bias": bias,
    }
    return BlockResult([ClientResult(client, {"model": ModelPart(model, 1.0)}, {}, {}, {}, {})], [], None)


def watch(pool: HelperPool, outputs: Mapping[int, list[float]]) -> list[BlockResult]:
    """Lets clients report models; the mark of a client's psi is its number."""
    return list(pool.watch(block(client, probs, client) for client, probs in outputs.items()))


def marks(helpers: Mapping[str, StateDict]) -> list[float]:
    """The clients whose psi is sent along, in order."""
    assert list(helpers) == [f"helper{i}" for i in range(len(helpers))]
    for model in helpers.values():
        assert list(model) == ["psi.weight", "psi.bias"]
    return [float(model["psi.weight"][0, 0]) for model in helpers.values()]


def test_nearest_by_hand() -> None:
    """From 7: 2 at sqrt(.01 + .01) = .141, 5 at sqrt(.04 + .01 + .01) = .245, 0 and 9 at .990.

    From 0: 5 at sqrt(.25 + .36 + .01) = .787, 2 at sqrt(.36 + .36) = .849. From 9: 5 at .787, 2 at .922.
    """
    pool = make_pool()
    watch(pool, OUTPUTS)
    assert pool.nearest(7) == [2, 5]
    assert pool.nearest(0) == [5, 2]
    assert pool.nearest(9) == [5, 2]
    assert pool.nearest(2) in ([7, 5], [5, 7])  # both at .141
    one = make_pool(count=1)
    watch(one, OUTPUTS)
    assert [one.nearest(client) for client in (7, 0)] == [[2], [5]]


def test_who_never_trained_has_none_and_few_known_give_few() -> None:
    pool = make_pool(count=3)
    assert pool.nearest(7) == []
    watch(pool, {7: OUTPUTS[7]})
    assert pool.nearest(7) == []  # never oneself
    watch(pool, {2: OUTPUTS[2]})
    assert pool.nearest(7) == [2]
    assert pool.nearest(5) == []
    watch(pool, {5: OUTPUTS[5]})
    assert pool.nearest(7) == [2, 5]
    watch(pool, {0: OUTPUTS[0], 9: OUTPUTS[9]})
    assert pool.nearest(7)[:2] == [2, 5]
    assert len(pool.nearest(7)) == 3


def test_never_oneself_even_among_equals() -> None:
    pool = make_pool()
    list(pool.watch([block(client, [0.2, 0.3, 0.5]) for client in (1, 3, 4, 6, 8)]))
    for client in (1, 3, 4, 6, 8):
        helpers = pool.nearest(client)
        assert len(set(helpers)) == 2
        assert client not in helpers


def test_the_last_model_counts() -> None:
    pool = make_pool(count=1)
    watch(pool, OUTPUTS)
    list(pool.watch([block(9, [0.79, 0.11, 0.1], mark=90.0)]))
    assert pool.nearest(7) == [9]
    assert marks(pool.helpers_of([7], 1)[7]) == [90.0]


def test_watching_hands_blocks_on_as_they_are_and_keeps_copies() -> None:
    """A model may be part of a whole stack of models."""
    pool = make_pool()
    sent = [block(client, probs) for client, probs in OUTPUTS.items()]
    handed_on = list(pool.watch(iter(sent)))
    assert all(a is b for a, b in zip(handed_on, sent, strict=True))
    for each in sent:
        each.results[0].parts["model"].state["psi.weight"].fill_(9.0)
    assert marks(pool.helpers_of([7], 1)[7]) == [0.0, 0.0]


def test_the_probe_is_one_fixed_image_of_clipped_noise() -> None:
    """Gaussian with mean and standard deviation 125: 15.9 % are at or below 0, 14.9 % at or above 255."""
    pool = make_pool(shape=(3, 32, 32))
    watch(pool, OUTPUTS)
    seen = pool._experiment.teacher.seen  # type: ignore[attr-defined]
    assert len(seen) == 5
    assert all(torch.equal(image, seen[0]) for image in seen)
    values = 255 * seen[0]
    assert values.shape == (1, 3, 32, 32)
    assert (values.min(), values.max()) == (0, 255)
    assert float((values < 1).float().mean()) == pytest.approx(0.161, abs=0.03)  # below 1: whole numbers are kept
    assert float((values > 254.5).float().mean()) == pytest.approx(0.149, abs=0.03)
    assert float(values.median()) == pytest.approx(125, abs=10)
    for seed, equal in ((0, True), (1, False)):
        other = make_pool(seed=seed, shape=(3, 32, 32))
        watch(other, {7: OUTPUTS[7]})
        assert torch.equal(other._experiment.teacher.seen[0], seen[0]) == equal  # type: ignore[attr-defined]


def test_helpers_travel_every_kth_round_only_to_whom_the_server_knows() -> None:
    pool = make_pool(every=3)
    watch(pool, OUTPUTS)
    for round_number in range(1, 10):
        helpers = pool.helpers_of([7, 1, 0], round_number)
        if round_number % 3:
            assert helpers == {}
            continue
        assert {client: marks(own) for client, own in helpers.items()} == {7: [2, 5], 0: [5, 2]}  # 1 never trained


def test_a_pool_is_restored_from_a_checkpoint(tmp_path: Path) -> None:
    pool = make_pool()
    watch(pool, OUTPUTS)
    path = save_checkpoint(tmp_path, ServerState(1, {}, "", helpers=pool.dump()), keep=1)
    restored = make_pool()
    restored.load(load_checkpoint(path).helpers)
    for client in range(10):
        assert restored.nearest(client) == pool.nearest(client)
        found, expected = (p.helpers_of([client], 1).get(client, {}) for p in (restored, pool))
        assert list(found) == list(expected)
        for name, model in expected.items():
            assert all(torch.equal(found[name][key], value) for key, value in model.items())
    watch(restored, {9: [0.79, 0.11, 0.1]})  # and goes on
    assert restored.nearest(7) == [9, 2]


def test_in_a_run_helpers_are_what_the_others_sent_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedMatch, helpers every second round: a client gets the newest psi of others as soon as it trained itself."""
    last: dict[int, StateDict] = {}
    pending: dict[int, StateDict] = {}
    sent: list[tuple[int, int]] = []
    train = fedlabel.cohort.train_cohort

    def watching(
        experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
    ) -> list[ClientResult | Exception]:
        for client in clients:
            check(client, invitation.round_number, invitation.helpers.get(client, {}))
        results = train(experiment, invitation, clients, memories)
        for result in results:
            assert isinstance(result, ClientResult)
            state = result.parts["model"].state
            pending[result.client] = {n: v.clone() for n, v in state.items() if n.startswith("psi.")}
        return results

    def check(client: int, round_number: int, helpers: Mapping[str, StateDict]) -> None:
        known = set(last) - {client} if client in last and round_number % 2 == 0 else set()
        assert set(helpers) == {f"helper{i}" for i in range(min(2, len(known)))}, (round_number, client)
        for helper in helpers.values():
            assert all(name.startswith("psi.") for name in helper)
            owners = [c for c in known if all(torch.equal(helper[name], last[c][name]) for name in helper)]
            assert len(owners) == 1
        sent.append((round_number, len(helpers)))

    monkeypatch.setattr(server.simulation, "InProcessGrid", lambda: InProcessGrid(watching))
    options = [
        *("method.name=fedmatch", "method.helper_interval=2", "method.confidence_threshold=0", "model.name=mlp"),
        *("num_clients=5", "num_rounds=4", "fraction_train=0.6", "training.lr=0.01", "training.local_steps=1"),
        *("evaluation.panel_samples=0", "evaluation.every=10", "checkpoint.every=10"),
    ]

    def on_round(round_number: int, metrics: Mapping[str, float]) -> None:
        last.update(pending)
        pending.clear()
        number = sum(count for r, count in sent if r == round_number)
        assert (metrics["train/loss_inter_client"] > 0) == (number > 0)

    simulate([], options, name="x", out=tmp_path, on_round=on_round)
    assert {0, 2} <= {count for _, count in sent}
    rows = [row["comm/bytes_down"] for row in read_metrics(tmp_path / "x")]
    for round_number, row in enumerate(rows, 1):  # and they are counted: half a model each
        number = sum(count for r, count in sent if r == round_number)
        assert row / rows[0] == pytest.approx(1 + number / 2 / 3, rel=0.02)


def test_the_probe_of_a_table_is_standard_normal() -> None:
    pool = make_pool(shape=(3000, 1, 1), tabular=True)
    watch(pool, {7: OUTPUTS[7]})
    (probe,) = pool._experiment.teacher.seen  # type: ignore[attr-defined]
    assert (probe.shape, probe.dtype) == ((1, 3000, 1, 1), torch.float32)
    assert float(probe.mean()) == pytest.approx(0, abs=0.06)
    assert float(probe.std()) == pytest.approx(1, abs=0.05)
