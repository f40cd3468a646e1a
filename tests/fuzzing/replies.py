"""One of four clients sends a mutated reply: it is refused, and the round is the one that the other three give.

Every mutation but those of `_allowed` makes of an honest reply what no client that follows its method can send. The
honest rounds come from runs of several methods and are kept for all cases.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from clients.client_app import app
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State
from fedlabel.metric_tags import client_tags
from server.blocks import Block, BlockResult
from server.exchange import replies_to
from server.grids.base import Order
from server.grids.flower import FlowerGrid, read_blocks
from server.helpers import HelperPool
from server.observers import Report, Round, observers_of
from server.replies import ReplyReader
from server.schema import ResultSchema
from server.server_app import run_federation
from server.state import ServerState, check_shared
from server.strategy import begin_round, build_strategy, combine
from server.tally import RoundTally
from server.traffic import ResultBytes
from tests.integration.local_nodes import LocalNodes

logging.getLogger("flwr").setLevel(logging.ERROR)
CLIENTS = 4
TINY = (
    *("num_clients=4", "fraction_train=1.0", "num_rounds=2", "partition.kind=iid", "data.train_samples=240"),
    *("model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=1", "training.batch_size=16", "device=cpu"),
    *("evaluation.figures=false", "evaluation.panel_samples=0", "checkpoint.keep=9", "evaluation.every=9"),
)
LABELS = ("supervision.label_rate=0.3",)
NOISY = ("supervision.kind=noisy", "supervision.noise=symmetric", "supervision.noise_rate=0.3")
STAGES = (
    *("method.functions_rounds=2", "method.assignment_rounds=1", "method.label_model_rounds=2", "num_rounds=5"),
    *("method.num_functions=4", "method.heads_per_class=4"),
)
SETTINGS: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("method.name=supervised", *LABELS), (1,)),
    (("method.name=fedlabel", "method.confidence_threshold=0.1", *LABELS, "strategy.name=Krum"), (1,)),
    (("method.name=fedlabel", "method.merge=mean", "method.confidence_threshold=0.1", *LABELS), (2,)),
    (("method.name=ill", "method.noise.warmup_rounds=0", *NOISY), (1, 2)),
    (("method.name=ill", "method.noise.warmup_rounds=0", "method.noise.form=gradient", *NOISY), (2,)),
    (("method.name=freematch", *LABELS), (1,)),
    (("method.name=fedmatch", "method.confidence_threshold=0.1", "method.helper_interval=1", *LABELS), (2,)),
    (("method.name=forward", "method.warmup_rounds=2", "num_rounds=3", *NOISY), (2,)),
    (("method.name=dp_ssl", *STAGES, *LABELS), (1, 3, 4)),
    (("method.name=supervised", "model.name=cnn", "model.hidden_layers=[]", "model.norm=batch", *LABELS), (2,)),
)
"""Overrides, and the rounds that are taken."""


class Recorder(FlowerGrid):
    """Keeps what is sent and what comes back."""

    def __init__(self) -> None:
        self.nodes = RecordingNodes(app, CLIENTS)
        super().__init__(self.nodes)
        self.rounds: list[tuple[Order, list[tuple[Message, RecordDict]]]] = []

    def train(self, order: Order, tasks: Sequence[Sequence[Block]]) -> Iterator[BlockResult]:
        self.nodes.answered = []
        yield from super().train(order, tasks)
        self.rounds.append((order, self.nodes.answered))


class RecordingNodes(LocalNodes):
    """Keeps messages, each with its reply."""

    answered: list[tuple[Message, RecordDict]]

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.message_type == "train":
            self.answered.append((message, copy.deepcopy(reply.content)))
        return reply


class Garbled:
    """What Flower's own grid does with a reply that it cannot decode."""

    pull_interval = 0.0

    def __init__(self, error: Exception) -> None:
        self.error = error

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise self.error


class Outcome(NamedTuple):
    """What a round leaves."""

    model: Mapping[str, bytes]
    shared: State
    metrics: Mapping[str, float]
    refused: int

    def same(self, other: Outcome) -> bool:
        return (
            self.model == other.model
            and self.shared.keys() == other.shared.keys()
            and all(torch.equal(value, other.shared[name]) for name, value in self.shared.items())
            and self.metrics == other.metrics
        )


