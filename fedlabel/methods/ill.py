"""ILL: one EM for labels that are missing, partial, noisy, or all of it at once.

Source: Chen et al., "Imprecise Label Learning: A Unified Framework for Learning with Various Imprecise Label
Configurations", NeurIPS 2024 (arXiv 2305.12715). Setting: any; every sample has what is known of it (`Supervision`).

E step, per batch, on the weak view: q(y) ~ p(y | x) p(information | y), see `inference/imprecise.py`. M step: CE(q,
strong view); CE on the weak view where the label is certain (or on the strong one: `label_view`); the
forward-corrected likelihood of noisy labels on the weak view. The noise matrix T is learnt beside.

What differs, and why:
- T is row-stochastic and the same in the E step and in the likelihood; the released code normalises rows in one and
  columns in the other, which agree only for symmetric T.
- T is federated: clients send expected counts (`noise.form`=closed: with `noise.decay`=0, `noise.smoothing`=0 and all
  clients in the cohort exactly EM on all their data), or T's logits after their steps (gradient, the paper's).
- What the released code has beyond the paper is off by default: three views, complement loss, balance term, the target
  re-weighted by T (`view_mean`, `complement_weight`, `balance_weight`, `reweighted`), distribution alignment and the
  cut to the largest classes for unlabelled samples (`alignment`, `top_k`). Left out are its normalisations of T and a
  further term, consistency of the two views of noisy samples; its balance term is over one part of the batch, here over
  all weak views, and `reweighted` is here also for noisy sets.
- Samples of which nothing is known weigh no more than the others where they are fewer: EM's objective is a sum over
  samples, and a candidate set that came out as all classes would else be drawn in every step.
- Noisy sets go by the sum rule, not the released code's product: with the product, T is a distribution over all the
  candidates drawn, flattens, and EM can end where nothing is known (see docs/decisions/0005).
- Noise that depends on the sample is modelled by the same T per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.data.supervision import Supervision
from fedlabel.inference.imprecise import (
    SMALLEST,
    SetLikelihood,
    candidates_log_likelihood,
    log_likelihood,
    marginal_nll,
    posterior,
    unchecked_posterior,
)
from fedlabel.inference.transition import (
    diagonal_transition,
    expected_counts,
    expected_set_counts,
    from_counts,
    gradient_step,
)
from fedlabel.methods.base import Limits, Method, Phase, PhaseResult, Prepared, Survey
from fedlabel.methods.plausible import SLACK, check_counts, check_flags, check_shares
from fedlabel.methods.steps import (
    Batch,
    Model,
    Part,
    PseudoLabels,
    State,
    StateDict,
    Step,
    batch_mean,
    mean_metric,
    pseudo_metrics,
)

FORMS = ("closed", "gradient", "fixed")
SCOPES = ("global", "client", "prior")


MAX_ANNOTATORS = 1000
"""Each has a matrix of its own."""


@dataclass(frozen=True)
class NoiseMatrix:
    """How T[y, j] = p(noisy label j | true label y) is learnt."""

    form: str = "closed"
    """closed: from expected counts over all of a client's samples, once a round. gradient: a step of gradient descent
    with every batch. fixed: it stays as it starts."""
    scope: str = "global"
    """global: one T for the federation. client: each client has its own, which never leaves it. prior (form=closed):
    a client's T is its own counts plus `strength` counts per class of the global T, for annotators who differ."""
    strength: float = 50.0
    """scope=prior: see there."""
    annotators: int = 1
    """Matrices: 1 for all labels, or one for each annotator of a sample."""
    start: float = 0.3
    """T starts with 1 - start on the diagonal, in (0, 1); a dominant diagonal says which class is which."""
    smoothing: float = 1.0
    """form=closed: how many counts per class the T before is worth; a class that no noisy label can be of keeps its
    row. 0: none, so EM's own M step, in which such a class gets an even row."""
    decay: float = 0.8
    """form=closed: what remains of the counts of earlier rounds, in [0, 1), as a cohort is a part of the federation. 0:
    T is of the last round's clients alone."""
    warmup_rounds: int = 3
    """Rounds that clients train with T as it starts, lest it take on the errors of the untrained model."""
    lr: float = 0.1
    """form=gradient: learning rate of T's logits."""

    def __post_init__(self) -> None:
        for key, allowed in {"form": FORMS, "scope": SCOPES}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"`method.noise.{key}` (={getattr(self, key)}) must be one of {', '.join(allowed)}.")
        if self.scope == "prior" and self.form != "closed":
            raise ValueError(
                f"`method.noise.scope` (=prior) adds up counts, which `method.noise.form` (={self.form}) does not "
                "have: take method.noise.form=closed."
            )
        if not 0 <= self.smoothing < float("inf"):
            raise ValueError(f"`method.noise.smoothing` (={self.smoothing}) must be a finite number of at least 0.")
        for key in ("strength", "lr"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"`method.noise.{key}` (={getattr(self, key)}) must be a finite number above 0.")
        if not 0 < self.start < 1:
            raise ValueError(f"`method.noise.start` (={self.start}) must lie in (0, 1).")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`method.noise.decay` (={self.decay}) must lie in [0, 1).")
        if not 1 <= self.annotators <= MAX_ANNOTATORS:
            raise ValueError(f"`method.noise.annotators` (={self.annotators}) must lie in [1, {MAX_ANNOTATORS}].")
        if self.warmup_rounds < 0:
            raise ValueError(f"`method.noise.warmup_rounds` (={self.warmup_rounds}) must be at least 0.")

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


