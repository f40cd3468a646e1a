"""Selection of pseudo-labels by confidence: one mask for all methods that use a threshold.

Thresholds per class:
- fixed: Sohn et al., "FixMatch", NeurIPS 2020: keep if max p >= tau.
- flexmatch: Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", NeurIPS 2021.
- freematch: Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023.
- cbafed: Li et al., "Class Balanced Adaptive Pseudo Labeling for Federated Semi-Supervised Learning", CVPR 2023.

debias=prior divides by what the model predicts on average: Zhu et al., "FedDB: Estimating before Debiasing", 2023.

What differs here, where data are spread over clients that train now and then:
- flexmatch counts, at the start of a round and with the received model, how many of the client's own samples pass; it
  does not remember predictions of rounds long past.
- freematch's moving averages are the federation's: every client goes on from the server's, the server takes the mean
  over those that trained on unlabelled samples.
- cbafed's class counts are sums over the last cohort's clients. Its second-best class for rare classes, its residual
  weights and, outside `pseudo_label` with relabel=round, its labels fixed before training are left out.
- debias=prior is FedDB's posterior; its balancing of the clients' weights in the mean is left out.
Only pseudo_label, uda, fixmatch and freematch have this mask; the other methods' rules are their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.checks import in_unit_interval, one_of
from fedlabel.methods.batch import LossFunction, Prepared, PseudoLabels, State, Survey
from fedlabel.methods.losses import one_hot
from fedlabel.methods.recipe import BySample, LabelKinds, Memory, Phase, Recipe, Stage, Views
from fedlabel.methods.shared import SLACK, Limits, Shared, check_counts, check_flags, check_shares, nothing_shared

KINDS = ("fixed", "flexmatch", "freematch", "cbafed")


class Selected(NamedTuple):
    """A mask's result for each sample; all detached."""

    label: Tensor
    """(n,) int64, the most probable class."""
    keep: Tensor
    """(n,) bool."""
    confidence: Tensor
    """(n,) float, the largest probability."""
    logits: Tensor
    """(n, classes), debiased if configured."""
    memory: State
    """Memory for the next step."""

    def pseudo_labels(self, from_global: bool) -> PseudoLabels:
        """Returns them as pseudo-labels of a step; from_global: whether the received model made them."""
        return PseudoLabels(self.label, self.keep, torch.full_like(self.keep, from_global), self.confidence)


def flexmatch_thresholds(counts: Tensor, unused: Tensor, threshold: float) -> Tensor:
    """Returns threshold * M(beta_c) with M(x) = x / (2 - x): lower for classes with fewer samples over the threshold.

    Args:
        counts: (classes,) samples whose prediction is c with at least `threshold`.
        unused: () samples that pass for no class; they hold all thresholds down as long as they are the most.
        threshold: tau.
    """
    largest = torch.maximum(counts.max(), unused.to(counts.dtype)).clamp_min(1)
    beta = counts / largest
    return threshold * beta / (2 - beta)


def freematch_thresholds(threshold: Tensor, class_mean: Tensor) -> Tensor:
    """Returns tau * p_c / max_c p_c, (classes,), from the moving averages tau () and p (classes,)."""
    return threshold * class_mean / class_mean.max(-1, keepdim=True).values


def cbafed_thresholds(counts: Tensor, base: float, cap: float) -> Tensor:
    """Returns min(share_c + base - sd(share), cap), (classes,): higher for frequent classes.

    Args:
        counts: (classes,) samples labelled or pseudo-labelled as c; all 0 counts as equal shares.
        base: .84 in the released code.
        cap: .95 there (.9 for SVHN).

    share_c = counts_c / sum * classes / 10, so that thresholds are alike for 10 and for 100 classes.
    """
    total = counts.sum()
    share = torch.where(total > 0, counts / total.clamp_min(1), torch.full_like(counts, 1 / len(counts)))
    share = share * len(counts) / 10
    return (share + base - share.std()).clamp_max(cap)


