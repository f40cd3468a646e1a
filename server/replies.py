"""The schema of a reply to a round, and the only entry point for clients' data: bytes in, checked values or a rejection
out.

The schema follows from the method, the model and the training: which arrays of which type and shape, which weights and
how large at most, which metrics in which range, which counts of which length and what they cannot exceed. Nothing
behind this door can raise on what a client sent. Only a model's weights are not bounded by what the method could give
(see `strategy.max_update_norm`, and Flower's robust strategies). Errors of Flower's decoder, before this door, are
dealt with in `server/exchange.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.experiment import Experiment
from fedlabel.learning.client import weight_in_mean
from fedlabel.learning.metrics import BELIEF_BINS, CALIBRATION_BINS, Counts
from fedlabel.learning.plan import Units, bag_units, most_drawn
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import ByBag, Recipe
from fedlabel.methods.shared import Limits
from fedlabel.methods.uploads import PhaseResult
from fedlabel.metric_tags import LARGEST_MEAN, Tag, client_tags
from fedlabel.models import NO_STATISTICS, RunningStatistics
from fedlabel.shown import shown
from server.npy import npy_header
from server.strategy import LARGEST_WEIGHT, Bounds, reply_bounds

LARGEST_NUMBER = 1e15
"""Of counts and statistics: whole numbers up to here are float64s."""
PER_DRAW = 100
"""How often, at most, a sample that is drawn is counted by one metric, or sent through one network."""
_ROUNDING = 1e-3
"""Relative error of sums that were made in float32."""
_RECORDS = {
    "arrays": ArrayRecord,
    "metrics": MetricRecord,
    "sums": ConfigRecord,
    "counts": ConfigRecord,
    "statistics": ConfigRecord,
}
ANY = Bounds()


class Refused(ValueError):
    """A reply is rejected; the text gives the reason in one line that is safe to show."""


def harmless(text: str, most: int = 300) -> str:
    """Returns a foreign text, see `shown`; it keeps its lines."""
    return shown(text, most, keep="\n")


def _listed(names: Sequence[str]) -> str:
    """Returns the first of a client's names, in one line."""
    return ", ".join(shown(name, 60) for name in names[:3]) + (", ..." * (len(names) > 3))


class ArrayForm(NamedTuple):
    """The expected form of one array of a model."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header: bytes
    """The header of numpy.save for such an array."""
    type_name: str
    """Of the dtype."""
    least: float
    largest: float

    @classmethod
    def like(cls, value: torch.Tensor, not_negative: bool = False, largest_weight: float = LARGEST_WEIGHT) -> ArrayForm:
        """Returns the form of a tensor.

        Args:
            value: the tensor.
            not_negative: whether no number in it can be below 0.
            largest_weight: largest absolute value, of floats.
        """
        dtype, shape, file = torch.empty(0, dtype=value.dtype).numpy().dtype, tuple(value.shape), BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        largest = largest_weight if dtype.kind == "f" else LARGEST_NUMBER
        return cls(dtype, shape, file.getvalue(), str(dtype), 0.0 if not_negative else -largest, largest)

    def read(self, name: str, array: Array) -> np.ndarray:
        """Returns the array as a read-only view of its bytes; `name` is the server's own name for it.

        Raises:
            Refused: it is of another type or shape, or holds what no weight is.
        """
        what = f"{name} of its model"
        if array.stype != "numpy.ndarray":
            raise Refused(f"BadReply: {what} cannot be read: it is serialised as {_listed([str(array.stype)])}")
        if array.dtype != self.type_name:
            raise Refused(f"BadReply: {what} is {_listed([str(array.dtype)])}, not {self.dtype}")
        if array.shape != self.shape:
            raise Refused(f"BadReply: {what} has shape {_listed([str(array.shape)])}, not {self.shape}")
        start, order = self._start(what, array.data)
        size = math.prod(self.shape)
        if len(array.data) - start != size * self.dtype.itemsize:
            raise Refused(
                f"BadReply: {what} has {len(array.data) - start} bytes, not {size * self.dtype.itemsize} of "
                f"{self.dtype} {self.shape}"
            )
        values = np.frombuffer(array.data, self.dtype, size, start).reshape(self.shape, order=order)  # type: ignore[call-overload]
        self._check(what, values)
        return values

    def _start(self, what: str, data: bytes) -> tuple[int, str]:
        """Returns the offset of the values and their order. A client's bytes are never evaluated as code."""
        if data.startswith(self.header):
            return len(self.header), "C"
        found = npy_header(data)
        if found is None:
            raise Refused(f"BadReply: {what} cannot be read: it is no file of numpy.save")
        if found.descr != np.lib.format.dtype_to_descr(self.dtype) or found.shape != self.shape:
            raise Refused(f"BadReply: {what} holds {found.descr} {found.shape}, not {self.dtype} {self.shape}")
        return found.start, found.order

    def _check(self, what: str, values: np.ndarray) -> None:
        if not values.size:
            return
        if self.dtype.kind == "b":
            if values.view(np.uint8).max() > 1:
                raise Refused(f"BadReply: {what} holds what is neither true nor false")
            return
        if not (values.min() >= self.least and values.max() <= self.largest):  # nor if one is NaN
            if not np.isfinite(values).all():
                raise Refused(f"NotFinite: {what} holds NaN or infinity")
            if self.least == 0 and values.min() < 0:
                raise Refused(f"BadReply: {what} holds a number below 0 (={values.min():g})")
            raise Refused(f"TooLarge: {what} holds a number beyond +-{self.largest:g}")


