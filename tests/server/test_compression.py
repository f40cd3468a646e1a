"""Compressed models on every grid: one result, bytes that are counted as Flower does, foreign bytes, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message, RecordDict

import fedlabel
import fedlabel.cohort
from clients.client_app import _reply, app
from clients.client_app import train as train_node
from fedlabel.cohort import ClientResult, Invitation, compressed, train_cohort
from fedlabel.compression import INDICES, RESIDUAL, SCALES, VALUES, residuals
from fedlabel.config import load_config, to_yaml
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.learning.client import LocalRound, Trainer
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import Recipe
from fedlabel.record.json_files import read_metrics
from server.checkpoint import load_checkpoint
from server.checkpoint_schema import complaints
from server.flower import dump_memory, parse_memory, set_identity
from server.grids.flower import FlowerGrid, messages_to
from server.grids.in_process import InProcessGrid
from server.replies import ReplyReader
from server.schema import Refused, ResultSchema
from server.server_app import run_federation
from server.strategy import build_strategy
from server.traffic import ResultBytes, invitation_bytes
from tests.integration import cohorts, tiny
from tests.integration.client_apps import by_client
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import (
    assert_same_run,
    assert_same_weights,
    comparable_metrics,
    final_weights,
)

set_identity()
TINY = (*tiny.TINY, "evaluation.figures=false")
UP = {
    "none": (),
    "float16": ("compression.up=float16",),
    "bfloat16": ("compression.up=bfloat16",),
    "int8": ("compression.up=int8",),
    "top_k": ("compression.up=top_k", "compression.share=0.05"),
    "top_k, feedback": ("compression.up=top_k", "compression.share=0.05", "compression.error_feedback=true"),
}
FEEDBACK = UP["top_k, feedback"]
DOWN = ("none", "float16", "bfloat16", "int8")
SMALL = ("num_clients=3", "data.train_samples=150", "training.local_steps=1", "training.batch_size=16", "device=cpu")
MLP = ("model.name=mlp", "model.hidden_layers=[8]", "supervision.label_rate=0.3")
SETTINGS = {
    "one model": ("method.name=fedlabel", *MLP),
    "parts": ("method.name=fedlabel", "method.merge=mean", *MLP),
    "helpers": ("method.name=fedmatch", *MLP),
    "batch norm": ("method.name=supervised", "model.name=cnn", "model.norm=batch", "supervision.label_rate=0.3"),
}


def run(out: Path, name: str, *overrides: str) -> Path:
    return tiny.run_tiny(out, name, "evaluation.figures=false", *overrides).path


def small(*options: str) -> Experiment:
    return open_experiment(to_yaml(load_config([], [*SMALL, *options])))


def trained(experiment: Experiment, client: int = 0, memory: State | None = None) -> tuple[Invitation, ClientResult]:
    """Returns a round and a client's result."""
    sent = compressed(Invitation(1, experiment.initial_state, {}, {}), experiment.downlink, 0)
    (result,) = train_cohort(experiment, sent, [client], [memory or {}])
    assert isinstance(result, ClientResult)
    return sent, result


def flowers(content: RecordDict) -> int:
    return sum(record.count_bytes() for name, record in content.items() if name != "config")


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("up", UP)
def test_bytes_up_are_those_of_flowers_records(up: str, setting: str) -> None:
    experiment = small(*SETTINGS[setting], *UP[up])
    schema = ResultSchema.of(experiment)
    sent, result = trained(experiment)
    assert ResultBytes(schema).of(result) == flowers(_reply(result))
    found = ReplyReader(schema.of_round(sent, {})).read(_reply(result), 0)
    for part, (model, weight) in result.parts.items():
        assert found.parts[part].weight == weight
        assert_same_weights(found.parts[part].state, model)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("down", DOWN)
