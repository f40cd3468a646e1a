"""What a method is: a frozen dataclass of hyper-parameters whose methods are the paper's equations.

A method sees models as functions `images -> logits`, never as modules, optimisers, messages or devices, so the same
code runs for one client or for a stack of clients under `torch.func.vmap`. `fedlabel/training.py` runs the phases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedlabel.data.supervision import Supervision
from fedlabel.methods.steps import (
    Batch,
    LossFunction,
    Model,
    PseudoLabels,
    State,
    StateDict,
    Step,
    cross_entropy_on_labels,
)
from fedlabel.metric_tags import Tag


class Survey(NamedTuple):
    """All of a client's samples at once, for `Phase.prepare`."""

    predict: Callable[..., Tensor]
    """(teacher, view, part="all") -> logits (n, classes) of the client's n samples, without gradient; with part="embed"
    their embeddings (n, features), see `fedlabel.models.Net`."""
    supervision: Supervision
    """What the client knows of them."""
    memory: State
    inputs: Callable[[], Tensor] = torch.Tensor
    """() -> the n samples themselves as a model sees them, (n, channels, height, width) normalised float."""


class Votes(NamedTuple):
    """What K labelling functions say of n samples."""

    cast: Tensor
    """(n, K) int64, -1 = abstained; rows of -2 were not given to them."""
    class_sets: Tensor
    """(K, classes) bool, what each of them may vote for."""


class Prepared(NamedTuple):
    """What an E step over a client's whole data leaves for the phase that follows."""

    targets: dict[str, Tensor]
    """Name -> (n, ...), one row per sample; a batch gets the rows of its samples."""
    draw: Tensor | None = None
    """(n,) bool, the unlabelled samples that are to be drawn; None: all of them."""
    memory: State | None = None
    """What to carry on; None: unchanged."""
    pseudo: PseudoLabels | None = None
    """Pseudo-labels of all n samples, for the evaluator, which looks at the unlabelled ones; None: none made here."""
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    """See `Step.metrics`."""
    pairs: Tensor | None = None
    """(e, 2) int64, samples taken for alike, for the evaluator, which looks at their labels; None: none."""
    votes: Votes | None = None
    """What labelling functions said of all samples, for the evaluator; None: there are none."""


@dataclass(frozen=True)
class Update:
    """One optimiser step on a batch."""

    loss: LossFunction
    trains: Callable[[Sequence[str]], Collection[str]] | None = None
    """Names of all the student's parameters, in the model's order -> those that this step moves; None: all of them."""
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """Named parameters of the student -> () added to the loss; None: nothing."""


@dataclass(frozen=True)
class Phase:
    """One local training run inside a round."""

    name: str
    loss: LossFunction
    labeled: tuple[str, ...] = ()
    """Views wanted of labelled samples; empty: none are drawn."""
    unlabeled: tuple[str, ...] = ()
    """Views wanted of unlabelled samples; empty: none are drawn."""
    teachers: tuple[str, ...] = ()
    """"global" (the received weights), the name of an earlier phase (its final weights) or of one of
    `Method.states`; frozen in eval mode. A state that lacks weights borrows them from the student as it is now."""
    steps: int | None = None
    """Local steps of this phase; None: as `training.local_steps` or `training.local_epochs` says. With 0 there is only
    its `prepare`, if it has one."""
    proximal: Callable[[Tensor], float] | None = None
    """Parameter tensor p -> c, where c * (p - p_global) is added to its gradient, on top of `training.prox_mu`."""
    start: str = "global"
    """Where the student starts: named as in `teachers`. Only one phase may go on from where another ended: with two,
    the default `Method.upload` would count the first one's update twice."""
    trains: Callable[[Sequence[str]], Collection[str]] | None = None
    """See `Update.trains`; of `loss`."""
    then: tuple[Update, ...] = ()
    """Further optimiser steps on the same batch, in turn."""
    prepare: Callable[[Survey], Prepared] | None = None
    """The E step over the client's whole data before this phase, with this phase's teachers; None: none."""
    mix: tuple[str, ...] = ()
    """Views wanted of a second draw of as many unlabelled samples, from all of them whatever `Prepared.draw` says."""
    mix_alpha: float = 1.0
    """Parameter of the Beta distribution that `Batch.mixing` is drawn from."""
    bags: bool = False
    """Whether a step draws whole bags, as many as have about `training.batch_size` samples, for the labelled part. A
    sample in no bag is one of its own: a labelled one, and of a phase with `unlabeled` any other, too."""
    least_bags: int = 1
    """Bags that a step draws at least, if the client has as many."""
    informed: bool = False
    """Whether the labelled samples are all of which anything is known (candidates, noisy labels), and the unlabelled
    ones the rest. False: the labelled ones are those with one candidate left."""

    @property
    def updates(self) -> tuple[Update, ...]:
        """All optimiser steps on a batch, in order."""
        return (Update(self.loss, self.trains), *self.then)


