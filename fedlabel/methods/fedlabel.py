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
- `score=calibrated` and `choice=mixture` are ours, off by default. Both need labels that the local model has not seen:
  stage A leaves `held_out` of the client's labelled samples out, in every round the same ones, and before stage B each
  expert gets a temperature, or the mixture its weight, from them (fedlabel/inference/calibration.py). That takes a pass
  of both experts over the client's samples. A client with too few labels to leave one out takes temperature 1 and equal
  weights. Nothing of it is sent.
- `merge=mean`, `burn_in_rounds`, `prox_mu`, `kl_target=local`, `normalization=each` and `teacher_view=weak` are the
  released code's, off by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, within
from fedlabel.inference.calibration import inverse_temperature, mixture_weight
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, State, StateDict, Step, Survey
from fedlabel.methods.losses import labeled_step, labels_loss, mean_metric
from fedlabel.methods.recipe import BySample, LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.uploads import ModelPart, PhaseResult, Upload, sum_of_updates

SCORES = ("variance", "entropy", "calibrated")
ROUNDING = 1e-9
"""Share * samples may fall short of a whole number by rounding."""


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
    confidence: Tensor
    """float, the selected model's largest probability."""


def confidence(probs: Tensor, score: str = "variance") -> Tensor:
    """Returns the confidence of each probability vector, h(s).

    Args:
        probs: (n, classes), rows are probabilities (softmax outputs, never logits).
        score: "variance" (unbiased, over the classes; 0 for uniform, 1/classes for one-hot), "entropy", 1/(H + 1e-5),
            or "calibrated", the largest probability, of probabilities that have been calibrated.

    Returns:
        (n,) float.

    Raises:
        ValueError: `score` is none of these.
    """
    if score == "variance":
        # As torch.var, which warns about an empty batch.
        return (probs - probs.mean(-1, keepdim=True)).square().sum(-1) / (probs.shape[-1] - 1)
    if score == "entropy":
        return 1 / (torch.special.entr(probs).sum(-1) + 1e-5)
    if score == "calibrated":
        return probs.amax(-1)
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
    return Selection(
        pseudo_label=pseudo_label,
        keep=largest > confidence_threshold,
        from_global=from_global,
        agree=discarded_label == pseudo_label,
        weight=lambda_0 * _ratio(global_score, local_score),
        confidence=largest,
    )


def mix(
    global_probs: Tensor,
    local_probs: Tensor,
    global_weight: Tensor,
    confidence_threshold: float,
    lambda_0: float,
    score: str = "variance",
) -> Selection:
    """Takes the mixture of two models for each sample in place of one of them.

    Args:
        global_probs: see `select`, as the others.
        local_probs: likewise.
        global_weight: () in [0, 1], weight of the global model.
        confidence_threshold: likewise, of the mixture's largest probability.
        lambda_0: likewise.
        score: likewise.

    Returns:
        A `Selection`, detached. The model that the pseudo-label more probably comes from counts as the selected one.
    """
    global_part, local_part = global_weight * global_probs.detach(), (1 - global_weight) * local_probs.detach()
    largest, pseudo_label = (global_part + local_part).max(-1)
    place = pseudo_label[:, None]
    from_global = (global_part.gather(-1, place) >= local_part.gather(-1, place)).squeeze(-1)
    discarded_label = torch.where(from_global, local_probs.argmax(-1), global_probs.argmax(-1))
    scores = confidence(global_probs.detach(), score), confidence(local_probs.detach(), score)
    return Selection(
        pseudo_label=pseudo_label,
        keep=largest > confidence_threshold,
        from_global=from_global,
        agree=discarded_label == pseudo_label,
        weight=lambda_0 * _ratio(*scores),
        confidence=largest,
    )


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """Returns the lower score by the higher one, (n,); 1 where both are 0."""
    high, low = torch.maximum(first, second), torch.minimum(first, second)
    return torch.where(high > 0, low / torch.where(high > 0, high, torch.ones_like(high)), torch.ones_like(high))


def held_out_samples(candidates: Tensor, share: float) -> Tensor:
    """Returns (n,) bool, the share of the labelled samples that stage A leaves out, evenly spaced and rounded down.

    Args:
        candidates: (n, classes) bool, of all of a client's samples.
        share: in [0, 1).
    """
    labeled = candidates.sum(-1) == 1
    upto = (labeled.cumsum(0).double() * share + ROUNDING).floor()
    return labeled & (upto.diff(prepend=upto.new_zeros(1)) > 0)


