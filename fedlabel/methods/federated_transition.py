"""The noise matrix T of a federation: initial value, client statistics, closed form, and bounds of the statistics.

The mathematics of one matrix is in `fedlabel/inference/transition.py`. Here each form of learning T is a `Shared`, and
`NoiseMatrix` is the configuration that chooses one, with what a client remembers for it. A state holds T as
"transition" or, where clients move its logits, as "logits".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, positive, within
from fedlabel.data.labels.imprecision import response_error
from fedlabel.inference.transition import diagonal_transition, from_counts, gradient_step
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.shared import SLACK, Limits, Shared, check_counts, check_shares, nothing_shared
from fedlabel.methods.uploads import PhaseResult

NOT_LEARNED = ("fixed", "known")
"""Values of `NoiseMatrix.form` with which T stays as it is."""
MAX_ANNOTATORS = 1000
"""Each has a matrix of its own."""


def noise_matrix(shared: State) -> dict[str, Tensor]:
    """Returns T, (matrices, classes, classes), as `Recipe.inspect` names it."""
    matrices = shared["logits"].softmax(-1) if "logits" in shared else shared["transition"]
    return {"noise_matrix": matrices.reshape(-1, *matrices.shape[-2:])}


def check_transition(shared: State) -> None:
    """Raises ValueError unless the rows of T are distributions."""
    check_shares("transition", shared["transition"], torch.ones(()))


@dataclass(frozen=True, eq=False)
class FixedTransition(Shared):
    """T fixed at its initial value."""

    initial: Tensor
    """([matrices,] classes, classes)."""

    def start(self) -> State:
        return {"transition": self.initial}

    def check(self, shared: State) -> None:
        check_transition(shared)


@dataclass(frozen=True, eq=False)
class FederatedTransition(Shared):
    """T in closed form, from the expected counts of all clients: `from_counts`.

    With `decay` and `smoothing` 0 and all clients in the cohort, exactly EM's M step on the union of their data.
    """

    initial: Tensor
    """(matrices, classes, classes)."""
    smoothing: float
    decay: float
    warmup_rounds: int
    """See `NoiseMatrix`."""
    labels_of_set: int
    """The largest number of labels that a noisy candidate set counts as."""

    def start(self) -> State:
        return {"transition": self.initial, "counts": torch.zeros_like(self.initial), "rounds": torch.zeros(())}

    def statistics(self, memory: State) -> State:
        return {"counts": memory["expected_counts"]}

    def update(self, shared: State, total: State) -> State:
        if "counts" not in total:
            return shared
        rounds = shared["rounds"] + 1
        if rounds < self.warmup_rounds:
            return {**shared, "rounds": rounds}
        counts = self.decay * shared["counts"] + total["counts"]
        transition = from_counts(counts, self.smoothing * shared["transition"])
        return {**shared, "rounds": rounds, "counts": counts, "transition": transition}

    def broadcast(self, shared: State) -> State:
        return {"transition": shared["transition"]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        most = limits.samples * max(self.labels_of_set, limits.annotators)
        check_counts("counts", statistics["counts"], most)

    def check(self, shared: State) -> None:
        check_transition(shared)


@dataclass(frozen=True, eq=False)
class AveragedLogits(Shared):
    """T's logits: the mean of the clients' logits, weighted by the number of samples with noisy labels that they
    trained on.
    """

    initial: Tensor
    """Initial T, (matrices, classes, classes)."""
    lr: float
    labels_of_set: int
    """As in `FederatedTransition`."""

    def start(self) -> State:
        return {"logits": self.initial.log()}

    def statistics(self, memory: State) -> State:
        samples = memory["noisy_samples"]
        return {"logits": memory["logits"] * samples, "noisy_samples": samples}

    def update(self, shared: State, total: State) -> State:
        if "logits" not in total or not total["noisy_samples"] > 0:
            return shared
        return {**shared, "logits": total["logits"] / total["noisy_samples"]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        samples = statistics["noisy_samples"]
        check_counts("noisy_samples", samples, limits.examples)
        start = shared["logits"].to(samples)
        # A step moves a logit by lr * |row sum of N * T - N| / samples, see `gradient_step`.
        of_steps = limits.steps * self.lr * max(self.labels_of_set, limits.annotators)
        most = of_steps + SLACK * (1 + start.abs().max())
        if (statistics["logits"] - samples * start).abs().max() > samples * most:
            raise ValueError("its statistic logits is further from what was sent than its steps can have gone")


@dataclass(frozen=True)
class NoiseMatrix:
    """How T[y, j] = p(noisy label j | true label y) is learned."""

    form: str = "closed"
    """closed: from expected counts over all of a client's samples, once a round. gradient: a step of gradient descent
    with every batch. fixed: the initial T. known: the T of the randomised response that the labels are from
    (`supervision.label_epsilon`), which is not learned."""
    scope: str = "global"
    """global: one T for the federation. client: each client has its own, which never leaves it. prior (form=closed):
    a client's T is its own counts plus `strength` counts per class of the global T, for annotators who differ."""
    strength: float = 50.0
    """scope=prior: see there."""
    annotators: int = 1
    """Number of matrices: 1 for all labels, or one for each annotator of a sample."""
    start: float = 0.3
    """T starts with 1 - start on the diagonal, in (0, 1); a dominant diagonal says which class is which."""
    smoothing: float = 1.0
    """form=closed: pseudo-counts per class of the previous T; a class that no noisy label can come from keeps its row.
    0: none, so EM's own M step, in which such a class gets a uniform row."""
    decay: float = 0.8
    """form=closed: decay of the counts of earlier rounds, in [0, 1), as a cohort is a part of the federation. 0: T
    comes from the last round's clients alone."""
    warmup_rounds: int = 3
    """Rounds in which clients train with the initial T, so that it does not fit the errors of the untrained model."""
    lr: float = 0.1
    """form=gradient: learning rate of T's logits."""

    def __post_init__(self) -> None:
        section = "method.noise"
        one_of(self, section, form=("closed", "gradient", *NOT_LEARNED), scope=("global", "client", "prior"))
        if self.scope == "prior" and self.form != "closed":
            raise ValueError(
                f"`method.noise.scope` (=prior) adds up counts, which `method.noise.form` (={self.form}) does not "
                "have: take method.noise.form=closed."
            )
        finite(self, section, "smoothing")
        positive(self, section, "strength", "lr")
        in_unit_interval(self, section, "decay", below_one=True)
        at_least(self, section, 0, "warmup_rounds")
        within(self, section, 0, 1, "start", ends="()")
        within(self, section, 1, MAX_ANNOTATORS, "annotators")

    @property
    def own(self) -> bool:
        """Whether each client learns its own T."""
        return self.scope != "global" and self.form not in NOT_LEARNED

    def initial(self, num_classes: int) -> Tensor:
        """Returns the start, (matrices, classes, classes).

        Raises:
            ValueError: its diagonal would not be dominant.
        """
        if self.start >= 1 - 1 / num_classes:
            raise ValueError(
                f"`method.noise.start` (={self.start}) must be below {1 - 1 / num_classes:g} for {num_classes} "
                "classes: a dominant diagonal says which class is which."
            )
        return diagonal_transition(num_classes, self.start).expand(self.annotators, -1, -1).clone()

    def shared(self, num_classes: int, labels_of_set: int, label_epsilon: float | None) -> Shared:
        """Returns the state that the server shares.

        Args:
            num_classes: how many classes.
            labels_of_set: see `FederatedTransition`.
            label_epsilon: see `LabelCard`.

        Raises:
            ValueError: see `initial`; or T is to be known and is not.
        """
        if self.form == "known":
            if label_epsilon is None:
                raise ValueError(
                    "`method.noise.form` (=known) needs noisy labels that all come from one "
                    "supervision.noise=randomized_response: take method.noise.form=closed, or fixed with "
                    "method.noise.start."
                )
            known = diagonal_transition(num_classes, response_error(label_epsilon, num_classes))
            return FixedTransition(known.expand(self.annotators, -1, -1).clone())
        initial = self.initial(num_classes)
        if self.form == "gradient":
            return nothing_shared if self.scope == "client" else AveragedLogits(initial, self.lr, labels_of_set)
        if self.form == "fixed" or self.scope == "client":
            return FixedTransition(initial)
        return FederatedTransition(initial, self.smoothing, self.decay, self.warmup_rounds, labels_of_set)

    def inspect(self, shared: State) -> dict[str, Tensor]:
        """Returns T for inspection; empty if it never leaves the clients."""
        return {} if self.scope == "client" else noise_matrix(shared)

    # ------------------------------------------------------------------------------------------------ a client's part

    def memory(self, candidates: Tensor) -> State:
        """Returns the memory of a client that never trained, see `Memory.start`."""
        classes, device = candidates.shape[-1], candidates.device
        if self.form == "closed":
            return {"expected_counts": torch.zeros(self.annotators, classes, classes, device=device)}
        if self.form in NOT_LEARNED:
            return {}
        own = {"own_logits": self.initial(classes).log().to(device)} if self.own else {}
        return {**own, "noisy_samples": torch.zeros((), device=device)}

    def keep(self, memory: State, results: Sequence[PhaseResult]) -> State:
        """Keeps a client's own T, see `Memory.keep`."""
        return {name: value for name, value in memory.items() if name in ("own_transition", "own_logits")}

    def like(self, memory: State, global_state: StateDict) -> State:
        """Returns an example of the result of `keep`, see `Memory.like`."""
        if not self.own:
            return {}
        if self.form == "gradient":
            return {"own_logits": memory["own_logits"]}
        return {"own_transition": memory["transition"]}

    def matrices(self, memory: State) -> Tensor:
        """Returns the T that a client uses, (matrices, classes, classes)."""
        if self.form == "gradient":
            return memory["own_logits" if self.scope == "client" else "logits"].softmax(-1)
        return memory.get("own_transition", memory["transition"])

    def stepped(self, memory: State, counts: Tensor, samples: Tensor) -> State:
        """Returns the memory after a step of T's logits (form=gradient); arguments: see `gradient_step`."""
        name = "own_logits" if self.scope == "client" else "logits"
        logits = gradient_step(memory[name], counts, samples, self.lr)
        return {**memory, name: logits, "noisy_samples": memory["noisy_samples"] + samples}

    def counted(self, memory: State, counts: Tensor, learn: bool) -> State:
        """Returns the memory with a round's expected counts (form=closed) and, if it learns one, a client's own T from
        them.
        """
        if not (self.own and learn):
            return {**memory, "expected_counts": counts}
        if self.scope == "prior":
            prior = self.strength * memory["transition"]
        else:
            prior = self.smoothing * self.matrices(memory)
        return {**memory, "expected_counts": counts, "own_transition": from_counts(counts, prior)}
