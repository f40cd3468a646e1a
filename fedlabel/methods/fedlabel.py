"""FedLabel: each client selects the local or the global model as the expert for every unlabelled sample.

Source: Cho, Joshi, Dimitriadis, "Local or Global: Selective Knowledge Assimilation for Federated Learning with Limited
Labels", ICCV 2023 (arXiv 2307.08809v1). Setting: every client holds a few labelled and many unlabelled samples; the
server holds no data. Equation numbers below are the paper's.

One round of client k, from the received weights w:
  A. tau steps of cross-entropy on labels from w                                       -> w_L, dL = w_L - w   (1)-(2)
  B. tau' steps on unlabelled samples from w again, with w and w_L as frozen teachers  -> w_U, dU = w_U - w   (3)-(10)
  The client sends w + dL + dU, weighted by the number of samples it used.                               (Algorithm 1)

What differs, and why:
- KL(teacher || student) is the default direction (the paper writes KL(student || teacher)): it is what the released
  code computes and the usual distillation term; `kl_direction` has both.
- The mean runs over the kept samples (the released code) and not over the batch: the step does not shrink when few
  samples pass; `normalization` has both.
- One student pass takes both views, so with BatchNorm they (and dropped samples) share batch statistics.
- `merge=mean`, `burn_in_rounds`, `prox_mu`, `kl_target=local`, `normalization=each` and `teacher_view=weak` are the
  released code's, off by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of
from fedlabel.methods.batch import Batch, Model, PseudoLabels, StateDict, Step
from fedlabel.methods.losses import labels_loss, mean_metric
from fedlabel.methods.recipe import BySample, LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.uploads import ModelPart, PhaseResult, Upload, sum_of_updates

SCORES = ("variance", "entropy")


class Selection(NamedTuple):
    """The expert's result for each sample; all (n,), all detached."""

    pseudo_label: Tensor
    """int64, argmax of the selected model's probabilities."""
    keep: Tensor
    """bool, the selected model's largest probability exceeds the threshold (strictly).    (4)"""
    from_global: Tensor
    """bool, the global model was selected.                                                 (3)"""
    agree: Tensor
    """bool, the discarded model predicts the same class."""
    weight: Tensor
    """float in [0, lambda_0], lambda_0 * h(discarded) / h(selected).                       (7)"""


def confidence(probs: Tensor, score: str = "variance") -> Tensor:
    """Returns the confidence of each probability vector, h(s).

    Args:
        probs: (n, classes), rows are probabilities (softmax outputs, never logits).
        score: "variance" (unbiased, over the classes; 0 for uniform, 1/classes for one-hot) or "entropy", 1/(H + 1e-5).

    Returns:
        (n,) float.

    Raises:
        ValueError: `score` is neither.
    """
    if score == "variance":
        # As torch.var, which warns about an empty batch.
        return (probs - probs.mean(-1, keepdim=True)).square().sum(-1) / (probs.shape[-1] - 1)
    if score == "entropy":
        return 1 / (torch.special.entr(probs).sum(-1) + 1e-5)
    raise ValueError(f"`score` (={score}) must be one of {', '.join(SCORES)}.")


def select(
    global_probs: Tensor,
    local_probs: Tensor,
    confidence_threshold: float,
    lambda_0: float,
    score: str = "variance",
) -> Selection:
    """Chooses the more confident of two models per sample; a tie goes to the global model.

    Args:
        global_probs: (n, classes) probabilities of the global model.
        local_probs: (n, classes) probabilities of the local model.
        confidence_threshold: beta in [0, 1]; kept only above it.
        lambda_0: the largest weight of the consistency term.
        score: see `confidence`.

    Returns:
        A `Selection`, detached. Two uniform vectors (h = 0 for both) count as equally sure: weight lambda_0.
    """
    global_probs, local_probs = global_probs.detach(), local_probs.detach()
    global_score, local_score = confidence(global_probs, score), confidence(local_probs, score)
    from_global = global_score >= local_score
    selected = torch.where(from_global[:, None], global_probs, local_probs)
    largest, pseudo_label = selected.max(-1)
    discarded_label = torch.where(from_global, local_probs.argmax(-1), global_probs.argmax(-1))
    high = torch.maximum(global_score, local_score)
    low = torch.minimum(global_score, local_score)
    ratio = torch.where(high > 0, low / torch.where(high > 0, high, torch.ones_like(high)), torch.ones_like(high))
    return Selection(
        pseudo_label=pseudo_label,
        keep=largest > confidence_threshold,
        from_global=from_global,
        agree=discarded_label == pseudo_label,
        weight=lambda_0 * ratio,
    )


