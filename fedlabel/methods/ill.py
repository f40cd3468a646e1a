"""ILL: one EM for labels that are missing, partial, noisy, or several of these at once.

Source: Chen et al., "Imprecise Label Learning: A Unified Framework for Learning with Various Imprecise Label
Configurations", NeurIPS 2024 (arXiv 2305.12715). Setting: any kind of label, all of them in one `Supervision`.

E step, per batch, on the weak view: q(y) ~ p(y | x) p(information | y), see `inference/imprecise.py`. M step: CE(q,
strong view); CE on the weak view where the label is certain (or on the strong one: `label_view`); the
forward-corrected likelihood of noisy labels on the weak view. The noise matrix T is learnt, too.

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
- Unlabelled samples weigh no more than the others where they are fewer: EM's objective is a sum over samples, and a
  candidate set that came out as all classes would else be drawn in every step.
- Noisy sets go by the sum rule, not the released code's product: with the product, T is a distribution over all the
  candidates drawn, flattens, and EM can end where nothing is learnt (see docs/decisions/0005).
- Noise that depends on the sample is modelled by the same T per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of
from fedlabel.data.labels.supervision import Supervision
from fedlabel.inference.imprecise import (
    SMALLEST,
    SetLikelihood,
    candidates_log_likelihood,
    log_likelihood,
    marginal_nll,
    posterior,
    unchecked_posterior,
)
from fedlabel.inference.transition import expected_label_counts
from fedlabel.methods.batch import Batch, Model, Part, Prepared, PseudoLabels, State, Step, Survey
from fedlabel.methods.federated_transition import NoiseMatrix
from fedlabel.methods.losses import batch_mean, mean_metric, pseudo_metrics
from fedlabel.methods.recipe import ByKnowledge, LabelKinds, Memory, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.shared import Limits, Shared, check_flags, check_shares, together


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
    """Returns every sample's class by the posterior of a batch, and metrics of how much was learned.

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


def has_noise(part: Part | Supervision) -> Tensor:
    """Returns (n,) bool, whether a sample has a noisy label, a noisy set or an annotation."""
    return part.noisy | (part.annotations >= 0).any(-1)


