"""The client: Flower message -> library -> message."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlabel.data.labeling_functions import NOT_ASKED
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.hardware import source_hash
from fedlabel.methods.base import state_from_lists, state_to_lists
from fedlabel.methods.steps import StateDict
from fedlabel.metrics import function_counts, means, pseudo_label_counts
from fedlabel.training import ClientUpdate

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Says which client this node is, which code it runs and, if that is the server's, how many samples it holds."""
    client, asked = _client(context), message.content.config_records["ask"]
    answer = ConfigRecord({"partition-id": client, "source-hash": source_hash()})
    if asked.get("source-hash") == source_hash():  # other code may not know what is in the configuration
        federation = open_experiment(str(asked["experiment"])).federation
        answer["num-samples"] = len(federation.parts[client]) if client < len(federation.parts) else 0
    return Message(RecordDict({"identity": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Runs one local round and returns the model, its weight and counts; never samples, labels or posteriors."""
    record = message.content.config_records["config"]
    experiment = open_experiment(str(record["experiment"]))
    torch.set_num_threads(experiment.config.grid.threads_per_worker)
    client = _client(context)
    round_number = int(record["server-round"])  # type: ignore[arg-type]
    received = {name: _to_state(arrays, experiment) for name, arrays in message.content.array_records.items()}
    state = received.pop("arrays")
    shared = cast(dict[str, list[float]], dict(message.content.config_records.get("shared", {})))
    kept = context.state.array_records.get("memory", ArrayRecord({}))
    memory = {name: torch.from_numpy(array.numpy().copy()).to(experiment.device) for name, array in kept.items()}
    memory |= state_from_lists(shared, experiment.device)
    update = experiment.train(client, state, round_number, memory, received)
    if update.kept:
        context.state["memory"] = ArrayRecord({name: Array(t.cpu().numpy()) for name, t in update.kept.items()})
    reply = _reply(update, experiment, client)
    claimed = experiment.config.method.claimed_bytes(state, next(iter(update.parts.values())).state, len(received))
    if claimed is not None:
        reply.config_records["counts"]["claimed_bytes"] = list(claimed)
    return Message(reply, reply_to=message)


def _to_state(arrays: ArrayRecord, experiment: Experiment) -> StateDict:
    """Returns received weights on the device, in the model's own types (integers come back as floats)."""
    values = arrays.to_torch_state_dict()
    return {
        name: values[name].to(experiment.device, like.dtype)
        for name, like in experiment.initial_state.items()  # in the model's order, whatever happened on the way
        if name in values
    }


def _reply(update: ClientUpdate, experiment: Experiment, client: int) -> RecordDict:
    """Packs an update: one ArrayRecord and one MetricRecord, as Flower's strategies want it, and counts beside.

    The counts compare pseudo-labels with the hidden truth where the client has it (a simulation); they are sums over
    all its draws of a round, per true class. So does graph/homophily: neighbours of the same class, and all; and so are
    labelling functions' votes on the samples without a label counted.
    """
    single = len(update.parts) == 1
    arrays = {
        name if single else f"{part}/{name}": value
        for part, model in update.parts.items()
        for name, value in model.state.items()
    }
    # Flower's strategies average by num-examples; several parts have a weight each (see server/strategy.py).
    weights = {f"weight/{part}": float(model.weight) for part, model in update.parts.items()} if not single else {}
    weight = float(next(iter(update.parts.values())).weight) if single else 1.0
    loss = means(update.sums).get("train/loss", 0.0)  # QFedAvg weighs clients by it
    counts: dict[str, list[float]] = {}
    if update.pseudo is not None:
        truth = experiment.federation.hidden_labels(client).to(experiment.device)
        rows = update.pseudo_index.to(experiment.device)
        kind = experiment.federation.supervision(client).kind.to(experiment.device)
        classes = experiment.federation.dataset.num_classes
        counts = pseudo_label_counts(update.pseudo, truth[rows], classes, kind[rows])
    sums = dict(update.sums)
    if update.pairs is not None:
        truth = experiment.federation.hidden_labels(client)
        pairs = truth[update.pairs.cpu()]
        first, second = pairs[(pairs >= 0).all(1)].unbind(1)
        sums["graph/homophily"] = [float((first == second).sum()), float(len(first))]
    if update.votes is not None:
        votes, sets = (values.cpu() for values in update.votes)
        free = ~experiment.federation.supervision(client).labeled & (votes > NOT_ASKED).any(1)
        counts |= function_counts(votes[free], sets, experiment.federation.hidden_labels(client)[free])
    counts["passes"] = [float(update.forward), float(update.backward)]
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": weight, "train_loss": loss, **weights}),
            "sums": ConfigRecord(dict(sums)),
            "counts": ConfigRecord(dict(counts)),
            "statistics": ConfigRecord(dict(state_to_lists(update.statistics))),
        }
    )


def _client(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise ValueError(
            "This node has no `partition-id`: start the SuperNode with "
            '--node-config "partition-id=0" (0, 1, ... below num_clients, each once).'
        )
    return int(context.node_config["partition-id"])