def complement(logits: Tensor, candidates: Tensor) -> Tensor:
    """Returns -sum over y outside S of log(1 - p(y)), (n,): Wu et al., "Revisiting Consistency Regularization for Deep
    Partial Label Learning", ICML 2022.

    Args:
        logits: (n, classes), with gradient.
        candidates: S (n, classes) bool.
    """
    return -_log_one_minus(logits.softmax(-1), ~candidates)


def _log_one_minus(probs: Tensor, where: Tensor) -> Tensor:
    values = (1.0000001 - probs).clamp_min(1e-7).log()  # sums of rounded probabilities exceed 1
    return torch.where(where, values, torch.zeros_like(values)).sum(-1)


def balance(logits: Tensor) -> Tensor:
    """Returns -(1/K) sum_y log p_y of the batch mean p of the predictions, (); smallest, log K, where p is uniform.

    Args:
        logits: (n, classes), with gradient; 0 for an empty batch.
    """
    if len(logits) == 0:
        return logits.sum()
    return -logits.softmax(-1).mean(0).clamp_min(1e-6).log().mean()


def aligned(probs: Tensor, class_mean: Tensor | None, top_k: int | None) -> Tensor:
    """Returns the target for unlabelled samples: p / class_mean, cut to the `top_k` largest classes; rows sum to 1.

    Args:
        probs: (n, classes).
        class_mean: (classes,) what the model predicts on average; None: not aligned.
        top_k: None: not cut.
    """
    if class_mean is not None:
        probs = probs / class_mean.clamp_min(SMALLEST)
    if top_k is not None and top_k < probs.shape[-1]:
        kept = probs.topk(top_k, -1)
        probs = torch.zeros_like(probs).scatter(-1, kept.indices, kept.values)
    return probs / probs.sum(-1, keepdim=True)


def soft_cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Returns -sum_y target_y log p_y, (n,), from two (n, classes)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def observed(belief: Tensor, candidates: Tensor, imprecise: Tensor) -> tuple[PseudoLabels, dict[str, Tensor]]:
    """Returns what is reported of the posterior of a batch: every sample's class, and how much was learnt.

    Args:
        belief: q (n, classes).
        candidates: (n, classes) bool, as given.
        imprecise: (n,) bool, which samples the means are over.
    """
    confidence, label = belief.max(-1)
    pseudo = PseudoLabels(label, torch.ones_like(imprecise), torch.zeros_like(imprecise), confidence)
    entropy = -torch.special.xlogy(belief, belief).sum(-1)
    metrics = {
        "posterior/entropy": mean_metric(entropy, imprecise),
        "posterior/candidates": mean_metric(candidates.sum(-1).to(belief.dtype), imprecise),
        "posterior/effective_classes": mean_metric(entropy.exp(), imprecise),
    }
    return pseudo, {**metrics, **pseudo_metrics(pseudo)}


