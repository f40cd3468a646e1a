"""The schema of an experiment's checkpoint: everything in it is checked against the state the experiment would create.

A digest tells a file that was damaged from one that was not, but not one that was written by something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi, Strategy
from torch import Tensor

from fedlabel.compression import RESIDUAL
from fedlabel.experiment import Experiment
from fedlabel.learning.metrics import COUNTED
from fedlabel.methods.batch import State, StateDict
from fedlabel.shown import shown
from server.flower import parse_memory
from server.sampling import COLUMNS, REMEMBERING
from server.schema import ResultSchema
from server.state import ServerState
from server.strategy import strategy_state

_FORMS = {"m_t": "arrays", "v_t": "arrays", "momentum_vector": "list"}
"""Attribute of a strategy -> its form in `strategy_state`; see also `_form`."""


def complaints(checkpoint: ServerState, experiment: Experiment, strategy: Strategy) -> Iterator[str]:
    """Yields the errors of a checkpoint, as a run of this experiment would not write it. Only the first is sure to make
    sense.

    Args:
        checkpoint: as loaded, on the CPU; its round number is one of the run's.
        experiment: of the run.
        strategy: a fresh one.
    """
    recipe, like, done = experiment.recipe, experiment.initial_state, checkpoint.round_number
    yield from _tensors("model", checkpoint.model, like)
    for name in ("previous", "average", "selected"):
        if not _is_empty(getattr(checkpoint, name)):
            yield from _tensors(name, getattr(checkpoint, name), like)
    if any(recipe.begins(number) for number in range(1, done + 1)) == _is_empty(checkpoint.previous):
        yield f"`previous` does not fit the stage of round {done}"
    shared = recipe.shared.start()
    yield from _tensors("shared", checkpoint.shared, shared, finite=False)
    yield from _strategy(checkpoint.strategy, strategy, like)
    yield from _client_states(checkpoint.clients, experiment, shared)
    yield from _helpers(checkpoint.helpers, experiment)
    yield from _pace(checkpoint.pace, experiment)
    if not isinstance(checkpoint.observers, dict) or checkpoint.observers.keys() - {"functions", "privacy"}:
        yield "`observers` holds what no observer remembers"
    yield from _votes(checkpoint.observers.get("functions", {}), experiment)
    yield from _uploads(checkpoint.observers.get("privacy", {}), experiment, done)


def _tensors(what: str, found: Any, like: State | StateDict, finite: bool = True) -> Iterator[str]:
    """Tensors by name; `finite`: infinity is not allowed, as NaN never is."""
    yield from _names(what, found, like)
    for name, example in like.items():
        value = found[name]
        plain = type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized:
            yield f"`{what}` has no plain tensor as {name}"
        if value.dtype != example.dtype or value.shape != example.shape:
            yield (
                f"`{what}` has {name} of shape {_size(value)} and {_dtype(value)}, not {_size(example)} and "
                f"{_dtype(example)}"
            )
        if value.isnan().any() or (finite and not value.isfinite().all()):
            yield f"`{what}` holds NaN or infinity in {name}"


def _arrays(what: str, found: Any, like: StateDict, dtypes: bool) -> Iterator[str]:
    """Finite numpy arrays by name; `dtypes`: of the same types as in `like`."""
    yield from _names(what, found, like)
    for name, example in like.items():
        yield from _array(f"{what}: {name}", found[name], tuple(example.shape), _dtype(example) if dtypes else None)


def _array(what: str, value: Any, shape: tuple[int, ...] | None, dtype: str | None = None) -> Iterator[str]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        yield f"`{what}` is no array of numbers"
    if shape is not None and value.shape != shape:
        yield f"`{what}` has shape {_size(value)}, not {_size(shape)}"
    if dtype is not None and value.dtype.name != dtype:
        yield f"`{what}` is {value.dtype.name}, not {dtype}"
    if not np.isfinite(value).all():
        yield f"`{what}` holds NaN or infinity"


def _names(what: str, found: Any, wanted: Mapping[Any, object]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"`{what}` is no mapping"
    if found.keys() != wanted.keys():
        odd = sorted(map(shown, found.keys() ^ wanted.keys()))
        yield f"`{what}` has missing or unexpected entries: {', '.join(odd[:3])}"


def _strategy(saved: Any, strategy: Strategy, like: StateDict) -> Iterator[str]:
    fresh = strategy_state(strategy)
    if not isinstance(saved, dict):
        yield "`strategy` is no mapping"
    # A mapping of other things than arrays is not saved, see `strategy_state`.
    needed = {name for name, value in fresh.items() if value != {"arrays": {}}}
    if odd := sorted(map(shown, (saved.keys() - fresh.keys()) | (needed - saved.keys()))):
        yield f"`strategy` has missing or unexpected entries: {', '.join(odd[:3])}"
    for name, value in saved.items():
        start = fresh[name]
        if isinstance(start, (bool, int, float)):
            if type(value) is not type(start) or value != start:
                yield f"`strategy`: {name} (={shown(value, 40)}) is not what the configuration says (={start})"
        elif value is not None and value != start:
            form = _form(name, strategy)
            if not isinstance(value, dict) or list(value) != [form]:
                yield f"`strategy`: {name} does not hold {form}"
            arrays = value[form]
            if form == "list":
                if not isinstance(arrays, list) or len(arrays) != len(like):
                    yield f"`strategy`: {name} is no list of {len(like)} arrays"
                arrays = dict(zip(like, arrays, strict=True))
            elif name == "current_arrays" and arrays == {}:  # QFedAvg's, which it uses up
                continue
            yield from _arrays(f"strategy: {name}", arrays, like, dtypes=False)


def _form(attribute: str, strategy: Strategy) -> str:
    """Returns the serialised form of an attribute's arrays, see `strategy_state`."""
    if attribute == "current_arrays":
        return "arrays" if isinstance(strategy, (FedAdagrad, FedAdam, FedYogi)) else "record"
    return _FORMS.get(attribute, "arrays")