class Honest:
    """A recorded round, to be run again with other replies."""

    def __init__(self, experiment: Experiment, order: Order, sent: list[tuple[Message, RecordDict]]):
        self.experiment, self.order = experiment, order
        self.messages = [message for message, _ in sent]
        self.contents = [content for _, content in sent]
        self.schema = ResultSchema.of(experiment)
        self.without: dict[int, Outcome] = {}

    def run(self, replies: list[Message]) -> Outcome:
        """The server's own steps, see `server.server`."""
        config, recipe = self.experiment.config, self.experiment.recipe
        sent, everybody = self.order.invitation, list(range(CLIENTS))
        number, strategy = sent.round_number, build_strategy(config.strategy)
        begin_round(strategy, number, sent.model, everybody)
        tally = RoundTally(sent, everybody, ResultBytes(self.schema))
        reader = ReplyReader(self.schema.of_round(sent, self.order.shared))
        messages = dict(zip(everybody, self.messages, strict=True))
        whole = [[client] for client in everybody]
        blocks = tally.watch(read_blocks(whole, messages, replies, reader, self.order.fold))
        if recipe.helpers is not None:
            pool = HelperPool(self.experiment, recipe.helpers)
            blocks = pool.watch(blocks)
        made = combine(strategy, number, blocks, self.experiment.initial_state)
        assert all(line.startswith(("Round ", "    ")) for text in tally.failures for line in text.split("\n"))
        assert all(text.replace("\n", "").isprintable() for text in tally.failures)
        shared = recipe.shared.update(self.order.shared, tally.statistics(torch.device("cpu")))
        check_shared(config.method.name, recipe, shared, number)
        if recipe.helpers is not None:
            assert all(client not in pool.nearest(client) for client in everybody)
        model = {} if made is None else {name: value.numpy() for name, value in made.items()}
        assert all(np.isfinite(value).all() for value in model.values())
        state = ServerState(number, self.experiment.initial_state, "", shared=shared)
        seen, report = Round(number, tally, None, time.perf_counter(), is_evaluated=False), Report()
        for observer in observers_of(self.experiment, {}, simulated=True).values():
            report = report.add(observer.after_round(seen, state))
        assert all(np.isfinite(value) for value in report.metrics.values())
        kept = {name: value for name, value in report.metrics.items() if not name.startswith("system/")}
        return Outcome({name: value.tobytes() for name, value in model.items()}, shared, kept, tally.refused)

    def replies(self, changed: Mapping[int, list[Message]]) -> list[Message]:
        """Returns the honest replies, but for some clients others."""
        honest = [Message(copy.copy(body), reply_to=m) for m, body in zip(self.messages, self.contents, strict=True)]
        return [found for client in range(CLIENTS) for found in changed.get(client, [honest[client]])]

    def without_client(self, client: int) -> Outcome:
        """Returns the round in which a client failed; CLIENTS: in which none did."""
        if client not in self.without:
            gone = {c: [Message(Error(2, "gone"), reply_to=self.messages[c])] for c in [client] if c < CLIENTS}
            self.without[client] = self.run(self.replies(gone))
        return self.without[client]


@cache
def rounds_of(place: int) -> list[Honest]:
    """Returns the recorded rounds of a setting."""
    overrides, numbers = SETTINGS[place]
    config = load_config([], [*TINY, *overrides])
    experiment, grid = Experiment(config), Recorder()
    with tempfile.TemporaryDirectory() as folder:
        run_federation(config, grid, Path(folder) / "run")
    return [Honest(experiment, *grid.rounds[number - 1]) for number in numbers]


# ------------------------------------------------------------------------------------------------------------ mutations

