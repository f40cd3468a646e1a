"""The interface of a method: a frozen dataclass of hyper-parameters that gives a `Recipe` for a task.

A recipe is all that happens in a run, as one value: the stages, the phases that a client runs in a round, its memory,
the state that the server shares and its closed-form update. `fedlabel/learning` runs it on a client and
`server/rounds.py` on the server; neither knows any method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fedlabel.data.labels.label_card import LabelCard
from fedlabel.methods.batch import LossFunction, Model, Prepared, State, StateDict, Survey
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.shared import Shared, nothing_shared
from fedlabel.methods.uploads import PhaseResult, Upload, sum_of_updates
from fedlabel.metric_tags import Tag
from fedlabel.models.wrap import Network, one_network

VIEWS = ("clean", "weak", "strong", "strong2")
Views = tuple[str, ...]
"""Of `VIEWS`; empty: no samples are drawn."""
Select = Callable[[Sequence[str]], Collection[str]]
"""Names of all the student's parameters, in the model's order -> those that a step moves."""


class LabelKinds(Flag):
    """The kinds of label that a method learns from: one certain class, one that may be wrong, candidate sets, labels of
    several annotators, class counts of bags, votes of written labelling functions, true labels that only the server
    holds (supervision.labels_at=server). SINGLE: what methods for one label per sample learn from.
    """

    TRUE = auto()
    NOISY = auto()
    SETS = auto()
    ANNOTATIONS = auto()
    BAGS = auto()
    VOTES = auto()
    AT_SERVER = auto()
    SINGLE = TRUE | NOISY | AT_SERVER


class Task(NamedTuple):
    """The setting for which a method gives a recipe."""

    num_classes: int
    num_rounds: int
    labels: LabelCard
    """The label card of the federation."""


@dataclass(frozen=True)
class BySample:
    """A step draws labelled and unlabelled samples separately."""

    labeled: Views = ("weak",)
    """Views of labelled samples: those with one candidate."""
    unlabeled: Views = ()
    """Views of the others, or of all samples with `training.unlabeled_includes_labeled`."""
    mix: Views = ()
    """Views of a second draw of as many unlabelled samples, from all of them regardless of `Prepared.draw`."""
    mix_alpha: float = 1.0
    """Parameter of the Beta distribution that `Batch.mixing` is drawn from."""


@dataclass(frozen=True)
class ByKnowledge:
    """As `BySample`, but a candidate set, noisy label or annotation counts as a label, too."""

    labeled: Views = ("weak",)
    """Views of samples with any supervision of their own."""
    unlabeled: Views = ()
    """Views of the others."""


@dataclass(frozen=True)
class ByBag:
    """A step draws whole bags, with about `training.batch_size` samples in all, for `Batch.labeled`. A labelled sample
    in no bag is a bag of one.
    """

    labeled: Views = ("weak",)
    """Views of their samples."""
    singles: bool = False
    """Whether unlabelled samples in no bag are drawn, too, as bags of one with unknown counts."""
    least: int = 1
    """Smallest number of bags per step, if the client has as many."""


Draw = BySample | ByKnowledge | ByBag


@dataclass(frozen=True)
class Update:
    """One more optimiser step on the same batch."""

    loss: LossFunction
    trains: Select | None = None
    """Names of the parameters that it trains; None: all."""
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """Named parameters of the student -> () added to the loss; None: no penalty."""


@dataclass(frozen=True)
class Phase:
    """One local training run inside a round."""

    name: str
    loss: LossFunction
    draw: Draw = BySample()
    """Which samples a step draws, and their views."""
    teachers: tuple[str, ...] = ()
    """"global" (the received weights), an earlier phase's name (its final weights), "previous" (see `Stage`) or one of
    `Memory.models`; frozen in eval mode. Weights missing in a state are taken from the current student."""
    start: str = "global"
    """Initial weights of the student: named as in `teachers`. Only one phase may start from the end of another: with
    two, `sum_of_updates` would count the first one's update twice."""
    steps: int | None = None
    """Local steps of this phase; None: from `training.local_steps` or `training.local_epochs`. With 0 only its
    `prepare` runs, if it has one."""
    prepare: Callable[[Survey], Prepared] | None = None
    """The E step over the client's whole data before this phase, with this phase's teachers; None: none."""
    trains: Select | None = None
    """Names of the parameters that `loss` trains; None: all."""
    then: tuple[Update, ...] = ()
    """Further optimiser steps on the same batch, in turn."""
    proximal: Callable[[Tensor], float] | None = None
    """Parameter tensor p -> c, where c * (p - p_global) is added to its gradient, on top of `training.prox_mu`."""

    @property
    def updates(self) -> tuple[Update, ...]:
        """All optimiser steps on a batch, in order."""
        return (Update(self.loss, self.trains), *self.then)


class Start(Enum):
    """The initial weights of a stage."""

    CONTINUE = auto()
    """The final weights of the previous stage."""
    FRESH = auto()
    """Newly initialised weights."""


def global_model(models: Mapping[str, Model], shared: State) -> Model | None:
    """Evaluates the global model as it is."""
    return models["model"]


