"""Messages of real nodes: what docs/trust.md lists and no more, nothing of hidden labels, nothing of few samples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.superlink.grid.http_grid import HttpGrid

import fedlabel.cohort
import fedlabel.experiment
from clients.client_app import app
from fedlabel.config import ExperimentConfig, load_config
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.nodes.export import client_folder
from fedlabel.data.sets.datasets import Split
from fedlabel.experiment import open_experiment
from fedlabel.hardware import PACKAGE_ROOT
from fedlabel.learning.client import ClientUpdate, Trainer
from fedlabel.learning.metrics import CALIBRATION_BINS
from fedlabel.learning.suppression import fewest
from fedlabel.methods import METHODS
from fedlabel.methods.recipe import Recipe
from fedlabel.methods.shared import state_from_lists
from server.grids.flower import FlowerGrid
from server.server_app import run_federation
from tests.integration.local_nodes import LocalNodes
from tests.integration.test_label_secrecy import method_overrides
from tests.integration.test_own_data import FOUR_KINDS, Exported

SMALL = (
    *("num_clients=2", "fraction_train=1.0", "num_rounds=2", "partition.kind=iid", "data.train_samples=120"),
    *("model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=2", "training.batch_size=16", "device=cpu"),
    *("evaluation.figures=false", "evaluation.panel_samples=0", "supervision.label_rate=0.3", "grid.timeout=60"),
)
CORE = {
    "fedlabel": ("method.confidence_threshold=0.1",),
    "ill": (
        *("supervision.kind=partial_and_noisy", "supervision.partial_ratio=0.2", "supervision.noise_rate=0.2"),
        "supervision.label_rate=null",
    ),
    "llp_bp": (
        *("method.stage_rounds=1", "supervision.kind=bags", "supervision.label_rate=null"),
        "supervision.bag_size=5",
    ),
    "dp_ssl": (
        *("method.functions_rounds=2", "method.assignment_rounds=1", "num_rounds=5"),
        *("method.label_model_rounds=1", "method.num_functions=6", "method.heads_per_class=3"),
    ),
}
NUMBERS = {"classes": 10, "functions": 6, "votes": 11, "matrices": 1}
"""What the words in the table stand for with `CORE`."""


@pytest.fixture(autouse=True)
def own_experiments() -> Iterator[None]:
    """None with poisoned labels is left for others."""
    fedlabel.experiment.open_experiment.cache_clear()
    yield
    fedlabel.experiment.open_experiment.cache_clear()


class Tapped(LocalNodes, HttpGrid):
    """Real nodes, by what their grid is; all that they send is in `sent`."""

    def __init__(self, count: int, further: Mapping[str, Any], node_configs: Sequence[dict[str, Any]] | None) -> None:
        super().__init__(app, count, further, node_configs)
        self.sent: list[tuple[str, Message, Message]] = []
        """Kind, message and reply."""

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        assert not reply.has_error(), reply.error.reason
        self.sent.append((message.metadata.message_type, message, reply))
        return reply


def sent(
    config: ExperimentConfig, path: Path, node_configs: Sequence[dict[str, Any]] | None = None, **further: Any
) -> list[tuple[str, Message, Message]]:
    """Returns the messages of a run, by client; none of the replies may be refused."""
    open_experiment.cache_clear()
    nodes = Tapped(config.num_clients, further, node_configs)
    run_federation(config, FlowerGrid(nodes), path)
    assert not (path / "failures.log").exists(), (path / "failures.log").read_text()
    return sorted(nodes.sent, key=lambda each: each[1].metadata.dst_node_id)


def said(content: RecordDict) -> dict[str, dict[str, object]]:
    """All that is in a reply, so that it can be compared."""
    return {
        name: {key: value.data if isinstance(record, ArrayRecord) else value for key, value in record.items()}
        for name, record in content.items()
    }


# ------------------------------------------------------------------------------------------------- the table


def table() -> list[tuple[str, ...]]:
    """The rows of the table in docs/trust.md."""
    text = (PACKAGE_ROOT / "docs" / "trust.md").read_text()
    rows = re.findall(r"^\| (query|train) \| (\w+) \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 30
    return rows


def of_method(method: str) -> dict[tuple[str, str, str], object]:
    """(message, record, entry) -> how many numbers a method sends by the table."""
    found: dict[tuple[str, str, str], object] = {}
    for kind, record, entry, numbers, senders in table():
        if senders == "all" or method in senders.split(", "):
            factors = [each.strip() for each in numbers.split("×")]
            shape = [int(each) if each.isdecimal() else NUMBERS.get(each, each) for each in factors]
            flat = record != "statistics" and len(shape) > 1  # statistics alone travel with their shape
            found[kind, record, entry.strip("`")] = (
                math.prod(map(int, shape)) if flat else shape[0] if len(shape) == 1 else tuple(shape)
            )
    return found


def of_own_data() -> dict[tuple[str, str, str], object]:
    """(message, record, entry) -> how many numbers a node with data of its own sends besides, by the second table."""
    text = (PACKAGE_ROOT / "docs" / "trust.md").read_text()
    rows = re.findall(r"^\| (query|evaluate) \| (\w+) \| `([^|]+)` \| ([^|]+) \|$", text, re.MULTILINE)
    numbers = {"classes": 10, "kinds": len(KIND_NAMES), "bins": CALIBRATION_BINS, "functions": 0}
    found: dict[tuple[str, str, str], object] = {}
    for kind, record, entry, amount in rows:
        factors = [numbers.get(each, each) for each in amount.split(" × ")]
        found[kind, record, entry] = amount if amount == "text" else math.prod(map(int, factors))
    return found


def shape_of(record: str, value: Any) -> object:
    if record == "statistics":
        shape = tuple(state_from_lists({"": value}, torch.device("cpu"))[""].shape)
        return shape[0] if len(shape) == 1 else shape
    return "text" if isinstance(value, str) else len(value) if isinstance(value, list) else 1


@pytest.mark.parametrize("method", CORE)
def test_the_table_lists_all_that_leaves_a_node(method: str, tmp_path: Path) -> None:
    config = load_config([], [*SMALL, f"method.name={method}", *CORE[method]])
    found: dict[tuple[str, str, str], object] = {}
    for kind, message, reply in sent(config, tmp_path / "run"):
        for record, values in reply.content.items():
            if isinstance(values, ArrayRecord):
                received = message.content.array_records["arrays"]
                assert {k: (v.shape, v.dtype) for k, v in values.items()} == {
                    k: (v.shape, v.dtype) for k, v in received.items()
                }
                found[kind, record, "each array of the received model"] = "as received"
                continue
            for name, value in values.items():
                shape = shape_of(record, value)
                assert found.setdefault((kind, record, name), shape) == shape
    assert found == of_method(method)


def own_nodes(path: Path, *overrides: str, **further: Any) -> list[tuple[str, Message, Message]]:
    """Returns the messages of a run on the folders of an exported federation, see `sent`."""
    exported = Exported(path, [*FOUR_KINDS, "method.name=ill"], held_out=True)
    folders = [{"data": str(exported.path / client_folder(n)), "client": n, **further} for n in range(4)]
    return sent(exported.config("num_rounds=1", *overrides), path / "run", node_configs=folders)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Message, Message]]:
    return own_nodes(tmp_path_factory.mktemp("own"))


def holding_of(reply: Message) -> dict[str, Any]:
    """The counts in a node's answer to the query, by their path."""
    content = json.loads(str(reply.content.config_records["identity"]["holding"]))
    return {**{f"card.{name}": value for name, value in content.pop("card").items()}, **content}


