"""DP-SSL: labelling functions grown by multiple-choice learning, a label model of their votes, an end model of its
probabilistic labels (Xu et al., "DP-SSL: Towards Robust Semi-supervised Learning with A Few Labeled Samples", NeurIPS
2021, arXiv 2110.13740).

Only the paper's abstract, first page and figures could be read, and there is no public code: the three steps, the class
sets and the star of the label model are the paper's; losses and assignment are our reconstruction.

Stages, by rounds; clients send sums, so with all clients in every round the first two assign and fit (`decay`=0) as in
one place:
  functions    a trunk with K heads over the classes and "abstain". Head k learns the classes of its set, and to abstain
               on the others; of unlabelled samples it learns its own confident votes (FixMatch), not its abstentions.
               In the first rounds clients measure every head's loss on every class, and the server gives each class to
               the heads that have least (winner takes all). The first round only measures: head k's first classes come
               from its random weights.
  label model  clients count what the label model expects of their votes; the server sums and updates it: EM, a step a
               round. No model is trained.
  end model    fresh weights; cross-entropy on labels, and on strong views to the label model's posterior.
With written functions (supervision.kind=labeling_functions) there is no first stage, and any function may vote for any
class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlabel.data.labeling_functions import NOT_ASKED
from fedlabel.data.supervision import Supervision
from fedlabel.inference.label_model import ABSTAIN, VARIANTS, Counts, LabelModel
from fedlabel.methods.base import Limits, Method, Phase, PhaseResult, Prepared, Survey, Votes
from fedlabel.methods.plausible import SLACK, check_counts, check_shares
from fedlabel.methods.steps import (
    Batch,
    Model,
    PseudoLabels,
    State,
    StateDict,
    Step,
    batch_mean,
    labeled_and,
    mean_metric,
    one_hot,
    pseudo_cross_entropy,
)

FUNCTIONS = ("grown", "written")
ASSIGNMENTS = ("wta", "random")
PRIORS = ("learnt", "uniform", "client")
STARTS = ("fresh", "warm")
LEAST_PER_CLASS = 3
"""Heads that each class has at least with assignment=random."""
LARGEST_LOSS = 100.0
"""-log p(y) of a sample in the heads' losses: less than the smallest float32 is no probability, and one client's model
or one bad sample must not decide on all heads."""
_FORGET = 0.5
"""Share of the heads' old losses in the new ones: the heads move from round to round."""
_PRIOR_STEPS = 50
_DRAWS = 1000