class ClientLimits(NamedTuple):
    """Upper limits of a client's values in a round."""

    method: Limits
    weights: Mapping[str, float]
    """Limits of the metrics that are weights in the server's mean."""
    draws: int
    """Largest number of times that samples were drawn or evaluated."""


class Reply(NamedTuple):
    """A checked reply of one client."""

    content: RecordDict
    """Its arrays, in the model's order, and its metrics, for a strategy."""
    sums: Counts
    counts: Counts
    statistics: dict[str, np.ndarray]
    """Name -> float64 statistic in its declared shape."""


class ReplySchema:
    """The schema of replies to the rounds of a run.

    Args:
        model: what is sent to clients, on any device.
        recipe: the method's.
        training: how clients train.
        sizes: how many samples each client holds, as it announced.
        num_classes: of the labels.
        parameters: names in `model` that are trained.
        functions: labelling functions that vote, or heads that do.
        annotators: who label one sample at most.
        units: (client, whether unlabelled samples are drawn) -> what a phase by bags draws.
        max_update_norm: see `StrategyConfig`.
        bounds: of weights and of `train_loss`, see `strategy.reply_bounds`.
        running: names in `model` of running statistics.
        metrics: see `Method.metrics`.
    """

    def __init__(
        self,
        model: StateDict,
        recipe: Recipe,
        training: TrainingConfig,
        sizes: Sequence[int],
        num_classes: int,
        parameters: frozenset[str] = frozenset(),
        functions: int = 0,
        annotators: int = 0,
        units: Callable[[int, bool], Units] | None = None,
        max_update_norm: float | None = None,
        bounds: Bounds = ANY,
        running: RunningStatistics = NO_STATISTICS,
        metrics: Sequence[Tag] = (),
    ) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.max_update_norm = max_update_norm
        self.bounds = bounds
        self.tags = client_tags(metrics)
        """Name -> tag of each metric that a client may send."""
        self._model = {name: value.cpu() for name, value in model.items()}
        self._training = training
        self._sizes = sizes
        self.parameters = parameters
        self._annotators = annotators
        self._units = units
        self._weights: dict[tuple[object, ...], Mapping[str, float]] = {}
        parts = tuple(recipe.upload.send(self._model, [], parameters, 0.0))  # as of a client that did not train
        self.parts = parts if len(parts) > 1 else ()
        """Names of the models that a reply holds; none if it is one."""
        self.counters = [f"{part}/{name}" for part in self.parts for name in running.counters] or [*running.counters]
        """Arrays of a reply that count batches."""
        not_negative = running.variances | running.counters
        one = {name: ArrayForm.like(value, name in not_negative, bounds.weight) for name, value in model.items()}
        self.arrays = {f"{part}/{name}": form for part in self.parts for name, form in one.items()} or one
        self.counts = _lengths(num_classes, functions, recipe.upload.claimed_bytes is not None)

    @classmethod
    def of(cls, experiment: Experiment, sizes: Sequence[int]) -> ReplySchema:
        """Returns the schema of an experiment; sizes: the clients' announced numbers of samples."""
        config, record = experiment.config, experiment.federation.record
        return cls(
            experiment.initial_state,
            experiment.recipe,
            config.training,
            sizes,
            experiment.federation.dataset.num_classes,
            frozenset(name for name, _ in experiment.teacher.named_parameters()),
            experiment.recipe.num_functions,
            record.annotations.shape[1],
            cache(lambda client, unlabeled: bag_units(experiment.federation.supervision(client), unlabeled)),
            config.strategy.max_update_norm,
            reply_bounds(config.strategy),
            experiment.running,
            config.method.metrics,
        )

    def of_round(self, round_number: int, shared: State, messages: Sequence[Message]) -> RoundSchema:
        """Returns the schema of a round.

        Args:
            round_number: 1-based.
            shared: what the server shares in it.
            messages: what is sent.
        """
        nobody = self.recipe.memory.start(torch.ones(1, self.num_classes, dtype=torch.bool))
        statistics = {name: tuple(v.shape) for name, v in self.recipe.shared.statistics({**nobody, **shared}).items()}
        arrays = messages[0].content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        trained = self.parameters if self.max_update_norm is not None else frozenset()
        needed = trained | {name.rpartition("/")[2] for name in self.counters}
        sent = {name: array.numpy() for name, array in arrays.items() if name in needed}
        return RoundSchema(self, round_number, shared, statistics, sent)

    def limits(self, client: int, round_number: int) -> ClientLimits:
        """Returns the upper limits of a client's values in a round."""
        samples, phases = self._sizes[client], self.recipe.phases(round_number)
        drawn = []
        for phase in phases:
            units = None
            if isinstance(phase.draw, ByBag):
                assert self._units is not None
                units = self._units(client, phase.draw.singles)
            drawn.append(most_drawn(phase, self._training, samples, units))
        steps, examples = (sum(column) for column in zip(*drawn, strict=True)) if drawn else (0, 0)
        key = (samples, *((phase.name, phase.start, most) for phase, (_, most) in zip(phases, drawn, strict=True)))
        if key not in self._weights:
            results = [
                PhaseResult(phase.name, self._model, float(most), phase.start)
                for phase, (_, most) in zip(phases, drawn, strict=True)
                if most
            ]
            self._weights[key] = self._most_weights(results, weight_in_mean(self._training, examples, samples))
        of_method = Limits(samples, self._annotators, int(steps), int(examples))
        return ClientLimits(of_method, self._weights[key], int(examples) + samples * len(phases))

    def _most_weights(self, results: list[PhaseResult], weight: float) -> Mapping[str, float]:
        """Returns upper limits of the method's own weights: the larger of those with all samples and with none."""
        most = self.recipe.upload.send(self._model, results, self.parameters, weight)
        none = self.recipe.upload.send(self._model, [], self.parameters, 0.0)
        weights = {part: float(max(most[part].weight, none[part].weight)) for part in most}
        if not self.parts:
            return {"num-examples": next(iter(weights.values()))}
        return {"num-examples": 1.0, **{f"weight/{part}": weights[part] for part in self.parts}}