def mark_held_out(survey: Survey, share: float) -> Prepared:
    """Marks the samples that `held_out_loss` leaves out."""
    return Prepared({"held_out": held_out_samples(survey.supervision.candidates, share)})


def held_out_loss(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    """Returns the mean cross-entropy of the labelled samples that are not held out."""
    labeled = batch.labeled
    return labeled_step(student(labeled.views["weak"]), labeled.candidates & ~labeled.targets["held_out"][:, None])


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
    """variance | entropy | calibrated: the confidence score h. calibrated: the largest probability after each expert's
    logits are divided by a temperature from held-out labels; threshold and targets then use these, too."""
    choice: str = "hard"
    """hard | mixture: one expert per sample, or the mixture of both, weighted by how well each explains held-out
    labels."""
    held_out: float = 0.2
    """Share of a client's labelled samples that stage A leaves out, for score=calibrated and choice=mixture only."""
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
            choice=("hard", "mixture"),
            merge=("sum", "mean"),
            kl_target=("discarded", "local"),
            kl_direction=("teacher_student", "student_teacher"),
            normalization=("kept", "batch", "each"),
            teacher_view=("clean", "weak"),
        )
        within(self, "method", 0, 1, "held_out", ends="()")
        if self.choice == "mixture" and self.teacher != "both":
            raise ValueError(
                f"`method.choice` (=mixture) mixes two experts, and `method.teacher` (={self.teacher}) leaves one: "
                "take method.teacher=both, or method.choice=hard."
            )

    def recipe(self, task: Task) -> Recipe:
        supervised = Phase("supervised", labels_loss)  # phase A, equations (1)-(2)
        calibrates = self.score == "calibrated" or self.choice == "mixture"
        if calibrates:
            supervised = Phase("supervised", held_out_loss, prepare=partial(mark_held_out, share=self.held_out))
        unlabeled = Phase(
            "unlabeled",
            self.loss,
            draw=BySample(labeled=(), unlabeled=(self.teacher_view, "strong")),
            teachers=("global", "supervised"),
            steps=self.unlabeled_steps,
            prepare=self.calibrate if calibrates else None,
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

    def calibrate(self, survey: Survey) -> Prepared:
        """Estimates each expert's inverse temperature, and the mixture's weight, from the held-out labels."""
        candidates = survey.supervision.candidates
        held_out = held_out_samples(candidates, self.held_out)
        label = candidates[held_out].int().argmax(-1)
        found: State = {}
        log_likelihood = []
        for expert in ("global", "supervised"):
            logits = survey.predict(expert, self.teacher_view)[held_out].float()
            if self.score == "calibrated":
                found[f"{expert}_sharpness"] = inverse_temperature(logits, label)
                logits = logits * found[f"{expert}_sharpness"]
            log_likelihood.append(logits.log_softmax(-1).gather(-1, label[:, None]).squeeze(-1))
        if self.choice == "mixture":
            found["global_weight"] = mixture_weight(*log_likelihood)
        return Prepared({}, memory={**survey.memory, **found})

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns phase B's loss, (5)-(8): cross-entropy to the expert (strong view), KL to the other (plain view)."""
        plain, strong = batch.unlabeled.views[self.teacher_view], batch.unlabeled.views["strong"]
        global_logits, local_logits = teachers["global"](plain).detach(), teachers["supervised"](plain).detach()
        if self.score == "calibrated":
            global_logits = global_logits * batch.memory["global_sharpness"]
            local_logits = local_logits * batch.memory["supervised_sharpness"]
        global_log_probs, local_log_probs = global_logits.log_softmax(-1), local_logits.log_softmax(-1)
        if self.teacher == "local":
            global_log_probs = local_log_probs
        elif self.teacher == "global":
            local_log_probs = global_log_probs
        probs, rule = (global_log_probs.exp(), local_log_probs.exp()), (self.confidence_threshold, self.lambda_0)
        if self.choice == "mixture":
            chosen = mix(*probs, batch.memory["global_weight"], *rule, self.score)
        else:
            chosen = select(*probs, *rule, self.score)
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
        pseudo = PseudoLabels(chosen.pseudo_label, chosen.keep, chosen.from_global, chosen.confidence)
        return Step(loss, metrics, kept, pseudo)