@dataclass(frozen=True)
class Mask:
    """How pseudo-labels are selected by their confidence."""

    kind: str = "fixed"
    """fixed | flexmatch | freematch | cbafed: thresholds per class. freematch and cbafed compute their own and ignore
    `method.confidence_threshold`."""
    debias: str = "none"
    """none | prior: divide probabilities by their average over the client's unlabelled samples, before anything
    else."""
    ema: float = 0.999
    """freematch: decay of its moving averages, per step."""
    base: float = 0.84
    """cbafed: the threshold of a class without a sample, before the spread of the shares is subtracted."""
    cap: float = 0.95
    """cbafed: the largest threshold."""

    def __post_init__(self) -> None:
        one_of(self, "method.mask", kind=KINDS, debias=("none", "prior"))
        in_unit_interval(self, "method.mask", "ema", "base", "cap")

    @property
    def surveys(self) -> bool:
        """Whether it needs all of a client's samples before a phase."""
        return self.kind == "flexmatch" or self.debias == "prior"

    def select(self, logits: Tensor, threshold: float, memory: State) -> Selected:
        """Selects the pseudo-labels of a batch.

        Args:
            logits: (n, classes).
            threshold: tau, for fixed and flexmatch.
            memory: a client's; with the moving averages, which this batch moves.
        """
        logits, memory = logits.detach(), dict(memory)
        raw = logits.softmax(-1)
        if self.debias == "prior":
            logits = logits - memory["prior"].clamp_min(1e-12).log()  # q(c) ~ p(c) / prior(c)
            if len(raw):
                memory["prior"] = 0.5 * memory["prior"] + 0.5 * raw.mean(0)
        probs = logits.softmax(-1)
        confidence, label = probs.max(-1)
        if self.kind == "freematch" and len(probs):
            memory |= self._moved_averages(probs, confidence, label, memory)
        keep = confidence >= self._thresholds(probs, threshold, memory)[label]
        if self.kind == "cbafed":
            hot = one_hot(label, probs.shape[-1])
            memory["kept_counts"] = memory["kept_counts"] + (hot * keep[:, None]).sum(0)
            memory["drawn"] = memory["drawn"] + len(label)
        return Selected(label, keep, confidence, logits, memory)

    def _moved_averages(self, probs: Tensor, confidence: Tensor, label: Tensor, memory: State) -> State:
        """Returns FreeMatch's three moving averages, and the incremented step."""
        share = one_hot(label, probs.shape[-1]).to(probs.dtype).mean(0)
        new = {"threshold": confidence.mean(), "class_mean": probs.mean(0), "class_share": share}
        moved = {name: self.ema * memory[name] + (1 - self.ema) * value for name, value in new.items()}
        return {**moved, "steps": memory["steps"] + 1}

    def _thresholds(self, probs: Tensor, threshold: float, memory: State) -> Tensor:
        match self.kind:
            case "flexmatch":
                return memory["class_threshold"]
            case "freematch":
                return freematch_thresholds(memory["threshold"], memory["class_mean"])
            case "cbafed":
                return cbafed_thresholds(memory["class_counts"], self.base, self.cap)
        return torch.full((probs.shape[-1],), threshold, dtype=probs.dtype, device=probs.device)

    def prepare(self, survey: Survey, threshold: float) -> State:
        """Returns the memory after a pass, if needed, over a client's unlabelled samples with the received model."""
        if not self.surveys:
            return survey.memory
        probs = survey.predict("global", "clean").softmax(-1)
        unlabeled = survey.supervision.candidates.sum(-1) != 1
        count = unlabeled.sum().clamp_min(1)
        memory = dict(survey.memory)
        if self.debias == "prior":
            prior = (probs * unlabeled[:, None]).sum(0) / count
            uniform = torch.full_like(prior, 1 / len(prior))
            memory["prior"] = torch.where(unlabeled.any(), prior, uniform)
            probs = probs / memory["prior"].clamp_min(1e-12)
            probs = probs / probs.sum(-1, keepdim=True)
        if self.kind == "flexmatch":
            confidence, label = probs.max(-1)
            passed = (confidence >= threshold) & unlabeled
            counts = (one_hot(label, probs.shape[-1]) * passed[:, None]).sum(0).to(probs.dtype)
            memory["class_threshold"] = flexmatch_thresholds(counts, (unlabeled & ~passed).sum(), threshold)
        return memory