@dataclass(frozen=True)
class Stage:
    """Rounds in which clients run the same phases.

    A stage that does not CONTINUE begins with weights of its own and a fresh strategy; the model until then goes to the
    clients as the teacher "previous" from then on.
    """

    phases: tuple[Phase, ...] | Callable[[int], tuple[Phase, ...]]
    """Phases of every round; or the round in this stage (1-based) -> its phases."""
    rounds: int | None = None
    """Number of rounds, 0: the stage is left out; None: to the end of the run (the last stage)."""
    name: str = ""
    """Name in the terminal; empty: no name."""
    start: Start | Callable[[StateDict, StateDict], StateDict] = Start.CONTINUE
    """Or (the previous stage's final weights, fresh weights) -> weights. Not used in the first stage, which starts
    fresh."""
    averaging: float = 0.0
    """Decay of a moving average of the global model over this stage's rounds, evaluated as "average"; 0: none. A next
    stage with weights of its own gets it as "previous"; one that CONTINUEs goes on with it if it averages, too."""
    predict: Callable[[Mapping[str, Model], State], Model | None] = global_model
    """("model", the global one, and, if they exist, "average" and "previous"; the shared state) -> the evaluated
    function, images -> logits; None: nothing to evaluate."""
    final: bool = True
    """Whether the evaluated model is the run's result; if not, its accuracy is logged as interim/accuracy."""


def _nothing(*_: object) -> dict[str, Any]:
    return {}


def _as_at_start(memory: State, global_state: StateDict) -> State:
    return memory


@dataclass(frozen=True)
class Memory:
    """A client's memory: from step to step, and from round to round."""

    start: Callable[[Tensor], State] = _nothing
    """Candidates (n, classes) bool -> memory of a client that never trained. The server's shared state is added to
    it."""
    keep: Callable[[State, Sequence[PhaseResult]], State] = _nothing
    """(memory, results of the round's phases) -> the memory that the client keeps until it trains again."""
    models: Callable[[StateDict, State], dict[str, StateDict]] = _nothing
    """(global state, memory) -> further weights for the start or the teachers of phases, by name."""
    like: Callable[[State, StateDict], State] = _as_at_start
    """(memory of a client that never trained and the server's shared state, the global state) -> an example of
    everything that `keep` may return: a checkpoint is checked against its names, types and sizes. Tensors without rows
    may grow some."""


@dataclass(frozen=True)
class Helpers:
    """Models of other clients that the server sends to a client, as teachers "helper0", "helper1", ... (FedMatch)."""

    count: int
    """Helpers per client: the models whose output on one fixed random image is nearest to its own."""
    every: int
    """Rounds between two rounds with helpers."""
    prefix: str
    """Prefix of the weights that are sent; the others are taken from the student (see `Phase.teachers`)."""


FINE_TUNING = Phase("server", labels_loss)


class Place(NamedTuple):
    """The position of a round in a recipe."""

    number: int
    """Index of the stage, from 0."""
    stage: Stage
    round_in_stage: int
    """Round in the stage, 1-based."""


@dataclass(frozen=True)
class Recipe:
    """The training procedure of a method: stages, memory, shared state and upload."""

    stages: tuple[Stage, ...]
    uses: LabelKinds
    """The kinds of label that it learns from; a run warns of others."""
    network: Network = one_network
    """The network built from the user's: heads, twins, a sum of parts."""
    memory: Memory = Memory()
    shared: Shared = nothing_shared
    """The state that the server shares and updates in closed form."""
    upload: Upload = sum_of_updates
    """The upload of a client after a round's phases."""
    server_phases: tuple[Phase, ...] = (FINE_TUNING,)
    """Phases of the server after each aggregation, if it holds labels."""
    inspect: Callable[[State], Mapping[str, Tensor]] = _nothing
    """Shared state -> values to show: "noise_matrix" (matrices, classes, classes), p(noisy label | true label), or
    "function_accuracy" (functions,), the accuracy of each labelling function, estimated without labels."""
    helpers: Helpers | None = None
    num_functions: int = 0
    """Number of labelling functions whose votes clients report."""

    def place(self, round_number: int) -> Place:
        """Returns the position of a round (1-based)."""
        left = max(1, round_number)  # before round 1: as in it
        for index, stage in enumerate(self.stages):
            if stage.rounds is None or left <= stage.rounds or index == len(self.stages) - 1:
                return Place(index, stage, left)
            left -= stage.rounds
        raise ValueError("`stages` is empty: a recipe needs one.")

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        """Returns the phases of a round (1-based)."""
        _, stage, number = self.place(round_number)
        return stage.phases(number) if callable(stage.phases) else stage.phases

    def begins(self, round_number: int) -> bool:
        """Returns whether a stage with its own initial weights begins with a round (1-based)."""
        place, stage, number = self.place(round_number)
        return place > 0 and number == 1 < round_number and stage.start is not Start.CONTINUE


@dataclass(frozen=True)
class Method:
    """Base class of all methods: a frozen dataclass of hyper-parameters, checked in `__post_init__`."""

    name: str = ""

    description: ClassVar[str] = ""
    """One line for `fedlabel list`."""
    metrics: ClassVar[tuple[Tag, ...]] = ()
    """Those of `Step.metrics` and `Prepared.metrics` that `fedlabel/metric_tags.py` lacks."""
    oracle_labels: ClassVar[bool] = False
    """True only if the method is defined as an upper bound that uses every training label."""
    corrects_class_prior: ClassVar[bool] = False
    """Whether its loss corrects for the client's class counts, so that `prior.kind` would do it a second time."""

    def check_rounds(self, num_rounds: int) -> None:
        """Checks the number of rounds, when a run is configured.

        Raises:
            ValueError: something that is configured would never happen.
        """

    def recipe(self, task: Task) -> Recipe:
        """Returns the training procedure for a task.

        Raises:
            ValueError: the method cannot learn this task.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `recipe`.")
