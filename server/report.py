"""What a round leaves in the run folder: counts, evaluation, figures; and the run's summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from matplotlib.figure import Figure

from fedlabel.config import SELECT
from fedlabel.experiment import Experiment
from fedlabel.figures import client_accuracy_figure, confusion_figure, pseudo_label_panel, reliability_figure
from fedlabel.hardware import describe_hardware, source_hash, versions
from fedlabel.methods.base import state_from_lists
from fedlabel.methods.steps import State, StateDict
from fedlabel.metrics import Counts, add_counts, bins_of, means, pseudo_label_metrics, ratio
from fedlabel.tracking import RunFolder, averaged_rounds, best_row, summarize
from server.functions import FunctionWatch
from server.noise import NoiseWatch
from server.tally import RoundTally

PANEL_EVERY = 10
"""Times evaluation.every rounds between two panels of pseudo-labelled samples."""


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
    metrics["system/failed_clients"] = float(tally.num_failed)
    metrics["system/refused_replies"] = float(tally.refused)
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
    if client is None and experiment.federation.lacking:  # then pseudo-labels were compared with nothing
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


def summary(rows: Sequence[Mapping[str, Any]], experiment: Experiment, commit: str) -> dict[str, object]:
    """Returns the content of `summary.json`, from `metrics.jsonl` (so it covers resumed runs as a whole).

    Args:
        rows: the run's rounds, as `read_metrics` returns them.
        experiment: the run's.
        commit: of the code that this process began with.
    """
    config = experiment.config
    keys = ("system/round_seconds", *_COUNTED, *_CLAIMED)
    total = add_counts({key: [row.get(key) or 0.0] for key in keys} for row in rows)
    own = config.method.metrics
    declared = {tag.name for tag in own}
    measured = sorted({key for row in rows for key in row if key.startswith(_SUMMARIZED) or key in declared})
    scalars = [key for key in measured if not any(isinstance(row.get(key), list) for row in rows)]
    results = {key: summarize(rows, key, own) for key in scalars}
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


OF_THE_PROCESS = ("commit", "source_hash", "versions", "hardware", "command")
"""Keys of `summary` that tell of the process which ended the run."""
_SUMMARIZED = ("eval/", "pseudo/", "posterior/", "transition/", "belief/", "graph/", "functions/", "train/loss")
_COUNTED = (
    "comm/bytes_up",
    "comm/bytes_down",
    "train/forward_samples",
    "train/backward_samples",
    "system/failed_clients",
    "system/refused_replies",
)
_CLAIMED = ("comm/claimed_bytes_up", "comm/claimed_bytes_down")


def _lists(content: RecordDict, name: str) -> Counts:
    return {key: cast(list[float], value) for key, value in content.config_records.get(name, {}).items()}