def test_the_table_lists_all_that_leaves_a_node_with_data_of_its_own(
    own_data: list[tuple[str, Message, Message]],
) -> None:
    found: dict[tuple[str, str, str], object] = {}
    trained: set[tuple[str, str, str]] = set()
    for kind, _, reply in own_data:
        for record, values in reply.content.items():
            if kind == "train":
                trained |= {(kind, record, name) for name in values} if record != "arrays" else set()
                continue
            for name, value in values.items():
                if name == "holding":
                    counts = {(kind, "holding", key): np.size(count) for key, count in holding_of(reply).items()}
                    assert (
                        found.setdefault((kind, "holding", "kinds"), len(KIND_NAMES))
                        == counts[kind, "holding", "kinds"]
                    )
                    found |= counts
                else:
                    found[kind, record, name] = shape_of(record, value)
    assert found == of_own_data()
    ill = {entry for entry in of_method("ill") if entry[0] == "train" and entry[1] != "arrays"}
    assert trained <= ill
    assert {entry for entry in trained if entry[1] != "sums"} == {entry for entry in ill if entry[1] != "sums"}


@pytest.mark.parametrize("bound", [{"min-count": 150}, {}], ids=["the node's", "the server's"])
def test_no_small_count_is_sent_before_the_first_round(
    bound: dict[str, int], tmp_path: Path, own_data: list[tuple[str, Message, Message]]
) -> None:
    """Nodes hold 359 or 360 samples, of which some kinds are fewer than 150; they then evaluate on nothing."""

    def small(messages: list[tuple[str, Message, Message]]) -> bool:
        answers = [holding_of(reply) for kind, _, reply in messages if kind == "query"]
        found = [count for each in answers for key in each if key != "card.annotators" for count in np.ravel(each[key])]
        return any(0 < count < 150 for count in found if isinstance(count, np.int64))

    overrides = () if bound else ("privacy.min_count=150",)
    messages = own_nodes(tmp_path, *overrides, **bound)
    assert small(own_data)
    assert not small(messages)
    assert any(kind == "evaluate" for kind, _, _ in own_data)
    assert not any(kind == "evaluate" for kind, _, _ in messages)