class RoundSchema(NamedTuple):
    """The schema of replies to one round."""

    schema: ReplySchema
    round_number: int
    shared: State
    statistics: Mapping[str, tuple[int, ...]]
    """Name -> shape of the results of `Shared.statistics` in this round."""
    sent: Mapping[str, np.ndarray]
    """Arrays of the global model: batch counters, and the trained parameters if distances to them are needed."""

    def read(self, content: RecordDict, client: int) -> Reply:
        """Returns the checked content of a client's reply.

        Raises:
            Refused: it is not what a client that follows the method can have sent; nothing else is ever raised.
        """
        for name, kind in _RECORDS.items():
            if not isinstance(content.get(name), kind):
                raise Refused(f"BadReply: it lacks the record `{name}`")
        if further := [name for name in content if name not in _RECORDS]:
            raise Refused(f"BadReply: it has records that were not requested, {_listed(further)}")
        limits = self.schema.limits(client, self.round_number)
        metrics = self._metrics(content["metrics"], limits)  # type: ignore[arg-type]
        sums = self._sums(content["sums"], limits)  # type: ignore[arg-type]
        counts = self._counts(content["counts"], limits)  # type: ignore[arg-type]
        statistics = self._statistics(content["statistics"], limits.method)  # type: ignore[arg-type]
        arrays = self._arrays(content["arrays"], limits)  # type: ignore[arg-type]
        return Reply(RecordDict({"arrays": arrays, "metrics": metrics}), sums, counts, statistics)

    def _metrics(self, record: MetricRecord, limits: ClientLimits) -> MetricRecord:
        expected = ["num-examples", "train_loss", *limits.weights]
        if missing := [name for name in expected if name not in record]:
            raise Refused(f"BadReply: its metrics lack `{missing[0]}`")
        if further := [name for name in record if name not in expected]:
            raise Refused(f"BadReply: its metrics have entries that were not requested, {_listed(further)}")
        for name, most in limits.weights.items():
            if type(record[name]) not in (int, float) or not 0 <= record[name] <= most * (1 + 1e-9):  # type: ignore[operator]
                value = _listed([str(record[name])])
                raise Refused(f"BadReply: `{name}` (={value}) must lie in [0, {most:g}], as what it holds allows")
        loss, (_, least, largest) = record["train_loss"], self.schema.bounds
        if type(loss) not in (int, float) or not least <= loss <= largest:  # type: ignore[operator]
            kind = "TooLarge" if type(loss) in (int, float) and loss > largest else "BadReply"  # type: ignore[operator]
            raise Refused(
                f"{kind}: `train_loss` (={_listed([str(loss)])}) must be a number in [{least:g}, {largest:g}]"
            )
        return record

    def _sums(self, record: ConfigRecord, limits: ClientLimits) -> Counts:
        for name, pair in record.items():
            tag = self.schema.tags.get(name)
            if tag is None:
                raise Refused(f"BadReply: its metric {_listed([name])} is none that a client may write")
            total, count = _numbers("metric", name, pair, 2, sys.float_info.max)
            most = float(PER_DRAW * (limits.draws + 1) * (self.schema.num_classes + 1))
            if tag.of_pairs:
                most = max(most, limits.method.samples * (limits.method.samples - 1) / 2)
            if not 0 <= count <= most:
                what = "pairs of samples" if tag.of_pairs else "samples"
                raise Refused(f"BadReply: its metric {name} is over {count:g} {what}, more than it can have")
            least, largest = tag.range(self.schema.num_classes)
            slack = _ROUNDING * max(abs(least), abs(largest))
            if not (least - slack) * count <= total <= (largest + slack) * count:
                kind = "TooLarge" if largest == LARGEST_MEAN else "BadReply"  # as of a training that diverged
                raise Refused(
                    f"{kind}: its metric {name} (sum {total:g} over {count:g}) must have a mean in [{least:g}, "
                    f"{largest:g}]"
                )
        return dict(record)  # type: ignore[arg-type]

    def _counts(self, record: ConfigRecord, limits: ClientLimits) -> Counts:
        expected = {name: length for group in self.schema.counts for name, length in group.items()}
        if further := [name for name in record if name not in expected]:
            raise Refused(f"BadReply: its counts have entries that were not requested, {_listed(further)}")
        for group in self.schema.counts:
            missing = [name for name in group if name not in record]
            if missing and (len(missing) < len(group) or "passes" in group):
                raise Refused(f"BadReply: its counts lack {missing[0]}")
        values = {name: _numbers("count", name, numbers, expected[name]) for name, numbers in record.items()}
        for name, array in values.items():
            if array.min() < 0:
                raise Refused(f"BadReply: its count {name} is below 0 (={array.min():g})")
        forward, backward = values["passes"]
        if not backward <= forward <= PER_DRAW * self.schema.recipe.network.count * (limits.draws + 1):
            raise Refused(f"BadReply: its count passes (={forward:g}, {backward:g}) is more than it can have")
        if "drawn" in values:
            _check_pseudo_labels(values, limits.draws)
        if "function_votes" in values:
            _check_votes(values, limits.method.samples)
        return dict(record)  # type: ignore[arg-type]

    def _statistics(self, record: ConfigRecord, limits: Limits) -> dict[str, np.ndarray]:
        if further := [name for name in record if name not in self.statistics]:
            raise Refused(f"BadReply: it has statistics that were not requested, {_listed(further)}")
        found = {}
        for name, shape in self.statistics.items():
            header = [float(len(shape)), *map(float, shape)]
            value = record.get(name)
            if type(value) is not list or value[: len(header)] != header:
                raise Refused(f"BadReply: its statistic {name} is missing or has another shape than {list(shape)}")
            values = _numbers("statistic", name, value, len(header) + math.prod(shape))
            found[name] = values[len(header) :].reshape(shape)
        if found:
            try:
                tensors = {name: torch.from_numpy(values) for name, values in found.items()}
                self.schema.recipe.shared.check_statistics(tensors, self.shared, limits)
            except ValueError as error:
                raise Refused(f"BadReply: {error}") from error
        return found

    def _arrays(self, record: ArrayRecord, limits: ClientLimits) -> ArrayRecord:
        forms = self.schema.arrays
        if record.keys() != forms.keys():
            wrong = [*(name for name in forms if name not in record), *(name for name in record if name not in forms)]
            raise Refused(f"BadReply: its model has missing or unexpected arrays: {_listed(wrong)}")
        values = {name: form.read(name, record[name]) for name, form in forms.items()}
        for name in self.schema.counters:
            most = self.sent[name.rpartition("/")[2]] + PER_DRAW * limits.method.steps
            if (values[name] > most).any():
                raise Refused(
                    f"BadReply: {name} of its model counts {values[name].max()} batches, more than it can have seen"
                )
        if self.schema.max_update_norm is not None:
            self._check_distance(values, self.schema.max_update_norm)
        if list(record) == list(forms):
            return record
        return ArrayRecord({name: record[name] for name in forms})  # strategies go by the order of arrays

    def _check_distance(self, values: Mapping[str, np.ndarray], most: float) -> None:
        for prefix in [f"{part}/" for part in self.schema.parts] or [""]:
            moved = [
                float(np.square(values[prefix + name].astype(np.float64) - start).sum())
                for name, start in self.sent.items()
                if name in self.schema.parameters
            ]
            distance = math.sqrt(math.fsum(moved))
            if distance > most:
                raise Refused(
                    f"TooFar: its model is {distance:g} from the one it was sent, and `strategy.max_update_norm` is "
                    f"{most:g}"
                )