def test_bytes_down_are_those_of_flowers_records(down: str, setting: str) -> None:
    """Of the model, of the previous stage's, and of helpers, which are parts of a model."""
    experiment = small(*SETTINGS[setting], f"compression.down={down}")
    model = experiment.initial_state
    helper = {name: value for name, value in model.items() if name.startswith(next(iter(model))[:2])}
    own = Invitation(1, model, {}, {n: v + 1 for n, v in model.items()}, {1: {"helper0": helper, "helper1": helper}})
    sent = compressed(own, experiment.downlink, 0)
    assert (sent is own) == (down == "none")
    messages = messages_to([0, 1], {0: 5, 1: 6}, sent, "any text")
    assert invitation_bytes(sent, [0, 1]) == sum(flowers(message.content) for message in messages)
    saved = invitation_bytes(own, [0, 1]) - invitation_bytes(sent, [0, 1])
    assert saved > 0 if down != "none" else saved == 0


def test_what_is_sent_is_rounded_by_seed_and_round() -> None:
    """The previous stage's model, which stays, in each round alike; a helper of several clients once."""
    experiment = small(*SETTINGS["one model"], "compression.down=int8")
    model = experiment.initial_state
    previous, helper = {n: v + 1 for n, v in model.items()}, {n: v + 2 for n, v in model.items()}

    def sent(number: int, seed: int = 0) -> Invitation:
        own = Invitation(number, model, {}, previous, {1: {"helper0": helper}, 2: {"helper0": helper}})
        return compressed(own, experiment.downlink, seed)

    first, again, other, another = sent(1), sent(1), sent(2), sent(1, seed=1)
    assert_same_weights(first.model, again.model)
    assert_same_weights(first.previous, other.previous)
    assert first.helpers[1]["helper0"] is first.helpers[2]["helper0"]
    for name in ("hidden.weight", "output.weight"):
        assert not torch.equal(first.model[name], other.model[name])
        assert not torch.equal(first.model[name], another.model[name])
        assert not torch.equal(first.previous[name], another.previous[name])
        assert not torch.equal(first.helpers[1]["helper0"][name], other.helpers[1]["helper0"][name])


class CountingNodes(LocalNodes):
    """Counts the bytes of what travels while clients train."""

    up = down = 0

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.message_type == "train":
            self.down += flowers(message.content)
            self.up += flowers(reply.content)
        return reply


@pytest.mark.parametrize(
    ("options", "downward"),
    [
        *((UP[up], down) for up, down in zip(UP, (*DOWN, *DOWN), strict=False)),
        (("strategy.name=FedAdam", *UP["int8"]), "int8"),
        (("model.name=cnn", "model.norm=batch", *UP["int8"]), "int8"),
        (("method.name=fedmatch", "method.helper_interval=1", "method.lambda_i=1", *FEEDBACK), "int8"),
        (("method.merge=mean", *FEEDBACK), "bfloat16"),
        (
            (
                *("method.name=llp_bp", "method.stage_rounds=1", "method.evidence=previous", "supervision.kind=bags"),
                *("supervision.label_rate=null", "supervision.bag_size=5", *UP["int8"]),
            ),
            "int8",
        ),
    ],
    ids=str,
)
def test_nodes_give_what_a_simulation_gives(options: Sequence[str], downward: str, tmp_path: Path) -> None:
    """All metrics, bytes among them, and all weights; the bytes are those of the messages."""
    own_method = any(option.startswith("method.name=") for option in options)
    tiny = [each for each in TINY if not (own_method and each.startswith("method."))]
    config = load_config([], [*tiny, *options, f"compression.down={downward}"])
    run_federation(config, InProcessGrid(), tmp_path / "here")
    nodes = CountingNodes(app, config.num_clients)
    run_federation(config, FlowerGrid(nodes), tmp_path / "there")
    assert_same_run(tmp_path / "there", tmp_path / "here")
    rows = read_metrics(tmp_path / "here")
    assert [row["system/failed_clients"] for row in rows] == [0] * 3
    assert sum(row["comm/bytes_up"] for row in rows) == nodes.up
    assert sum(row["comm/bytes_down"] for row in rows) == nodes.down