Mutation = Callable[[np.random.Generator, RecordDict], None]
ODD: tuple[Any, ...] = (
    *(float("nan"), float("inf"), -float("inf"), 1e308, -1e300, 10**400, -1.0, True, None, "1", b"1", "\x1b[2J"),
    *([], [1.0], [1.0] * 7, ["a", "b"], [b"a", b"b"], [True, False], [10**400, 1], [float("nan")] * 2, [None, None]),
    *({"a": 1}, (1.0, 1.0), np.float64(1), [[1.0], [1.0]], [-1.0, -1.0], [1e308, 1e308], [1.0, float("inf")]),
)
"""What stands for no number, and for no pair of a sum and a count."""
SHAPES = ((8, 64), (8,), (10, 8), (10,), (44, 8), (44,))
"""Of the models' arrays."""
GROUPS = ("train", "pseudo", "posterior", "transition", "belief", "bag", "graph", "functions")
"""Of clients' metrics."""
RECORDS = ("arrays", "metrics", "sums", "counts", "statistics")
NAMES = (
    "evil",
    "",
    "round",
    "eval/accuracy",
    "weight/evil",
    "weight/",
    "train/\x1b[31m",
    "a" * 100_000,
    "system/x",
    "../x",
)


def _any(rng: np.random.Generator, things: Iterable[Any]) -> Any:
    things = list(things)
    return things[rng.integers(len(things))]


def _put(record: Any, key: str, value: Any) -> None:
    record.__dict__["_data"][key] = value  # past Flower's own checks: what comes over a wire may pass others


def _records(rng: np.random.Generator, body: RecordDict) -> None:
    own = [name for name in body if name in RECORDS]
    if not own:
        return
    key = _any(rng, own)  # none that an earlier mutation put there, or this one would take it back
    match rng.integers(4):
        case 0:
            del body[key]
        case 1:
            _put(body, key + "x", body.pop(key))
        case 2:
            kinds = [kind for kind in (ArrayRecord, MetricRecord, ConfigRecord) if not isinstance(body[key], kind)]
            _put(body, key, _any(rng, kinds)({}))
        case _:
            _put(
                body,
                _any(rng, [name for name in NAMES if name not in RECORDS]),
                _any(rng, [ConfigRecord, MetricRecord, ArrayRecord])({}),
            )


def _keys(rng: np.random.Generator, body: RecordDict) -> None:
    """A name more or less, in a record whose names are all needed."""
    record = body.get(_any(rng, [name for name in ("arrays", "metrics", "counts", "statistics") if name in body]))
    if not isinstance(record, (ArrayRecord, MetricRecord, ConfigRecord)):
        return
    own = [name for name in record if name not in NAMES]
    if rng.random() < 0.5 and own:
        del record[_any(rng, own)]
    else:
        _put(record, _any(rng, NAMES), _any(rng, [1.0, [1.0, 1.0], Array(np.ones(3, np.float32))]))


def _array(rng: np.random.Generator, body: RecordDict) -> None:
    record = body.get("arrays")
    if not isinstance(record, ArrayRecord) or not len(record):
        return
    key = _any(rng, record)
    good = record[key]
    if not isinstance(good, Array) or good.shape not in SHAPES or len(good.data) < 128:  # mutated before
        return
    kind = rng.integers(8)
    made = copy.copy(good)
    values = np.zeros(good.shape, np.float32)
    if kind == 0:
        made = Array(
            values.astype(
                _any(rng, ["bool", "int8", "uint8", "float64", "float16", ">f4", "M8[s]", "m8[s]", "U3", "S2", "c8"])
            )
        )
        if rng.random() < 0.5:
            made.dtype = good.dtype
    elif kind == 1:
        made = Array(np.zeros(_any(rng, [(), (1,), (0,), (*good.shape, 1), (2, *good.shape)]), np.float32))
        if made.shape == good.shape:
            made.stype = "torch"
        elif rng.random() < 0.5:
            made.shape = good.shape
    elif kind == 2:
        made.data = good.data[: rng.integers(len(good.data))]
    elif kind == 3:
        made.data = good.data + rng.bytes(int(rng.integers(1, 50)))
    elif kind == 4:  # a byte of the header
        place = int(rng.integers(60))
        made.data = (
            good.data[:place] + bytes([(good.data[place] + int(rng.integers(1, 256))) % 256]) + good.data[place + 1 :]
        )
    elif kind == 5:
        made.data = rng.bytes(int(rng.integers(200)))
    elif kind == 6:
        field = _any(rng, ["dtype", "shape", "stype"])
        setattr(made, field, _any(rng, ["pickle", "float", (7, 7, 7), ("a",), (-1,), None, 3, b"x"]))
    else:
        values.ravel()[rng.integers(max(1, values.size)) :][:1] = _any(rng, [np.nan, np.inf, -np.inf, 1e30, -1e38])
        made = Array(values) if values.size else Array(np.zeros(9, np.float32))
    _put(record, key, made)


