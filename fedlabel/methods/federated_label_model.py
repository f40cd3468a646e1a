"""Shared state of labelling functions: the classes that each may vote for, and a label model of their votes.

Clients send sums, so with all of them in every round the classes are assigned and (with `decay` 0) the label model is
fitted as in one place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedlabel.inference.head_assignment import LARGEST_LOSS, assign_classes, class_losses, classes_in_turn
from fedlabel.inference.label_model import Counts, LabelModel, client_prior
from fedlabel.methods.batch import Prepared, State, Survey
from fedlabel.methods.shared import SLACK, Limits, Shared, check_counts, check_shares

_FORGET = 0.5
"""Share of the heads' old losses in the new ones: the heads move from round to round."""


class RoundCounter(Shared):
    """Counts completed rounds, "rounds" (), for closed forms that are active only in some of them."""

    def start(self) -> State:
        return {"rounds": torch.zeros(())}

    def update(self, shared: State, total: State) -> State:
        return {"rounds": shared["rounds"] + 1}


class FixedSets(Shared):
    """Fixed classes that each function may vote for, "sets" (K, C), from `sets` (K, C) bool."""

    def __init__(self, sets: np.ndarray) -> None:
        self._sets = torch.from_numpy(sets).float()

    def start(self) -> State:
        return {"sets": self._sets}

    def memory(self, candidates: Tensor) -> State:
        """Returns an empty memory: clients measure nothing."""
        return {}


