"""Which pseudo-labels are good enough: one mask, shared by all methods that keep samples by their confidence.

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

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.methods.base import Limits, Method, Phase, Prepared, Survey
from fedlabel.methods.plausible import SLACK, check_counts, check_flags, check_shares
from fedlabel.methods.steps import LossFunction, PseudoLabels, State, one_hot

KINDS = ("fixed", "flexmatch", "freematch", "cbafed")


class Selected(NamedTuple):
    """A mask's word on each sample; all detached."""

    label: Tensor
    """(n,) int64, the most probable class."""
    keep: Tensor
    """(n,) bool."""
    confidence: Tensor
    """(n,) float, the largest probability."""
    logits: Tensor
    """(n, classes), debiased where asked for."""
    memory: State
    """To be carried on."""

    def pseudo_labels(self, from_global: bool) -> PseudoLabels:
        """Returns them as a step reports them; from_global: whether the received model made them."""
        return PseudoLabels(self.label, self.keep, torch.full_like(self.keep, from_global), self.confidence)


def flexmatch_thresholds(counts: Tensor, unused: Tensor, threshold: float) -> Tensor:
    """Returns threshold * M(beta_c) with M(x) = x / (2 - x): lower where fewer samples passed.

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
    """Returns min(share_c + base - sd(share), cap), (classes,): frequent classes have to be surer.

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
    """How a confidence becomes a decision."""

    kind: str = "fixed"
    """fixed | flexmatch | freematch | cbafed: thresholds per class. freematch and cbafed make their own and do not look
    at `method.confidence_threshold`."""
    debias: str = "none"
    """none | prior: divide probabilities by their average over the client's unlabelled samples, before everything."""
    ema: float = 0.999
    """freematch: share of the old value in its moving averages, per step."""
    base: float = 0.84
    """cbafed: the threshold of a class without a sample, before the spread of the shares is taken off."""
    cap: float = 0.95
    """cbafed: the largest threshold."""

    def __post_init__(self) -> None:
        for key, allowed in {"kind": KINDS, "debias": ("none", "prior")}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"`method.mask.{key}` (={getattr(self, key)}) must be one of {', '.join(allowed)}.")
        for key in ("ema", "base", "cap"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"`method.mask.{key}` (={getattr(self, key)}) must lie in [0, 1].")

    @property
    def surveys(self) -> bool:
        """Whether it looks at all of a client's samples before a phase: then `prepare` must be the phase's."""
        return self.kind == "flexmatch" or self.debias == "prior"

    def select(self, logits: Tensor, threshold: float, memory: State) -> Selected:
        """Decides on the samples of a batch.

        Args:
            logits: (n, classes).
            threshold: tau, for fixed and flexmatch.
            memory: see `Method.initial_memory`; with the moving averages, which this batch moves.
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
        """Returns FreeMatch's three moving averages, and the step counted."""
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
        """Returns the memory after a look at all of a client's unlabelled samples with the received model."""
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

    def initial_memory(self, candidates: Tensor) -> State:
        """See `Method.initial_memory`."""
        if self.kind == "freematch":
            return {"steps": torch.zeros((), device=candidates.device)}
        if self.kind == "cbafed":
            labeled = candidates.sum(-1) == 1
            counts = (candidates & labeled[:, None]).sum(0).float()
            return {
                "labeled_counts": counts,
                "num_unlabeled": (~labeled).sum().float(),
                "kept_counts": torch.zeros_like(counts),
                "drawn": torch.zeros((), device=candidates.device),
            }
        return {}

    def initial_shared(self, num_classes: int) -> State:
        """See `Method.initial_shared`."""
        uniform = torch.full((num_classes,), 1 / num_classes)
        if self.kind == "freematch":
            return {"threshold": uniform[0].clone(), "class_mean": uniform, "class_share": uniform.clone()}
        return {"class_counts": torch.zeros(num_classes)} if self.kind == "cbafed" else {}

    def statistics(self, memory: State) -> State:
        """See `Method.statistics`."""
        if self.kind == "freematch":
            took_part = (memory["steps"] > 0).to(memory["threshold"].dtype)
            averages = {name: memory[name] * took_part for name in ("threshold", "class_mean", "class_share")}
            return {**averages, "clients": took_part}
        if self.kind == "cbafed":
            per_draw = memory["num_unlabeled"] / memory["drawn"].clamp_min(1)
            return {"class_counts": memory["labeled_counts"] + memory["kept_counts"] * per_draw}
        return {}

    def check_statistics(self, statistics: State, limits: Limits) -> None:
        """See `Method.check_statistics`."""
        if self.kind == "freematch":
            took_part = statistics["clients"]
            check_flags("clients", took_part)
            if not 0 <= statistics["threshold"] <= took_part * (1 + SLACK):
                raise ValueError(f"its statistic threshold (={float(statistics['threshold']):g}) must lie in [0, 1]")
            for name in ("class_mean", "class_share"):
                check_shares(f"its statistic {name}", statistics[name], took_part)
        if self.kind == "cbafed":
            check_counts("class_counts", statistics["class_counts"], limits.samples)

    def check_shared(self, shared: State) -> None:
        """See `Method.check_shared`."""
        if self.kind == "freematch":
            for name in ("class_mean", "class_share"):
                check_shares(name, shared[name], torch.ones(()))

    def server_step(self, shared: State, total: State) -> State:
        """See `Method.server_step`; a round in which nobody reports leaves everything as it is."""
        if self.kind == "freematch" and total and total["clients"] > 0:
            return {name: total[name] / total["clients"] for name in shared}
        if self.kind == "cbafed" and total:
            return {"class_counts": total["class_counts"]}
        return shared


@dataclass(frozen=True)
class MaskedMethod(Method):
    """Base of the methods that have a `Mask`: one phase, and the mask's hooks passed on."""

    mask: Mask = field(default_factory=Mask)
    """Thresholds per class, debiasing."""

    # Not a field: a method whose mask looks at a threshold has one of this name.
    confidence_threshold = 0.0

    def check_mask(self) -> None:
        """Raises ValueError if the threshold is out of range."""
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"`method.confidence_threshold` (={self.confidence_threshold}) must lie in [0, 1].")

    def masked_phase(self, loss: LossFunction, unlabeled: tuple[str, ...], prepares: bool = False) -> Phase:
        """Returns the one phase of a round; prepares: whether it has an E step beside the mask's own."""
        looks = prepares or self.mask.surveys
        teachers, prepare = (("global",), self.prepare) if looks else ((), None)
        return Phase("train", loss, labeled=("weak",), unlabeled=unlabeled, teachers=teachers, prepare=prepare)

    def prepare(self, survey: Survey) -> Prepared:
        """The mask's E step over a client's whole data."""
        return Prepared({}, memory=self.mask.prepare(survey, self.confidence_threshold))

    def initial_memory(self, candidates: Tensor) -> State:
        return self.mask.initial_memory(candidates)

    def initial_shared(self, num_classes: int) -> State:
        return self.mask.initial_shared(num_classes)

    def statistics(self, memory: State) -> State:
        return self.mask.statistics(memory)

    def check_statistics(self, statistics: State, shared: State, limits: Limits) -> None:
        self.mask.check_statistics(statistics, limits)

    def check_shared(self, shared: State) -> None:
        self.mask.check_shared(shared)

    def server_step(self, shared: State, total: State) -> State:
        return self.mask.server_step(shared, total)