@dataclass(frozen=True)
class _Averages(Shared):
    """FreeMatch's moving averages: their mean over the clients that trained on unlabelled samples."""

    num_classes: int

    def start(self) -> State:
        uniform = torch.full((self.num_classes,), 1 / self.num_classes)
        return {"threshold": uniform[0].clone(), "class_mean": uniform, "class_share": uniform.clone()}

    def statistics(self, memory: State) -> State:
        took_part = (memory["steps"] > 0).to(memory["threshold"].dtype)
        averages = {name: memory[name] * took_part for name in ("threshold", "class_mean", "class_share")}
        return {**averages, "clients": took_part}

    def update(self, shared: State, total: State) -> State:
        if not total or not total["clients"] > 0:
            return shared
        return {name: total[name] / total["clients"] for name in shared}

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        took_part = statistics["clients"]
        check_flags("clients", took_part)
        if not 0 <= statistics["threshold"] <= took_part * (1 + SLACK):
            raise ValueError(f"its statistic threshold (={float(statistics['threshold']):g}) must lie in [0, 1]")
        for name in ("class_mean", "class_share"):
            check_shares(f"its statistic {name}", statistics[name], took_part)

    def check(self, shared: State) -> None:
        for name in ("class_mean", "class_share"):
            check_shares(name, shared[name], torch.ones(()))


@dataclass(frozen=True)
class _ClassCounts(Shared):
    """CBAFed's counts per class: their sum over a round's clients."""

    num_classes: int

    def start(self) -> State:
        return {"class_counts": torch.zeros(self.num_classes)}

    def statistics(self, memory: State) -> State:
        per_draw = memory["num_unlabeled"] / memory["drawn"].clamp_min(1)
        return {"class_counts": memory["labeled_counts"] + memory["kept_counts"] * per_draw}

    def update(self, shared: State, total: State) -> State:
        return {"class_counts": total["class_counts"]} if total else shared

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        check_counts("class_counts", statistics["class_counts"], limits.samples)


def _no_steps(candidates: Tensor) -> State:
    return {"steps": torch.zeros((), device=candidates.device)}


def _labeled_counts(candidates: Tensor) -> State:
    labeled = candidates.sum(-1) == 1
    counts = (candidates & labeled[:, None]).sum(0).float()
    return {
        "labeled_counts": counts,
        "num_unlabeled": (~labeled).sum().float(),
        "kept_counts": torch.zeros_like(counts),
        "drawn": torch.zeros((), device=candidates.device),
    }


def masked_phase(
    mask: Mask,
    loss: LossFunction,
    threshold: float = 0.0,
    unlabeled: Views = ("weak", "strong"),
    prepare: Callable[[Survey], Prepared] | None = None,
) -> Phase:
    """Returns the one phase of a round of a method that has a mask.

    Args:
        mask: its mask.
        loss: which calls `Mask.select`.
        threshold: tau, see `Mask.select`.
        unlabeled: views of unlabelled samples.
        prepare: an E step of the method's own, which calls `Mask.prepare`; None: the mask's, where it has one.
    """
    if prepare is None and mask.surveys:
        prepare = partial(_prepared, mask=mask, threshold=threshold)
    return Phase("train", loss, BySample(unlabeled=unlabeled), teachers=("global",) if prepare else (), prepare=prepare)


def _prepared(survey: Survey, mask: Mask, threshold: float) -> Prepared:
    return Prepared({}, memory=mask.prepare(survey, threshold))


def masked_recipe(
    mask: Mask, num_classes: int, phases: tuple[Phase, ...] | Callable[[int], tuple[Phase, ...]]
) -> Recipe:
    """Returns the recipe of a method that has a mask: one stage, with the mask's memory and shared state.

    Args:
        mask: its mask.
        num_classes: of the task.
        phases: see `Stage.phases` and `masked_phase`.
    """
    memory, shared = Memory(), nothing_shared
    if mask.kind == "freematch":
        memory, shared = Memory(start=_no_steps), _Averages(num_classes)
    elif mask.kind == "cbafed":
        memory, shared = Memory(start=_labeled_counts), _ClassCounts(num_classes)
    return Recipe(
        stages=(Stage(phases),),
        uses=LabelKinds.SINGLE,
        memory=memory,
        shared=shared,
    )
