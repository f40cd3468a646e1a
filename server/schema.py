"""The limits of a client's result in a round: what a client that follows its method can have, and no more.

They follow from the method, the model and the training: which weights and how large at most, which metrics in which
range, which counts and what they cannot exceed. A result is checked where the client ran: of a simulated client as it
is, of a real node after its bytes were read (see `server/replies.py`). Only a model's weights are not bounded by what
the method could give (see `strategy.max_update_norm`, and Flower's robust strategies).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.compression import NO_COMPRESSION, Codec
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.experiment import Experiment
from fedlabel.learning.client import weight_in_mean
from fedlabel.learning.metrics import BELIEF_BINS, CALIBRATION_BINS, Counts, means
from fedlabel.learning.plan import Units, most_drawn
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import ByBag, Recipe
from fedlabel.methods.shared import Limits
from fedlabel.methods.uploads import ModelPart, PhaseResult
from fedlabel.metric_tags import LARGEST_MEAN, Tag, client_tags
from fedlabel.models import NO_STATISTICS, RunningStatistics
from fedlabel.privacy import PrivacyConfig, clipped, distance
from fedlabel.shown import shown
from server.strategy import LARGEST_WEIGHT, Bounds, reply_bounds

LARGEST_NUMBER = 1e15
"""Of counts and statistics: whole numbers up to here are float64s."""
PER_DRAW = 100
"""How often, at most, a sample that is drawn is counted by one metric, or sent through one network."""
_ROUNDING = 1e-3
"""Relative error of sums that were made in float32."""
ANY = Bounds()
NOT_PRIVATE = PrivacyConfig()


class Refused(ValueError):
    """A result is rejected; the text gives the reason in one line that is safe to show."""


def harmless(text: str, most: int = 300) -> str:
    """Returns a foreign text, see `shown`; it keeps its lines."""
    return shown(text, most, keep="\n")


def listed(names: Sequence[str]) -> str:
    """Returns the first of a client's names, in one line."""
    return ", ".join(shown(name, 60) for name in names[:3]) + (", ..." * (len(names) > 3))


class Range(NamedTuple):
    """The range of the numbers in one array of a model."""

    least: float
    largest: float

    @classmethod
    def of(cls, value: Tensor, not_negative: bool = False, largest_weight: float = LARGEST_WEIGHT) -> Range:
        """Returns the range of a tensor's numbers.

        Args:
            value: the tensor.
            not_negative: whether no number in it can be below 0.
            largest_weight: largest absolute value, of floats.
        """
        largest = largest_weight if value.is_floating_point() else LARGEST_NUMBER
        return cls(0.0 if not_negative else -largest, largest)

    def check(self, what: str, values: Tensor, least: float, largest: float) -> None:
        """Checks an array with this smallest and this largest number; both are NaN if one is.

        Raises:
            Refused: it holds what no weight is.
        """
        if least >= self.least and largest <= self.largest:  # not if they are NaN
            return
        if not values.isfinite().all():
            raise Refused(f"NotFinite: {what} holds NaN or infinity")
        if self.least == 0 and least < 0:
            raise Refused(f"BadReply: {what} holds a number below 0 (={least:g})")
        raise Refused(f"TooLarge: {what} holds a number beyond +-{self.largest:g}")


class ClientLimits(NamedTuple):
    """Upper limits of a client's values in a round."""

    method: Limits
    weights: Mapping[str, float]
    """Limits of the parts' weights in the server's mean."""
    draws: int
    """Largest number of times that samples were drawn or evaluated."""