@dataclass(frozen=True)
class ILL(Method):
    """Hyper-parameters of ILL."""

    name: str = "ill"
    lambda_u: float = 1.0
    """Weight of the loss of samples of which nothing is known."""
    forward_weight: float = 1.0
    """Weight of -log sum_y p(y | weak view) T[y, label] for noisy labels, beside CE(q, strong view)."""
    noise: NoiseMatrix = field(default_factory=NoiseMatrix)
    """The noise matrix."""
    label_view: str = "weak"
    """Where the label is certain. weak: CE on the weak view (the paper's semi-supervised form). strong: it is a set of
    one class and learnt as the other sets are (the paper's partial labels, where sets may have one class)."""
    set_likelihood: SetLikelihood = field(default_factory=SetLikelihood)
    """What a candidate set that may miss the truth says."""
    view_mean: bool = False
    """Released code, partial labels: CE(q, view) in the mean over the weak and two strong views."""
    complement_weight: float = 0.0
    """Released code, partial labels: weight of `complement` (1 there)."""
    balance_weight: float = 0.0
    """Released code: weight of `balance` on the weak views (.1 there)."""
    reweighted: bool = False
    """Released code, noisy labels: CE(q, p T[:, label] normalised) in place of CE(q, p) on the strong view."""
    alignment: bool = False
    """Released code, unlabelled samples: q ~ p / (moving average of p)."""
    alignment_ema: float = 0.999
    """Share of the old value in that average, per step; it is the federation's."""
    top_k: int | None = None
    """Released code, unlabelled samples: q keeps that many classes (3 there)."""

    description: ClassVar[str] = "one EM over partial, noisy, missing and mixed labels (Chen et al., 2024)"

    def __post_init__(self) -> None:
        for key in ("lambda_u", "forward_weight", "complement_weight", "balance_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"`method.{key}` (={getattr(self, key)}) must be a finite number of at least 0.")
        if self.label_view not in ("weak", "strong"):
            raise ValueError(f"`method.label_view` (={self.label_view}) must be one of weak, strong.")
        if not 0 <= self.alignment_ema < 1:
            raise ValueError(f"`method.alignment_ema` (={self.alignment_ema}) must lie in [0, 1).")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`method.top_k` (={self.top_k}) must be at least 1 (or null).")

    @property
    def reads_annotations(self) -> bool:
        return True

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        counts = self.noise.form == "closed"
        learn = self.noise.form == "gradient" and round_number > self.noise.warmup_rounds
        strong = ("strong", "strong2") if self.view_mean else ("strong",)
        return (
            Phase(
                "train",
                partial(self.loss, learn=learn),
                labeled=("weak", *strong),
                unlabeled=("weak", "strong"),
                teachers=("global",) if counts else (),
                prepare=partial(self.prepare, round_number=round_number) if counts else None,
                informed=True,
            ),
        )

    # ------------------------------------------------------------------------------------------------------- one batch

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, learn: bool = False) -> Step:
        """Returns the loss of a batch; learn: whether T's logits take a step, too (form=gradient)."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        matrices = self._matrices(batch.memory)
        certain, noise = self._information(labeled, matrices)
        with torch.set_grad_enabled(self.balance_weight > 0):
            weak_u = student(unlabeled.views["weak"])
        views = [view for view in ("weak", "strong", "strong2") if view in labeled.views]
        stacked = torch.cat([*(labeled.views[view] for view in views), unlabeled.views["strong"]])
        n = len(labeled.candidates)
        weak, *strong, strong_u = student(stacked).split([*[n] * len(views), len(unlabeled.candidates)])

        q = unchecked_posterior(weak.detach(), certain + noise)
        class_mean, memory = self._moved_average(weak_u.detach().softmax(-1), batch.memory)
        q_u = aligned(weak_u.detach().softmax(-1), class_mean, self.top_k)
        if learn:
            memory = self._learnt(memory, labeled, q, matrices)

        certainly = (labeled.candidates.sum(-1) == 1) & ~labeled.noisy
        is_label = certainly & (self.label_view == "weak")
        has_noise = self._has_noise(labeled) & ~certainly
        in_set = ~is_label & ~labeled.candidates.all(-1) & ((labeled.candidates.sum(-1) > 1) | certainly)
        zero = torch.zeros_like(is_label, dtype=weak.dtype)
        supervised = torch.where(is_label, marginal_nll(weak, certain), zero)
        em = torch.where(is_label, zero, self._em(q, weak, strong, noise, has_noise))
        forward = torch.where(has_noise, marginal_nll(weak, certain + noise), zero)
        terms = supervised + em + self.forward_weight * forward
        if self.complement_weight > 0:
            said = torch.where(labeled.noisy[:, None], weak.softmax(-1) @ matrices[0], weak.softmax(-1))
            outside = -_log_one_minus(said, ~labeled.candidates)
            terms = terms + self.complement_weight * torch.where(in_set, outside, zero)
        unsupervised = soft_cross_entropy(q_u, strong_u)
        # Where fewer samples are unknown than known, each weighs as much as a known one.
        share = torch.where(labeled.size > 0, (unlabeled.size / labeled.size.clamp_min(1)).clamp_max(1), 1.0)
        loss = batch_mean(terms) + self.lambda_u * share * batch_mean(unsupervised)
        if self.balance_weight > 0:
            loss = loss + self.balance_weight * balance(torch.cat([weak, weak_u]))

        losses = {
            "train/loss": torch.stack([loss, torch.ones_like(loss)]).detach(),
            "train/loss_supervised": mean_metric(supervised, is_label),
            "train/loss_em": mean_metric(em, ~is_label),
            "train/loss_forward": mean_metric(forward, has_noise),
            "train/loss_unsupervised": mean_metric(unsupervised, torch.ones_like(unlabeled.noisy)),
        }
        pseudo, metrics = observed(
            torch.cat([q, q_u]),
            torch.cat([labeled.candidates, unlabeled.candidates]),
            torch.cat([~certainly, torch.ones_like(unlabeled.noisy)]),
        )
        if self.noise.scope != "global" and self.noise.form != "fixed":
            dominant = matrices.argmax(-1) == torch.arange(matrices.shape[-1], device=matrices.device)
            metrics["transition/own_dominant"] = mean_metric(dominant.to(weak.dtype), torch.ones_like(dominant))
        used = len(terms) + (len(unsupervised) if self.lambda_u > 0 else 0)
        examples = torch.full((), float(used), device=weak.device)
        return Step(loss, {**losses, **metrics}, examples, pseudo, memory)

    def _em(self, q: Tensor, weak: Tensor, strong: Sequence[Tensor], noise: Tensor, has_noise: Tensor) -> Tensor:
        """Returns CE(q, strong view) of each sample, (n,), or one of the released code's variants."""
        first = strong[0] + noise if self.reweighted else strong[0]
        value = soft_cross_entropy(q, first)
        if self.view_mean:
            views = torch.stack([soft_cross_entropy(q, view) for view in (weak, *strong)])
            value = torch.where(has_noise, value, views.mean(0))
        return value

    # ------------------------------------------------------------------------------------- information and the matrix

    def _information(self, part: Part | Supervision, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-likelihoods of what is certain (0 or -inf) and of what is noisy (finite), (n, classes)."""
        shown = torch.where(part.noisy[:, None], torch.ones_like(part.candidates), part.candidates)
        hidden = torch.where(part.noisy[:, None], part.candidates, torch.ones_like(part.candidates))
        noise = log_likelihood(hidden, part.noisy, part.annotations, matrices, self.set_likelihood)
        return candidates_log_likelihood(shown), noise

    @staticmethod
    def _has_noise(part: Part | Supervision) -> Tensor:
        """Returns (n,) bool, whether something noisy is known of a sample."""
        return part.noisy | (part.annotations >= 0).any(-1)

    def _matrices(self, memory: State) -> Tensor:
        """Returns the matrices in use, (matrices, classes, classes)."""
        if self.noise.form == "gradient":
            return memory["own_logits" if self.noise.scope == "client" else "logits"].softmax(-1)
        return memory.get("own_transition", memory["transition"])

    def _counts(self, part: Part | Supervision, q: Tensor, matrices: Tensor) -> Tensor:
        """Returns the expected counts of samples with posterior q (n, classes), (matrices, classes, classes)."""
        several = len(matrices) > 1
        first = expected_set_counts(q, part.candidates, part.noisy, matrices[0], self.set_likelihood)
        counts = [first, *(torch.zeros_like(first) for _ in range(len(matrices) - 1))]
        for annotator, labels in enumerate(part.annotations.unbind(-1)):
            place = annotator if several else 0
            counts[place] = counts[place] + expected_counts(q, labels)
        return torch.stack(counts)

    def _learnt(self, memory: State, part: Part, q: Tensor, matrices: Tensor) -> State:
        """Returns the memory after one gradient step of T's logits."""
        name = "own_logits" if self.noise.scope == "client" else "logits"
        samples = self._has_noise(part).sum()
        logits = gradient_step(memory[name], self._counts(part, q, matrices), samples, self.noise.lr)
        return {**memory, name: logits, "noisy_samples": memory["noisy_samples"] + samples}

    def _moved_average(self, probs: Tensor, memory: State) -> tuple[Tensor | None, State]:
        """Returns the average prediction with this batch in it, (classes,) or None, and the memory with it."""
        if not self.alignment:
            return None, memory
        if len(probs) == 0:
            return memory["class_mean"], memory
        moved = self.alignment_ema * memory["class_mean"] + (1 - self.alignment_ema) * probs.mean(0)
        return moved, {**memory, "class_mean": moved, "aligned": torch.ones_like(memory["aligned"])}

    def prepare(self, survey: Survey, round_number: int) -> Prepared:
        """The E step over a client's whole data with the received model: expected counts, and its own T."""
        memory, known = dict(survey.memory), survey.supervision
        matrices = self._matrices(memory)
        counts = torch.zeros_like(matrices)
        if bool(self._has_noise(known).any()):
            certain, noise = self._information(known, matrices)
            q = posterior(survey.predict("global", "clean"), certain + noise)
            counts = self._counts(known, q, matrices)
        memory["expected_counts"] = counts
        if self.noise.scope != "global" and round_number > self.noise.warmup_rounds:
            prior = self.noise.smoothing * matrices
            if self.noise.scope == "prior":
                prior = self.noise.strength * memory["transition"]
            memory["own_transition"] = from_counts(counts, prior)
        return Prepared({}, memory=memory)

    # --------------------------------------------------------------------------------------- what is kept and summed up

    def initial_memory(self, candidates: Tensor) -> State:
        start = self.noise.initial(candidates.shape[-1]).to(candidates.device)
        zero = torch.zeros((), device=candidates.device)
        memory = {"aligned": zero} if self.alignment else {}
        if self.noise.form == "gradient":
            memory |= {"noisy_samples": zero}
            return {**memory, "own_logits": start.log()} if self.noise.scope == "client" else memory
        return {**memory, "expected_counts": torch.zeros_like(start)}

    def keep(self, memory: State, results: Sequence[PhaseResult]) -> State:
        return {name: value for name, value in memory.items() if name in ("own_transition", "own_logits")}

    def kept_like(self, memory: State, global_state: StateDict) -> State:
        return {**memory, "own_transition": memory["transition"]} if "transition" in memory else memory

    def initial_shared(self, num_classes: int) -> State:
        start = self.noise.initial(num_classes)
        shared = {"class_mean": torch.full((num_classes,), 1 / num_classes)} if self.alignment else {}
        if self.noise.form == "gradient":
            return shared if self.noise.scope == "client" else {**shared, "logits": start.log()}
        if self.noise.form == "fixed" or self.noise.scope == "client":
            return {**shared, "transition": start}
        return {**shared, "transition": start, "counts": torch.zeros_like(start), "rounds": torch.zeros(())}

    def told(self, shared: State) -> State:
        return {name: value for name, value in shared.items() if name not in ("counts", "rounds")}

    def statistics(self, memory: State) -> State:
        total: State = {}
        if self.alignment:
            total |= {"class_mean": memory["class_mean"] * memory["aligned"], "aligned": memory["aligned"]}
        if self.noise.scope == "client" or self.noise.form == "fixed":
            return total
        if self.noise.form == "gradient":
            samples = memory["noisy_samples"]
            return {**total, "logits": memory["logits"] * samples, "noisy_samples": samples}
        return {**total, "counts": memory["expected_counts"]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        if self.alignment:
            check_flags("aligned", statistics["aligned"])
            check_shares("class_mean", statistics["class_mean"], statistics["aligned"])
        # A label counts 1, a noisy set 1 or each of its candidates.
        classes = next((value.shape[-1] for name, value in statistics.items() if name in ("counts", "logits")), 0)
        of_set = classes if self.set_likelihood.kind == "product" else 1
        of_sample = max(of_set, limits.annotators)
        if "counts" in statistics:
            check_counts("counts", statistics["counts"], limits.samples * of_sample)
        if "logits" in statistics:
            samples = statistics["noisy_samples"]
            check_counts("noisy_samples", samples, limits.examples)
            start = shared["logits"].to(samples)
            # A step moves a logit by lr * |row sum of N * T - N| / samples, see `gradient_step`.
            most = limits.steps * self.noise.lr * of_sample + SLACK * (1 + start.abs().max())
            if (statistics["logits"] - samples * start).abs().max() > samples * most:
                raise ValueError("its statistic logits is further from what was sent than its steps can have gone")

    def check_shared(self, shared: State) -> None:
        for name in ("transition", "class_mean"):
            if name in shared:
                check_shares(name, shared[name], torch.ones(()))

    def server_step(self, shared: State, total: State) -> State:
        """Returns the next T: from the summed counts (form=closed), or the mean of the clients' logits by the noisy
        labels that they were trained on.
        """
        shared = dict(shared)
        if self.alignment and total and total["aligned"] > 0:
            shared["class_mean"] = total["class_mean"] / total["aligned"]
        if self.noise.form == "gradient" and "logits" in total and total["noisy_samples"] > 0:
            shared["logits"] = total["logits"] / total["noisy_samples"]
        if "counts" in total:
            shared["rounds"] = shared["rounds"] + 1
            if shared["rounds"] >= self.noise.warmup_rounds:
                shared["counts"] = self.noise.decay * shared["counts"] + total["counts"]
                shared["transition"] = from_counts(shared["counts"], self.noise.smoothing * shared["transition"])
        return shared

    def check(self, known: Supervision) -> None:
        if not bool(known.informed.any()):
            there = {
                "bags of known counts (method.name=llp_bp learns from them)": len(known.bag_counts) > 0,
                "votes of labelling functions (method.name=dp_ssl method.functions=written)": known.votes.shape[1] > 0,
            }
            found = " and ".join(what for what, some in there.items() if some)
            raise ValueError(
                f"`method.name` (={self.name}) learns from what is known of single samples, and nothing is"
                + (f": there are only {found}." if found else ". Take supervision.kind=few_labels, or another kind.")
            )
        annotators = known.annotations.shape[1]
        if self.noise.annotators not in (1, annotators):
            raise ValueError(
                f"`method.noise.annotators` (={self.noise.annotators}) must be 1, one matrix for all, or as many as "
                f"the data have: {annotators}."
            )

    def noise_matrix(self, shared: State) -> Tensor | None:
        if self.noise.scope == "client":
            return None
        return shared["logits"].softmax(-1) if self.noise.form == "gradient" else shared["transition"]