class HeadAssignment(Shared):
    """Assigns each class to the heads with the smallest loss on it: "sets" (K, C), by "losses" (K, C) summed over
    "samples" (C,). Needs a `RoundCounter`.

    Args:
        heads: K.
        classes: C.
        heads_per_class: rho, see `assign_classes`.
        rounds: how many rounds, from the first, clients measure losses in; then the sets stay.
    """

    def __init__(self, heads: int, classes: int, heads_per_class: int, rounds: int) -> None:
        self._heads, self._classes, self._heads_per_class, self._rounds = heads, classes, heads_per_class, rounds

    def start(self) -> State:
        sets = classes_in_turn(self._heads, self._classes, self._heads_per_class)  # until the first losses are there
        losses, samples = torch.zeros(self._heads, self._classes), torch.zeros(self._classes)
        return {"sets": torch.from_numpy(sets).float(), "losses": losses, "samples": samples}

    def memory(self, candidates: Tensor) -> State:
        """Returns the sums of a client without samples, see `Memory.start`."""
        losses = torch.zeros(self._heads, self._classes, device=candidates.device)
        return {"head_losses": losses, "class_samples": losses.new_zeros(self._classes)}

    def measure(self, survey: Survey) -> Prepared:
        """Adds up the heads' losses on the client's labelled samples, an E step with the teacher "global"."""
        losses, seen = class_losses(survey.predict("global", "clean", "heads"), survey.supervision.label)
        return Prepared({}, memory={**survey.memory, "head_losses": losses, "class_samples": seen})

    def statistics(self, memory: State) -> State:
        if int(memory["rounds"]) >= self._rounds:
            return {}
        return {name: memory[name] for name in ("head_losses", "class_samples")}

    def update(self, shared: State, total: State) -> State:
        if "head_losses" not in total:
            return shared
        losses = _FORGET * shared["losses"] + total["head_losses"]
        samples = _FORGET * shared["samples"] + total["class_samples"]
        mean = (losses / samples.clamp_min(1e-12)).cpu().double().numpy()
        sets = torch.from_numpy(assign_classes(mean, self._heads_per_class)).float().to(losses.device)
        return {"sets": sets, "losses": losses, "samples": samples}

    def broadcast(self, shared: State) -> State:
        return {"sets": shared["sets"]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        if "head_losses" not in statistics:
            return
        losses, samples = statistics["head_losses"], statistics["class_samples"]
        check_counts("class_samples", samples, limits.samples)
        if (losses < 0).any() or (losses > samples * LARGEST_LOSS * (1 + SLACK)).any():
            raise ValueError(f"its statistic head_losses must lie in [0, {LARGEST_LOSS:g}] per sample")


class FederatedLabelModel(Shared):
    """A label model fitted by EM, one step a round: "tables" (K, C + 1, C) and "prior" (C,) of the expected "counts"
    and "classes" of the same shapes; "fitted" () steps so far. The first starts from the votes themselves, see
    `LabelModel.initial_counts`. Needs a `RoundCounter`, and the functions' "sets" (K, C).

    Args:
        functions: K.
        classes: C.
        make: (K, C) bool class sets -> a label model that is not fitted.
        rounds: how many rounds have ended before each in which clients count.
        decay: what remains of the counts of earlier rounds; 0: the M step is EM's.
        own_prior: whether clients read their votes under class priors of their own, which stay with them.
        label_weight: of labelled samples, clamped to their label, from the second step on.
    """

    def __init__(
        self,
        functions: int,
        classes: int,
        make: Callable[[Tensor], LabelModel],
        rounds: range,
        decay: float = 0.0,
        own_prior: bool = False,
        label_weight: float = 0.0,
    ) -> None:
        self._functions, self._classes, self._make, self._rounds = functions, classes, make, rounds
        self._decay, self._own_prior, self._label_weight = decay, own_prior, label_weight

    def start(self) -> State:
        c = self._classes
        return {
            "fitted": torch.zeros(()),
            "tables": torch.zeros(self._functions, c + 1, c),
            "counts": torch.zeros(self._functions, c + 1, c),
            "prior": torch.full((c,), 1 / c),
            "classes": torch.zeros(c),
        }

    def memory(self, candidates: Tensor) -> State:
        """Returns the counts of a client without samples, see `Memory.start`."""
        votes = torch.zeros(self._functions, self._classes + 1, self._classes, device=candidates.device)
        return {"vote_counts": votes, "class_counts": votes.new_zeros(self._classes)}

    def model(self, state: State) -> LabelModel:
        """Returns the label model of a shared state: with its tables and prior, once fitted."""
        model = self._make(state["sets"] > 0.5)
        if state["fitted"] > 0:
            model.tables = state["tables"].double()
            model.prior = state["prior"].double() / state["prior"].double().sum()
        return model

    def reader(self, state: State) -> Callable[[Tensor], Tensor]:
        """Returns votes (n, K) -> class probabilities (n, C): posteriors, or initial posteriors until it has been
        fitted.
        """
        model = self.model(state)
        return model.posterior if state["fitted"] > 0 else model.guess

    def expect(
        self, memory: State, votes: Tensor, label: Tensor, asked: Tensor
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Runs the E step over the votes on a client's n samples.

        Args:
            memory: the client's, with the shared state.
            votes: (n, K) int64, see `LabelModel.posterior`.
            label: (n,) int64, -1 where there is none.
            asked: (n,) bool, whether the functions were asked about a sample; others are not counted.

        Returns:
            Class probabilities (n, C) float64; the memory, in rounds of counting with the counts; metrics.
        """
        fitted, model = bool(memory["fitted"] > 0), self.model(memory)
        free = votes[asked & (label < 0)]
        if fitted and self._own_prior and len(free):
            model.prior = client_prior(model, free)
        posterior = model.posterior(votes) if fitted else model.guess(votes)
        if int(memory["rounds"]) not in self._rounds:
            return posterior, memory, {}
        if not fitted:
            counts = model.initial_counts(free)
        elif self._label_weight > 0:
            counts = model.expected_counts(votes[asked], label[asked], self._label_weight)
        else:
            counts = model.expected_counts(free)
        memory = {**memory, "vote_counts": counts.votes.float(), "class_counts": counts.classes.float()}
        if not fitted:  # first guesses have no likelihood
            return posterior, memory, {}
        likelihood = torch.stack([counts.log_likelihood, counts.classes.sum()])
        return posterior, memory, {"functions/log_likelihood": likelihood}

    def statistics(self, memory: State) -> State:
        if int(memory["rounds"]) not in self._rounds:
            return {}
        return {name: memory[name] for name in ("vote_counts", "class_counts")}

    def update(self, shared: State, total: State) -> State:
        if "vote_counts" not in total or not total["class_counts"].sum() > 0:
            return shared
        counts = self._decay * shared["counts"] + total["vote_counts"]
        classes = self._decay * shared["classes"] + total["class_counts"]
        model = self.model(shared)
        model.update(Counts(counts.double(), classes.double(), classes.new_zeros(()).double()))
        return {
            "fitted": shared["fitted"] + 1,
            "tables": model.tables.float(),
            "prior": model.prior.float(),
            "counts": counts,
            "classes": classes,
        }

    def broadcast(self, shared: State) -> State:
        begun = int(shared["rounds"]) >= self._rounds.start
        return {name: shared[name] for name in ("fitted", *(("tables", "prior") if begun else ()))}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        if "vote_counts" not in statistics:
            return
        votes, classes = statistics["vote_counts"], statistics["class_counts"]
        check_counts("class_counts", classes, limits.samples * max(1.0, self._label_weight))
        check_counts("vote_counts", votes, len(votes) * float(classes.sum()))
        if ((votes.sum(1) - classes).abs() > SLACK * (1 + classes)).any():  # abstaining is a vote, too
            raise ValueError("its statistic vote_counts does not add up to class_counts for every function")

    def check(self, shared: State) -> None:
        if shared["fitted"] > 0:
            check_shares("prior", shared["prior"], torch.ones(()))
            check_shares("tables", shared["tables"].movedim(1, -1), torch.ones(()))

    def inspect(self, shared: State) -> State:
        """Returns {"function_accuracy": (K,)}, the estimated accuracy of each function on its votes; {} before the
        first fit.
        """
        return {"function_accuracy": self.model(shared).accuracy()} if shared["fitted"] > 0 else {}