def _running(rng: np.random.Generator, body: RecordDict) -> None:
    """A variance below 0, or a number of batches that it cannot have seen."""
    record = body.get("arrays")
    if not isinstance(record, ArrayRecord):
        return
    names = [name for name in record if name.endswith(("running_var", "num_batches_tracked"))]
    if not names:
        return
    key = _any(rng, names)
    if key.endswith("running_var"):
        values = np.ones(record[key].shape, np.float32)
        values[rng.integers(len(values))] = -(10.0 ** rng.uniform(-30, 30))
    else:
        values = np.array(_any(rng, [-1, -(2**40), 10**4, 2**40, 2**63 - 1]))
    _put(record, key, Array(values))


def _metric(rng: np.random.Generator, body: RecordDict) -> None:
    record = body.get("metrics")
    if not isinstance(record, MetricRecord):
        return
    if rng.random() < 0.3:
        for place in range(int(rng.integers(1, 21))):
            _put(record, f"weight/e{place}", 1e9)
        return
    key = _any(rng, ["num-examples", "train_loss"] + [name for name in record if name.startswith("weight/")])
    values = [value for value in ODD if not (key == "train_loss" and value == -1.0)]
    _put(record, key, _any(rng, [*values, *([1e9, 1e300, 1e5] if key != "train_loss" else [1e300])]))


def _sum(rng: np.random.Generator, body: RecordDict) -> None:
    record = body.get("sums")
    if not isinstance(record, ConfigRecord):
        return
    chance = rng.random()
    if chance < 0.4:
        tags = (
            "eval/accuracy",
            "round",
            "select/accuracy",
            "interim/accuracy",
            "system/failed_clients",
            "comm/bytes_up",
            *(f"{group}/invented" for group in GROUPS),
        )
        _put(record, _any(rng, [*tags, "pseudo/accuracy", "train/forward_samples", *NAMES]), [1.0, 1.0])
    elif chance < 0.7:  # a mean out of the tag's range
        tag = _any(rng, client_tags().values())
        least, largest = tag.range(10)
        beyond = float(10 ** rng.uniform(-1, 30)) * max(abs(least), abs(largest))
        mean, count = _any(rng, [least - beyond, largest + beyond]), float(rng.integers(1, 9))
        _put(record, tag.name, [mean * count, count])
    else:
        _put(record, _any(rng, [*record, "train/loss"]), _any(rng, [*ODD, 1.0, [1.0, 1e14], [1e307, 1.0]]))


def _count(rng: np.random.Generator, body: RecordDict) -> None:
    record = body.get("counts")
    if not isinstance(record, ConfigRecord) or not len(record):
        return
    key = _any(rng, record)
    if not isinstance(record[key], list):
        return
    old = list(record[key])  # type: ignore[arg-type]
    wrong = [-1.0, float("nan"), 1e300, float("inf")]
    match rng.integers(4):
        case 0:
            _put(
                record,
                key,
                _any(rng, [value for value in ODD if not (isinstance(value, list) and len(value) == len(old))]),
            )
        case 1:
            _put(record, key, [*old, -1.0])  # after another mutation it may be of the right length
        case 2:
            _put(record, key, [_any(rng, wrong), *old[1:]])
        case _:
            if key == "claimed_bytes":
                _put(record, key, [-value - 1 for value in old])
            else:
                _put(record, key, [value * 1e6 + 1e9 for value in old])