class ResultSchema:
    """The limits of results of the rounds of a run.

    Args:
        model: what is sent to clients, on any device.
        recipe: the method's.
        training: how clients train.
        size_of: client -> how many samples it holds.
        num_classes: of the labels.
        parameters: names in `model` that are trained.
        functions: labelling functions that vote, or heads that do.
        annotators: who label one sample at most.
        units: (client, whether unlabelled samples are drawn) -> what a phase by bags draws.
        max_update_norm: see `StrategyConfig`.
        bounds: of weights and of the training loss, see `strategy.reply_bounds`.
        running: names in `model` of running statistics.
        metrics: see `Method.metrics`.
        steps: whether clients send how many steps they took.
        clip_update_norm: see `StrategyConfig`.
        privacy: see `PrivacyConfig`.
        codec: of updates.
    """

    def __init__(
        self,
        model: StateDict,
        recipe: Recipe,
        training: TrainingConfig,
        size_of: Callable[[int], int],
        num_classes: int,
        parameters: frozenset[str] = frozenset(),
        functions: int = 0,
        annotators: int = 0,
        units: Callable[[int, bool], Units] | None = None,
        max_update_norm: float | None = None,
        bounds: Bounds = ANY,
        running: RunningStatistics = NO_STATISTICS,
        metrics: Sequence[Tag] = (),
        steps: bool = False,
        clip_update_norm: float | None = None,
        privacy: PrivacyConfig = NOT_PRIVATE,
        codec: Codec = NO_COMPRESSION,
    ) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.max_update_norm, self.clip_update_norm = max_update_norm, clip_update_norm
        self.privacy = privacy
        self.bounds = bounds
        self.tags = client_tags(metrics)
        """Name -> tag of each metric that a client may send."""
        self.parameters = parameters
        self.counters = frozenset(running.counters)
        """Arrays of a model that count batches."""
        self.model = {name: value.cpu() for name, value in model.items()}
        """An example of a model."""
        self.codec = codec
        self.sent = codec.form(self.model)
        """The arrays that travel of a model: names, types and shapes."""
        self.forms = [(name, value.shape, value.dtype) for name, value in model.items()]
        """Names, shapes and types of its arrays, in order."""
        not_negative = running.variances | running.counters
        self.ranges = {name: Range.of(value, name in not_negative, bounds.weight) for name, value in model.items()}
        self.is_uniform = len({*self.ranges.values()}) == 1 and len({value.dtype for value in model.values()}) == 1
        """Whether all arrays are of one type and have one range."""
        self.parts = tuple(recipe.upload.send(self.model, [], parameters, 0.0))  # as of a client that did not train
        """Names of the models that a result holds."""
        self.counts = _lengths(num_classes, functions, recipe.upload.claimed_bytes is not None, steps)
        self._training = training
        self._size_of = size_of
        self._annotators = annotators
        self._units = units
        self._limits: dict[tuple[object, ...], ClientLimits] = {}

    @classmethod
    def of(cls, experiment: Experiment) -> ResultSchema:
        """Returns the schema of an experiment."""
        config, federation = experiment.config, experiment.federation
        return cls(
            experiment.initial_state,
            experiment.recipe,
            config.training,
            lambda client: len(federation.parts[client]),
            federation.dataset.num_classes,
            frozenset(name for name, _ in experiment.teacher.named_parameters()),
            experiment.recipe.num_functions,
            federation.record.annotations.shape[1],
            cache(experiment.units),
            config.strategy.max_update_norm,
            reply_bounds(config.strategy),
            experiment.running,
            config.method.metrics,
            config.strategy.normalize_steps,
            config.strategy.clip_update_norm,
            config.privacy,
            experiment.uplink,
        )

    def of_round(self, invitation: Invitation, shared: State) -> RoundSchema:
        """Returns the schema of a round; shared: the state as the server has it."""
        return RoundSchema(self, invitation, {name: value.cpu() for name, value in shared.items()})

    def limits(self, client: int, round_number: int) -> ClientLimits:
        """Returns the upper limits of a client's values in a round."""
        samples, phases = self._size_of(client), self.recipe.phases(round_number)
        drawn = []
        for phase in phases:
            units = None
            if isinstance(phase.draw, ByBag):
                assert self._units is not None
                units = self._units(client, phase.draw.singles)
            drawn.append(most_drawn(phase, self._training, samples, units))
        key = (samples, *((phase.name, phase.start, most) for phase, most in zip(phases, drawn, strict=True)))
        if key not in self._limits:
            steps, examples = (int(sum(column)) for column in zip(*drawn, strict=True)) if drawn else (0, 0)
            results = [
                PhaseResult(phase.name, self.model, float(most), phase.start)
                for phase, (_, most) in zip(phases, drawn, strict=True)
                if most
            ]
            weights = self._most_weights(results, weight_in_mean(self._training, examples, samples))
            of_method = Limits(samples, self._annotators, steps, examples)
            self._limits[key] = ClientLimits(of_method, weights, examples + samples * len(phases))
        return self._limits[key]

    def _most_weights(self, results: list[PhaseResult], weight: float) -> Mapping[str, float]:
        """Returns upper limits of the method's own weights: the larger of those with all samples and with none."""
        most = self.recipe.upload.send(self.model, results, self.parameters, weight)
        none = self.recipe.upload.send(self.model, [], self.parameters, 0.0)
        return {part: float(max(most[part].weight, none[part].weight)) for part in most}


