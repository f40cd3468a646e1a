"""The contract of a method: a frozen dataclass of hyper-parameters that, for a task, gives a `Recipe`.

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

Views = tuple[str, ...]
"""Of "clean", "weak", "strong" and "strong2"; empty: no samples are drawn."""
Select = Callable[[Sequence[str]], Collection[str]]
"""Names of all the student's parameters, in the model's order -> those that a step moves."""


class LabelKinds(Flag):
    """The kinds of label that a method learns from: one certain class, one that may be wrong, candidate sets, labels of
    several annotators, class counts of bags, votes of written labelling functions, true labels that only the server
    holds (supervision.labels_at=server); and the three of them that methods for single labels learn from.
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
    """The setting that a method is asked for a recipe for."""

    num_classes: int
    num_rounds: int
    labels: LabelCard
    """How much of each kind of label the federation holds."""


@dataclass(frozen=True)
class BySample:
    """A step draws samples with a label and, for themselves, samples without."""

    labeled: Views = ("weak",)
    """Views of labelled samples: those with one candidate left."""
    unlabeled: Views = ()
    """Views of the others, of all samples with `training.unlabeled_includes_labeled`."""
    mix: Views = ()
    """Views of a second draw of as many unlabelled samples, from all of them whatever `Prepared.draw` says."""
    mix_alpha: float = 1.0
    """Parameter of the Beta distribution that `Batch.mixing` is drawn from."""


@dataclass(frozen=True)
class ByKnowledge:
    """As `BySample`, where a candidate set, noisy label or annotation counts as a label, too."""

    labeled: Views = ("weak",)
    """Views of samples with any supervision of their own."""
    unlabeled: Views = ()
    """Views of the others."""


@dataclass(frozen=True)
class ByBag:
    """A step draws whole bags, as many as have about `training.batch_size` samples, for `Batch.labeled`. A labelled
    sample in no bag is a bag of one.
    """

    labeled: Views = ("weak",)
    """Views of their samples."""
    singles: bool = False
    """Whether unlabelled samples in no bag are drawn, too, as bags of one with unknown counts."""
    least: int = 1
    """Bags that a step draws at least, if the client has as many."""


Draw = BySample | ByKnowledge | ByBag


@dataclass(frozen=True)
class Update:
    """One more optimiser step on the same batch."""

    loss: LossFunction
    trains: Select | None = None
    """The parameters that it moves; None: all."""
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """Named parameters of the student -> () added to the loss; None: nothing."""


@dataclass(frozen=True)
class Phase:
    """One local training run inside a round."""

    name: str
    loss: LossFunction
    draw: Draw = BySample()
    """Which samples a step draws, and which views of them."""
    teachers: tuple[str, ...] = ()
    """"global" (the received weights), an earlier phase's name (its final weights), "previous" (see `Stage`) or one of
    `Memory.models`; frozen in eval mode. A state that lacks weights borrows them from the student as it is now."""
    start: str = "global"
    """Where the student starts: named as in `teachers`. Only one phase may go on from where another ended: with two,
    `sum_of_updates` would count the first one's update twice."""
    steps: int | None = None
    """Local steps of this phase; None: as `training.local_steps` or `training.local_epochs` says. With 0 there is only
    its `prepare`, if it has one."""
    prepare: Callable[[Survey], Prepared] | None = None
    """The E step over the client's whole data before this phase, with this phase's teachers; None: none."""
    trains: Select | None = None
    """The parameters that `loss` moves; None: all."""
    then: tuple[Update, ...] = ()
    """Further optimiser steps on the same batch, in turn."""
    proximal: Callable[[Tensor], float] | None = None
    """Parameter tensor p -> c, where c * (p - p_global) is added to its gradient, on top of `training.prox_mu`."""

    @property
    def updates(self) -> tuple[Update, ...]:
        """All optimiser steps on a batch, in order."""
        return (Update(self.loss, self.trains), *self.then)


