"""What a round leaves in the run folder: counts from the replies, evaluation, figures; and the run's summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from matplotlib.figure import Figure

from fedlabel.config import SELECT
from fedlabel.experiment import Experiment
from fedlabel.figures import client_accuracy_figure, confusion_figure, pseudo_label_panel, reliability_figure
from fedlabel.hardware import describe_hardware, source_hash, versions
from fedlabel.methods.base import state_from_lists, state_to_lists
from fedlabel.methods.steps import State, StateDict
from fedlabel.metrics import Counts, add_counts, bins_of, means, pseudo_label_metrics, ratio
from fedlabel.tracking import RunFolder, averaged_rounds, best_row, summarize
from server.functions import FunctionWatch
from server.noise import NoiseWatch
from server.strategy import decode

PANEL_EVERY = 10
"""Times evaluation.every rounds between two panels of pseudo-labelled samples."""


class RoundTally:
    """Takes in the replies of one round: hands on the usable ones, adds their counts, records failures."""

    def __init__(
        self,
        round_number: int,
        client_of: dict[int, int],
        messages: list[Message],
        statistics: State = MappingProxyType({}),  # type: ignore[assignment]
    ) -> None:
        """Takes the round's messages, and an example of the statistics that each reply has to bring."""
        self.round_number = round_number
        self.messages = {client_of[message.metadata.dst_node_id]: message for message in messages}
        self._template = state_to_lists(statistics)
        self._statistics: Counts = {}
        self.client_of = client_of
        """Node id -> client, for the cohort."""
        self.failures: list[str] = []
        """One text per failed client: a line that says who and what, then a traceback where there is one."""
        self.sums: Counts = {}
        self.client_counts: dict[int, Counts] = {}
        self.bytes_down = sum(_bytes(message.content) for message in messages)
        sent = messages[0].content.array_records["arrays"]
        self._shapes = {name: tuple(array.shape) for name, array in sent.items()}
        self.bytes_up = 0
        self._seen: set[int] = set()
        self._sizes = {"passes": 2, "claimed_bytes": 2}
        """How many numbers each of the counts has, as far as known: what is added up must be of one size."""

    def usable(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yields the replies that carry a finite model of the right shape, in client order."""
        if isinstance(replies, list):  # Flower's own grid: order of arrival
            replies = sorted(replies, key=lambda reply: self.client_of[reply.metadata.src_node_id])
        for reply in replies:
            client = self.client_of[reply.metadata.src_node_id]
            self._seen.add(client)
            if reply.has_error():
                self._fail(client, str(reply.error.reason))
                continue
            content = reply.content
            complaint = self._complaint(content)
            if complaint:
                self._fail(client, complaint)
                continue
            self.bytes_up += _bytes(content)
            counts = _lists(content, "counts")
            self.client_counts[client] = counts
            self._sizes |= {name: len(values) for name, values in counts.items()}
            self.sums = add_counts([self.sums, _lists(content, "sums")])
            self._statistics = add_counts([self._statistics, self._values(content)])
            yield reply

    def statistics(self, device: torch.device) -> State:
        """Returns the sum of the usable replies' statistics."""
        total = {name: self._header(name) + values for name, values in self._statistics.items()}
        return state_from_lists(total, device)

    def _header(self, name: str) -> list[float]:
        """Returns the dimensions and sizes in front of the values, see `state_to_lists`."""
        return self._template[name][: 1 + int(self._template[name][0])]

    def _values(self, content: RecordDict) -> Counts:
        lists = _lists(content, "statistics")
        return {name: lists[name][len(self._header(name)) :] for name in self._template}

    def finish(self) -> None:
        """Records the clients that never answered."""
        for client in sorted(set(self.client_of.values()) - self._seen):
            self._fail(client, "NoAnswer: the client did not answer in time")

    @property
    def all_failed(self) -> bool:
        """Whether no client of the cohort gave a usable answer."""
        return len(self.failures) == len(self.client_of)

    def _complaint(self, content: RecordDict) -> str | None:
        """Returns what makes a reply unusable: one client must not be able to stop the run or to spoil the model."""
        if "arrays" not in content.array_records or "metrics" not in content.metric_records:
            return "BadReply: it lacks the record `arrays` or `metrics`"
        metrics, arrays = content.metric_records["metrics"], content.array_records["arrays"]
        weights = {key: value for key, value in metrics.items() if key == "num-examples" or key.startswith("weight/")}
        if "num-examples" not in weights:
            return "BadReply: its metrics lack `num-examples`"
        for key, weight in weights.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                return f"BadReply: `{key}` (={weight}) must be a finite number of at least 0"
        prefixes = [f"{key.removeprefix('weight/')}/" for key in weights if key != "num-examples"] or [""]
        expected = {prefix + name: shape for prefix in prefixes for name, shape in self._shapes.items()}
        if found := set(expected) ^ set(arrays):
            return f"BadReply: its model lacks, or has beside the global model's arrays, {', '.join(sorted(found)[:3])}"
        for name, array in arrays.items():
            try:
                value = decode(array)
            except ValueError as error:
                return f"BadReply: {name} of its model cannot be read: {error}"
            if value.shape != expected[name]:
                return f"BadReply: {name} of its model has shape {value.shape}, not {expected[name]}"
            if not np.isfinite(value).all():
                return f"NotFinite: {name} of its model holds NaN or infinity"
        statistics = _lists(content, "statistics")
        for name, example in self._template.items():
            values, header = statistics.get(name, []), self._header(name)
            if len(values) != len(example) or values[: len(header)] != header:
                return f"BadReply: its statistic {name} is missing or has another shape than {header[1:]}"
        sums, counts = _lists(content, "sums"), _lists(content, "counts")
        sizes = {**dict.fromkeys(sums, 2), **self._sizes}
        for name, values in [*sums.items(), *counts.items()]:
            if len(values) != sizes.get(name, len(values)):
                return f"BadReply: its metric {name} has {len(values)} numbers, not {sizes[name]}"
        numbers = [*sums.values(), *counts.values(), *statistics.values()]
        if not all(np.isfinite(values).all() for values in numbers):
            return "NotFinite: its metrics hold NaN or infinity"
        return None

    def _fail(self, client: int, reason: str) -> None:
        self.failures.append(f"Round {self.round_number}, client {client}: {reason}")


def log_round(
    folder: RunFolder,
    experiment: Experiment,
    tally: RoundTally,
    models: Mapping[str, StateDict] | None,
    client_states: Mapping[int, RecordDict] | None,
    shared: State,
    watches: tuple[NoiseWatch, FunctionWatch],
    started: float,
) -> dict[str, float]:
    """Writes one round into the run folder and returns its metrics.

    Args:
        folder: the run's.
        experiment: evaluates.
        tally: the finished tally of the round.
        models: the new global model and what belongs to it (see `Experiment.evaluate`), or None where this round is not
            evaluated.
        client_states: what the clients kept when the round began; None: not in this process.
        shared: the state that the server shares from now on.
        watches: what is shown of it.
        started: `time.perf_counter()` at the start of the round.
    """
    counts = add_counts(tally.client_counts.values())
    metrics = {**means(tally.sums), **pseudo_label_metrics(counts if "drawn" in counts else {})}
    noise, functions = watches
    metrics |= noise.metrics(shared, tally.round_number)
    lists: dict[str, np.ndarray] = {}
    figures: dict[str, Figure] = {}
    bins = {"pseudo/confidences": bins_of(counts)[0]} if "drawn" in counts else {}
    if "beliefs" in counts:
        bins["pseudo/beliefs"] = np.array(counts["beliefs"])
    if "drawn" in counts:
        lists["pseudo/class_coverage"] = ratio(counts["kept"], counts["drawn"])
        lists["pseudo/class_accuracy"] = ratio(counts["correct"], counts["kept"])
        clients = [tally.client_counts.get(client, {}) for client in range(experiment.config.num_clients)]
        drawn, kept, correct = ([sum(c.get(key, [0.0])) for c in clients] for key in ("drawn", "kept", "correct"))
        lists["pseudo/client_coverage"] = ratio(kept, drawn)  # NaN for clients that did not train this round
        lists["pseudo/client_accuracy"] = ratio(correct, kept)
    with_figures = experiment.config.evaluation.figures
    if with_figures and noise.is_shown(tally.round_number):
        figures |= noise.figures(shared)
    if "function_votes" in counts:
        metrics |= functions.watch(tally.round_number, tally.client_counts, shared)
    evaluation = experiment.evaluate(models, shared) if models is not None else None
    if evaluation is not None and experiment.config.method.interim(tally.round_number):
        metrics["interim/accuracy"] = evaluation.metrics()["eval/accuracy"]
    elif evaluation is not None:
        metrics |= evaluation.metrics()
        lists["eval/class_accuracy"] = evaluation.class_accuracy
        lists["eval/client_accuracy"] = evaluation.client_accuracy
        last = tally.round_number == experiment.config.num_rounds
        every = experiment.config.evaluation.every
        if with_figures and (last or tally.round_number % (every * PANEL_EVERY) == 0):
            names = experiment.federation.dataset.class_names
            figures["eval/confusion"] = confusion_figure(evaluation.confusion, names)
            figures["eval/clients"] = client_accuracy_figure(evaluation.client_accuracy)
            panel = pseudo_panel(experiment, tally, client_states)
            figures |= {"pseudo/samples": panel} if panel is not None else {}
            if "drawn" in counts:
                title = f"Pseudo-labels of round {tally.round_number}"
                figures["pseudo/reliability"] = reliability_figure(bins_of(counts), title)
        tag = select_key(experiment)
        # Not in the other rounds of the last tenth: the next stage starts from the model that is selected, and what a
        # run learns must not depend on when it is to end.
        if tag is not None and (last or tally.round_number % every == 0):
            score = experiment.selection_score(models or {}, shared)
            metrics |= {tag: score} if score is not None else {}
    metrics["comm/bytes_up"] = float(tally.bytes_up)
    metrics["comm/bytes_down"] = float(tally.bytes_down)
    passes = counts.get("passes", [0.0, 0.0])
    metrics["train/forward_samples"], metrics["train/backward_samples"] = passes
    if "claimed_bytes" in counts:
        metrics["comm/claimed_bytes_up"], metrics["comm/claimed_bytes_down"] = counts["claimed_bytes"]
    metrics["system/failed_clients"] = float(len(tally.failures))
    metrics["system/round_seconds"] = time.perf_counter() - started
    folder.log_round(tally.round_number, metrics, lists=lists, bins=bins, figures=figures)
    return metrics


def select_key(experiment: Experiment) -> str | None:
    """Returns the tag of what `evaluation.select` goes by on the validation split; None: nothing is selected."""
    select = experiment.config.evaluation.select
    return None if select is None else "select/" + SELECT[select].rpartition("/")[2]


def pseudo_panel(
    experiment: Experiment, tally: RoundTally, client_states: Mapping[int, RecordDict] | None
) -> Figure | None:
    """Returns a figure of one client's pseudo-labelled samples, or None where the method has none.

    Nothing is asked of the client: this process trains its own copy of the (simulated) client once more, which gives
    the same draws and the same experts. Where what clients keep is not in this process, a method that keeps something
    has no panel; nor have tables, whose samples are no pictures.
    """
    size = 0 if experiment.federation.dataset.tabular else experiment.config.evaluation.panel_samples
    client = next((c for c, counts in tally.client_counts.items() if "drawn" in counts), None)
    if (
        client is None and experiment.federation.lacking
    ):  # the pseudo-labels that there may be were compared with nothing
        client = next(iter(tally.client_counts), None)
    if size == 0 or client is None:
        return None
    content = tally.messages[client].content
    types = {name: value.dtype for name, value in experiment.initial_state.items()}
    received = {
        record: {name: value.to(experiment.device, types[name]) for name, value in arrays.to_torch_state_dict().items()}
        for record, arrays in content.array_records.items()
    }
    kept = (client_states or {}).get(client, RecordDict()).array_records.get("memory", ArrayRecord({}))
    memory = {name: torch.from_numpy(array.numpy().copy()).to(experiment.device) for name, array in kept.items()}
    memory |= state_from_lists(_lists(content, "shared"), experiment.device)
    update = experiment.train(client, received.pop("arrays"), tally.round_number, memory, received)
    if update.pseudo is None or (client_states is None and update.kept):
        return None
    rows = update.pseudo_index[:size]
    names = experiment.federation.dataset.class_names
    pseudo = [values[: len(rows)].cpu() for values in update.pseudo]
    return pseudo_label_panel(
        images=experiment.client_data(client).images[rows.to(experiment.device)].cpu(),
        true_names=[names[y] if y >= 0 else None for y in experiment.federation.hidden_labels(client)[rows].tolist()],
        pseudo_names=[names[int(y)] for y in pseudo[0]],
        kept=pseudo[1].tolist(),
        experts=["global" if g else "local" for g in pseudo[2]],
        confidences=pseudo[3].tolist(),
    )


def summary(folder: RunFolder, experiment: Experiment, commit: str) -> dict[str, object]:
    """Returns the content of `summary.json`, from `metrics.jsonl` (so it covers resumed runs as a whole).

    Args:
        folder: the run's.
        experiment: the run's.
        commit: of the code that this process began with.
    """
    rows = folder.read_metrics()
    config = experiment.config
    keys = ("system/round_seconds", *_COUNTED, *_CLAIMED)
    total = add_counts({key: [row.get(key) or 0.0] for key in keys} for row in rows)
    measured = sorted({key for row in rows for key in row if key.startswith(_SUMMARIZED)})
    scalars = [key for key in measured if not any(isinstance(row.get(key), list) for row in rows)]
    results = {key: summarize(rows, key) for key in scalars}
    tag = select_key(experiment)
    chosen = best_row(rows, tag) if tag is not None else None
    if chosen is not None:
        results |= {k: {**v, "selected": chosen[k]} for k, v in results.items() if chosen.get(k) is not None}
    return {
        **results,
        **({"selected_round": chosen["round"]} if chosen is not None else {}),
        "rounds": len(rows),
        "last_tenth": averaged_rounds(rows),
        "seed": config.seed,
        "seconds": total["system/round_seconds"][0],
        "method": config.method.name,
        "dataset": config.data.name,
        "evaluation_split": config.evaluation.split,
        **{key: int(total[key][0]) for key in _COUNTED},
        **{key: int(total[key][0]) for key in _CLAIMED if any(key in row for row in rows)},
        "commit": commit,
        "source_hash": source_hash(),
        "versions": versions(),
        "hardware": describe_hardware(experiment.device),
        "command": sys.argv,
    }


_SUMMARIZED = ("eval/", "pseudo/", "posterior/", "transition/", "belief/", "graph/", "functions/", "train/loss")
_COUNTED = (
    "comm/bytes_up",
    "comm/bytes_down",
    "train/forward_samples",
    "train/backward_samples",
    "system/failed_clients",
)
_CLAIMED = ("comm/claimed_bytes_up", "comm/claimed_bytes_down")


def _bytes(content: RecordDict) -> int:
    """Size of a message's records, as Flower counts them (array data with their small headers, keys and scalars).

    The configuration is left out: its text names the grid, so the same run would count differently on another one.
    """
    return sum(record.count_bytes() for name, record in content.items() if name != "config")


def _lists(content: RecordDict, name: str) -> Counts:
    return {key: cast(list[float], value) for key, value in content.config_records.get(name, {}).items()}