class RoundSchema:
    """The limits of results of one round.

    Args:
        schema: the run's.
        invitation: what clients got.
        shared: the shared state as the server has it, on the CPU.
    """

    def __init__(self, schema: ResultSchema, invitation: Invitation, shared: State) -> None:
        self.schema, self.shared, self.round_number = schema, shared, invitation.round_number
        self.is_silent = schema.privacy.is_on and not invitation.audit
        """Whether clients send nothing but their model."""
        self.received = invitation.model
        counters = sorted(schema.counters)
        counted = torch.stack([invitation.model[name] for name in counters]).tolist() if counters else []
        self._counted = dict(zip(counters, counted, strict=True))  # one look at a device

    def limits(self, client: int) -> ClientLimits:
        """Returns the upper limits of a client's values."""
        return self.schema.limits(client, self.round_number)

    def check(self, result: ClientResult) -> ClientResult:
        """Returns a result whose values are checked, its arrays in the model's order.

        Raises:
            Refused: they are not what a client that follows the method can have.
        """
        limits = self.limits(result.client)
        if self.schema.privacy.is_on:
            check_private_weights(result.parts)
        else:
            check_weights(result.parts, limits.weights)
        if self.is_silent:
            if result.sums or result.counts or result.statistics:
                raise Refused("BadReply: it holds more than a model, which `privacy.kind` forbids")
            return self._with_checked_models(result, limits)
        self._check_sums(result.sums, limits)
        check_loss(training_loss(result.sums), self.schema.bounds)
        self._check_counts(result.counts, limits)
        self._check_statistics(result.statistics, limits.method)
        return self._with_checked_models(result, limits)

    def _with_checked_models(self, result: ClientResult, limits: ClientLimits) -> ClientResult:
        parts: dict[str, ModelPart] = {}
        for part, (state, weight) in result.parts.items():
            prefix = f"{part}/" if len(result.parts) > 1 else ""
            parts[part] = ModelPart(self._in_order(prefix, state), weight)
            self._check_model(prefix, parts[part].state, limits.method.steps)
            if self.schema.clip_update_norm is not None:
                short = clipped(parts[part].state, self.received, self.schema.parameters, self.schema.clip_update_norm)
                parts[part] = ModelPart(short, weight)
        return result._replace(parts=parts)

    def _in_order(self, prefix: str, state: StateDict) -> StateDict:
        """Returns a model with its arrays in order: sums and strategies go by position."""
        like = self.schema.model
        if [(name, value.shape, value.dtype) for name, value in state.items()] == self.schema.forms:  # nearly always
            return state
        if odd := sorted(state.keys() ^ like.keys()):
            raise Refused(f"BadReply: its model has missing or unexpected arrays: {listed([prefix + n for n in odd])}")
        for name, value in like.items():
            if state[name].shape != value.shape or state[name].dtype != value.dtype:
                found, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (state[name], value))
                raise Refused(f"BadReply: {prefix}{name} of its model is {found}, not {wanted}")
        return {name: state[name] for name in like}

    def _check_sums(self, sums: Counts, limits: ClientLimits) -> None:
        for name, pair in sums.items():
            tag = self.schema.tags.get(name)
            if tag is None:
                raise Refused(f"BadReply: its metric {listed([name])} is none that a client may write")
            _check_numbers("metric", name, pair, sys.float_info.max)
            total, count = pair
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

    def _check_counts(self, counts: Counts, limits: ClientLimits) -> None:
        for name, values in counts.items():
            _check_numbers("count", name, values)
            if min(values) < 0:
                raise Refused(f"BadReply: its count {name} is below 0 (={min(values):g})")
        forward, backward = counts["passes"]
        if not backward <= forward <= PER_DRAW * self.schema.recipe.network.count * (limits.draws + 1):
            raise Refused(f"BadReply: its count passes (={forward:g}, {backward:g}) is more than it can have")
        if counts.get("steps", [0.0])[0] > limits.method.steps:
            raise Refused(f"BadReply: its count steps (={counts['steps'][0]:g}) is more than it can have")
        if "drawn" in counts:
            _check_pseudo_labels(counts, limits.draws)
        if "function_votes" in counts:
            _check_votes(counts, limits.method.samples)

    def _check_statistics(self, statistics: State, limits: Limits) -> None:
        if not statistics:
            return
        found = {name: values.cpu().double() for name, values in statistics.items()}
        for name, values in found.items():
            if not (values.abs() <= LARGEST_NUMBER).all():
                raise Refused(_not_finite("statistic", name, LARGEST_NUMBER))
        try:
            self.schema.recipe.shared.check_statistics(found, self.shared, limits)
        except ValueError as error:
            raise Refused(f"BadReply: {error}") from error

    def _check_model(self, prefix: str, state: StateDict, steps: int) -> None:
        if not self._is_in_range(state):
            self._check_arrays(prefix, state, steps)
        if self.schema.max_update_norm is not None:
            self._check_distance(state, "strategy.max_update_norm", self.schema.max_update_norm)
        if self.schema.privacy.kind == "server":  # with client, the noise is on it
            self._check_distance(state, "privacy.clipping_norm", self.schema.privacy.limit)

    def _is_in_range(self, state: StateDict) -> bool:
        """Returns whether all numbers of a model are in range, by one look at all; False if that cannot tell."""
        if not self.schema.is_uniform:
            return False
        arrays = [in_memory_order(values) for values in state.values()]
        if any(values.device.type != "cpu" for values in arrays):  # few launches; elsewhere copying takes longer
            arrays = [torch.cat(arrays)]
        allowed = next(iter(self.schema.ranges.values()))
        found = extremes(arrays)
        return all(allowed.least <= least and largest <= allowed.largest for least, largest in found)

    def _check_arrays(self, prefix: str, state: StateDict, steps: int) -> None:
        for (name, values), (least, largest) in zip(state.items(), extremes(list(state.values())), strict=True):
            what = f"{prefix}{name} of its model"
            self.schema.ranges[name].check(what, values, least, largest)
            if name in self._counted and largest > self._counted[name] + PER_DRAW * steps:
                raise Refused(f"BadReply: {what} counts {largest:.0f} batches, more than it can have seen")

    def _check_distance(self, state: StateDict, key: str, most: float) -> None:
        found = distance(state, self.received, self.schema.parameters)
        if found > most:
            raise Refused(f"TooFar: its model is {found:g} from the one it was sent, and `{key}` is {most:g}")