def kl_divergence(target_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """Returns KL(target || other) per row, (n,), from two (n, classes) tensors of log-probabilities."""
    difference = target_log_probs.exp() * (target_log_probs - log_probs)
    return torch.where(target_log_probs.isneginf(), torch.zeros_like(difference), difference).sum(-1)


def send_both(
    global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
) -> dict[str, ModelPart]:
    """Sends w_L with uniform weights and w_U weighted by kept samples, or 1 if there are none (released code). A phase
    that did not run keeps the received weights.
    """
    by_name = {result.name: result for result in results}
    supervised, unlabeled = by_name.get("supervised"), by_name.get("unlabeled")
    return {
        "supervised": ModelPart(supervised.state if supervised else dict(global_state), 1.0),
        "unlabeled": ModelPart(
            unlabeled.state if unlabeled else dict(global_state),
            unlabeled.examples if unlabeled and unlabeled.examples else 1.0,
        ),
    }


@dataclass(frozen=True)
class FedLabel(Method):
    """Hyper-parameters of FedLabel; the defaults are the paper's algorithm."""

    name: str = "fedlabel"
    confidence_threshold: float = 0.4
    """beta: a pseudo-label is used only if the expert's largest probability exceeds it (paper: best in 0.3-0.5)."""
    lambda_0: float = 1.0
    """Largest weight of the consistency term (paper: 0 to 2 tried on CIFAR)."""
    unlabeled_steps: int | None = None
    """tau': local steps of phase B; null: from `training.local_steps` / `training.local_epochs`."""
    teacher: str = "both"
    """both | local | global: the paper's single-teacher ablations use one model as both experts."""
    score: str = "variance"
    """variance | entropy: the confidence score h."""
    merge: str = "sum"
    """sum: one upload of w + dL + dU. mean: the released code, two uploads; the new global model is half the plain
    mean of w_L and half the mean of w_U weighted by kept samples. Needs strategy.name=weighted_mean."""
    kl_target: str = "discarded"
    """discarded | local: the target model of the consistency term (the released code: always the local one)."""
    kl_direction: str = "teacher_student"
    """teacher_student: KL(teacher || student); student_teacher: KL(student || teacher), as the paper writes it."""
    normalization: str = "kept"
    """kept: both terms averaged over kept samples; batch: over the batch; each: cross-entropy over kept and KL over
    agreeing samples, as in the released code."""
    burn_in_rounds: int = 0
    """Rounds at the start without phase B (the released code: 50 of 2000)."""
    prox_mu: float = 0.0
    """Phase B adds mu * sum over tensors of mean((p - p_global)^2), the released code's term (10 there)."""
    teacher_view: str = "clean"
    """clean | weak: the view of the teachers, and of the student in the consistency term."""

    description: ClassVar[str] = "local or global model as expert per unlabelled sample (Cho et al., ICCV 2023)"

    def __post_init__(self) -> None:
        in_unit_interval(self, "method", "confidence_threshold")
        finite(self, "method", "lambda_0", "prox_mu")
        at_least(self, "method", 0, "burn_in_rounds")
        at_least(self, "method", 0, "unlabeled_steps", null=True)
        one_of(
            self,
            "method",
            teacher=("both", "local", "global"),
            score=SCORES,
            merge=("sum", "mean"),
            kl_target=("discarded", "local"),
            kl_direction=("teacher_student", "student_teacher"),
            normalization=("kept", "batch", "each"),
            teacher_view=("clean", "weak"),
        )

    def recipe(self, task: Task) -> Recipe:
        supervised = Phase("supervised", labels_loss)  # phase A, equations (1)-(2)
        unlabeled = Phase(
            "unlabeled",
            self.loss,
            draw=BySample(labeled=(), unlabeled=(self.teacher_view, "strong")),
            teachers=("global", "supervised"),
            steps=self.unlabeled_steps,
            proximal=self._proximal if self.prox_mu > 0 else None,
        )
        return Recipe(
            stages=(
                Stage((supervised,), rounds=self.burn_in_rounds, name="burn-in"),
                Stage((supervised, unlabeled), name="pseudo-labels"),
            ),
            uses=LabelKinds.SINGLE,
            upload=Upload(send_both) if self.merge == "mean" else sum_of_updates,
        )

    def _proximal(self, parameter: Tensor) -> float:
        return 2 * self.prox_mu / parameter.numel()

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns phase B's loss, (5)-(8): cross-entropy to the expert (strong view), KL to the other (plain view)."""
        plain, strong = batch.unlabeled.views[self.teacher_view], batch.unlabeled.views["strong"]
        global_log_probs = teachers["global"](plain).detach().log_softmax(-1)
        local_log_probs = teachers["supervised"](plain).detach().log_softmax(-1)
        if self.teacher == "local":
            global_log_probs = local_log_probs
        elif self.teacher == "global":
            local_log_probs = global_log_probs
        chosen = select(
            global_log_probs.exp(), local_log_probs.exp(), self.confidence_threshold, self.lambda_0, self.score
        )
        if self.teacher == "local":  # select() calls a tie global
            chosen = chosen._replace(from_global=torch.zeros_like(chosen.from_global))

        student_logits = student(torch.cat([strong, plain]))
        strong_log_probs, plain_log_probs = student_logits.log_softmax(-1).tensor_split(2)
        # (5) hard pseudo-label, strong view.
        cross_entropy = -strong_log_probs.gather(-1, chosen.pseudo_label[:, None]).squeeze(-1)
        # (6)-(7) pull to the discarded model where both agree.
        target = torch.where(chosen.from_global[:, None], local_log_probs, global_log_probs)
        if self.kl_target == "local":
            target = local_log_probs
        if self.kl_direction == "teacher_student":
            consistency = kl_divergence(target, plain_log_probs)
        else:
            consistency = kl_divergence(plain_log_probs, target)

        zero = torch.zeros_like(cross_entropy)
        pulled = chosen.keep & chosen.agree
        cross_entropy = torch.where(chosen.keep, cross_entropy, zero)
        consistency = torch.where(pulled, chosen.weight * consistency, zero)
        kept = chosen.keep.sum()
        if self.normalization == "batch":
            cross_entropy_count = consistency_count = torch.full_like(kept, max(len(strong), 1))
        else:
            cross_entropy_count = kept.clamp_min(1)
            consistency_count = pulled.sum().clamp_min(1) if self.normalization == "each" else cross_entropy_count
        loss = cross_entropy.sum() / cross_entropy_count + consistency.sum() / consistency_count

        everyone = torch.ones_like(chosen.keep)
        dtype = cross_entropy.dtype
        metrics = {
            "train/loss": mean_metric(cross_entropy + consistency, chosen.keep),
            "train/loss_unsupervised": mean_metric(cross_entropy, chosen.keep),
            "train/loss_consistency": mean_metric(consistency, chosen.keep),
            "pseudo/coverage": mean_metric(chosen.keep.to(dtype), everyone),
            "pseudo/from_global": mean_metric(chosen.from_global.to(dtype), everyone),
            "pseudo/agreement": mean_metric(chosen.agree.to(dtype), everyone),
        }
        expert = torch.where(chosen.from_global[:, None], global_log_probs, local_log_probs).exp()
        pseudo = PseudoLabels(chosen.pseudo_label, chosen.keep, chosen.from_global, expert.max(-1).values)
        return Step(loss, metrics, kept, pseudo)