def _numbers(what: str, name: str, value: object, length: int, largest: float = LARGEST_NUMBER) -> np.ndarray:
    """Returns a list of `length` numbers as (length,) float64; `name` is safe to show.

    Raises:
        Refused: it is anything else.
    """
    if type(value) is not list or set(map(type, value)) - {float}:
        raise Refused(f"BadReply: its {what} {name} is no list of floats")
    if len(value) != length:
        raise Refused(f"BadReply: its {what} {name} has {len(value)} numbers, not {length}")
    numbers = np.array(value, dtype=np.float64)
    if not (np.abs(numbers) <= largest).all():
        raise Refused(f"NotFinite: its {what} {name} holds NaN, infinity or a number beyond +-{largest:g}")
    return numbers


def _lengths(classes: int, functions: int, claims: bool) -> tuple[Mapping[str, int], ...]:
    """Returns groups of counts, name -> number of values; each group is complete or absent, "passes" always present."""
    per_class = dict.fromkeys(("drawn", "kept", "correct"), classes)
    per_expert = dict.fromkeys((f"{name}_by_expert" for name in per_class), 2)
    per_kind = dict.fromkeys(("drawn_by_kind", "correct_by_kind"), len(KIND_NAMES))
    rows = [f"{bins}_{row}" for bins in ("bins", "kept_bins") for row in ("count", "confidence", "correct")]
    beliefs = {"beliefs": BELIEF_BINS} if classes == 2 else {}
    groups: list[Mapping[str, int]] = [
        {"passes": 2},
        {**per_class, **per_expert, **per_kind, **dict.fromkeys(rows, CALIBRATION_BINS), **beliefs},
    ]
    if claims:
        groups.append({"claimed_bytes": 2})
    if functions:
        groups.append({"function_votes": functions * classes, "function_counts": functions * 4, "function_samples": 5})
    return tuple(groups)


