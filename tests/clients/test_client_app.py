"""What a client answers: hidden labels are in it only where the server says that it is simulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedlabel.experiment
from clients.client_app import app
from fedlabel.config import load_config, to_yaml
from fedlabel.data.federation import Federation
from fedlabel.experiment import open_experiment
from fedlabel.hardware import source_hash
from fedlabel.learning.metrics import COUNTED
from fedlabel.methods.shared import state_to_lists
from tests.integration.local_nodes import LocalNodes

TINY = (
    *("num_clients=2", "fraction_train=1.0", "num_rounds=2", "partition.kind=iid", "data.train_samples=120"),
    *("model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=2", "training.batch_size=16", "device=cpu"),
)
SETTINGS = {
    "fedlabel": ("method.name=fedlabel", "method.confidence_threshold=0.1", "supervision.label_rate=0.3"),
    "llp_bp": (
        *("method.name=llp_bp", "method.stage_rounds=1", "supervision.kind=bags", "supervision.label_rate=null"),
        "supervision.bag_size=5",
    ),
    "dp_ssl": (
        *("method.name=dp_ssl", "method.functions_rounds=2", "method.assignment_rounds=1", "num_rounds=5"),
        *("method.label_model_rounds=1", "method.num_functions=4", "method.heads_per_class=4"),
        "supervision.label_rate=0.3",
    ),
}
OF_THE_TRUTH = {"fedlabel": "drawn", "llp_bp": "graph/homophily", "dp_ssl": "function_counts"}
"""Method -> what a simulated client says that needs hidden labels."""
ROUND = {"fedlabel": 1, "llp_bp": 2, "dp_ssl": 4}


@pytest.fixture(autouse=True)
def own_experiments() -> Iterator[None]:
    """None with poisoned labels is left for others."""
    yield
    fedlabel.experiment.open_experiment.cache_clear()


def answer(method: str, **flags: bool) -> RecordDict:
    """Returns the reply of client 0 in a round; flags: what the server says beside the configuration."""
    text = to_yaml(load_config([], [*TINY, *SETTINGS[method]]))
    experiment = open_experiment(text)
    config = ConfigRecord({"experiment": text, "source-hash": source_hash(), "server-round": ROUND[method], **flags})
    shared = ConfigRecord(dict(state_to_lists(experiment.recipe.shared.start())))
    records = {"arrays": ArrayRecord(experiment.initial_state), "config": config, "shared": shared}
    if experiment.recipe.place(ROUND[method]).number:
        records["previous"] = records["arrays"]
    reply = LocalNodes(app, 2).answer(order_of(RecordDict(records)))  # type: ignore[arg-type]
    assert not reply.has_error(), reply.error.reason
    return reply.content


def order_of(content: RecordDict) -> Message:
    """Returns a message to node 1 as a grid has sent it."""
    message = Message(content, 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    return message


def said(content: RecordDict) -> dict[str, object]:
    """All that is in a reply, so that it can be compared."""
    arrays = {name: array.data for name, array in content.array_records["arrays"].items()}
    others = [content.metric_records["metrics"], *(content.config_records[n] for n in ("sums", "counts", "statistics"))]
    return {"arrays": arrays, "others": [dict(record) for record in others]}


def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every hidden label class 0; returns the clients whose labels are asked for."""
    asked: list[int] = []

    def poisoned(self: Federation, client: int) -> torch.Tensor:
        asked.append(client)
        return torch.zeros(len(self.parts[client]), dtype=torch.int64)

    monkeypatch.setattr(Federation, "hidden_labels", poisoned)
    return asked


@pytest.mark.parametrize("flags", [{"audit": False}, {}], ids=["not simulated", "not said"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_real_client_does_not_look_at_hidden_labels(
    method: str, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answer(method, **flags)
    asked = poison(monkeypatch)
    assert said(answer(method, **flags)) == said(first)
    assert asked == []
    counts, sums = first.config_records["counts"], first.config_records["sums"]
    assert counts["passes"][0] > 0  # type: ignore[index]  # it did train
    assert set(counts) == {"passes", *(COUNTED if method == "dp_ssl" else ())}
    assert "graph/homophily" not in sums
    if method == "dp_ssl":
        votes = torch.tensor(counts["function_counts"]).view(-1, 4)
        assert not votes[:, 2:].any()  # none is known to be right, or wrong
        assert float(torch.tensor(counts["function_votes"]).sum()) > 0


PRIVATE = (
    *("method.name=supervised", "training.weight_by=uniform", "privacy.kind=server", "privacy.clipping_norm=0.1"),
    *("privacy.noise_multiplier=1", "supervision.label_rate=0.3"),
)


def test_a_private_client_does_not_send_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A traceback may hold data; it stays in the client's own log."""
    pytest.importorskip("dp_accounting", reason="an optional dependency")

    def fail(self: object, client: int) -> None:
        raise ValueError("the label of Alice is 7")

    monkeypatch.setitem(SETTINGS, "supervised", PRIVATE)
    monkeypatch.setitem(ROUND, "supervised", 1)
    monkeypatch.setattr(fedlabel.experiment.Experiment, "client_data", fail)
    with pytest.raises(AssertionError, match="own log says why") as caught, caplog.at_level("ERROR", "fedlabel"):
        answer("supervised")
    assert "Alice" not in str(caught.value)
    assert "Alice" in caplog.text


def test_a_private_client_does_not_say_how_many_samples_it_holds() -> None:
    pytest.importorskip("dp_accounting", reason="an optional dependency")
    for keys, said in ((PRIVATE, False), (PRIVATE[:1], True)):
        record = ConfigRecord({"experiment": to_yaml(load_config([], [*TINY, *keys])), "source-hash": source_hash()})
        message = Message(RecordDict({"ask": record}), 1, "query")
        message.metadata.__dict__["_message_id"] = "asked"
        reply = LocalNodes(app, 2).answer(message)
        assert ("num-samples" in reply.content["identity"]) is said


@pytest.mark.parametrize("method", SETTINGS)
def test_a_simulated_client_compares_with_them(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only what it counts depends on them, neither the model nor the statistics."""
    first = answer(method, audit=True)
    key = OF_THE_TRUTH[method]
    asked = poison(monkeypatch)
    second = answer(method, audit=True)
    assert asked == [0]
    record = "sums" if "/" in key else "counts"
    assert second.config_records[record][key] != first.config_records[record][key]
    for content in (first, second):
        del content["counts"], content["sums"]
        content["counts"] = content["sums"] = ConfigRecord({})
    assert said(second) == said(first)