# ------------------------------------------------------------------------------------------- hidden labels


def options(method: str) -> list[str]:
    """A run of a few rounds in which a method uses all it has."""
    fewer = [each for each in SMALL if not each.startswith("supervision.")]
    return [*fewer, "supervision.label_rate=0.3", *method_overrides(method)]


def watch_metrics(patch: pytest.MonkeyPatch) -> list[ClientUpdate]:
    """Returns a list that gets all updates. No metric of theirs may count a sample more often than `times` says: what
    is left out of few samples goes by it.
    """
    train, watched = fedlabel.cohort.train_clients, list[ClientUpdate]()

    def watching(recipe: Recipe, trainer: Trainer, *others: Any) -> list[ClientUpdate]:
        updates = train(recipe, trainer, *others)
        for update, client in zip(updates, others[1], strict=True):
            for name, (_, count) in update.sums.items():
                most = fewest(trainer.tags[name], len(client.data.images), update.times, recipe.num_functions)
                assert count <= most, name
        watched.extend(updates)
        return updates

    patch.setattr(fedlabel.cohort, "train_clients", watching)
    return watched


@pytest.mark.parametrize("method", sorted(METHODS))
def test_nothing_depends_on_hidden_labels(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them set to others, every message of every node is the same, even if the server asks for an audit."""
    config = load_config([], options(method))
    with monkeypatch.context() as patch:
        watched = watch_metrics(patch)
        first = [(kind, said(reply.content)) for kind, _, reply in sent(config, tmp_path / "first")]
    assert watched
    assert any(reply["metrics"]["num-examples"] for kind, reply in first if kind == "train")
    poisoned_rows = []

    def poisoned(*arguments: Any) -> Federation:
        federation = build_federation(*arguments)
        train = federation.dataset.train
        hidden = torch.from_numpy(~federation.labeled)
        labels = torch.where(hidden, (train.labels + 1) % federation.dataset.num_classes, train.labels)
        poisoned_rows.append(int((labels != train.labels).sum()))
        return replace(federation, dataset=replace(federation.dataset, train=Split(train.images, labels)))

    monkeypatch.setattr(fedlabel.experiment, "build_federation", poisoned)
    monkeypatch.setattr(FlowerGrid, "simulated", property(lambda self: True, lambda self, value: None), raising=False)
    second = [(kind, said(reply.content)) for kind, _, reply in sent(config, tmp_path / "second")]
    assert poisoned_rows[0] > 50
    assert second == first


# ---------------------------------------------------------------------------------------------- few samples


def trained(messages: list[tuple[str, Message, Message]], client: int) -> list[dict[str, dict[str, object]]]:
    return [
        said(reply.content)
        for kind, message, reply in messages
        if kind == "train" and message.metadata.dst_node_id == client + 1
    ]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_tiny_client_takes_no_part(method: str, tmp_path: Path) -> None:
    """By the node's own bound: whatever it holds, its reply is that of any other tiny client."""
    messages = sent(load_config([], options(method)), tmp_path / "run", **{"min-count": 1000})
    first, second = (trained(messages, client) for client in range(2))
    assert first == second
    for reply in first:
        assert reply["sums"] == {}
        assert reply["counts"]["passes"] == [0.0, 0.0]
        assert not any(value for name, value in reply["metrics"].items() if name != "num-examples")
        weights = [value for name, value in reply["metrics"].items() if name.startswith("weight/")]
        assert not any(weights or [reply["metrics"]["num-examples"]])


@pytest.mark.parametrize("method", ["fedlabel", "dp_ssl", "ill"])
def test_few_labels_send_a_model_alone(method: str, tmp_path: Path) -> None:
    """Two labelled samples a client, and `privacy.min_count` of 5."""
    noisy = ("supervision.kind=noisy", "supervision.noise_rate=0.2") if method == "ill" else ()
    few = (*noisy, "supervision.label_rate=null", "supervision.labels_per_client=2")
    keys = [key for key in CORE[method] if key.startswith(("method.", "num_rounds"))]
    for least in (1, 5):
        told = [*SMALL, *few, f"method.name={method}", *keys, f"privacy.min_count={least}"]
        messages = sent(load_config([], told), tmp_path / str(least))
        first, second = (trained(messages, client) for client in range(2))
        for one, other in zip(first, second, strict=True):
            assert one["arrays"] != other["arrays"] or one["metrics"]["num-examples"] == 0
            assert set(one["counts"]) >= {"passes"}
            if least == 5:
                assert one["sums"] == {}
                assert one["metrics"]["train_loss"] == 0
                assert set(one["counts"]) == {"passes"}
                assert one["statistics"] == other["statistics"]
        if least == 1:
            assert any(reply["sums"] for reply in first)
            assert any(reply["statistics"] for reply in first) == (method != "fedlabel")
            assert [reply["statistics"] for reply in first] != [reply["statistics"] for reply in second] or (
                method == "fedlabel"
            )