def _check_pseudo_labels(counts: Mapping[str, np.ndarray], most: int) -> None:
    """Checks `metrics.pseudo_label_counts`: each count is of a subset of another, and all are of one number of samples.

    Raises:
        Refused: they cannot be counts of the same pseudo-labels.
    """
    parts = [("kept", "drawn"), ("correct", "kept"), ("correct_by_kind", "drawn_by_kind")]
    parts += [("kept_by_expert", "drawn_by_expert"), ("correct_by_expert", "kept_by_expert")]
    parts += [("kept_bins_count", "bins_count")]
    parts += [(f"{bins}_{row}", f"{bins}_count") for bins in ("bins", "kept_bins") for row in ("correct", "confidence")]
    for part, whole in parts:
        if (counts[part] > counts[whole] * (1 + _ROUNDING)).any():
            raise Refused(f"BadReply: its count {part} is more than {whole}")
    total = counts["drawn"].sum()
    same = ["drawn_by_expert", "drawn_by_kind", "bins_count", *(["beliefs"] if "beliefs" in counts else [])]
    for name in same:
        if counts[name].sum() != total:
            raise Refused(f"BadReply: its count {name} is of other samples than drawn")
    if total > most:
        raise Refused(f"BadReply: its count drawn (={total:g} samples) is more than it can have, {most}")


