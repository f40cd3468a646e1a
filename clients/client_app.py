"""The client: Flower message -> library -> message."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.mods import remembering, told
from clients.own_data import evaluate_own, holding_record, open_own, refuse_folder
from clients.trust import Refusal, allowed_by, check_request, discreet, is_simulation_worker, may_audit, min_count_of
from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.compression import RESIDUAL, without_residuals
from fedlabel.config import parse_config
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.hardware import source_hash
from fedlabel.learning.metrics import means
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.shared import state_from_lists, state_to_lists
from fedlabel.shown import shown

app = ClientApp(mods=[discreet, told, remembering])


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answers the server's query: the client's id, the hash of its code and, if that equals the server's, its number of
    samples.
    """
    asked = message.content.config_records["ask"]
    if "schema" in asked:  # a run of nodes with data of their own
        answer = ConfigRecord({"source-hash": source_hash()})
        if asked.get("source-hash") == source_hash():
            _check(asked, context)
            least = max(parse_config(str(asked["experiment"])).privacy.min_count, min_count_of(context))
            answer.update(holding_record(context, str(asked["schema"]), least))
        return Message(RecordDict({"identity": answer}), reply_to=message)
    client = _client(context)
    answer = ConfigRecord({"partition-id": client, "source-hash": source_hash()})
    if asked.get("source-hash") == source_hash():  # other code may not know what is in the configuration
        experiment = _open(asked, context)
        parts = experiment.federation.parts
        if not experiment.config.privacy.is_on:
            answer["num-samples"] = len(parts[client]) if client < len(parts) else 0
    return Message(RecordDict({"identity": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Runs one local round and returns the model, its weight and counts; never samples, labels or posteriors. What is
    in a reply is listed in docs/trust.md.
    """
    record = message.content.config_records["config"]
    experiment, client = _open_with_client(record, context)
    torch.set_num_threads(experiment.config.grid.threads_per_worker)
    round_number = int(record["server-round"])  # type: ignore[arg-type]
    encoded = {name: _to_state(arrays, experiment) for name, arrays in message.content.array_records.items()}
    received = {name: experiment.downlink.decode(*each) for name, each in encoded.items()}
    state = received.pop("arrays")
    shared = cast(dict[str, list[float]], dict(message.content.config_records.get("shared", {})))
    memory = _kept(context, "memory", experiment)
    used, last = record.get("used-round"), context.state.config_records.get("last", ConfigRecord()).get("round")
    if used is not None and last is not None and used != last:  # the server did not use the last reply
        memory = {**without_residuals(memory), **_kept(context, "before", experiment)}
    invitation = Invitation(
        round_number,
        state,
        state_from_lists(shared, experiment.device),
        received.pop("previous", {}),
        {client: received},
        {client: float(record.get("work", 1.0))},  # type: ignore[arg-type]
        audit=may_audit(context, record.get("audit")),
        min_count=min_count_of(context),
    )
    (result,) = train_cohort(experiment, invitation, [client], [memory])
    if isinstance(result, Exception):
        raise result
    if result.kept:
        context.state["memory"] = _record(result.kept)
    if experiment.config.compression.error_feedback:
        context.state["before"] = _record({name: value for name, value in memory.items() if name.startswith(RESIDUAL)})
        context.state["last"] = ConfigRecord({"round": round_number})
    return Message(_reply(result), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the global model on the samples that a node with data of its own holds out; returns sums."""
    record = message.content.config_records["config"]
    _check(record, context)
    experiment, _ = open_own(context, record)
    torch.set_num_threads(experiment.config.grid.threads_per_worker)
    models = {}
    for name, arrays in message.content.array_records.items():
        values = arrays.to_torch_state_dict()
        models[name] = {key: values[key].to(experiment.device) for key in experiment.initial_state if key in values}
    shared = cast(dict[str, list[float]], dict(message.content.config_records.get("shared", {})))
    number = int(record["server-round"])  # type: ignore[arg-type]
    least = max(experiment.config.privacy.min_count, min_count_of(context))
    sums = evaluate_own(experiment, number, models, state_from_lists(shared, experiment.device), least)
    return Message(sums, reply_to=message)


def _open_with_client(record: ConfigRecord, context: Context) -> tuple[Experiment, int]:
    """Returns the experiment that a message is about, and the number of the node's client in it; see `_check`."""
    if "agreement" in record:
        _check(record, context)
        return open_own(context, record)
    return _open(record, context), _client(context)


def _open(record: ConfigRecord, context: Context) -> Experiment:
    """Returns the experiment that a message is about; see `_check`."""
    _check(record, context)
    return open_experiment(str(record["experiment"]))


def _check(record: ConfigRecord, context: Context) -> None:
    """Checks what a server asks for.

    Raises:
        Refusal: the server has other code, or its configuration names what this node does not allow.
    """
    text, code = str(record["experiment"]), record.get("source-hash")
    if code != source_hash():
        raise Refusal(
            f"the server runs other code (hash {shown(str(code), 64)}, at this node {source_hash()}): install the same "
            "version of fedlabel on both"
        )
    if not is_simulation_worker():
        check_request(text, allowed_by(context))


def _kept(context: Context, name: str, experiment: Experiment) -> State:
    """Returns tensors that the client has kept, on the device."""
    found = context.state.array_records.get(name, ArrayRecord({}))
    return {key: torch.from_numpy(array.numpy().copy()).to(experiment.device) for key, array in found.items()}


def _record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(value.cpu().numpy()) for name, value in state.items()})


def _to_state(arrays: ArrayRecord, experiment: Experiment) -> tuple[StateDict, StateDict]:
    """Returns received arrays on the device, in the types in which they were sent, and an example of their model."""
    values = arrays.to_torch_state_dict()
    # In the model's order, whatever happened on the way; a helper is a part of a model.
    like = {name: value for name, value in experiment.initial_state.items() if name in values}
    form = experiment.downlink.form(like)
    return {name: values[name].to(experiment.device, sent.dtype) for name, sent in form.items()}, like


def _reply(result: ClientResult) -> RecordDict:
    """Packs a result: one ArrayRecord and one MetricRecord, as Flower's strategies expect, and the method's own
    records.
    """
    single = len(result.parts) == 1
    arrays = {
        name if single else f"{part}/{name}": value
        for part, model in result.parts.items()
        for name, value in result.encoded.get(part, model.state).items()
    }
    # Flower's strategies average by num-examples; several parts have a weight each (see server/strategy.py).
    weights = {f"weight/{part}": float(model.weight) for part, model in result.parts.items()} if not single else {}
    weight = float(next(iter(result.parts.values())).weight) if single else 1.0
    loss = means(result.sums).get("train/loss", 0.0)  # QFedAvg weighs clients by it
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": weight, "train_loss": loss, **weights}),
            "sums": ConfigRecord(dict(result.sums)),
            "counts": ConfigRecord(dict(result.counts)),
            "statistics": ConfigRecord(dict(state_to_lists(result.statistics))),
        }
    )


def _client(context: Context) -> int:
    refuse_folder(context)
    if "partition-id" not in context.node_config:
        raise Refusal(
            "This node has no `partition-id`: start the SuperNode with "
            '--node-config "partition-id=0" (0, 1, ... below num_clients, each once).'
        )
    return int(context.node_config["partition-id"])
