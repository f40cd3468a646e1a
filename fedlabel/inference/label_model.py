"""A label model: the posterior class of a sample given the votes and abstentions of noisy labelling functions.

A star: the class y has prior pi, and function k votes v with probability T_k[y, v], independently of the others given
y; v is a class of its own set or "abstain". So

    P(y | votes) ~ pi_y prod_k T_k[y, v_k],

over all functions, abstaining ones included: of a function that specialises in some classes, silence is evidence for
the others. Fitted by EM on the likelihood of the votes alone. The sums of the E step add up over clients: the M step on
their total (`LabelModel.update`) is that of the pooled votes.

Source: Xu et al., "DP-SSL: Towards Robust Semi-supervised Learning with A Few Labeled Samples", NeurIPS 2021 (arXiv
2110.13740), whose label model is such a star; its parameters are ours (Dawid & Skene, 1979; Ratner et al., 2016;
"cage": Chatterjee et al., AAAI 2020), as the paper's could not be verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

VARIANTS = ("full", "tied", "cage")
ABSTAIN = -1
_CHUNK = 1 << 16
"""Samples whose votes are looked at together."""
_GUIDE_STEPS = 30
_PRIOR_STEPS = 50


class Counts(NamedTuple):
    """Expected counts of an E step, which are summed over samples and over clients."""

    votes: Tensor
    """(functions, classes + 1, classes) float64: expected number of samples of each class (last) with each vote; the
    last vote is an abstention."""
    classes: Tensor
    """(classes,) float64: expected number of samples of each class."""
    log_likelihood: Tensor
    """() float64, log-likelihood of the votes, in nats; 0 if it was not requested."""

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(mine + yours for mine, yours in zip(self, other, strict=True)))


class LabelModel:
    """Estimates the accuracies of labelling functions from their agreement.

    Args:
        num_classes: C.
        class_sets: (K, C) bool (tensor, array or lists), the classes that each of K functions may vote for, at least
            one each.
        variant: full: T_k free, K C (|set| + 1) numbers. tied: three numbers per function, for few votes: right, wrong
            or silent inside its set, and how often it speaks up outside. cage: log-linear in (vote, class), with a
            guide that holds each function's precision near `guide`.
        prior: (C,) probabilities that stay as they are; None: learnt (of cage: implied by the others).
        smoothing: pseudo-counts of each distribution.
        temperature: kappa in (0, 1], multiplies the functions' log-likelihood in the posterior, because functions that
            share a network are not independent; 1 as the model has it.
        abstentions: whether an abstention is evidence; False: only what was voted is looked at.
        guide: of cage, the precision that functions are taken to have.
        guide_weight: of cage, its weight in samples.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_classes: int,
        class_sets: Tensor,
        variant: str = "full",
        prior: Tensor | None = None,
        smoothing: float = 1.0,
        temperature: float = 1.0,
        abstentions: bool = True,
        guide: float = 0.9,
        guide_weight: float = 100.0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"`variant` (={variant}) must be one of {', '.join(VARIANTS)}.")
        class_sets = torch.as_tensor(class_sets)
        if class_sets.dtype != torch.bool or class_sets.dim() != 2 or class_sets.shape[1] != num_classes:
            raise ValueError(
                f"`class_sets` ({class_sets.dtype} of shape {tuple(class_sets.shape)}) must be bool of shape "
                f"(functions, {num_classes})."
            )
        empty = (~class_sets.any(1)).nonzero()
        if len(empty):
            raise ValueError(f"`class_sets` of function {int(empty[0])} is empty: it could only abstain. Leave it out.")
        uncovered = (~class_sets.any(0)).nonzero()
        if len(uncovered):
            raise ValueError(
                f"`class_sets`: no function votes for class {int(uncovered[0])}; every class needs one. Take more "
                "functions, or larger sets."
            )
        if not smoothing > 0:
            raise ValueError(f"`smoothing` (={smoothing}) must be positive.")
        if not 0 < temperature <= 1:
            raise ValueError(f"`temperature` (={temperature}) must lie in (0, 1].")
        if not 0 < guide < 1 or not guide_weight >= 0:
            raise ValueError(
                f"`guide` (={guide}) must lie in (0, 1) and `guide_weight` (={guide_weight}) be at least 0."
            )
        if prior is not None:
            prior = torch.as_tensor(prior).to(class_sets.device, torch.float64)
            if prior.shape != (num_classes,) or not bool(((prior > 0) & prior.isfinite()).all()):
                raise ValueError(f"`prior` (={prior.tolist()}) must be {num_classes} positive, finite numbers.")
        self.num_classes = num_classes
        self.variant = variant
        self.class_sets = class_sets
        self.smoothing = smoothing
        self.temperature = temperature
        self.abstentions = abstentions
        self.guide = guide
        self.guide_weight = guide_weight
        self.fixed_prior = None if prior is None else prior / prior.sum()
        """(C,) or None."""
        symbols = torch.cat([class_sets, torch.ones_like(class_sets[:, :1])], 1)
        self._symbols = symbols[:, :, None].expand(-1, -1, num_classes)
        """(K, C + 1, C) bool, the votes that there are."""
        if not abstentions:
            self._symbols = self._symbols.clone()
            self._symbols[:, -1] = False
        self._reset()
        self.iterations = 0
        """How often the last `fit` looked at the votes; the last look found no change, or there were no more."""

    def _reset(self) -> None:
        uniform = torch.ones(self.num_classes, dtype=torch.float64, device=self.class_sets.device) / self.num_classes
        self.prior = uniform if self.fixed_prior is None else self.fixed_prior
        """(C,) pi."""
        self.tables = self._symbols.double() / self._symbols.sum(1, keepdim=True)
        """(K, C + 1, C) T: probability of each vote, given the class."""

    @property
    def num_functions(self) -> int:
        """K."""
        return len(self.class_sets)

    # ---------------------------------------------------------------------------------------------------------- E step

    def posterior(self, votes: Tensor) -> Tensor:
        """Returns P(y | votes), (n, C) float64, of votes (n, K) int64, `ABSTAIN` where a function abstains."""
        symbols = self._symbols_of(votes)
        return torch.cat([self._joint(part).softmax(1) for part in symbols.split(_CHUNK)])

    def log_likelihood(self, votes: Tensor) -> Tensor:
        """Returns log P(votes) of each row, (n,) float64; with temperature 1, whatever `temperature` is."""
        symbols = self._symbols_of(votes)
        return torch.cat([self._joint(part, 1.0).logsumexp(1) for part in symbols.split(_CHUNK)])

    def expected_counts(self, votes: Tensor, labels: Tensor | None = None, label_weight: float = 1.0) -> Counts:
        """Returns the expected counts of the E step for votes (n, K).

        Args:
            votes: see `posterior`.
            labels: (n,) int64 the true class, -1 elsewhere; None: nowhere.
            label_weight: how much a sample with a label counts.
        """
        return self._counts(self._symbols_of(votes), self._labels_of(labels, len(votes)), label_weight)

    def initial_counts(self, votes: Tensor, labels: Tensor | None = None, label_weight: float = 1.0) -> Counts:
        """Returns expected counts of initial posteriors: each class's votes divided by the number of functions that may
        vote for it; a row without votes by the prior. EM starts from here, so that class c of the model is class c. For
        the arguments see `expected_counts`.
        """
        labels = self._labels_of(labels, len(votes))

        def look(start: int, part: Tensor) -> tuple[Tensor, Tensor]:
            guess = _clamped(self._guess(part), _rows(labels, start, part), label_weight)
            return guess, part.new_zeros(()).double()

        return self._sum(self._symbols_of(votes), look)

    def guess(self, votes: Tensor) -> Tensor:
        """Returns the initial posteriors that `initial_counts` sums, (n, C) float64."""
        return self._guess(self._symbols_of(votes))

    def _guess(self, symbols: Tensor) -> Tensor:
        share = coverage_normalized_votes(self._votes_of(symbols), self.class_sets)
        return torch.where(share.sum(1, keepdim=True) > 0, share / share.sum(1, keepdim=True), self.prior)

    def _counts(self, symbols: Tensor, labels: Tensor | None, label_weight: float) -> Counts:
        def look(start: int, part: Tensor) -> tuple[Tensor, Tensor]:
            joint = self._joint(part, 1.0)
            posterior = joint.softmax(1) if self.temperature == 1 else self._joint(part).softmax(1)
            evidence = joint.logsumexp(1)
            given = _rows(labels, start, part)
            if given is not None:
                own = joint.gather(1, given.clamp_min(0)[:, None]).squeeze(1)
                evidence = torch.where(given >= 0, label_weight * own, evidence)
            return _clamped(posterior, given, label_weight), evidence.sum()

        return self._sum(symbols, look)

    def _sum(self, symbols: Tensor, look: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> Counts:
        """Sums the results of `look(first row, symbols)` over chunks: posteriors (n, C), and the log-likelihood."""
        k, symbol_count, classes = self.tables.shape
        votes = torch.zeros(k * symbol_count, classes, dtype=torch.float64, device=symbols.device)
        total, log_likelihood, start = votes.new_zeros(classes), votes.new_zeros(()), 0
        places = torch.arange(k * symbol_count, device=symbols.device).view(k, symbol_count, 1)
        for part in symbols.split(_CHUNK):
            posterior, evidence = look(start, part)
            total += posterior.sum(0)
            log_likelihood += evidence
            for function, own_votes in enumerate(part.T.contiguous()):
                if votes.is_cuda:  # there sums at few places are slow, or not the same each time
                    own = slice(function * symbol_count, (function + 1) * symbol_count)
                    votes[own] += (own_votes == places[function]).double() @ posterior
                else:
                    votes.index_add_(0, own_votes, posterior)
            start += len(part)
        return Counts(votes.view(k, symbol_count, classes), total, log_likelihood)

    def _joint(self, symbols: Tensor, temperature: float | None = None) -> Tensor:
        """Returns log pi_y + kappa sum_k log T_k[y, v_k], (n, C)."""
        log_tables = self.tables.clamp_min(1e-300).log()
        if not self.abstentions:
            log_tables[:, -1] = 0
        kappa = self.temperature if temperature is None else temperature
        return self.prior.log() + kappa * embedding_bag(symbols, log_tables.flatten(0, 1), mode="sum")

    def _symbols_of(self, votes: Tensor) -> Tensor:
        """Returns (n, K) int64, the index of every vote in the flattened tables."""
        votes = torch.as_tensor(votes).to(self.class_sets.device)
        if votes.dtype != torch.int64 or votes.dim() != 2 or votes.shape[1] != self.num_functions:
            raise ValueError(
                f"`votes` ({votes.dtype} of shape {tuple(votes.shape)}) must be int64 of shape "
                f"(n, {self.num_functions})."
            )
        functions = torch.arange(self.num_functions, device=votes.device)
        inside = (votes >= 0) & (votes < self.num_classes)
        allowed = self.class_sets[functions, votes.clamp(0, self.num_classes - 1)] & inside
        wrong = (~allowed & (votes != ABSTAIN)).nonzero()
        if len(wrong):
            sample, function = wrong[0].tolist()
            own = self.class_sets[function].nonzero().flatten().tolist()
            raise ValueError(
                f"The vote of function {function} on sample {sample} (={int(votes[sample, function])}) must be one of "
                f"its classes, {own}, or {ABSTAIN} to abstain."
            )
        return torch.where(votes == ABSTAIN, self.num_classes, votes) + functions * (self.num_classes + 1)

    def _labels_of(self, labels: Tensor | None, n: int) -> Tensor | None:
        if labels is None:
            return None
        labels = torch.as_tensor(labels).to(self.class_sets.device)
        if labels.dtype != torch.int64 or labels.shape != (n,):
            raise ValueError(
                f"`labels` ({labels.dtype} of shape {tuple(labels.shape)}) must be int64 of shape ({n},), one per row "
                "of votes, -1 where the class is not known."
            )
        wrong = ((labels < -1) | (labels >= self.num_classes)).nonzero()
        if len(wrong):
            raise ValueError(
                f"The label of sample {int(wrong[0])} (={int(labels[wrong[0]])}) must lie in [0, "
                f"{self.num_classes - 1}], or be -1 where it is not known."
            )
        return labels

    def _votes_of(self, symbols: Tensor) -> Tensor:
        votes = symbols % (self.num_classes + 1)
        return torch.where(votes == self.num_classes, ABSTAIN, votes)

    def accuracy(self) -> Tensor:
        """Returns the model's estimate of each function's accuracy on its votes, (K,) float64."""
        voted = self.tables[:, :-1] * self.prior
        return voted.diagonal(dim1=1, dim2=2).sum(1) / voted.sum((1, 2)).clamp_min(1e-300)

    # ---------------------------------------------------------------------------------------------------------- M step

    def update(self, counts: Counts) -> None:
        """Sets the parameters that maximise the likelihood of summed `expected_counts` (with `smoothing`)."""
        if self.fixed_prior is None and self.variant != "cage":
            smoothed = counts.classes + self.smoothing
            self.prior = smoothed / smoothed.sum()
        votes = torch.where(self._symbols, counts.votes, 0.0)
        if self.variant == "full":
            smoothed = torch.where(
                self._symbols, votes + self.smoothing / self._symbols.double().sum(1, keepdim=True), 0.0
            )
            self.tables = smoothed / smoothed.sum(1, keepdim=True)
        elif self.variant == "tied":
            self._update_tied(votes)
        else:
            self._update_cage(votes, counts.classes)

    def _update_tied(self, votes: Tensor) -> None:
        c = self.num_classes
        inside = self.class_sets.double()
        size = inside.sum(1)
        voted, silent = votes[:, :-1], votes[:, -1]
        hits = (voted.diagonal(dim1=1, dim2=2) * inside).sum(1)
        wrong = (voted.sum(1) * inside).sum(1) - hits
        quiet = (silent * inside).sum(1)
        spoke = (voted.sum(1) * (1 - inside)).sum(1)
        still = (silent * (1 - inside)).sum(1)
        may_err = (size > 1).double()
        heard = float(self.abstentions)
        outcomes = torch.stack([hits, wrong, quiet], 1)
        possible = torch.stack([torch.ones_like(size), may_err, torch.full_like(size, heard)], 1)
        outcomes = (outcomes + self.smoothing / possible.sum(1, keepdim=True)) * possible
        right, err, quiet = (outcomes / outcomes.sum(1, keepdim=True)).unbind(1)
        outside = torch.stack([spoke, still], 1) + self.smoothing / 2
        speaks = outside[:, 0] / outside.sum(1) if self.abstentions else torch.ones_like(spoke)
        same = torch.eye(c, dtype=torch.float64, device=votes.device)
        each = (err / (size - 1).clamp_min(1))[:, None, None]
        of_inside = right[:, None, None] * same + each * (1 - same)
        of_outside = (speaks / size)[:, None, None].expand(-1, c, c)
        table = torch.where(self.class_sets[:, None, :], of_inside, of_outside) * inside[:, :, None]
        silence = torch.where(self.class_sets, quiet[:, None], (1 - speaks)[:, None])[:, None]
        self.tables = torch.cat([table, silence], 1)

    def _update_cage(self, votes: Tensor, classes: Tensor) -> None:
        """Maximises the expected log-likelihood over theta, T = exp(theta) / (1 + sum exp(theta)), plus the guide."""
        theta = (self.tables[:, :-1].clamp_min(1e-6) / self.tables[:, -1:].clamp_min(1e-6)).log()
        theta = theta.masked_fill(~self._symbols[:, :-1], 0.0).requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=_GUIDE_STEPS, line_search_fn="strong_wolfe")
        count = classes.sum()

        def loss() -> Tensor:
            optimizer.zero_grad()
            log_tables, log_prior = self._cage(theta)
            value = (votes * log_tables.masked_fill(~self._symbols, 0.0)).sum() + (classes * log_prior).sum()
            joint = (log_tables[:, :-1] + log_prior).masked_fill(~self._symbols[:, :-1], -math.inf)
            right = joint.diagonal(dim1=1, dim2=2).logsumexp(1) - joint.flatten(1).logsumexp(1)
            wrong = torch.log1p(-right.exp().clamp_max(1 - 1e-9))
            guide = self.guide * right + (1 - self.guide) * wrong
            # A weak pull of every theta to 0 in place of pseudo-counts.
            penalty = self.smoothing / 2 * theta.square().sum() * 1e-3
            result = -(value + self.guide_weight * guide.sum() - penalty) / count.clamp_min(1)
            result.backward()
            return result

        optimizer.step(loss)
        log_tables, log_prior = self._cage(theta.detach())
        self.tables = torch.where(self._symbols, log_tables.exp(), 0.0)
        self.prior = log_prior.exp()

    def _cage(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log T (K, C + 1, C) and log pi (C,) of theta (K, C, C)."""
        silent = torch.zeros_like(theta[:, :1])
        scores = torch.cat([theta, silent], 1).masked_fill(~self._symbols, -math.inf)
        normalizer = scores.logsumexp(1)
        log_prior = normalizer.sum(0).log_softmax(0) if self.fixed_prior is None else self.fixed_prior.log()
        return scores - normalizer[:, None], log_prior

    # ------------------------------------------------------------------------------------------------------------- fit

    def fit(
        self,
        votes: Tensor,
        labels: Tensor | None = None,
        label_weight: float = 1.0,
        max_iterations: int = 100,
        tolerance: float = 1e-6,
    ) -> LabelModel:
        """Runs EM from `initial_counts`, until the mean log-likelihood changes by less than a share `tolerance`.

        Args:
            votes: (n, K) int64, n at least 1.
            labels: see `expected_counts`.
            label_weight: see `expected_counts`.
            max_iterations: at most so many M steps.
            tolerance: relative.

        Returns:
            Itself.

        Raises:
            ValueError: no votes, or a vote outside its function's set.
        """
        if len(votes) == 0:
            raise ValueError("`votes` has no rows: there is nothing to fit.")
        symbols, labels = self._symbols_of(votes), self._labels_of(labels, len(votes))
        self._reset()
        self.update(self.initial_counts(votes, labels, label_weight))
        before = -math.inf
        for self.iterations in range(1, max_iterations + 1):
            counts = self._counts(symbols, labels, label_weight)
            now = float(counts.log_likelihood) / len(votes)
            if abs(now - before) <= tolerance * abs(now):
                break
            before = now
            self.update(counts)
        return self


def _rows(labels: Tensor | None, start: int, part: Tensor) -> Tensor | None:
    return None if labels is None else labels[start : start + len(part)]


def _clamped(posterior: Tensor, labels: Tensor | None, weight: float) -> Tensor:
    """Returns posteriors (n, C) with `weight` at the label, and 0 elsewhere, for samples with a label (not -1)."""
    if labels is None:
        return posterior
    clamped = weight * torch.zeros_like(posterior).scatter_(1, labels.clamp_min(0)[:, None], 1.0)
    return torch.where((labels >= 0)[:, None], clamped, posterior)


def client_prior(model: LabelModel, votes: Tensor) -> Tensor:
    """Returns the maximum-likelihood class prior (C,) of votes (n, K) under the model's tables: EM from its prior."""
    ratio = model.posterior(votes) / model.prior
    prior = model.prior
    for _ in range(_PRIOR_STEPS):
        joint = ratio * prior
        prior = (joint / joint.sum(1, keepdim=True)).sum(0) + model.smoothing
        prior = prior / prior.sum()
    return prior


def majority_vote(votes: Tensor, num_classes: int) -> Tensor:
    """Returns each class's share of the votes, (n, C) float64; uniform without votes."""
    total = vote_tallies(votes, num_classes)
    return torch.where(total.sum(1, keepdim=True) > 0, total / total.sum(1, keepdim=True), 1 / num_classes)


def coverage_normalized_votes(votes: Tensor, class_sets: Tensor) -> Tensor:
    """Returns each class's votes divided by the number of functions that may vote for it, (n, C) float64; 0 without
    votes.
    """
    return vote_tallies(votes, class_sets.shape[1]) / class_sets.sum(0).clamp_min(1)


def vote_tallies(votes: Tensor, num_classes: int) -> Tensor:
    """Returns each class's number of votes (n, K), (n, C) float64."""
    n, symbols = len(votes), num_classes + 1
    flat = torch.where(votes >= 0, votes, num_classes) + torch.arange(n, device=votes.device)[:, None] * symbols
    return torch.bincount(flat.flatten(), minlength=n * symbols).view(n, symbols)[:, :-1].double()
