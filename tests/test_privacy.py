"""Differential privacy: what leaves a client is clipped, noise has the right size, and epsilon is the accountant's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedlabel.experiment
from clients.client_app import _reply, app
from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart
from fedlabel.privacy import (
    NotFinite,
    PrivacyConfig,
    clipped,
    distance,
    epsilon,
    noised,
    private_mean,
    private_upload,
)
from fedlabel.seeding import numpy_generator
from server.grids.flower import FlowerGrid
from server.sampling import History, Pool, uniform
from server.schema import Refused, ResultSchema
from server.server_app import run_federation
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import assert_same_run, final_weights, run_tiny

pytest.importorskip("dp_accounting", reason="an optional dependency")

NAMES = frozenset({"w", "v"})
SERVER = PrivacyConfig("server", clipping_norm=1.0, noise_multiplier=2.0)
CLIENT = PrivacyConfig("client", clipping_norm=0.5, noise_multiplier=2.0)


def model(*w: float, v: float = 0.0, n: int = 0) -> StateDict:
    return {"w": torch.tensor(w), "v": torch.tensor(v), "n": torch.tensor(n)}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------ clipping and noise


def test_an_update_is_shortened_over_all_arrays_together() -> None:
    """(3, 0), 4 has norm 5: at norm 1 it becomes (.6, 0), .8. What is not trained stays."""
    start = model(1.0, 1.0, v=2.0)
    found = clipped(model(4.0, 1.0, v=6.0, n=7), start, NAMES, 1.0)
    assert found["w"].tolist() == pytest.approx([1.6, 1.0])
    assert float(found["v"]) == pytest.approx(2.8)
    assert int(found["n"]) == 7


def test_a_short_update_stays() -> None:
    near = model(1.3, 1.4)
    assert clipped(near, model(1.0, 1.0), NAMES, 0.5001) is near


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_makes_no_update_longer(size: float, seed: int) -> None:
    """Of weights of this size, with single precision: the distance is of the numbers that are sent."""
    generator = torch.Generator().manual_seed(seed)
    start = {"w": size * torch.randn(1000, generator=generator)}
    found = clipped({"w": start["w"] + size * torch.randn(1000, generator=generator)}, start, {"w"}, 0.1)
    assert distance(found, start, {"w"}) <= 0.1
    if size == 1:
        assert distance(found, start, {"w"}) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_cannot_be_clipped(odd: float) -> None:
    with pytest.raises(NotFinite, match="holds NaN or infinity"):
        clipped(model(odd, 1.0), model(0.0, 0.0), NAMES, 1.0)


def test_noise_has_the_deviation_and_spares_what_is_not_trained() -> None:
    zeros = {"w": torch.zeros(20_000), "n": torch.zeros(5)}
    found = noised(zeros, {"w"}, 3.0, rng())
    assert float(found["w"].std()) == pytest.approx(3.0, rel=0.03)
    assert abs(float(found["w"].mean())) < 0.1
    assert not found["n"].any()


def test_the_servers_noise_is_that_of_a_sum_over_the_cohort() -> None:
    """Start 1; 3 of 4 clients reply with a mean of 2: 1 + 3 / 4, with deviation 2 * 1 / 4."""
    start, mean = {"w": torch.ones(20_000)}, {"w": torch.full((20_000,), 2.0)}
    found = private_mean(start, mean, {"w"}, 3, 4, SERVER, rng())["w"]
    assert float(found.mean()) == pytest.approx(1.75, abs=0.02)
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)


def test_one_client_moves_the_sum_by_two_norms_at_most() -> None:
    """The sensitivity that the accountant is told, of two clients with opposite updates; 5 clients are asked."""
    start = model(0.0, 0.0)
    others = [clipped(model(0.1, v=0.2) | {"w": torch.tensor([0.1, 0.3])}, start, NAMES, 1.0)] * 4
    sums = []
    for sign in (1.0, -1.0):
        every = [*others, clipped(model(sign * 50.0, 0.0), start, NAMES, 1.0)]
        mean = {name: torch.stack([each[name] for each in every]).double().mean(0) for name in NAMES}
        sums.append(private_mean(start, mean, NAMES, 5, 5, PrivacyConfig("server", 1.0, 1e-12), rng()))
    assert distance(sums[0], sums[1], NAMES) == pytest.approx(2.0 / 5, rel=1e-5)


def test_an_upload_has_weight_one_and_noise_only_with_kind_client() -> None:
    start, far = {"w": torch.zeros(20_000)}, {"w": torch.ones(20_000)}
    parts = {"model": ModelPart(far, 77.0)}
    ((state, weight),) = private_upload(parts, start, {"w"}, SERVER, rng()).values()
    assert weight == 1.0
    assert distance(state, start, {"w"}) == pytest.approx(1.0, rel=1e-5)
    ((state, weight),) = private_upload(parts, start, {"w"}, CLIENT, rng()).values()
    assert weight == 1.0
    assert float(state["w"].std()) == pytest.approx(1.0, rel=0.03)  # noise_multiplier * clipping_norm


# --------------------------------------------------------------------------------------------------------- accounting


def test_epsilon_is_the_accountants_own() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    config = PrivacyConfig("server", 0.3, 4.0, delta=1e-6)
    for cohort, clients, rounds in ((10, 100, 7), (100, 100, 3)):
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        event: Any = GaussianDpEvent(4.0 / 2)  # the noise, in multiples of the sensitivity 2 * clipping_norm
        if cohort < clients:
            event = SampledWithoutReplacementDpEvent(clients, cohort, event)
        for _ in range(rounds):
            accountant.compose(event)
        assert epsilon(config, rounds, cohort, clients) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)
    assert epsilon(config, 0) == 0
    assert epsilon(config, 7, 10, 100) < epsilon(config, 7)  # whoever knows the cohort gets more


def test_epsilon_of_a_gaussian_is_above_the_exact_one_and_near_it() -> None:
    """Balle and Wang (ICML 2018): delta(e) = Phi(s/2 - e/s) - exp(e) Phi(-s/2 - e/s), s = sqrt(T) * 2 / z."""
    rounds, z = 5, 8.0
    s = math.sqrt(rounds) * 2 / z

    def delta(e: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(s / 2 - e / s) - math.exp(e) * phi(-s / 2 - e / s)

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > 1e-5 else (low, middle)
    assert high <= epsilon(PrivacyConfig("client", 1.0, z), rounds) <= 1.2 * high


# ----------------------------------------------------------------------------------------------- what leaves a client

TINY = (
    *("data.name=digits", "data.train_samples=200", "num_clients=4", "model.name=mlp", "model.hidden_layers=[8]"),
    *("training.local_steps=4", "training.batch_size=8", "training.lr=1.0", "training.weight_by=uniform", "device=cpu"),
    *("partition.kind=iid", "evaluation.figures=false", "evaluation.panel_samples=0"),
)
NOISE = ("privacy.noise_multiplier=2", "privacy.clipping_norm=0.01")
RESPONSES = ("supervision.kind=noisy", "supervision.noise=randomized_response", "supervision.label_epsilon=3")
METHODS = {
    "supervised": ("method.name=supervised", "supervision.label_rate=0.5"),
    "fedlabel": ("method.name=fedlabel", "supervision.label_rate=0.5"),
    "fixmatch": ("method.name=fixmatch", "supervision.label_rate=0.5"),
    "ill": ("method.name=ill", "method.noise.form=known", *RESPONSES),
    "ill, own T": ("method.name=ill", "method.noise.form=gradient", "method.noise.scope=client", *RESPONSES),
    "clients without a label": ("method.name=supervised", "supervision.labels_total=2"),
}


def results_of(*overrides: str, audit: bool) -> tuple[Experiment, Invitation, list[ClientResult]]:
    experiment = Experiment(load_config([], [*TINY, *overrides]))
    invitation = Invitation(1, experiment.initial_state, experiment.recipe.shared.start(), {}, audit=audit)
    found = train_cohort(experiment, invitation, [0, 1, 2, 3], [{}] * 4)
    assert all(isinstance(result, ClientResult) for result in found), found
    return experiment, invitation, found  # type: ignore[return-value]


def tensors_in(value: object) -> list[Tensor]:
    """Returns all tensors and numbers below a value."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or value is False:  # how a field stands that is not used
        return []
    if isinstance(value, (float, int)):
        return [torch.tensor(value)]
    if isinstance(value, Mapping):
        return [each for inner in value.values() for each in tensors_in(inner)]
    if isinstance(value, (list, tuple)):
        return [each for inner in value for each in tensors_in(inner)]
    raise AssertionError(f"of {type(value).__name__} it is unknown what is in it")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaves_a_client_unclipped(method: str) -> None:
    """All fields of a result but the client's number and what it keeps: the clipped model and the weight 1, no more."""
    overrides = METHODS[method]
    experiment, invitation, found = results_of(*overrides, *NOISE, "privacy.kind=server", audit=False)
    start, names = invitation.model, experiment.parameters
    assert names == start.keys()
    for result in found:
        sent = {name: value for name, value in result._asdict().items() if name not in ("client", "kept")}
        ((state, weight),) = sent.pop("parts").values()
        assert distance(state, start, names) <= 0.01
        assert weight == 1.0
        assert tensors_in(sent) == []  # sums, counts, statistics, and whatever is added to a result
        content = _reply(result)
        moved = {name: torch.tensor(array.numpy()) for name, array in content.array_records["arrays"].items()}
        assert distance(moved, start, names) <= 0.01
        assert dict(content.metric_records["metrics"]) == {"num-examples": 1.0, "train_loss": 0.0}
        assert content.keys() == {"arrays", "metrics", "sums", "counts", "statistics"}
        assert not any(content.config_records[name] for name in ("sums", "counts", "statistics"))
    if method != "clients without a label":  # without privacy all of that is more
        _, _, plain = results_of(*overrides, audit=False)
        assert min(distance(next(iter(r.parts.values())).state, start, names) for r in plain) > 0.02
        assert all(result.sums and result.counts for result in plain)