class ClassMean(Shared):
    """The average prediction for unlabelled samples: the mean over the clients that trained on some."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def start(self) -> State:
        return {"class_mean": torch.full((self._num_classes,), 1 / self._num_classes)}

    def statistics(self, memory: State) -> State:
        return {"class_mean": memory["class_mean"] * memory["aligned"], "aligned": memory["aligned"]}

    def update(self, shared: State, total: State) -> State:
        if not total or not total["aligned"] > 0:
            return shared
        return {**shared, "class_mean": total["class_mean"] / total["aligned"]}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        check_flags("aligned", statistics["aligned"])
        check_shares("class_mean", statistics["class_mean"], statistics["aligned"])

    def check(self, shared: State) -> None:
        check_shares("class_mean", shared["class_mean"], torch.ones(()))


@dataclass(frozen=True)
class ILL(Method):
    """Hyper-parameters of ILL."""

    name: str = "ill"
    lambda_u: float = 1.0
    """Weight of the loss of unlabelled samples: those without supervision of their own."""
    forward_weight: float = 1.0
    """Weight of -log sum_y p(y | weak view) T[y, label] for noisy labels, on top of CE(q, strong view)."""
    noise: NoiseMatrix = field(default_factory=NoiseMatrix)
    """The noise matrix."""
    label_view: str = "weak"
    """Treatment of certain labels. weak: CE on the weak view (the paper's semi-supervised form). strong: a certain
    label is a set of one class and learned as the other sets are (the paper's partial labels, where sets may have one
    class)."""
    set_likelihood: SetLikelihood = field(default_factory=SetLikelihood)
    """Likelihood of a candidate set that may miss the true class."""
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
    """Decay of that average per step; it is shared by the federation."""
    top_k: int | None = None
    """Released code, unlabelled samples: q keeps this number of classes (3 there)."""

    description: ClassVar[str] = "one EM over partial, noisy, missing and mixed labels (Chen et al., 2024)"

    def __post_init__(self) -> None:
        finite(self, "method", "lambda_u", "forward_weight", "complement_weight", "balance_weight")
        in_unit_interval(self, "method", "alignment_ema", below_one=True)
        at_least(self, "method", 1, "top_k", null=True)
        one_of(self, "method", label_view=("weak", "strong"))

    def recipe(self, task: Task) -> Recipe:
        if self.noise.annotators not in (1, task.labels.annotators):
            raise ValueError(
                f"`method.noise.annotators` (={self.noise.annotators}) must be 1, one matrix for all, or as many as "
                f"the data have: {task.labels.annotators}."
            )
        labels_of_set = task.num_classes if self.set_likelihood.kind == "product" else 1
        matrix = self.noise.shared(task.num_classes, labels_of_set, task.labels.label_epsilon)
        kinds = LabelKinds
        return Recipe(
            stages=(
                Stage((self._phase(learn=False),), rounds=self.noise.warmup_rounds, name="warm-up"),
                Stage((self._phase(learn=True),), name="learning"),
            ),
            uses=kinds.TRUE | kinds.NOISY | kinds.SETS | kinds.ANNOTATIONS | kinds.AT_SERVER,
            memory=Memory(self._first_memory, self.noise.keep, like=self.noise.like),
            shared=together(ClassMean(task.num_classes), matrix) if self.alignment else matrix,
            inspect=self.noise.inspect,
        )

    def _phase(self, learn: bool) -> Phase:
        closed = self.noise.form == "closed"
        strong = ("strong", "strong2") if self.view_mean else ("strong",)
        return Phase(
            "train",
            partial(self.loss, learn=learn and self.noise.form == "gradient"),
            draw=ByKnowledge(labeled=("weak", *strong), unlabeled=("weak", "strong")),
            teachers=("global",) if closed else (),
            prepare=partial(self.prepare, learn=learn) if closed else None,
        )

    def _first_memory(self, candidates: Tensor) -> State:
        aligned = {"aligned": torch.zeros((), device=candidates.device)} if self.alignment else {}
        return {**aligned, **self.noise.memory(candidates)}

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, learn: bool = False) -> Step:
        """Returns the loss of a batch; learn: whether T's logits take a step, too (form=gradient)."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        matrices = self.noise.matrices(batch.memory)
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
            memory = self.noise.stepped(memory, self._counts(labeled, q, matrices), has_noise(labeled).sum())

        is_certain = (labeled.candidates.sum(-1) == 1) & ~labeled.noisy
        is_label = is_certain & (self.label_view == "weak")
        is_noisy = has_noise(labeled) & ~is_certain
        zero = torch.zeros_like(is_label, dtype=weak.dtype)
        supervised = torch.where(is_label, marginal_nll(weak, certain), zero)
        em = torch.where(is_label, zero, self._em(q, weak, strong, noise, is_noisy))
        forward = torch.where(is_noisy, marginal_nll(weak, certain + noise), zero)
        terms = supervised + em + self.forward_weight * forward
        if self.complement_weight > 0:
            in_set = ~is_label & ~labeled.candidates.all(-1) & ((labeled.candidates.sum(-1) > 1) | is_certain)
            probs = torch.where(labeled.noisy[:, None], weak.softmax(-1) @ matrices[0], weak.softmax(-1))
            outside = -_log_one_minus(probs, ~labeled.candidates)
            terms = terms + self.complement_weight * torch.where(in_set, outside, zero)
        unsupervised = soft_cross_entropy(q_u, strong_u)
        # Where unlabelled samples are fewer than the others, each weighs as much as one of these.
        share = torch.where(labeled.size > 0, (unlabeled.size / labeled.size.clamp_min(1)).clamp_max(1), 1.0)
        loss = batch_mean(terms) + self.lambda_u * share * batch_mean(unsupervised)
        if self.balance_weight > 0:
            loss = loss + self.balance_weight * balance(torch.cat([weak, weak_u]))

        losses = {
            "train/loss": torch.stack([loss, torch.ones_like(loss)]).detach(),
            "train/loss_supervised": mean_metric(supervised, is_label),
            "train/loss_em": mean_metric(em, ~is_label),
            "train/loss_forward": mean_metric(forward, is_noisy),
            "train/loss_unsupervised": mean_metric(unsupervised, torch.ones_like(unlabeled.noisy)),
        }
        pseudo, metrics = observed(
            torch.cat([q, q_u]),
            torch.cat([labeled.candidates, unlabeled.candidates]),
            torch.cat([~is_certain, torch.ones_like(unlabeled.noisy)]),
        )
        if self.noise.own:
            dominant = matrices.argmax(-1) == torch.arange(matrices.shape[-1], device=matrices.device)
            metrics["transition/own_dominant"] = mean_metric(dominant.to(weak.dtype), torch.ones_like(dominant))
        used = len(terms) + (len(unsupervised) if self.lambda_u > 0 else 0)
        examples = torch.full((), float(used), device=weak.device)
        return Step(loss, {**losses, **metrics}, examples, pseudo, memory)

    def _em(self, q: Tensor, weak: Tensor, strong: Sequence[Tensor], noise: Tensor, is_noisy: Tensor) -> Tensor:
        """Returns CE(q, strong view) of each sample, (n,), or one of the released code's variants."""
        first = strong[0] + noise if self.reweighted else strong[0]
        value = soft_cross_entropy(q, first)
        if self.view_mean:
            views = torch.stack([soft_cross_entropy(q, view) for view in (weak, *strong)])
            value = torch.where(is_noisy, value, views.mean(0))
        return value

    def _information(self, part: Part | Supervision, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-likelihoods of certain labels (0 or -inf) and of noisy labels (finite), (n, classes)."""
        shown = torch.where(part.noisy[:, None], torch.ones_like(part.candidates), part.candidates)
        hidden = torch.where(part.noisy[:, None], part.candidates, torch.ones_like(part.candidates))
        noise = log_likelihood(hidden, part.noisy, part.annotations, matrices, self.set_likelihood)
        return candidates_log_likelihood(shown), noise

    def _counts(self, part: Part | Supervision, q: Tensor, matrices: Tensor) -> Tensor:
        """Returns the expected counts of samples with posterior q (n, classes), (matrices, classes, classes)."""
        return expected_label_counts(q, part.candidates, part.noisy, part.annotations, matrices, self.set_likelihood)

    def _moved_average(self, probs: Tensor, memory: State) -> tuple[Tensor | None, State]:
        """Returns the average prediction with this batch in it, (classes,) or None, and the memory with it."""
        if not self.alignment:
            return None, memory
        if len(probs) == 0:
            return memory["class_mean"], memory
        moved = self.alignment_ema * memory["class_mean"] + (1 - self.alignment_ema) * probs.mean(0)
        return moved, {**memory, "class_mean": moved, "aligned": torch.ones_like(memory["aligned"])}

    def prepare(self, survey: Survey, learn: bool) -> Prepared:
        """The E step over a client's whole data with the received model: expected counts; learn: and its own T."""
        supervision = survey.supervision
        matrices = self.noise.matrices(survey.memory)
        counts = torch.zeros_like(matrices)
        if bool(has_noise(supervision).any()):
            certain, noise = self._information(supervision, matrices)
            q = posterior(survey.predict("global", "clean"), certain + noise)
            counts = self._counts(supervision, q, matrices)
        return Prepared({}, memory=self.noise.counted(survey.memory, counts, learn))