def training_loss(sums: Counts) -> float:
    """Returns a client's mean training loss, by which QFedAvg weighs clients; 0 where it has none."""
    return means(sums).get("train/loss", 0.0)


def check_weights(parts: Mapping[str, ModelPart], most: Mapping[str, float]) -> None:
    """Checks the weights of a result's models.

    Raises:
        Refused: one is beyond what the client's data allow.
    """
    for part, (_, weight) in parts.items():
        if not 0 <= weight <= most[part] * (1 + 1e-9):
            name = weight_name(part, len(parts))
            raise Refused(f"BadReply: `{name}` (={weight}) must lie in [0, {most[part]:g}], as what it holds allows")


def check_private_weights(parts: Mapping[str, ModelPart]) -> None:
    """Checks that a weight tells nothing of a client's data, see `fedlabel.privacy.private_upload`.

    Raises:
        Refused: it is not 1.
    """
    for part, (_, weight) in parts.items():
        if weight != 1:
            raise Refused(f"BadReply: `{weight_name(part, len(parts))}` (={weight}) must be 1 with `privacy.kind`")


def weight_name(part: str, parts: int) -> str:
    """Returns the name of a part's weight in Flower's metrics; parts: how many models there are."""
    return "num-examples" if parts == 1 else f"weight/{part}"


def check_loss(loss: float, bounds: Bounds) -> None:
    """Checks a client's mean training loss.

    Raises:
        Refused: the strategy cannot compute with it.
    """
    if not bounds.least_loss <= loss <= bounds.largest_loss:
        kind = "TooLarge" if loss > bounds.largest_loss else "BadReply"
        raise Refused(
            f"{kind}: `train_loss` (={listed([str(loss)])}) must be a number in [{bounds.least_loss:g}, "
            f"{bounds.largest_loss:g}]"
        )


def in_memory_order(values: Tensor) -> Tensor:
    """Returns all numbers of an array, (n,), in an order that needs no copy of a matrix whose columns lie in a row, as
    those of stacked clients do.
    """
    return (values.mT if values.dim() == 2 and values.mT.is_contiguous() else values).reshape(-1)