class Start(Enum):
    """The weights that a stage starts from."""

    CONTINUE = auto()
    """Those that the stage before ended with."""
    FRESH = auto()
    """New ones."""


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
    """Of every round; or the round in this stage (1-based) -> its phases."""
    rounds: int | None = None
    """How many; None: to the end of the run (the last stage)."""
    name: str = ""
    """Shown in a terminal; empty: not named."""
    start: Start | Callable[[StateDict, StateDict], StateDict] = Start.CONTINUE
    """Or (the stage before's end, fresh weights) -> weights. Of the first stage nothing: it starts fresh."""
    averaging: float = 0.0
    """Decay of a moving average of the global model over this stage's rounds, which is then the stage's end, and
    evaluated as "average"; the rounds go on from the model itself. 0: none."""
    predict: Callable[[Mapping[str, Model], State], Model | None] = global_model
    """("model", the global one, and where there are such "average" and "previous"; the shared state) -> what is
    evaluated, images -> logits; None: nothing that could be."""
    final: bool = True
    """Whether what is evaluated is a model as the run is for; if not, its accuracy is logged as interim/accuracy."""


def _nothing(*_: object) -> dict[str, Any]:
    return {}


def _as_at_start(memory: State, global_state: StateDict) -> State:
    return memory


@dataclass(frozen=True)
class Memory:
    """What a client remembers: from step to step, and from round to round."""

    start: Callable[[Tensor], State] = _nothing
    """Candidates (n, classes) bool -> memory of a client that never trained. What the server shares is added to it."""
    keep: Callable[[State, Sequence[PhaseResult]], State] = _nothing
    """(memory, results of the round's phases) -> what stays at the client until it trains again."""
    models: Callable[[StateDict, State], dict[str, StateDict]] = _nothing
    """(global state, memory) -> further weights that phases may start from or have as teachers, by name."""
    like: Callable[[State, StateDict], State] = _as_at_start
    """(memory of a client that never trained and what the server shares, the global state) -> an example of everything
    that `keep` may return: a checkpoint is held against its names, types and sizes. What has no rows may grow some."""


@dataclass(frozen=True)
class Helpers:
    """Models of other clients that the server hands to a client, as teachers "helper0", "helper1", ... (FedMatch)."""

    count: int
    """How many each client gets: those whose output on one fixed random image is nearest to its own."""
    every: int
    """Rounds between two in which they are sent."""
    prefix: str
    """Only the weights whose names start so travel; the rest is borrowed (see `Phase.teachers`)."""


FINE_TUNING = Phase("server", labels_loss)
"""Cross-entropy on labels."""


class Place(NamedTuple):
    """Where a round lies in a recipe."""

    number: int
    """Of the stage, from 0."""
    stage: Stage
    round_in_stage: int
    """1-based."""


@dataclass(frozen=True)
class Recipe:
    """All that happens in a run."""

    stages: tuple[Stage, ...]
    uses: LabelKinds
    """The kinds of label that it learns from; of others a run warns."""
    network: Network = one_network
    """What is made of the user's network: heads, twins, a sum of parts."""
    memory: Memory = Memory()
    shared: Shared = nothing_shared
    """The state that the server shares and updates in closed form."""
    upload: Upload = sum_of_updates
    """What a client sends of a round's phases."""
    server_phases: tuple[Phase, ...] = (FINE_TUNING,)
    """What the server trains after each aggregation, where it holds labels."""
    inspect: Callable[[State], Mapping[str, Tensor]] = _nothing
    """Shared state -> what is shown of it: "noise_matrix" (matrices, classes, classes), p(noisy label | true label), or
    "function_accuracy" (functions,), how often each labelling function is right, estimated without labels."""
    helpers: Helpers | None = None
    num_functions: int = 0
    """Labelling functions whose votes clients report."""

    def place(self, round_number: int) -> Place:
        """Returns the place of a round (1-based)."""
        left = max(1, round_number)
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
        """Returns whether a stage with weights of its own begins with a round (1-based)."""
        place, stage, number = self.place(round_number)
        return place > 0 and number == 1 and stage.start is not Start.CONTINUE


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of hyper-parameters, checked in `__post_init__`."""

    name: str = ""

    description: ClassVar[str] = ""
    """One line for `fedlabel list`."""
    metrics: ClassVar[tuple[Tag, ...]] = ()
    """Those in `Step.metrics` and `Prepared.metrics` that `fedlabel/metric_tags.py` lacks: a client sends no others."""
    oracle_labels: ClassVar[bool] = False
    """True only where the method is defined as an upper bound that sees every training label."""

    def check_rounds(self, num_rounds: int) -> None:
        """Looks at the length of a run, as soon as it is configured.

        Raises:
            ValueError: something that is configured would never happen.
        """

    def recipe(self, task: Task) -> Recipe:
        """Returns all that happens in a run.

        Raises:
            ValueError: the method cannot learn this task.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `recipe`.")