def _client_states(saved: Any, experiment: Experiment, shared: State) -> Iterator[str]:
    if not isinstance(saved, dict):
        yield "`clients` is no mapping"
    remembered, residual_examples = experiment.recipe.memory, {}
    if experiment.config.compression.error_feedback:
        numbers = torch.zeros(experiment.uplink.numbers(experiment.initial_state))
        residual_examples = {RESIDUAL + part: numbers for part in ResultSchema.of(experiment).parts}
    for client, data in saved.items():
        yield from _client("clients", client, experiment)
        what = f"clients: client {client}"
        kept = parse_memory(data) if type(data) is bytes else None
        if kept is None:
            yield f"`{what}` cannot be read"
            return
        memory = remembered.start(experiment.federation.supervision(client).candidates)
        examples = {**remembered.like({**memory, **shared}, experiment.initial_state), **residual_examples}
        if odd := sorted(map(shown, set(kept) - set(examples))):
            yield f"`{what}` has unexpected entries: {', '.join(odd[:3])}"
        for name, value in kept.items():
            example = examples[name]
            # What starts without rows gets as many as it needs.
            start = 1 if example.dim() and len(example) == 0 else 0
            if value.ndim != example.dim() or value.shape[start:] != tuple(example.shape)[start:]:
                yield f"`{what}` has {name} of shape {_size(value)}, not {_size(example)}"
            if value.dtype.name != _dtype(example):
                yield f"`{what}` has {name} of {value.dtype.name}, not {_dtype(example)}"
            if np.isnan(value).any():
                yield f"`{what}` holds NaN in {name}"
            if name in residual_examples and not np.isfinite(value).all():
                yield f"`{what}` holds infinity in {name}"