def assign_classes(losses: np.ndarray, heads_per_class: int) -> np.ndarray:
    """Gives every class to `heads_per_class` heads so that the sum of the losses is least, with sets of about one size.

    A head gets at most ceil(heads_per_class * C / K) + 1 classes, and at least one: left alone, some heads would win
    everything (the dead heads of multiple-choice learning). Solved exactly, as a transport problem.

    Args:
        losses: (K, C), mean loss of each head on each class.
        heads_per_class: rho, in [ceil(K / C), K].

    Returns:
        (K, C) bool.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: it takes a while to import

    heads, classes = losses.shape
    cell = np.arange(heads * classes)
    of_class = (cell % classes == np.arange(classes)[:, None]).astype(float)
    of_head = (cell // classes == np.arange(heads)[:, None]).astype(float)
    most = math.ceil(heads_per_class * classes / heads) + 1
    result = milp(
        losses.ravel(),
        integrality=np.ones(heads * classes),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(of_class, heads_per_class, heads_per_class), LinearConstraint(of_head, 1, most)],
    )
    assert result.x is not None, result.message
    sets: np.ndarray = result.x.reshape(heads, classes) > 0.5
    return sets


def random_classes(heads: int, classes: int, least: int, most: int, seed: int) -> np.ndarray:
    """Returns (K, C) bool: sets of random sizes from least to most, drawn until each class is in `LEAST_PER_CLASS`.

    Raises:
        ValueError: so many draws do not give that.
    """
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        order = rng.random((heads, classes)).argsort(1).argsort(1)
        sets: np.ndarray = order < rng.integers(least, most + 1, heads)[:, None]
        if (sets.sum(0) >= LEAST_PER_CLASS).all():
            return sets
    raise ValueError(
        f"`method.num_functions` (={heads}) with sets of `method.least_classes` (={least}) to `method.most_classes` "
        f"(={most}) of {classes} classes: in {_DRAWS} draws some class was always in fewer than {LEAST_PER_CLASS} of "
        "them. Take more functions, or larger sets."
    )


def functions_loss(log_probs: Tensor, labels: Tensor, sets: Tensor, abstain_weight: Tensor) -> Tensor:
    """Returns the loss of labelled samples, mean over the heads: the class's cross-entropy where it is in the head's
    set, else that of abstaining.

    Args:
        log_probs: (n, K, C + 1), the last is "abstain".
        labels: (n,) int64.
        sets: (K, C) bool.
        abstain_weight: (K,), of the second case.

    Returns:
        (n,).
    """
    classes = sets.shape[1]
    own = -(log_probs[..., :classes] * one_hot(labels, classes)[:, None]).sum(-1)
    inside = sets.T.to(log_probs.dtype)[labels]
    return (inside * own - (1 - inside) * abstain_weight * log_probs[..., -1]).mean(1)


def votes_of(logits: Tensor, sets: Tensor, threshold: float = 0.0) -> Tensor:
    """Returns (n, K) int64, each head's likeliest class of its set, or `ABSTAIN`.

    Args:
        logits: (n, K, C + 1).
        sets: (K, C) bool.
        threshold: a head whose largest probability is below it abstains.
    """
    confidence, vote = restricted(logits, sets).softmax(-1).max(-1)
    return torch.where((vote < sets.shape[1]) & (confidence >= threshold), vote, ABSTAIN)


def restricted(logits: Tensor, sets: Tensor) -> Tensor:
    """Returns logits (n, K, C + 1) with -inf for the classes that are not in the head's set."""
    return logits.masked_fill(~torch.cat([sets, torch.ones_like(sets[:, :1])], 1), -math.inf)


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of each head's -log p(y) over the samples of each class, (K, C), and their numbers, (C,). No
    sample counts more than `LARGEST_LOSS`.

    Args:
        logits: (n, K, C + 1).
        labels: (n,) int64, -1 where the class is not known.
    """
    classes = logits.shape[-1] - 1
    of_class = one_hot(labels, classes)  # all 0 for -1
    nll = -logits.log_softmax(-1)[..., :classes].clamp_min(-LARGEST_LOSS)
    return torch.einsum("nkc,nc->kc", nll, of_class), of_class.sum(0)


MAX_FUNCTIONS = 4096
"""Each has tables over classes and votes of its own."""


@dataclass(frozen=True)
class DPSSL(Method):
    """Hyper-parameters of DP-SSL."""

    name: str = "dp_ssl"
    description: ClassVar[str] = "labelling functions that grow or are written, a label model, an end model (DP-SSL)"

    server_labels: ClassVar[bool] = False

    functions: str = "grown"
    """grown: heads learn to vote. written: the functions of supervision.kind=labeling_functions vote."""
    num_functions: int = 50
    """K; with functions=written as many as there are."""
    functions_rounds: int = 24
    """Rounds of the first stage; none with functions=written."""
    label_model_rounds: int = 6
    """Rounds of the second stage: one EM step each, after the first, which starts from the votes."""

    assignment: str = "wta"
    """How heads get classes. wta: by their losses. random: sets of random sizes."""
    heads_per_class: int | None = None
    """assignment=wta: rho, how many heads learn each class; null: K / 5, but at most 15, and enough for all heads."""
    assignment_rounds: int = 4
    """assignment=wta: rounds after which the server assigns anew; from then on sets stay, as a label model needs."""
    least_classes: int = 1
    """assignment=random: of a head."""
    most_classes: int = 3
    """assignment=random: of a head."""
    sets_seed: int = 0
    """assignment=random: of the draw, for whatever `seed`."""

    lambda_u: float = 1.0
    """Weight of the functions' unlabelled loss."""
    confidence_threshold: float = 0.95
    """A head learns its vote on an unlabelled sample from this probability on."""
    learn_abstentions: bool = False
    """Whether it learns to abstain there, too. With a few labels at a client most heads are sure to abstain on most
    samples, and learning that again leaves few that vote."""
    averaging_decay: float = 0.5
    """The functions that vote have the moving average of the global weights over the rounds, with this decay. 0: the
    weights of the last round. It lags: with 40 rounds, 0.9 still holds the early ones."""
    vote_threshold: float = 0.0
    """A head abstains below this probability."""

    variant: str = "full"
    """Tables of the label model: full, tied or cage, see `inference/label_model.py`."""
    prior: str = "learnt"
    """Class prior. learnt: the federation's. uniform. client: each client's own, fitted to its votes under the common
    tables: clients of different class mixes read the same votes differently. It is not sent, though expected counts,
    which are, tell as much."""
    abstentions: bool = True
    """Whether the label model takes an abstention for evidence; if not, only the votes that were cast count."""
    smoothing: float = 1.0
    """Pseudo-counts of the tables."""
    temperature: float = 1.0
    """kappa in (0, 1]: log-likelihoods of votes are multiplied by it, as votes of one trunk are not independent."""
    label_weight: float = 0.0
    """Weight of labelled samples in EM, clamped to their label. Heads were fitted on these and look better there than
    they are; written functions were not."""
    decay: float = 0.8
    """What remains of the counts of earlier rounds, in [0, 1), as a round's cohort may be a part of the federation: EM
    on a few clients' counts alone forgets the others' functions. 0: where all take part, exactly EM's M step."""

    end_start: str = "fresh"
    """Where the end model starts. fresh: new weights. warm: the functions' trunk."""
    lambda_e: float = 1.0
    """Weight of the end model's loss on unlabelled samples."""
    hard: bool = False
    """Whether the end model learns the likeliest class instead of the posterior."""
    least_confidence: float = 0.0
    """Samples whose largest posterior is below are not learnt."""
    learn_silent: bool = False
    """Whether samples on which all functions abstain are learnt, too: silence says only which classes few cover."""
    lambda_c: float = 0.0
    """Weight of FixMatch's consistency loss in the end model."""

    def __post_init__(self) -> None:
        allowed = {
            "functions": FUNCTIONS,
            "assignment": ASSIGNMENTS,
            "variant": VARIANTS,
            "prior": PRIORS,
            "end_start": STARTS,
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must be one of {', '.join(values)}.")
        for key in ("num_functions", "functions_rounds", "label_model_rounds", "assignment_rounds"):
            if getattr(self, key) < 1:
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must be at least 1.")
        if self.num_functions > MAX_FUNCTIONS:
            raise ValueError(f"`method.num_functions` (={self.num_functions}) must be at most {MAX_FUNCTIONS}.")
        for key in ("lambda_u", "lambda_e", "lambda_c", "label_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must be a finite number of at least 0.")
        for key in ("confidence_threshold", "vote_threshold", "least_confidence"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must lie in [0, 1].")
        for key in ("averaging_decay", "decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must lie in [0, 1).")
        if not 0 < self.smoothing < math.inf:
            raise ValueError(f"`method.smoothing` (={self.smoothing}) must be a positive number.")
        if not 0 < self.temperature <= 1:
            raise ValueError(f"`method.temperature` (={self.temperature}) must lie in (0, 1].")
        if self.grown and self.assignment == "wta" and self.assignment_rounds >= self.functions_rounds:
            raise ValueError(
                f"`method.assignment_rounds` (={self.assignment_rounds}) must be below `method.functions_rounds` "
                f"(={self.functions_rounds}): heads learn with sets that stay."
            )
        if self.functions == "written" and (self.end_start == "warm" or self.vote_threshold > 0):
            raise ValueError(
                f"`method.end_start` (={self.end_start}) and `method.vote_threshold` (={self.vote_threshold}) are for "
                "method.functions=grown: written functions have no weights and no probabilities."
            )
        if not 1 <= self.least_classes <= self.most_classes:
            raise ValueError(
                f"`method.least_classes` (={self.least_classes}) must be at least 1 and at most `method.most_classes` "
                f"(={self.most_classes})."
            )

    # ------------------------------------------------------------------------------------------------- stages and sets

    @property
    def grown(self) -> bool:
        """Whether heads are the functions."""
        return self.functions == "grown"

    @property
    def functions_vote(self) -> bool:
        return not self.grown

    @property
    def labeling_heads(self) -> int:
        return self.num_functions if self.grown else 0

    @property
    def needs_embeddings(self) -> bool:
        return self.grown

    def averaging(self, round_number: int) -> float:
        return self.averaging_decay if self.stage(round_number) == "functions" else 0.0

    def stage(self, round_number: int) -> str:
        """Returns "functions", "label model" or "end model"; of round 0 the first."""
        first = self.functions_rounds if self.grown else 0
        if round_number <= first and self.grown:
            return "functions"
        return "label model" if round_number <= first + self.label_model_rounds else "end model"

    def stage_name(self, round_number: int) -> str:
        return self.stage(round_number)

    def starts_stage(self, round_number: int) -> bool:
        return self.grown and round_number == self.functions_rounds + 1

    def begin_stage(self, previous: StateDict, fresh: StateDict) -> StateDict:
        if self.end_start == "fresh":
            return fresh
        return {name: (fresh if ".output." in name else previous)[name] for name in fresh}

    def check_rounds(self, num_rounds: int) -> None:
        before = (self.functions_rounds if self.grown else 0) + self.label_model_rounds
        if num_rounds <= before:
            raise ValueError(
                f"`num_rounds` (={num_rounds}) ends before the end model begins, after `method.functions_rounds` "
                f"(={self.functions_rounds if self.grown else 0}) and `method.label_model_rounds` "
                f"(={self.label_model_rounds}): take at least {before + 1}, or fewer of these."
            )

    def check(self, known: Supervision) -> None:
        written, classes = known.votes.shape[1], known.candidates.shape[1]
        if not self.grown:
            if written != self.num_functions:
                raise ValueError(
                    f"`method.num_functions` (={self.num_functions}) must be the number of labelling functions, "
                    f"{written}" + ("." if written else ": set supervision.kind=labeling_functions and its module.")
                )
            if not bool((known.votes >= 0).any()):
                raise ValueError(
                    f"None of the {written} labelling functions votes for a class on any of the "
                    f"{int(known.voted_on.sum()):,} samples they were given: nothing to learn from. A function "
                    "returns a class, its name or its number; None abstains."
                )
            return
        if written:
            raise ValueError(
                f"`method.functions` (=grown): there are {written} written labelling functions, which it would leave "
                f"aside. Set method.functions=written and method.num_functions={written}."
            )
        super().check(known)
        k = self.num_functions
        if self.assignment == "random":
            if self.most_classes > classes:
                raise ValueError(f"`method.most_classes` (={self.most_classes}) must be at most the {classes} classes.")
            random_classes(k, classes, self.least_classes, self.most_classes, self.sets_seed)
        elif not math.ceil(k / classes) <= self._heads_per_class(classes) <= k:
            raise ValueError(
                f"`method.heads_per_class` (={self.heads_per_class}) must lie in [{math.ceil(k / classes)}, {k}] for "
                f"`method.num_functions` (={k}) and {classes} classes: no head without a class, none twice."
            )

    def doubts(self, known: Supervision, names: Sequence[str]) -> list[str]:
        found = super().doubts(known, names)
        cast = torch.stack([(known.votes == label).sum(0) for label in range(len(names))])  # (classes, functions)
        silent = [str(place) for place in (cast.sum(0) == 0).nonzero().flatten().tolist()]
        if silent:
            found.append(
                f"Labelling functions that vote on no sample (in the file's order, from 0): {', '.join(silent)}."
            )
        missing = [names[label] for label in (cast.sum(1) == 0).nonzero().flatten().tolist()]
        if self.functions_vote and missing:
            found.append(
                f"No labelling function votes for {', '.join(missing)}: the label model cannot find these classes."
            )
        return found

    def _heads_per_class(self, classes: int) -> int:
        if self.heads_per_class is not None:
            return self.heads_per_class
        return max(1, math.ceil(self.num_functions / classes), min(15, round(self.num_functions / 5)))

    def _round(self, memory: State) -> int:
        """Returns the round that a client is in, 1-based."""
        return int(memory["rounds"]) + 1

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        stage = self.stage(round_number)
        if stage == "functions":
            measures = self.assignment == "wta" and round_number <= self.assignment_rounds
            return (
                Phase(
                    "functions",
                    partial(self.functions_step, frozen=not measures),
                    labeled=("weak",),
                    unlabeled=("weak", "strong"),
                    teachers=("global",) if measures else (),
                    prepare=self.measure if measures else None,
                    steps=0 if measures and round_number == 1 else None,
                    trains=_functions,
                ),
            )
        views = ("weak", "strong") if self.lambda_c > 0 else ("strong",)
        return (
            Phase(
                stage,
                self.loss,
                labeled=("weak",),
                unlabeled=views,
                teachers=("previous",) if self.grown else (),
                prepare=partial(self.annotate, count=stage == "label model"),
                steps=0 if stage == "label model" else None,
                trains=_classifier,
            ),
        )

    # ----------------------------------------------------------------------------------------------- stage 1: functions

    def measure(self, survey: Survey) -> Prepared:
        """Adds up the heads' losses on the client's labelled samples."""
        losses, seen = class_losses(survey.predict("global", "clean", "heads"), survey.supervision.label)
        return Prepared({}, memory={**survey.memory, "head_losses": losses, "class_samples": seen})

    def functions_step(self, student: Model, teachers: Mapping[str, Model], batch: Batch, frozen: bool = True) -> Step:
        """Returns the loss of the heads on a batch; frozen: whether the sets stay, and a head knows no other class."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        sets = batch.memory["sets"] > 0.5
        symbols = sets if frozen else torch.ones_like(sets)
        with torch.no_grad():
            weak_u = restricted(student(unlabeled.views["weak"], "heads"), symbols).softmax(-1)
        both = student(torch.cat([labeled.views["weak"], unlabeled.views["strong"]]), "heads")
        log_probs = restricted(both, symbols).log_softmax(-1).clamp_min(-1e9)  # 0 * -inf would be NaN
        log_l, log_u = log_probs.split([len(labeled.candidates), len(unlabeled.candidates)])

        known = labeled.candidates.sum(-1) == 1
        label = labeled.candidates.int().argmax(-1)
        size = sets.sum(1).to(log_l.dtype)
        weight = size / (sets.shape[1] - size).clamp_min(1)  # as much of "abstain" as of the set, were classes even
        values = functions_loss(log_l, label, sets, weight)
        values = torch.where(known, values, torch.zeros_like(values))
        count = known.sum()
        supervised = values.sum() / count.clamp_min(1)

        confidence, vote = weak_u.max(-1)
        keep = confidence >= self.confidence_threshold
        if not self.learn_abstentions:
            keep = keep & (vote < sets.shape[1])
        nll = pseudo_cross_entropy(log_u.flatten(0, 1), vote.flatten(), keep.flatten()).view_as(confidence)
        unsupervised = nll.mean(1)
        loss = supervised + self.lambda_u * batch_mean(unsupervised)
        everyone = torch.ones_like(keep)
        metrics = {
            "train/loss": torch.stack([loss, torch.ones_like(loss)]).detach(),
            "train/loss_supervised": mean_metric(values, known),
            "train/loss_unsupervised": mean_metric(unsupervised, torch.ones_like(unlabeled.noisy)),
            "functions/kept": mean_metric(keep.to(nll.dtype), everyone),
            "functions/abstained": mean_metric((vote == sets.shape[1]).to(nll.dtype), everyone),
        }
        # The sum over heads: the trunk gets the mean of their gradients all the same, see `LabelingHeads`.
        return Step(len(sets) * loss, metrics, count + keep.any(1).sum())

    # --------------------------------------------------------------------------------------------- stage 2: label model

    def label_model(self, state: State) -> LabelModel:
        """Returns the label model of what is shared: with its tables and prior, if they have been fitted."""
        sets = state["sets"] > 0.5
        classes = sets.shape[1]
        uniform = torch.ones(classes, device=sets.device) if self.prior == "uniform" else None
        model = LabelModel(classes, sets, self.variant, uniform, self.smoothing, self.temperature, self.abstentions)
        if state["fitted"] > 0:
            model.tables = state["tables"].double()
            model.prior = state["prior"].double() / state["prior"].double().sum()
        return model

    def annotate(self, survey: Survey, count: bool) -> Prepared:
        """Lets the functions vote on all of a client's samples, and makes posteriors of the votes.

        Args:
            survey: the client's samples.
            count: whether to add up what the label model expects of the unlabelled samples' votes.
        """
        known, memory = survey.supervision, survey.memory
        sets, asked = memory["sets"] > 0.5, torch.ones_like(known.noisy)
        if self.grown:
            votes = memory["votes"].long()
            if len(votes) != len(asked):  # the functions stay as they are from here on: they vote once
                votes = votes_of(survey.predict("previous", "clean", "heads"), sets, self.vote_threshold)
                memory = {**memory, "votes": votes.to(torch.int16)}
        else:
            votes, asked = known.votes.clamp_min(ABSTAIN), known.voted_on
        begun, model = bool(memory["fitted"] > 0), self.label_model(memory)
        label = torch.where(known.noisy, -1, known.label)
        free = votes[asked & (label < 0)]
        if begun and self.prior == "client" and len(free):
            model.prior = client_prior(model, free)
        posterior = model.posterior(votes) if begun else model.guess(votes)
        metrics: dict[str, Tensor] = {}
        if count:
            sums = self._counts(model, free, votes[asked], label[asked], begun)
            memory = {**memory, "vote_counts": sums.votes.float(), "class_counts": sums.classes.float()}
            if begun:  # first guesses have none
                metrics = {"functions/log_likelihood": torch.stack([sums.log_likelihood, sums.classes.sum()])}
        confidence, likeliest = posterior.float().max(1)
        keep = asked & (confidence >= self.least_confidence)
        if not self.learn_silent:
            keep = keep & (votes >= 0).any(1)
        target = one_hot(likeliest, sets.shape[1]) if self.hard else posterior.float()
        pseudo = PseudoLabels(likeliest, keep, torch.ones_like(keep), confidence)
        cast = votes.masked_fill(~asked[:, None], NOT_ASKED)
        said = {"target": target * keep[:, None]}
        return Prepared(said, memory=memory, pseudo=pseudo, metrics=metrics, votes=Votes(cast, sets))

    def _counts(self, model: LabelModel, free: Tensor, votes: Tensor, label: Tensor, begun: bool) -> Counts:
        if not begun:
            return model.initial_counts(free)
        if self.label_weight > 0:
            return model.expected_counts(votes, label, self.label_weight)
        return model.expected_counts(free)

    # ----------------------------------------------------------------------------------------------- stage 3: end model

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns cross-entropy on labels plus the noise-aware risk, cross-entropy to the posterior on strong views."""
        unlabeled = batch.unlabeled
        supervised, strong = labeled_and(student, batch, "strong")
        target = unlabeled.targets["target"].detach()
        log_probs = strong.log_softmax(-1)
        values = -(target * log_probs).sum(-1)
        told = target.sum(-1) > 0
        loss = supervised.loss + self.lambda_e * batch_mean(values)
        metrics = {**supervised.metrics, "train/loss_unsupervised": mean_metric(values, told)}
        examples = supervised.examples + told.sum()
        if self.lambda_c > 0:
            with torch.no_grad():
                confidence, label = student(unlabeled.views["weak"]).softmax(-1).max(-1)
            keep = confidence >= self.confidence_threshold
            consistency = pseudo_cross_entropy(log_probs, label, keep)
            loss = loss + self.lambda_c * batch_mean(consistency)
            metrics["train/loss_consistency"] = mean_metric(consistency, torch.ones_like(keep))
            examples = supervised.examples + (told | keep).sum()
        metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
        return Step(loss, metrics, examples)

    # ----------------------------------------------------------------------------- what is shared, summed and evaluated

    def initial_shared(self, num_classes: int) -> State:
        k, c = self.num_functions, num_classes
        shared = {"rounds": torch.zeros(()), "fitted": torch.zeros(())}
        if not self.grown:
            sets = torch.ones(k, c)
        elif self.assignment == "random":
            sets = torch.from_numpy(random_classes(k, c, self.least_classes, self.most_classes, self.sets_seed)).float()
        else:
            rho = self._heads_per_class(c)  # until the first losses are there, in turn
            sets = torch.zeros(k, c).index_put_(
                (torch.arange(c * rho) % k, torch.arange(c).repeat_interleave(rho)), torch.ones(c * rho)
            )
            shared |= {"losses": torch.zeros(k, c), "samples": torch.zeros(c)}
        return {
            **shared,
            "sets": sets,
            "tables": torch.zeros(k, c + 1, c),
            "counts": torch.zeros(k, c + 1, c),
            "prior": torch.full((c,), 1 / c),
            "classes": torch.zeros(c),
        }

    def initial_memory(self, candidates: Tensor) -> State:
        k, c, device = self.num_functions, candidates.shape[1], candidates.device
        memory = {
            "vote_counts": torch.zeros(k, c + 1, c),
            "class_counts": torch.zeros(c),
            "head_losses": torch.zeros(k, c),
            "class_samples": torch.zeros(c),
            "votes": torch.zeros(0, k, dtype=torch.int16),
        }
        return {name: value.to(device) for name, value in memory.items()}

    def keep(self, memory: State, results: Sequence[PhaseResult]) -> State:
        return {"votes": memory["votes"]} if len(memory["votes"]) else {}

    def told(self, shared: State) -> State:
        kept = ["rounds", "fitted", "sets"]
        if self.stage(int(shared["rounds"]) + 1) != "functions":
            kept += ["tables", "prior"]
        return {name: shared[name] for name in kept}

    def statistics(self, memory: State) -> State:
        stage = self.stage(self._round(memory))
        if stage == "label model":
            return {name: memory[name] for name in ("vote_counts", "class_counts")}
        if stage == "functions" and self.assignment == "wta" and self._round(memory) <= self.assignment_rounds:
            return {name: memory[name] for name in ("head_losses", "class_samples")}
        return {}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        if "head_losses" in statistics:
            losses, samples = statistics["head_losses"], statistics["class_samples"]
            check_counts("class_samples", samples, limits.samples)
            if (losses < 0).any() or (losses > samples * LARGEST_LOSS * (1 + SLACK)).any():
                raise ValueError(f"its statistic head_losses must lie in [0, {LARGEST_LOSS:g}] per sample")
        if "vote_counts" in statistics:
            votes, classes = statistics["vote_counts"], statistics["class_counts"]
            check_counts("class_counts", classes, limits.samples * max(1.0, self.label_weight))
            check_counts("vote_counts", votes, len(votes) * float(classes.sum()))
            if ((votes.sum(1) - classes).abs() > SLACK * (1 + classes)).any():  # abstaining is a vote, too
                raise ValueError("its statistic vote_counts does not add up to class_counts for every function")

    def check_shared(self, shared: State) -> None:
        if shared["fitted"] > 0:
            check_shares("prior", shared["prior"], torch.ones(()))
            check_shares("tables", shared["tables"].movedim(1, -1), torch.ones(()))

    def server_step(self, shared: State, total: State) -> State:
        """Assigns classes by the summed losses, or takes EM's M step of the summed counts."""
        shared = {**shared, "rounds": shared["rounds"] + 1}
        if "head_losses" in total:
            losses = _FORGET * shared["losses"] + total["head_losses"]
            samples = _FORGET * shared["samples"] + total["class_samples"]
            mean = (losses / samples.clamp_min(1e-12)).cpu().double().numpy()
            assigned = assign_classes(mean, self._heads_per_class(mean.shape[1]))
            shared |= {"losses": losses, "samples": samples}
            shared["sets"] = torch.from_numpy(assigned).float().to(losses.device)
        if "vote_counts" in total and total["class_counts"].sum() > 0:
            counts = self.decay * shared["counts"] + total["vote_counts"]
            classes = self.decay * shared["classes"] + total["class_counts"]
            model = self.label_model(shared)
            model.update(Counts(counts.double(), classes.double(), classes.new_zeros(()).double()))
            shared |= {"counts": counts, "classes": classes, "fitted": shared["fitted"] + 1}
            shared |= {"tables": model.tables.float(), "prior": model.prior.float()}
        return shared

    def function_accuracy(self, shared: State) -> Tensor | None:
        if not shared["fitted"] > 0:
            return None
        return self.label_model(shared).accuracy()

    def interim(self, round_number: int) -> bool:
        return self.stage(round_number) != "end model"

    def judged(self, models: Mapping[str, Model], shared: State) -> Model | None:
        """Returns the end model; before its stage what the functions' votes make of an image."""
        stage, sets = self.stage(int(shared["rounds"])), shared["sets"] > 0.5
        if stage == "end model":
            return models["model"]
        if not self.grown:
            return None
        voters = models["previous"] if stage == "label model" else models.get("average", models["model"])
        fitted, model = bool(shared["fitted"] > 0), self.label_model(shared)

        def judge(images: Tensor) -> Tensor:
            votes = votes_of(voters(images, "heads"), sets, self.vote_threshold)
            said: Tensor = model.posterior(votes) if fitted else model.guess(votes)
            return said.clamp_min(1e-12).log().float()

        return judge


def _functions(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("net.output.")]


def _classifier(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("heads.")]


def client_prior(model: LabelModel, votes: Tensor) -> Tensor:
    """Returns the class prior (C,) that is likeliest for votes (n, K) under the model's tables: EM from its prior."""
    ratio = model.posterior(votes) / model.prior
    prior = model.prior
    for _ in range(_PRIOR_STEPS):
        joint = ratio * prior
        prior = (joint / joint.sum(1, keepdim=True)).sum(0) + model.smoothing
        prior = prior / prior.sum()
    return prior