@dataclass(frozen=True)
class Helpers:
    """Models of other clients that the server hands to a client (FedMatch)."""

    count: int
    """How many each client gets: those whose output on one fixed random image is nearest to its own."""
    every: int
    """Rounds between two of which they are sent."""
    prefix: str
    """Only the weights whose names start so travel; the rest is borrowed (see `Phase.teachers`)."""


class PhaseResult(NamedTuple):
    """What a phase left behind."""

    name: str
    state: StateDict
    examples: float
    """Samples used over all steps (see `Step.examples`)."""
    start: str = "global"
    """See `Phase.start`."""


class ModelPart(NamedTuple):
    """One model that a client uploads, with its weight in the server's mean of that part."""

    state: StateDict
    weight: float


class Limits(NamedTuple):
    """What a client can have worked with at most in a round, as follows from what it holds and from the configuration.

    It may be far more than what it did work with: only a client that does not follow the method exceeds it.
    """

    samples: int
    """It holds."""
    annotators: int
    """Labels that annotators can have given to a sample."""
    steps: int
    """Optimiser steps over all phases."""
    examples: int
    """Samples that its losses can have used, over all steps (see `Step.examples`)."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is final: it is never subclassed again."""

    name: str = ""

    description: ClassVar[str] = ""
    """One line for `fedlabel list`."""
    metrics: ClassVar[tuple[Tag, ...]] = ()
    """Those in `Step.metrics` and `Prepared.metrics` that `fedlabel/metric_tags.py` lacks: a client sends no others."""
    server_labels: ClassVar[bool] = True
    """Whether it can use labels that only the server has (supervision.labels_at=server)."""
    oracle_labels: ClassVar[bool] = False
    """True only where the method is defined as an upper bound that sees every training label."""

    @property
    def additive(self) -> Mapping[str, float]:
        """Name -> initial scale of parts whose sum is the model, each trained and averaged for itself; empty: one.

        With {"sigma": 1, "psi": 0.2} the student has parameters "sigma.NAME" and "psi.NAME", at the start 1 and 0.2
        times the initial weights, and works with their sum.
        """
        return {}

    @property
    def networks(self) -> int:
        """How many networks the model is made of, see `models/twins.py`; with 1 it is the network itself. Several
        exclude `additive`, and the default `server_phases`.
        """
        return 1

    @property
    def bag_head(self) -> int:
        """Width of the hidden layer of a second output, for means of embeddings, see `models/bag_head.py`; 0: none."""
        return 0

    @property
    def labeling_heads(self) -> int:
        """How many heads vote for a class or abstain, see `models/labeling_heads.py`; 0: none."""
        return 0

    @property
    def functions_vote(self) -> bool:
        """Whether it learns from the votes of written labelling functions."""
        return False

    @property
    def reads_annotations(self) -> bool:
        """Whether it learns from labels of several annotators (see `Supervision.annotations`)."""
        return False

    @property
    def reads_sets_of_bags(self) -> bool:
        """Whether a method that learns from bags makes use of candidate sets, too."""
        return False

    @property
    def needs_embeddings(self) -> bool:
        """Whether the network must give embeddings, see `fedlabel.models.Net`."""
        return False

    @property
    def input_gradients(self) -> bool:
        """Whether its loss differentiates the network by its inputs, which BatchNorm in training does not allow."""
        return False

    def check_rounds(self, num_rounds: int) -> None:
        """Looks at the length of a run before anything starts.

        Raises:
            ValueError: something that is configured would never happen.
        """

    def starts_stage(self, round_number: int) -> bool:
        """Returns whether the server starts this round (1-based) with fresh weights. What the model was until then goes
        to the clients from then on, as the teacher "previous". Default: never.
        """
        return False

    def stage_name(self, round_number: int) -> str:
        """Returns what a terminal calls the stage of a round (1-based). Default: nothing, for one stage."""
        return ""

    def begin_stage(self, previous: StateDict, fresh: StateDict) -> StateDict:
        """Returns what a stage starts from, of the stage before's end and of fresh weights. Default: the fresh ones."""
        return fresh

    def averaging(self, round_number: int) -> float:
        """Returns the decay of the moving average of the global model over the rounds of a stage. The average is what
        the model "was until then" (see `starts_stage`) and what `judged` gets; the rounds go on from the model itself.
        0: none.
        """
        return 0.0

    def interim(self, round_number: int) -> bool:
        """Returns whether what is `judged` after a round is not yet a model as the run is for: then its accuracy is
        logged as interim/accuracy, and is none of the run's evaluations.
        """
        return False

    def judged(self, models: Mapping[str, Model], shared: State) -> Model | None:
        """Returns what is evaluated as the global model, images -> logits; None: nothing that could be, as yet. See
        `interim`.

        Args:
            models: "model", the global one; where there are such, "average" (see `averaging`) and "previous".
            shared: as of now.
        """
        return models["model"]

    @property
    def helpers(self) -> Helpers | None:
        """Which models of other clients the server sends along, as teachers "helper0", "helper1", ...; None: none."""
        return None

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the local phases of a round (1-based). Default: one phase over labelled and unlabelled samples."""
        return (Phase("train", self.loss, labeled=("weak",), unlabeled=("weak", "strong")),)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the loss of one batch (the M step, with the E step inside where it is per batch).

        Pure: no global random numbers, no data-dependent Python branch, teachers detached, empty masks give exactly 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss`.")

    def upload(
        self, global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
    ) -> dict[str, ModelPart]:
        """Returns what the client sends: by default one model, the start plus the sum of the phases' updates.

        Args:
            global_state: the weights every phase started from.
            results: what the phases that ran left behind, in order. Where a phase started from another's end, its
                update contains the other's.
            parameters: names in the state that are trained; the others are buffers.
            weight: the client's weight in the server's mean, as `training.weight_by` says.

        Returns:
            Part name -> model and weight. The server averages each part over the clients by its weights and then takes
            the plain mean of the parts.
        """
        continued = {result.start for result in results}
        named = {result.name for result in results}
        assert len([r for r in results if r.start in named]) == len(continued & named), "two phases go on from one"
        ends = [result.state for result in results if result.name not in continued]
        return {"model": ModelPart(sum_updates(global_state, ends, parameters), weight)}

    def claimed_bytes(self, received: StateDict, uploaded: StateDict, helpers: int) -> tuple[float, float] | None:
        """Returns (up, down) bytes by the count that the paper makes of its own traffic; None: it makes none.

        Args:
            received: the global state.
            uploaded: the model that the client sends.
            helpers: how many models of other clients came along.
        """
        return None

    # What is remembered. A client's memory at the start of a round is what it kept (or `initial_memory`) and, over
    # it, what the server shares. Losses carry it from step to step, through all phases.

    def initial_memory(self, candidates: Tensor) -> State:
        """Returns the memory of a client that never trained; candidates: (n, classes) bool, see `Part`."""
        return {}

    def states(self, global_state: StateDict, memory: State) -> dict[str, StateDict]:
        """Returns further weights that phases may start from or have as teachers, by name."""
        return {}

    def keep(self, memory: State, results: Sequence[PhaseResult]) -> State:
        """Returns what stays at the client until it trains again. Default: nothing."""
        return {}

    def kept_like(self, memory: State, global_state: StateDict) -> State:
        """Returns an example of everything that `keep` may return: a checkpoint is held against its names, types and
        sizes. What has no rows may grow some. Default: what a client starts from.

        Args:
            memory: of a client that never trained (`initial_memory`), and what the server shares.
            global_state: the model.
        """
        return memory

    def statistics(self, memory: State) -> State:
        """Returns tensors whose sums over the cohort go into `server_step`. Default: nothing."""
        return {}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        """Looks at the statistics of one client before they are added up: no robust strategy covers them, so what they
        can do to the shared state has to be bounded by what the client holds. Default: anything goes.

        Args:
            statistics: float64, of the right names and shapes, all finite.
            shared: the shared state that the client got, as the server has it.
            limits: what the client can have worked with.

        Raises:
            ValueError: no client that follows the method can have sent this.
        """

    def check_shared(self, shared: State) -> None:
        """Looks at the shared state before it is saved and sent; that all of it is finite is known. Default: nothing.

        Raises:
            ValueError: it is none that the method can go on from.
        """

    def initial_shared(self, num_classes: int) -> State:
        """Returns the state that the server shares with all clients in round 1. Default: nothing."""
        return {}

    def told(self, shared: State) -> State:
        """Returns what of the shared state the clients get. Default: all of it."""
        return shared

    def server_step(self, shared: State, total: State) -> State:
        """Returns the next shared state from the current one and the summed `statistics` of a round."""
        return shared

    def check(self, known: Supervision) -> None:
        """Looks at what is known in the whole federation before anything starts.

        Raises:
            ValueError: the method could not learn from it.
        """
        by_bags = any(phase.bags for phase in self.phases(1))
        if by_bags and len(known.bag_counts) == 0 and not bool((known.labeled & ~known.noisy).any()):
            raise ValueError(
                f"`method.name` (={self.name}) learns from bags of known counts and from true labels, and there is "
                "none. Take supervision.kind=bags, with supervision.bag_size."
            )
        wants_labels = any(phase.labeled and not phase.informed and not phase.bags for phase in self.phases(1))
        if wants_labels and not bool(known.labeled.any()):
            raise ValueError(
                f"`method.name` (={self.name}) learns from labels, and no sample has one: what is known are sets of "
                "candidates, the labels of several annotators, the counts of bags or the votes of functions. Take "
                "method.name=ill, supervision.vote=true for annotators, method.name=llp_bp for bags, or "
                "method.name=dp_ssl with method.functions=written for votes."
            )
        if any(phase.informed for phase in self.phases(1)) and bool(known.candidates.all()):
            raise ValueError(
                f"`method.name` (={self.name}) learns from sets of candidates, and no sample has one. Take "
                "method.name=ill, or supervision.vote=true for annotators."
            )

    def doubts(self, known: Supervision, names: Sequence[str]) -> list[str]:
        """Returns what to warn of before a run begins: here, what is known and this method makes nothing of.

        Args:
            known: what is known in the whole federation.
            names: of the classes.
        """
        phases = self.phases(1)
        left = []
        if len(known.bag_counts) and not any(phase.bags for phase in phases):
            left.append(f"the counts of {len(known.bag_counts):,} bags")
        if known.votes.shape[1] and not self.functions_vote:
            left.append(f"the votes of {known.votes.shape[1]} labelling functions")
        annotated = (known.annotations >= 0).any(1)
        if bool(annotated.any()) and not self.reads_annotations:
            left.append(f"the annotators' labels of {int(annotated.sum()):,} samples")
        by_bags = any(phase.bags for phase in phases)
        if by_bags and bool((known.noisy & known.informed).any()):
            left.append(f"the noisy labels, or sets, of {int((known.noisy & known.informed).sum()):,} samples")
        sets = known.informed & (known.candidates.sum(1) > 1) & ~known.candidates.all(1)
        if by_bags:
            sets = sets & ~known.noisy & (not self.reads_sets_of_bags)
        if bool(sets.any()) and not any(phase.informed for phase in phases):
            left.append(f"the candidate sets of {int(sets.sum()):,} samples")
        said = [f"method.name={self.name} makes nothing of {what}: these samples count as unlabelled." for what in left]
        if by_bags and not len(known.bag_counts):
            said.append(
                f"method.name={self.name} learns from bags of known counts, and there are none: each true label is a "
                "bag of one sample. If bags were meant, take supervision.kind=bags, with supervision.bag_size."
            )
        return said

    def noise_matrix(self, shared: State) -> Tensor | None:
        """Returns p(noisy label | true label) as far as the server knows it, (matrices, classes, classes), to be shown;
        None: the method has none.
        """
        return None

    def function_accuracy(self, shared: State) -> Tensor | None:
        """Returns how often each labelling function is right where it votes, as far as the server can tell without any
        label, (functions,), to be shown; None: the method has none, or cannot tell yet.
        """
        return None

    def server_phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns what the server trains after each aggregation, where it holds labels (supervision.labels_at)."""
        return (Phase("server", lambda student, _, batch: cross_entropy_on_labels(student, batch.labeled), ("weak",)),)