def extremes(arrays: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Returns the smallest and the largest number of each array, NaN where it holds one; (0, 0) of an empty one. They
    are fetched from a device in one go.
    """
    found = [value.aminmax() if value.numel() else (value.new_zeros(()),) * 2 for value in arrays]
    if any(value.device.type != "cpu" for value in arrays):
        dtype = torch.float32 if arrays[0].device.type == "mps" else torch.float64
        return [(least, largest) for least, largest in torch.stack([torch.stack(p).to(dtype) for p in found]).tolist()]
    return [(float(least), float(largest)) for least, largest in found]


def _check_numbers(what: str, name: str, values: Sequence[float], largest: float = LARGEST_NUMBER) -> None:
    if not all(-largest <= value <= largest for value in values):
        raise Refused(_not_finite(what, name, largest))


def _not_finite(what: str, name: str, largest: float) -> str:
    return f"NotFinite: its {what} {name} holds NaN, infinity or a number beyond +-{largest:g}"


def _lengths(classes: int, functions: int, claims: bool, steps: bool) -> tuple[Mapping[str, int], ...]:
    """Returns groups of counts, name -> number of values; each group is complete or absent, "passes" always present."""
    per_class = dict.fromkeys(("drawn", "kept", "correct"), classes)
    per_expert = dict.fromkeys((f"{name}_by_expert" for name in (*per_class, "confidence")), 2)
    per_both = dict.fromkeys(("kept_by_both", "correct_by_both"), 2 * classes)
    per_kind = dict.fromkeys(("drawn_by_kind", "correct_by_kind"), len(KIND_NAMES))
    rows = [f"{bins}_{row}" for bins in ("bins", "kept_bins") for row in ("count", "confidence", "correct")]
    beliefs = {"beliefs": BELIEF_BINS} if classes == 2 else {}
    groups: list[Mapping[str, int]] = [
        {"passes": 2},
        {**per_class, **per_expert, **per_both, **per_kind, **dict.fromkeys(rows, CALIBRATION_BINS), **beliefs},
    ]
    if steps:
        groups.append({"steps": 1})
    if claims:
        groups.append({"claimed_bytes": 2})
    if functions:
        groups.append({"function_votes": functions * classes, "function_counts": functions * 4, "function_samples": 5})
    return tuple(groups)


_PARTS = (
    *(("kept", "drawn"), ("correct", "kept"), ("correct_by_kind", "drawn_by_kind")),
    *(
        ("kept_by_expert", "drawn_by_expert"),
        ("correct_by_expert", "kept_by_expert"),
        ("confidence_by_expert", "kept_by_expert"),
        ("correct_by_both", "kept_by_both"),
        ("kept_bins_count", "bins_count"),
    ),
    *((f"{bins}_{row}", f"{bins}_count") for bins in ("bins", "kept_bins") for row in ("correct", "confidence")),
)
"""Counts of which the first is of a subset of the second's samples."""


def _check_pseudo_labels(counts: Counts, most: int) -> None:
    """Checks `metrics.pseudo_label_counts`: each count is of a subset of another, and all are of one number of samples.

    Raises:
        Refused: they cannot be counts of the same pseudo-labels.
    """
    for part, whole in _PARTS:
        if any(few > many * (1 + _ROUNDING) for few, many in zip(counts[part], counts[whole], strict=True)):
            raise Refused(f"BadReply: its count {part} is more than {whole}")
    total = sum(counts["drawn"])
    same = ["drawn_by_expert", "drawn_by_kind", "bins_count", *(["beliefs"] if "beliefs" in counts else [])]
    for name in same:
        if sum(counts[name]) != total:
            raise Refused(f"BadReply: its count {name} is of other samples than drawn")
    if sum(counts["kept_by_both"]) != sum(counts["kept"]):
        raise Refused("BadReply: its count kept_by_both is of other samples than kept")
    if total > most:
        raise Refused(f"BadReply: its count drawn (={total:g} samples) is more than it can have, {most}")


def _check_votes(counts: Counts, most: int) -> None:
    """Checks `metrics.function_counts`.

    Raises:
        Refused: they cannot be counts of the same votes.
    """
    samples, voted, labeled, *right = counts["function_samples"]
    if not (samples <= most and voted <= samples and labeled <= samples and max(right) <= labeled * (1 + _ROUNDING)):
        raise Refused(f"BadReply: its count function_samples is more than it can have, {most}")
    per_function = torch.tensor(counts["function_counts"]).view(-1, 4)
    cast = torch.tensor(counts["function_votes"]).view(len(per_function), -1).sum(1)
    if (cast > voted).any() or (per_function > cast[:, None]).any():
        raise Refused("BadReply: its count function_votes or function_counts is more than function_samples allows")
