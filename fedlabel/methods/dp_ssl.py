"""DP-SSL: labelling functions learned by multiple-choice learning, a label model of their votes, an end model trained
on its probabilistic labels (Xu et al., "DP-SSL: Towards Robust Semi-supervised Learning with A Few Labeled Samples",
NeurIPS 2021, arXiv 2110.13740).

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
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, positive, within
from fedlabel.data.labels.labeling_functions import NOT_ASKED
from fedlabel.inference.head_assignment import random_classes, restricted, votes_of
from fedlabel.inference.label_model import ABSTAIN, VARIANTS, LabelModel
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, State, StateDict, Step, Survey, Votes
from fedlabel.methods.federated_label_model import FederatedLabelModel, FixedSets, HeadAssignment, RoundCounter
from fedlabel.methods.losses import batch_mean, labeled_and, mean_metric, one_hot, pseudo_cross_entropy
from fedlabel.methods.recipe import BySample, LabelKinds, Memory, Method, Phase, Recipe, Stage, Start, Task
from fedlabel.methods.shared import together
from fedlabel.methods.uploads import PhaseResult
from fedlabel.models.wrap import one_network, with_labeling_heads

MAX_FUNCTIONS = 4096
"""Each has tables over classes and votes of its own."""


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


@dataclass(frozen=True)
class DPSSL(Method):
    """Hyper-parameters of DP-SSL."""

    name: str = "dp_ssl"
    description: ClassVar[str] = "labelling functions that grow or are written, a label model, an end model (DP-SSL)"

    functions: str = "grown"
    """grown: heads learn to vote. written: the functions of supervision.kind=labeling_functions vote."""
    num_functions: int = 50
    """K, number of functions; with functions=written the number of written functions."""
    functions_rounds: int = 24
    """Rounds of the first stage; none with functions=written."""
    label_model_rounds: int = 6
    """Rounds of the second stage: one EM step each, after the first, which starts from the votes."""

    assignment: str = "wta"
    """Assignment of classes to heads. wta: by their losses. random: sets of random sizes."""
    heads_per_class: int | None = None
    """assignment=wta: rho, number of heads that learn each class; null: K / 5, but at most 15, and enough for all
    heads."""
    assignment_rounds: int = 4
    """assignment=wta: rounds after which the server reassigns classes; later the sets are fixed, as a label model
    needs."""
    least_classes: int = 1
    """assignment=random: smallest set of a head."""
    most_classes: int = 3
    """assignment=random: largest set of a head."""
    sets_seed: int = 0
    """assignment=random: seed of the draw, independent of `seed`."""

    lambda_u: float = 1.0
    """Weight of the functions' unlabelled loss."""
    confidence_threshold: float = 0.95
    """Smallest probability from which a head learns its vote on an unlabelled sample."""
    learn_abstentions: bool = False
    """Whether heads also learn to abstain on unlabelled samples. With few labels at a client most heads abstain
    confidently on most samples, and reinforcing that leaves few that vote."""
    averaging_decay: float = 0.5
    """The functions vote with the moving average of the global weights over the rounds, with this decay. 0: the weights
    of the last round. The average lags: with 40 rounds, 0.9 still holds the early ones."""
    vote_threshold: float = 0.0
    """A head abstains below this probability."""

    variant: str = "full"
    """Tables of the label model: full, tied or cage, see `inference/label_model.py`."""
    prior: str = "learnt"
    """Class prior. learnt: the federation's. uniform. client: each client's own, fitted to its votes under the common
    tables: clients of different class mixes read the same votes differently. It is not sent, but the expected counts,
    which are, reveal as much."""
    abstentions: bool = True
    """Whether the label model treats an abstention as evidence; if not, only votes count."""
    smoothing: float = 1.0
    """Pseudo-counts of the tables."""
    temperature: float = 1.0
    """kappa in (0, 1]: log-likelihoods of votes are multiplied by it, as votes of heads on one trunk are dependent."""
    label_weight: float = 0.0
    """Weight of labelled samples in EM, clamped to their label. Heads were fitted on these and look more accurate on
    them than they are; written functions were not."""
    decay: float = 0.8
    """Decay of the counts of earlier rounds, in [0, 1), for rounds whose cohort is a part of the federation: EM on a
    few clients' counts alone forgets the others' functions. 0: if all take part, exactly EM's M step."""

    end_start: str = "fresh"
    """Initial weights of the end model. fresh: new weights. warm: the functions' trunk."""
    lambda_e: float = 1.0
    """Weight of the end model's loss on unlabelled samples."""
    hard: bool = False
    """Whether the end model learns the likeliest class instead of the posterior."""
    least_confidence: float = 0.0
    """Samples with a smaller largest posterior are not learned."""
    learn_silent: bool = False
    """Whether samples on which all functions abstain are learned, too: abstentions only indicate classes that few
    functions cover."""
    lambda_c: float = 0.0
    """Weight of FixMatch's consistency loss in the end model."""

    def __post_init__(self) -> None:
        one_of(
            self,
            "method",
            functions=("grown", "written"),
            assignment=("wta", "random"),
            variant=VARIANTS,
            prior=("learnt", "uniform", "client"),
            end_start=("fresh", "warm"),
        )
        at_least(self, "method", 1, "functions_rounds", "label_model_rounds", "assignment_rounds")
        finite(self, "method", "lambda_u", "lambda_e", "lambda_c", "label_weight")
        in_unit_interval(self, "method", "confidence_threshold", "vote_threshold", "least_confidence")
        in_unit_interval(self, "method", "averaging_decay", "decay", below_one=True)
        positive(self, "method", "smoothing")
        within(self, "method", 1, MAX_FUNCTIONS, "num_functions")
        within(self, "method", 0, 1, "temperature", ends="(]")
        if self.grown and self.assignment == "wta" and self.assignment_rounds >= self.functions_rounds:
            raise ValueError(
                f"`method.assignment_rounds` (={self.assignment_rounds}) must be below `method.functions_rounds` "
                f"(={self.functions_rounds}): heads learn with sets that stay."
            )
        if not self.grown and (self.end_start == "warm" or self.vote_threshold > 0):
            raise ValueError(
                f"`method.end_start` (={self.end_start}) and `method.vote_threshold` (={self.vote_threshold}) are for "
                "method.functions=grown: written functions have no weights and no probabilities."
            )
        if not 1 <= self.least_classes <= self.most_classes:
            raise ValueError(
                f"`method.least_classes` (={self.least_classes}) must be at least 1 and at most `method.most_classes` "
                f"(={self.most_classes})."
            )

    @property
    def grown(self) -> bool:
        """Whether the functions are learned heads."""
        return self.functions == "grown"

    def check_rounds(self, num_rounds: int) -> None:
        functions = self.functions_rounds if self.grown else 0
        before = functions + self.label_model_rounds
        if num_rounds <= before:
            raise ValueError(
                f"`num_rounds` (={num_rounds}) ends before the end model begins, after `method.functions_rounds` "
                f"(={functions}) and `method.label_model_rounds` (={self.label_model_rounds}): take at least "
                f"{before + 1}, or fewer of these."
            )

    def recipe(self, task: Task) -> Recipe:
        k, classes, written = self.num_functions, task.num_classes, task.labels.functions
        if self.grown and written:
            raise ValueError(
                f"`method.functions` (=grown): there are {written} written labelling functions, which it would not "
                f"use. Set method.functions=written and method.num_functions={written}."
            )
        if not self.grown and written != k:
            raise ValueError(
                f"`method.num_functions` (={k}) must be the number of labelling functions, {written}"
                + ("." if written else ": set supervision.kind=labeling_functions and its module.")
            )
        sets, label_model = self._class_sets(classes), self._label_model(classes)
        functions = Stage(
            partial(self._grow, sets),
            rounds=self.functions_rounds,
            name="functions",
            averaging=self.averaging_decay,
            predict=partial(self._predict, label_model),
            final=False,
        )
        learn = Phase(
            "end model",
            self.loss,
            draw=BySample(unlabeled=("weak", "strong") if self.lambda_c > 0 else ("strong",)),
            teachers=("previous",) if self.grown else (),
            prepare=partial(self._annotate, label_model),
            trains=_classifier,
        )
        count = Stage(
            (replace(learn, name="label model", steps=0),),
            rounds=self.label_model_rounds,
            name="label model",
            start=Start.FRESH if self.end_start == "fresh" else _warm,
            predict=partial(self._predict, label_model),
            final=False,
        )
        end_model = Stage((learn,), name="end model")
        return Recipe(
            stages=(functions, count, end_model) if self.grown else (count, end_model),
            uses=LabelKinds.TRUE | LabelKinds.NOISY | (LabelKinds(0) if self.grown else LabelKinds.VOTES),
            network=with_labeling_heads(k) if self.grown else one_network,
            memory=Memory(partial(self._remember, sets, label_model), _keep_votes),
            shared=together(RoundCounter(), sets, label_model),
            inspect=label_model.inspect,
            num_functions=k,
        )

    def _class_sets(self, classes: int) -> FixedSets | HeadAssignment:
        k = self.num_functions
        if not self.grown:
            return FixedSets(np.ones((k, classes), dtype=bool))
        if self.assignment == "random":
            if self.most_classes > classes:
                raise ValueError(f"`method.most_classes` (={self.most_classes}) must be at most the {classes} classes.")
            return FixedSets(random_classes(k, classes, self.least_classes, self.most_classes, self.sets_seed))
        least, each = math.ceil(k / classes), self.heads_per_class
        if each is None:
            each = max(least, min(15, round(k / 5)))
        if not least <= each <= k:
            raise ValueError(
                f"`method.heads_per_class` (={each}) must lie in [{least}, {k}] for `method.num_functions` (={k}) and "
                f"{classes} classes: no head without a class, none twice."
            )
        return HeadAssignment(k, classes, each, self.assignment_rounds)

    def _label_model(self, classes: int) -> FederatedLabelModel:
        first = self.functions_rounds if self.grown else 0
        make = partial(
            LabelModel,
            classes,
            variant=self.variant,
            prior=torch.ones(classes) if self.prior == "uniform" else None,
            smoothing=self.smoothing,
            temperature=self.temperature,
            abstentions=self.abstentions,
        )
        rounds = range(first, first + self.label_model_rounds)
        own_prior = self.prior == "client"
        return FederatedLabelModel(self.num_functions, classes, make, rounds, self.decay, own_prior, self.label_weight)

    def _remember(
        self, sets: FixedSets | HeadAssignment, label_model: FederatedLabelModel, candidates: Tensor
    ) -> State:
        votes = torch.zeros(0, self.num_functions, dtype=torch.int16, device=candidates.device)
        return {**sets.memory(candidates), **label_model.memory(candidates), "votes": votes}

    def _predict(self, label_model: FederatedLabelModel, models: Mapping[str, Model], shared: State) -> Model | None:
        """Returns the label model's posterior of the heads' votes on images; None for written functions, which take no
        tensors. The heads are those of "previous" once their stage is over, before that of the moving average, if there
        is one.
        """
        if not self.grown:
            return None
        voters = next(models[name] for name in ("previous", "average", "model") if name in models)
        read, sets = label_model.reader(shared), shared["sets"] > 0.5

        def predict(images: Tensor) -> Tensor:
            votes = votes_of(voters(images, "heads"), sets, self.vote_threshold)
            return read(votes).clamp_min(1e-12).log().float()

        return predict

    # ----------------------------------------------------------------------------------------------- stage 1: functions

    def _grow(self, sets: FixedSets | HeadAssignment, round_in_stage: int) -> tuple[Phase, ...]:
        views = BySample(unlabeled=("weak", "strong"))
        phase = Phase("functions", self.functions_step, draw=views, trains=_functions)
        if not isinstance(sets, HeadAssignment) or round_in_stage > self.assignment_rounds:
            return (phase,)
        return (
            replace(
                phase,
                loss=partial(self.functions_step, frozen=False),
                teachers=("global",),
                prepare=sets.measure,
                steps=0 if round_in_stage == 1 else None,
            ),
        )

    def functions_step(self, student: Model, teachers: Mapping[str, Model], batch: Batch, frozen: bool = True) -> Step:
        """Returns the loss of the heads on a batch; frozen: whether the sets are fixed, and a head knows no other
        class.
        """
        labeled, unlabeled = batch.labeled, batch.unlabeled
        sets = batch.memory["sets"] > 0.5
        symbols = sets if frozen else torch.ones_like(sets)
        with torch.no_grad():
            weak_u = restricted(student(unlabeled.views["weak"], "heads"), symbols).softmax(-1)
        both = student(torch.cat([labeled.views["weak"], unlabeled.views["strong"]]), "heads")
        log_probs = restricted(both, symbols).log_softmax(-1).clamp_min(-1e9)  # 0 * -inf would be NaN
        log_l, log_u = log_probs.split([len(labeled.candidates), len(unlabeled.candidates)])

        given = labeled.candidates.sum(-1) == 1
        label = labeled.candidates.int().argmax(-1)
        size = sets.sum(1).to(log_l.dtype)
        weight = size / (sets.shape[1] - size).clamp_min(1)  # as much of "abstain" as of the set, were classes even
        values = functions_loss(log_l, label, sets, weight)
        values = torch.where(given, values, torch.zeros_like(values))
        count = given.sum()
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
            "train/loss_supervised": mean_metric(values, given),
            "train/loss_unsupervised": mean_metric(unsupervised, torch.ones_like(unlabeled.noisy)),
            "functions/kept": mean_metric(keep.to(nll.dtype), everyone),
            "functions/abstained": mean_metric((vote == sets.shape[1]).to(nll.dtype), everyone),
        }
        # The sum over heads: the trunk gets the mean of their gradients all the same, see `LabelingHeads`.
        return Step(len(sets) * loss, metrics, count + keep.any(1).sum())

    # --------------------------------------------------------------------------------- stages 2 and 3: votes and labels

    def _annotate(self, label_model: FederatedLabelModel, survey: Survey) -> Prepared:
        """Applies the functions to all of a client's samples, and computes posteriors of the votes."""
        supervision, memory = survey.supervision, survey.memory
        sets, asked = memory["sets"] > 0.5, torch.ones_like(supervision.noisy)
        if self.grown:
            votes = memory["votes"].long()
            if len(votes) != len(asked):  # the functions stay as they are from here on: they vote once
                votes = votes_of(survey.predict("previous", "clean", "heads"), sets, self.vote_threshold)
                memory = {**memory, "votes": votes.to(torch.int16)}
        else:
            votes, asked = supervision.votes.clamp_min(ABSTAIN), supervision.voted_on
        label = torch.where(supervision.noisy, -1, supervision.label)
        posterior, memory, metrics = label_model.expect(memory, votes, label, asked)
        posterior = posterior.float()
        confidence, likeliest = posterior.max(1)
        keep = asked & (confidence >= self.least_confidence)
        if not self.learn_silent:
            keep = keep & (votes >= 0).any(1)
        target = one_hot(likeliest, sets.shape[1]) if self.hard else posterior
        return Prepared(
            targets={"target": target * keep[:, None]},
            memory=memory,
            pseudo=PseudoLabels(likeliest, keep, torch.ones_like(keep), confidence),
            metrics=metrics,
            votes=Votes(votes.masked_fill(~asked[:, None], NOT_ASKED), sets),
        )

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns cross-entropy on labels plus the noise-aware risk, cross-entropy to the posterior on strong views."""
        unlabeled = batch.unlabeled
        supervised, strong = labeled_and(student, batch, "strong")
        target = unlabeled.targets["target"].detach()
        log_probs = strong.log_softmax(-1)
        values = -(target * log_probs).sum(-1)
        taught = target.sum(-1) > 0
        loss = supervised.loss + self.lambda_e * batch_mean(values)
        metrics = {**supervised.metrics, "train/loss_unsupervised": mean_metric(values, taught)}
        examples = supervised.examples + taught.sum()
        if self.lambda_c > 0:
            with torch.no_grad():
                confidence, label = student(unlabeled.views["weak"]).softmax(-1).max(-1)
            keep = confidence >= self.confidence_threshold
            consistency = pseudo_cross_entropy(log_probs, label, keep)
            loss = loss + self.lambda_c * batch_mean(consistency)
            metrics["train/loss_consistency"] = mean_metric(consistency, torch.ones_like(keep))
            examples = supervised.examples + (taught | keep).sum()
        metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
        return Step(loss, metrics, examples)


def _functions(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("net.output.")]


def _classifier(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("heads.")]


def _warm(previous: StateDict, fresh: StateDict) -> StateDict:
    return {name: (fresh if ".output." in name else previous)[name] for name in fresh}


def _keep_votes(memory: State, results: Sequence[PhaseResult]) -> State:
    return {"votes": memory["votes"]} if len(memory["votes"]) else {}