def test_statistics_stay_even_if_a_method_with_some_were_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experiment, "_check_privacy", lambda self: None)
    ill = ("method.name=ill", *RESPONSES, *NOISE)
    for audit in (True, False):
        _, _, found = results_of(*ill, "privacy.kind=server", audit=audit)
        assert not any(result.statistics for result in found)


def test_noise_of_real_clients_is_not_drawn_from_the_seed() -> None:
    """Everybody knows the seed. A simulation is repeatable, though."""

    def uploads(audit: bool, kind: str) -> Tensor:
        _, _, found = results_of("method.name=supervised", *NOISE, f"privacy.kind={kind}", audit=audit)
        states = [next(iter(result.parts.values())).state for result in found]
        return torch.cat([value.flatten() for state in states for value in state.values()])

    clean = uploads(True, "server")
    assert torch.equal(uploads(True, "client"), uploads(True, "client"))
    first, second = uploads(False, "client"), uploads(False, "client")
    assert not torch.equal(first, second)
    for noise in (first - clean, second - clean, uploads(True, "client") - clean):
        assert float(noise.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([first - clean, second - clean]))[0, 1])) < 0.1


def test_the_server_refuses_what_is_not_private() -> None:
    experiment, invitation, found = results_of("method.name=supervised", *NOISE, "privacy.kind=server", audit=False)
    limits = ResultSchema.of(experiment).of_round(invitation, {})
    result = found[0]
    ((part, (state, _)),) = result.parts.items()
    limits.check(result)
    far = {name: value + 0.01 for name, value in state.items()}
    for reason, wrong in (
        (r"TooFar: .*`privacy.clipping_norm` is 0.01", result._replace(parts={part: ModelPart(far, 1.0)})),
        (r"`num-examples` \(=2.0\) must be 1 with `privacy", result._replace(parts={part: ModelPart(state, 2.0)})),
        ("more than a model", result._replace(sums={"train/loss": [1.0, 1.0]})),
        ("more than a model", result._replace(counts={"passes": [1.0, 1.0]})),
        ("more than a model", result._replace(statistics={"counts": torch.ones(1)})),
    ):
        with pytest.raises(Refused, match=reason):
            limits.check(wrong)