def _helpers(saved: Any, experiment: Experiment) -> Iterator[str]:
    helpers = experiment.recipe.helpers
    yield from _names("helpers", saved, {} if helpers is None else {"models": None, "outputs": None})
    if helpers is None:
        return
    if not isinstance(saved["models"], dict):
        yield "`helpers` has no mapping of models"
    yield from _names("helpers: outputs", saved["outputs"], saved["models"])
    like = {name: value for name, value in experiment.initial_state.items() if name.startswith(helpers.prefix)}
    classes = experiment.federation.dataset.num_classes
    for client, model in saved["models"].items():
        yield from _client("helpers", client, experiment)
        yield from _arrays(f"helpers: client {client}", model, like, dtypes=True)
        output = saved["outputs"][client]
        yield from _names(f"helpers: client {client}", output, {"output": None})
        yield from _array(f"helpers: client {client}: output", output["output"], (classes,), "float64")


def _pace(saved: Any, experiment: Experiment) -> Iterator[str]:
    """What `Pacing.dump` returns. Replies on their way are only looked at: they were checked before they were kept."""
    config = experiment.config
    remembers = experiment.devices is not None or config.sampling.kind in REMEMBERING
    parts = {"seconds": config.pacing.kind, "history": None} if remembers else {}
    parts |= {"passes": None} if config.pacing.partial_work else {}
    parts |= {"flights": None} if config.pacing.is_asynchronous else {}
    yield from _names("pace", saved, parts)
    if not parts:
        return
    numbers = [saved["seconds"], *saved.get("passes", {}).values()]
    if not all(type(each) is float and 0 <= each < math.inf for each in numbers):
        yield "`pace` holds a time or a number of passes that is none"
    yield from _names("pace: history", saved["history"], dict.fromkeys(("client", *COLUMNS)))
    size = len(saved["history"]["client"])
    for name, values in saved["history"].items():
        if not isinstance(values, np.ndarray) or values.shape != (size,):
            yield f"`pace: history` has no {size} numbers as {name}"
    for client in saved["history"]["client"].tolist():
        yield from _client("pace: history", client, experiment)
    for flight in saved.get("flights", []):
        yield from _names("pace: flights", flight, dict.fromkeys(("finish", "client", "start", "version", "result")))
        yield from _client("pace: flights", flight["client"], experiment)
        for part in (flight["result"] or {"parts": {}})["parts"].values():
            yield from _tensors("pace: flights", part["state"], experiment.initial_state)


def _votes(saved: Any, experiment: Experiment) -> Iterator[str]:
    if not isinstance(saved, dict):
        yield "`votes` is no mapping"
    classes = experiment.federation.dataset.num_classes
    functions: int | None = None
    for client, counts in saved.items():
        yield from _client("votes", client, experiment)
        what = f"votes: client {client}"
        yield from _names(what, counts, dict.fromkeys(COUNTED))
        if not all(isinstance(row, list) and all(type(each) is float for each in row) for row in counts.values()):
            yield f"`{what}` holds other things than lists of numbers"
        if not all(math.isfinite(each) and each >= 0 for row in counts.values() for each in row):
            yield f"`{what}` holds counts that are none"
        functions = len(counts["function_counts"]) // 4 if functions is None else functions
        sizes = {"function_votes": functions * classes, "function_counts": functions * 4, "function_samples": 5}
        if any(len(counts[name]) != size for name, size in sizes.items()):
            yield f"`{what}` does not fit {functions} functions and {classes} classes"


def _uploads(saved: Any, experiment: Experiment, done: int) -> Iterator[str]:
    if not isinstance(saved, dict):
        yield "`uploads` is no mapping"
    for client, times in saved.items():
        yield from _client("uploads", client, experiment)
        if type(times) is not int or not 1 <= times <= done:
            yield f"`uploads: client {shown(client, 40)}` (={shown(times, 40)}) is no number of rounds up to {done}"


def _client(what: str, client: object, experiment: Experiment) -> Iterator[str]:
    clients = experiment.config.num_clients
    if type(client) is not int or not 0 <= client < clients:
        yield f"`{what}` names client {shown(client, 40)}, and there are {clients}"


def _is_empty(value: object) -> bool:
    return isinstance(value, dict) and not value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _size(value: Any) -> str:
    return "x".join(map(str, value if isinstance(value, tuple) else tuple(value.shape))) or "()"