def _check_votes(counts: Mapping[str, np.ndarray], most: int) -> None:
    """Checks `metrics.function_counts`.

    Raises:
        Refused: they cannot be counts of the same votes.
    """
    samples, voted, labeled, *right = counts["function_samples"]
    if not (samples <= most and voted <= samples and labeled <= samples and max(right) <= labeled * (1 + _ROUNDING)):
        raise Refused(f"BadReply: its count function_samples is more than it can have, {most}")
    per_function = counts["function_counts"].reshape(-1, 4)
    cast = counts["function_votes"].reshape(len(per_function), -1).sum(1)
    if (cast > voted).any() or (per_function > cast[:, None]).any():
        raise Refused("BadReply: its count function_votes or function_counts is more than function_samples allows")


class Identity(NamedTuple):
    """A node's answer to the query before the first round."""

    client: int
    source_hash: str
    samples: int | None
    """None if its code differs from the server's."""


def read_identity(content: RecordDict) -> Identity:
    """Returns a node's answer to the query, checked.

    Raises:
        Refused: it says nothing that makes sense.
    """
    record = content.get("identity")
    if not isinstance(record, ConfigRecord):
        raise Refused("its answer lacks the record `identity`")
    client, code, samples = (record.get(name) for name in ("partition-id", "source-hash", "num-samples"))
    if type(client) is not int or client < 0:
        raise Refused(f"its partition-id (={_listed([str(client)])}) is no number of at least 0")
    if type(code) is not str:
        raise Refused("its answer lacks `source-hash`")
    if samples is not None and (type(samples) is not int or samples < 0):
        raise Refused(f"its num-samples (={_listed([str(samples)])}) is no number of at least 0")
    return Identity(client, harmless(code, 64), samples)