@pytest.mark.slow
def test_ray_gives_the_same(shared_ray: None, tmp_path: Path) -> None:
    options = (*FEEDBACK, "compression.down=int8", "num_clients=12")
    here = run(tmp_path, "here", *options)
    there = run(tmp_path, "there", *options, "grid.kind=ray", "grid.num_workers=2")
    assert_same_run(there, here)


def test_stacks_compress_as_clients_alone(tmp_path: Path) -> None:
    """But for the rounding of what they train."""
    options = (*UP["int8"], "num_clients=12", "fraction_train=1", "num_rounds=1", "training.local_steps=1")
    stacked = run(tmp_path, "stacked", *options, "grid.stack=4")
    alone = run(tmp_path, "alone", *options, "grid.stack=off")
    for name, value in final_weights(alone).items():
        torch.testing.assert_close(final_weights(stacked)[name], value, rtol=0, atol=1e-3)


# ----------------------------------------------------------------------------------------------- the server's own model


def test_the_server_does_not_lose_what_is_below_the_last_digit_that_is_sent(tmp_path: Path) -> None:
    """Its own model adds up steps that are smaller than the rounding of what it sends."""
    slow = ("training.lr=0.0001", "num_rounds=4")
    exact = final_weights(run(tmp_path, "exact", *slow))
    found = final_weights(run(tmp_path, "found", *slow, "compression.down=bfloat16"))
    rounding = max(float((value - value.bfloat16().float()).abs().max()) for value in exact.values())
    apart = max(float((found[name] - value).abs().max()) for name, value in exact.items())
    assert 0 < apart < rounding / 20


@pytest.mark.parametrize("name", ["FedAdam", "Krum"])
def test_strategies_move_the_servers_own_model(name: str, tmp_path: Path) -> None:
    slow = ("training.lr=0.0001", "num_rounds=2", f"strategy.name={name}")
    slow += ("strategy.args.eta=0.0001",) * (name == "FedAdam")
    exact = final_weights(run(tmp_path, "exact", *slow))
    found = final_weights(run(tmp_path, "found", *slow, "compression.down=int8"))
    step = max(float(value.abs().max()) / 127 for value in exact.values())
    assert max(float((found[n] - value).abs().max()) for n, value in exact.items()) < step / 4


# -------------------------------------------------------------------------------------------------------- foreign bytes