def _statistic(rng: np.random.Generator, body: RecordDict) -> None:
    record = body.get("statistics")
    if not isinstance(record, ConfigRecord):
        return
    if not len(record):
        _put(record, _any(rng, NAMES), [1.0, 1.0, 5.0])
        return
    key = _any(rng, record)
    value = record[key]
    if (
        not isinstance(value, list)
        or value[:1] not in ([0.0], [1.0], [2.0], [3.0])
        or {type(x) for x in value} != {float}
    ):
        return  # mutated before
    start = 1 + int(value[0])
    numbers = np.array(value[start:])
    if not len(numbers):
        return
    match rng.integers(5):
        case 0:
            _put(record, key, _any(rng, ODD))
        case 1:
            _put(record, key, [*value[:start], *numbers, 0.0])
        case 2:
            numbers[rng.integers(len(numbers))] = _any(rng, [np.nan, np.inf, 1e300, -1e300, 1e10, -1e10])
            _put(record, key, [*value[:start], *numbers.tolist()])
        case 3:
            numbers = rng.permutation(numbers) * 1e6 + (0 if numbers.any() else 1e7)
            _put(record, key, [*value[:start], *numbers.tolist()])
        case _:
            _put(record, key, [value[0] + 1, *value[1:]])


def _allowed(rng: np.random.Generator, body: RecordDict) -> None:
    """What a client that follows its method could send, if it is no good one: to be taken without a crash."""
    arrays, metrics, statistics = body["arrays"], body["metrics"], body["statistics"]
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(metrics, MetricRecord)
    assert isinstance(statistics, ConfigRecord)
    match rng.integers(4):
        case 0:
            factor = _any(rng, [1000.0, 0.0, 1e9, -1e6])
            for name, array in arrays.items():
                values = array.numpy()
                if values.dtype.kind == "f":
                    _put(arrays, name, Array((values * factor).astype(values.dtype)))
        case 1:
            _put(metrics, "num-examples", 0.0)
        case 2:
            shuffled = {name: arrays[name] for name in rng.permutation(list(arrays)).tolist()}
            _put(body, "arrays", ArrayRecord(shuffled))
        case _:
            _put(body["sums"], "train/loss", [float(rng.normal() * 1e6), 1.0])


MUTATIONS: tuple[Mutation, ...] = (
    _records,
    _keys,
    _array,
    _array,
    _running,
    _metric,
    _sum,
    _count,
    _statistic,
    _statistic,
)


def case(seed: int, folder: Path) -> str | None:
    """Returns what is wrong with how a round takes one mutated reply."""
    rng = np.random.default_rng(seed)
    honest = _any(rng, rounds_of(seed % len(SETTINGS)))
    client = int(rng.integers(CLIENTS))
    message, body = honest.messages[client], copy.deepcopy(honest.contents[client])
    reply = Message(body, reply_to=message)
    changed, expected, done = {client: [reply]}, client, ""
    chance = rng.random()
    if chance < 0.1:
        _allowed(rng, body)
        return _attempt(honest, changed, "_allowed")[1] or None
    if chance < 0.2:
        done = _any(rng, ["twice", "forged", "earlier", "empty", "undecodable"])
        if done == "twice":
            changed, expected = {client: [Message(copy.copy(body), reply_to=message), reply]}, CLIENTS
        elif done == "forged":
            reply.metadata.__dict__["_src_node_id"] = _any(rng, [0, 1 + (client + 1) % CLIENTS, 2**63, -1, None])
        elif done == "earlier":
            reply.metadata.__dict__["_reply_to_message_id"] = _any(rng, ["", "999999", None, "\x1b[2J"])
        elif done == "undecodable":
            raised = _any(
                rng, [DecodeError("\x1b[2J\n"), AttributeError(), KeyError("a" * 100_000), RecursionError("b")]
            )
            grid: Any = Garbled(raised)
            changed = {client: list(replies_to(grid, [message], timeout=1.0))}
        else:
            reply.__dict__["_content"] = None
    else:
        whole = repr(body)
        for _ in range(int(rng.integers(1, 4))):
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            before = repr(body)
            mutation(rng, body)
            done += f" {mutation.__name__}" * (repr(body) != before)
        if repr(body) == whole:  # nothing was changed, or it was changed back
            return None
    outcome, wrong = _attempt(honest, changed, done)
    if outcome is None:
        return wrong
    if not outcome.refused:
        return f"{done} was accepted"
    if not outcome.same(honest.without_client(expected)):
        return f"{done} left a trace in the round"
    return None


def _attempt(honest: Honest, changed: Mapping[int, list[Message]], done: str) -> tuple[Outcome | None, str]:
    try:
        return honest.run(honest.replies(changed)), ""
    except Exception as error:
        return None, f"{done} raised {type(error).__name__}: {error}"