# ------------------------------------------------------------------------------------------------------------- a run

QUICK = (
    *("training.weight_by=uniform", "num_clients=20", "fraction_train=0.25", "data.train_samples=400"),
    *("evaluation.figures=false", "training.local_steps=1", "partition.min_samples=1"),
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_epsilon_of_a_run_is_logged_and_in_the_summary(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "x", *QUICK, *NOISE, "privacy.kind=server")
    config = PrivacyConfig("server", 0.01, 2.0)
    rows = rows_of(result.path)
    assert [row["privacy/epsilon"] for row in rows] == [epsilon(config, number, 5, 20) for number in (1, 2, 3)]
    assert result.summary["privacy"] == {
        "epsilon": epsilon(config, 3, 5, 20),
        "delta": 1e-5,
        "neighbours": "all data of one client replaced",
        "noise_at": "server",
        "clipping_norm": 0.01,
        "noise_multiplier": 2.0,
    }
    assert "privacy" not in run_tiny(tmp_path, "off", *QUICK, "num_rounds=1").summary


def test_with_noise_at_clients_the_one_that_sent_most_counts(tmp_path: Path) -> None:
    """3 rounds with 5 of 20 clients: who sent how often is known to the server. A resumed run goes on counting."""
    whole = run_tiny(tmp_path, "whole", *QUICK, *NOISE, "privacy.kind=client")
    spent = [row["privacy/epsilon"] for row in rows_of(whole.path)]
    cohorts = [uniform(Pool(20, History()), 5, numpy_generator(0, "cohort", number)) for number in (1, 2, 3)]
    most = [max(sum(client in cohort for cohort in cohorts[:number]) for client in range(20)) for number in (1, 2, 3)]
    assert most[0] == 1 < most[-1]
    assert spent == [epsilon(PrivacyConfig("client", 0.01, 2.0), times) for times in most]
    run_tiny(tmp_path, "part", *QUICK, *NOISE, "privacy.kind=client", "num_rounds=2")
    again = run_tiny(tmp_path, "part", *QUICK, *NOISE, "privacy.kind=client", resume=True)
    assert_same_run(whole.path, again.path)


def test_noise_moves_the_model(tmp_path: Path) -> None:
    """With privacy.kind=server the model is away from where it started by about sqrt(numbers) * noise / cohort."""
    experiment = Experiment(load_config([], [*QUICK, "device=cpu", "model.name=mlp", *NOISE, "privacy.kind=server"]))
    result = run_tiny(tmp_path, "x", *QUICK, *NOISE, "privacy.kind=server", "num_rounds=1")
    found, start = final_weights(result.path), experiment.initial_state
    numbers = sum(value.numel() for value in start.values())
    assert distance(found, start, start.keys()) == pytest.approx(math.sqrt(numbers) * 0.02 / 5, rel=0.1)


def test_real_nodes_send_models_alone(tmp_path: Path) -> None:
    """Over Flower's messages: no metric of a client is there, and who is drawn is known to all."""
    keys = ("num_clients=4", "fraction_train=0.5", "num_rounds=2", "evaluation.panel_samples=0", "privacy.kind=server")
    config = load_config([], [*TINY, "method.name=supervised", "supervision.label_rate=0.5", *NOISE, *keys])
    grid = FlowerGrid(LocalNodes(app, 4))
    grid.simulated = False
    run_federation(config, grid, tmp_path / "x")
    rows = rows_of(tmp_path / "x")
    assert [row["privacy/epsilon"] for row in rows] == [epsilon(config.privacy, number) for number in (1, 2)]
    for row in rows:
        assert row["system/failed_clients"] == 0
        assert row.keys() >= {"eval/accuracy", "comm/bytes_up"}
        assert not [name for name in row if name.startswith(("train/", "pseudo/"))]


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"clipping_norm": 1.0}, r"`privacy.clipping_norm` \(=1\) is for privacy.kind=server and client"),
        ({"kind": "server", "clipping_norm": 1.0}, "needs `privacy.noise_multiplier`"),
        ({"kind": "client", "noise_multiplier": 1.0}, "needs `privacy.clipping_norm`"),
        ({"kind": "server", "clipping_norm": 1.0, "noise_multiplier": 0.0}, "must be a positive number"),
        ({"kind": "server", "clipping_norm": 1.0, "noise_multiplier": 1.0, "delta": 1.0}, r"must lie in \(0, 1\)"),
        ({"kind": "local"}, "must be one of none, server, client"),
    ],
)
def test_impossible_privacy_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PrivacyConfig(**keys)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.weight_by=size", r"`training.weight_by` \(=size\) must be uniform .* how many samples"),
        ("sampling.kind=size", r"`sampling.kind` \(=size\) must be uniform"),
        ("strategy.normalize_steps=true", "`strategy.normalize_steps`"),
        ("compression.up=int8", "`compression.up` .* lengthen clipped updates"),
        ("strategy.max_update_norm=1", "`strategy.max_update_norm` .* must be null"),
        ("strategy.clip_update_norm=1", "`strategy.clip_update_norm` .* must be null"),
        ("strategy.name=FedAdam", r"`strategy.name` \(=FedAdam\) must be weighted_mean"),
        ("privacy.delta=0.05", r"`privacy.delta` \(=0.05\) must be below 1 / `num_clients`"),
    ],
)
def test_settings_that_tell_of_data_are_refused(override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_config([], [*QUICK, *NOISE, "privacy.kind=server", override])


def test_losses_are_not_there_to_weigh_by() -> None:
    fair = ("strategy.name=QFedAvg", "strategy.args.client_learning_rate=0.1")
    with pytest.raises(ValueError, match="QFedAvg.* goes by clients' losses"):
        load_config([], [*QUICK, *NOISE, "privacy.kind=client", *fair])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("method.name=ill", *RESPONSES), r"method ill also sends statistics .*\(counts\)"),
        (
            ("method.name=fixmatch", "method.mask.kind=cbafed", "training.unlabeled_includes_labeled=true"),
            "class_count",
        ),
        (("method.name=fedmatch",), "fedmatch sends single models to other clients"),
        (("method.name=fedlabel", "method.merge=mean"), r"sends 2 models .* cannot clip as one; use .*merge=sum"),
        (
            ("model.name=cnn", "model.norm=batch", "model.hidden_layers=[]"),
            "further arrays, e.g. BatchNorm's running statistics: .*running_mean",
        ),
    ],
)
def test_what_a_method_sends_beside_a_model_is_refused(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Experiment(load_config([], [*TINY, "method.name=supervised", *NOISE, "privacy.kind=server", *overrides]))


def test_a_missing_accountant_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedlabel.experiment, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package dp-accounting.*pip install 'fedlabel\[privacy\]'"):
        Experiment(load_config([], [*TINY, "method.name=supervised", *NOISE, "privacy.kind=server"]))