def spoil(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    """Changes an array of a reply."""

    def apply(body: RecordDict) -> None:
        body["arrays"][name] = Array(change(body["arrays"][name].numpy().copy()))  # type: ignore[index,call-overload]

    return apply


def put(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return apply


BIAS = "output.bias"
FAULTS: dict[str, tuple[str, Callable[[RecordDict], None], str]] = {
    "an index beyond all": ("top_k", spoil(INDICES, put(-1, 65000)), "BadReply: .indices .* is none of"),
    "an index twice": (
        "top_k",
        spoil(INDICES, lambda v: np.sort(np.r_[v[1], v[1:]])),
        "BadReply: .indices .* not rise",
    ),
    "falling indices": ("top_k", spoil(INDICES, lambda v: v[::-1].copy()), "BadReply: .indices .* (none of|not rise)"),
    "an index of another type": ("top_k", spoil(INDICES, lambda v: v.astype(np.int64)), "is int64, not uint16"),
    "an index more": ("top_k", spoil(INDICES, lambda v: np.r_[v, v[-1] + 1].astype(v.dtype)), "has shape"),
    "a value less": ("top_k", spoil(VALUES, lambda v: v[1:]), "has shape"),
    "a value that is none": ("top_k", spoil(VALUES, put(0, np.nan)), "NotFinite: .values"),
    "an infinite value": ("top_k", spoil(VALUES, put(0, np.inf)), "NotFinite: .values"),
    "a huge value": ("top_k", spoil(VALUES, put(0, 1e30)), "TooLarge: .* of its model holds a number beyond"),
    "no values": ("top_k", lambda body: body["arrays"].__delitem__(VALUES), "unexpected arrays: .values"),
    "all weights": ("top_k", lambda body: body["arrays"].update({"w": Array(np.ones(3))}), "unexpected arrays: w"),
    "a scale that is none": ("int8", spoil(SCALES, put(0, np.nan)), "NotFinite: .scales"),
    "an infinite scale": ("int8", spoil(SCALES, put(1, np.inf)), "NotFinite: .scales"),
    "a scale below 0": ("int8", spoil(SCALES, put(0, -1)), "BadReply: .scales .* below 0"),
    "a huge scale": ("int8", spoil(SCALES, put(0, 1e30)), "TooLarge: .* of its model holds a number beyond"),
    "a scale less": ("int8", spoil(SCALES, lambda v: v[1:]), "has shape"),
    "a code of -128": ("int8", spoil(BIAS, put(0, -128)), "BadReply: .* below -127"),
    "codes of another type": ("int8", spoil(BIAS, lambda v: v.astype(np.float32)), "is float32, not int8"),
    "float32 for float16": ("float16", spoil(BIAS, lambda v: v.astype(np.float32)), "is float32, not float16"),
    "an infinite float16": ("float16", spoil(BIAS, put(0, np.inf)), "NotFinite: .* NaN or infinity"),
    "the bits of a NaN": ("bfloat16", spoil(BIAS, put(0, 0x7FC0)), "NotFinite: .* NaN or infinity"),
    "an update of another form": ("bfloat16", spoil(BIAS, lambda v: v.view(np.float16)), "is float16, not int16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tampered_replies_are_refused(fault: str) -> None:
    up, tamper, reason = FAULTS[fault]
    experiment = small(*SETTINGS["one model"], *UP[up])
    sent, result = trained(experiment)
    body = _reply(result)
    reader = ReplyReader(ResultSchema.of(experiment).of_round(sent, {}))
    reader.read(body, 0)
    tamper(body)
    with pytest.raises(Refused, match=reason):
        reader.read(body, 0)


# ------------------------------------------------------------------------------------------------------- error feedback


def test_what_is_not_sent_stays_with_the_client() -> None:
    experiment = small(*SETTINGS["parts"], "method.confidence_threshold=0.1", *FEEDBACK)
    _, first = trained(experiment)
    kept = residuals(first.kept)
    assert set(kept) == set(first.parts)
    _, second = trained(experiment, memory=first.kept)
    for part, residual in kept.items():
        assert residual.abs().sum() > 0
        assert not torch.equal(residuals(second.kept)[part], residual)


def test_a_client_without_weight_keeps_what_it_has() -> None:
    """Nobody adds up what it sends."""
    experiment = small(*SETTINGS["one model"], "training.local_steps=0", *FEEDBACK)
    residual = torch.ones(experiment.uplink.numbers(experiment.initial_state))
    _, result = trained(experiment, memory={RESIDUAL + "model": residual})
    assert result.parts["model"].weight == 0
    assert torch.equal(residuals(result.kept)["model"], residual)
    assert_same_weights(result.parts["model"].state, experiment.initial_state)


def test_error_feedback_resumes_to_the_bit(tmp_path: Path) -> None:
    options = [*TINY, *FEEDBACK, "compression.down=int8", "num_rounds=6"]

    def stop(done: int, metrics: Mapping[str, float]) -> None:
        if done == 4:
            raise KeyboardInterrupt

    config = load_config([], options)
    run_federation(config, InProcessGrid(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_federation(config, InProcessGrid(), tmp_path / "run", on_round=stop)
    run_federation(config, InProcessGrid(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    without = run(tmp_path, "without", *UP["top_k"], "compression.down=int8", "num_rounds=6")
    assert comparable_metrics(without) != comparable_metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda memory: {RESIDUAL + "other": torch.ones(3)}, "unexpected entries"),
        (lambda memory: {name: value[1:] for name, value in memory.items()}, "of shape"),
        (lambda memory: {name: value.double() for name, value in memory.items()}, "of float64"),
        (lambda memory: {name: value * torch.nan for name, value in memory.items()}, "holds NaN"),
        (lambda memory: {name: value.abs() + torch.inf for name, value in memory.items()}, "holds infinity"),
    ],
)
def test_what_is_kept_is_checked_in_a_checkpoint(
    change: Callable[[State], State], complaint: str, tmp_path: Path
) -> None:
    path = run(tmp_path, "run", *FEEDBACK, "num_rounds=1")
    (file,) = (path / "checkpoints").glob("round_*.ckpt")
    state, config = load_checkpoint(file), load_config([], [*TINY, *FEEDBACK, "num_rounds=1"])
    experiment, strategy = open_experiment(to_yaml(config)), build_strategy(config.strategy)
    assert list(complaints(state, experiment, strategy)) == []
    client, data = next(iter(state.clients.items()))
    memory = {name: torch.from_numpy(array.copy()) for name, array in (parse_memory(data) or {}).items()}
    state.clients[client] = dump_memory(change(memory))
    assert complaint in next(complaints(state, experiment, strategy))


def _refused_in_round_2(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult:
    (result,) = train_cohort(experiment, invitation, [client], [memory])
    assert isinstance(result, ClientResult)
    return result._replace(sums={"evil": [1.0, 1.0]}) if invitation.round_number == 2 else result


def _node_refused_in_round_2(message: Message, context: Context) -> Message:
    reply = train_node(message, context)
    if message.content.config_records["config"]["server-round"] == 2:
        reply.content.config_records["sums"]["evil"] = [1.0, 1.0]
    return reply


@pytest.mark.parametrize("options", [FEEDBACK, (*FEEDBACK, "method.name=freematch")])
def test_a_client_whose_result_is_not_used_keeps_what_it_had(options: Sequence[str], tmp_path: Path) -> None:
    """Also a real one, which hears of it with the next message."""
    tiny = [each for each in TINY if not each.startswith("method.")]
    config = load_config([], [*tiny, *options, "fraction_train=1.0", "grid.stack=off", "num_rounds=4"])
    here = InProcessGrid(cohorts.by_client({1: _refused_in_round_2}))
    kept: list[dict[str, Any]] = []

    def look(done: int, metrics: Mapping[str, float]) -> None:
        kept.append({name: value.clone() for name, value in residuals(here.memory_of([1])(1)).items()})

    run_federation(config, here, tmp_path / "here", on_round=look)
    assert torch.equal(kept[1]["model"], kept[0]["model"])
    assert not torch.equal(kept[2]["model"], kept[1]["model"])
    nodes = LocalNodes(by_client({1: _node_refused_in_round_2}), config.num_clients)
    run_federation(config, FlowerGrid(nodes), tmp_path / "there")
    assert_same_run(tmp_path / "there", tmp_path / "here")
    assert [row["system/failed_clients"] for row in read_metrics(tmp_path / "there")] == [0, 1, 0, 0]


def test_methods_do_not_see_what_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a client trains nor where the panel repeats it: their memories would have other shapes."""
    seen: list[State] = []
    usual, usual_again = fedlabel.cohort.train_clients, Experiment.train

    def train(recipe: Recipe, trainer: Trainer, model: StateDict, rounds: Sequence[LocalRound], number: int) -> Any:
        seen.extend(each.memory for each in rounds)
        return usual(recipe, trainer, model, rounds, number)

    def again(self: Experiment, client: int, model: StateDict, number: int, memory: State, further: Any) -> Any:
        seen.append(memory)
        return usual_again(self, client, model, number, memory, further)

    monkeypatch.setattr(fedlabel.cohort, "train_clients", train)
    monkeypatch.setattr(Experiment, "train", again)
    options = [each for each in tiny.TINY if not each.startswith(("evaluation.panel", "fraction_train"))]
    fedlabel.run(
        overrides=[*options, *FEEDBACK, "evaluation.panel_samples=2", "fraction_train=1.0", "num_rounds=2"],
        name="run",
        out=tmp_path,
    )
    assert len(seen) > 10
    assert not any(residuals(memory) for memory in seen)