def state_to_lists(state: State) -> dict[str, list[float]]:
    """Returns a small state as name -> [dimensions, sizes..., values...], to travel in a message's configuration."""
    return {
        name: [float(value.dim()), *map(float, value.shape), *value.detach().double().flatten().tolist()]
        for name, value in state.items()
    }


def state_from_lists(lists: Mapping[str, Sequence[float]], device: torch.device) -> State:
    """Returns what `state_to_lists` was given, as float tensors on `device`."""
    state: State = {}
    for name, values in lists.items():
        dimensions = int(values[0])
        shape = [int(size) for size in values[1 : 1 + dimensions]]
        state[name] = torch.tensor(values[1 + dimensions :], dtype=torch.float32, device=device).reshape(shape)
    return state


def sum_updates(start: StateDict, states: Sequence[StateDict], parameters: frozenset[str]) -> StateDict:
    """Returns start + sum of (state - start); exactly the only state where the others did not move.

    Buffers (BatchNorm's running statistics) are averaged instead: a sum of two changes of a variance can be negative.
    Integer buffers (BatchNorm's batch counter) are taken from the last state.
    """
    if not states:
        return dict(start)
    if len(states) == 1:
        return dict(states[0])
    merged: StateDict = {}
    for key, first in states[0].items():
        if key in parameters:
            merged[key] = first + sum(state[key] - start[key] for state in states[1:])
        elif first.is_floating_point():
            merged[key] = torch.stack([state[key] for state in states]).mean(0)
        else:
            merged[key] = states[-1][key]
    return merged
