"""Belief propagation over labels that are coupled by bag counts and by a graph of neighbours.

Binary labels z in {0, 1}^n have

    P(z) ~ prod_i exp(log_odds_i z_i) * prod_bags f_b(sum of z in b) * prod_edges exp(-lambda_edge K_ij (z_i - z_j)^2).

- factor="cardinality": f_b is one factor per bag, see `fedlabel.inference.cardinality`; for a finite `lambda_bag` the
  distribution is the paper's. Exact where bags and edges form a tree, so always without edges, but for bags above
  `cardinality.EXACT_UP_TO` whose count varies: there the others' sum is taken as Gaussian.
- factor="pairwise": the paper's. The same penalty as a term for every sample and one for every pair in a bag, and then
  plain sum-product; it oscillates where lambda_bag times the bags' size is large, and says so.

Messages are log-odds, log p(1) / p(0). For more than two classes: `fedlabel.inference.class_belief`.

Source: Havaldar et al., "Learning from Label Proportions: Bootstrapping Supervised Learners via Belief Propagation",
ICLR 2024 (arXiv 2310.08056).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlabel.inference.cardinality import (
    CERTAIN,
    EXACT_UP_TO,
    SMALLEST_VARIANCE,
    bag_posterior,
    check_counts,
    check_evidence,
    count_log_likelihood,
    exact_messages,
    gaussian_messages,
    tilt,
    wants_large_blocks,
)
from fedlabel.inference.pairwise import ising, sum_product
from fedlabel.inference.sums import IndexedSums

__all__ = ["Beliefs", "bag_posterior", "count_log_likelihood", "marginals"]

FACTORS = ("cardinality", "pairwise")
MOST_PAIRS = 50_000_000
"""The most pairs in bags that the pairwise form is written out for."""
VISIBLE = 10.0
"""Log-odds beyond this, p = 4.5e-5, count a thousandth where it is asked whether beliefs still change."""
_LARGEST_CAVITY = 80.0
"""exp(-80) is still a number in single precision."""
CELLS = 1 << 16
"""Numbers per position of a stack of bags on a CPU: what stays in its cache."""
LARGE_CELLS = 1 << 27
"""Numbers of all positions of a stack of bags on a GPU, where a step over few bags takes as long as one over many: half
a gibibyte in single precision."""
TEMPORARIES = 16
"""Numbers per label that `gaussian_messages` has at a time."""


class Beliefs(NamedTuple):
    """The result of belief propagation."""

    probability: Tensor
    """(n,) p(z_i = 1); for several classes (n, classes)."""
    converged: bool
    """Whether in the last iteration no belief, and no message along an edge, changed by `tolerance` or more, before
    damping."""
    iterations: int
    """Number of iterations."""
    residual: float
    """The largest change of a belief in the last iteration, before damping: in log-odds, where the part beyond
    +-`VISIBLE` counts a thousandth; if the beliefs have converged, of a message along an edge if that is larger."""


def marginals(
    log_odds: Tensor,
    bag: Tensor,
    bag_counts: Tensor,
    edges: Tensor,
    edge_weight: Tensor,
    lambda_bag: float = math.inf,
    lambda_edge: float = 1.0,
    factor: str = "cardinality",
    damping: float = 0.5,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> Beliefs:
    """Returns p(z_i = 1) of each label. Computes in the type of `log_odds`, on its device; arrays and lists are
    accepted.

    Args:
        log_odds: (n,) float, what else is known of each label; 0 is nothing, +-inf certainty.
        bag: (n,) int64, each label's bag, -1 for none.
        bag_counts: (bags,) how many labels of each bag are 1, or (bags, 2) the least and the most; (1, size) says at
            least one.
        edges: (e, 2) int64, pairs of labels; the weights of a pair that occurs twice add up.
        edge_weight: (e,) float >= 0, K.
        lambda_bag: weight of the penalty on a count that is missed; inf: it cannot be missed.
        lambda_edge: weight of the penalty on two neighbours that differ.
        factor: "cardinality" or "pairwise".
        damping: share of the old message in the new one, in [0, 1).
        max_iterations: at least 1. One iteration sends all messages along edges and then all from bags.
        tolerance: see `Beliefs.converged`.

    Raises:
        ValueError: arguments of wrong shape or outside their range, an impossible count, an empty bag, or a bag whose
            count contradicts what is certain.
    """
    log_odds = torch.as_tensor(log_odds)
    given = (torch.as_tensor(value).to(log_odds.device) for value in (bag, bag_counts, edges, edge_weight))
    bag, bag_counts, edges, edge_weight = given
    if edges.numel() == 0:  # an empty list has neither type nor width
        edges = edges.new_zeros(0, 2, dtype=torch.int64)
    least, most, sizes = _checked_bags(log_odds, bag, bag_counts)
    check_edges(edges, edge_weight, len(log_odds))
    check_settings(lambda_bag, lambda_edge, factor, damping, max_iterations, tolerance)
    if factor == "pairwise":
        pairs = int((sizes * (sizes - 1) // 2).sum())
        if pairs > MOST_PAIRS or bool((least != most).any()) or bool(log_odds.isinf().any()):
            raise ValueError(
                f"`factor` (=pairwise) has a term for every pair in a bag, here {pairs}, and takes at most "
                f"{MOST_PAIRS} of them, one count per bag, and nothing that is certain. Take factor=cardinality."
            )
        weight = edge_weight.to(log_odds.dtype) * lambda_edge
        total, iteration, residual = sum_product(
            *ising(log_odds, bag, least, sizes, edges, weight, lambda_bag), damping, max_iterations, tolerance, change
        )
        return Beliefs(total.sigmoid(), residual < tolerance, iteration, residual)
    ones, zeros = log_odds == torch.inf, log_odds == -torch.inf
    if lambda_bag == math.inf:
        check_evidence(count_members(bag, ones, len(sizes)), count_members(bag, zeros, len(sizes)), least, most, sizes)
        ones, zeros = ones | of_bag(bag, least == sizes), zeros | of_bag(bag, most == 0)
    unary = log_odds.masked_fill(ones, CERTAIN).masked_fill(zeros, -CERTAIN)
    bags = Bags(bag, least, most, sizes, lambda_bag)
    if len(edges) == 0:  # bags alone: exact at once
        total, residual, iteration = unary + bags.messages(unary), 0.0, 1
    else:
        graph = _Edges(edges, edge_weight.to(unary.dtype) * lambda_edge, len(unary))
        from_bag = torch.zeros_like(unary)
        total, residual, iteration = unary, math.inf, 0
        while residual >= tolerance and iteration < max_iterations:
            iteration += 1
            keep = damping if iteration > 1 else 0.0  # of the first messages there are no old ones
            graph.send(total, keep)
            from_edges = graph.arrived(unary)
            from_bag.lerp_(bags.messages(unary + from_edges), 1 - keep)
            before, total = total, unary + from_bag + from_edges
            residual = change(before, total) / (1 - keep)
            if residual < tolerance:  # what arrives may cancel where what is sent on does not
                residual = max(residual, graph.unrest(total))
    probability = total.sigmoid().masked_fill(ones, 1.0).masked_fill(zeros, 0.0)
    return Beliefs(probability, residual < tolerance, iteration, residual)


class Bags:
    """The factors of all bags, in stacks of bags of about the same size."""

    def __init__(self, bag: Tensor, least: Tensor, most: Tensor, sizes: Tensor, lambda_bag: float) -> None:
        self.lambda_bag = lambda_bag
        if lambda_bag == 0:  # says nothing
            bag, least, most, sizes = torch.full_like(bag, -1), least[:0], most[:0], sizes[:0]
        # Half of the states are saved where the rarer of the two labels is counted.
        flipped = least + most > sizes
        least, most = torch.where(flipped, sizes - most, least), torch.where(flipped, sizes - least, most)
        samples = bag.argsort(stable=True)[int((bag < 0).sum()) :]
        first = sizes.cumsum(0) - sizes
        order = (sizes * (int(sizes.max()) + 1 if len(sizes) else 1) + most).argsort(stable=True)
        self.large = wants_large_blocks(bag)
        if self.large:
            widths = (most[order].cummax(0).values if lambda_bag == math.inf else sizes[order]) + 1
            stacks = _large_stacks(order, sizes[order].tolist(), widths.tolist())
        else:
            stacks = _stacks(order, sizes[order].tolist())
        self.stacks = []
        for rows in stacks:
            size = int(sizes[rows].max())
            place = torch.arange(size, device=bag.device)
            there = place < sizes[rows, None]
            members = torch.where(there, samples[(first[rows, None] + place).clamp_max(len(samples) - 1)], len(bag))
            bounds = least[rows], most[rows], int(most[rows].max())
            self.stacks.append(_Stack(members, ~there, flipped[rows, None], *bounds))
        self.tilts: list[Tensor | None] = [None] * len(self.stacks)

    def messages(self, cavity: Tensor) -> Tensor:
        """Returns the messages (n,) of the bags to all variables, given the messages (n,) of the other factors; 0
        without a bag.
        """
        extended = torch.cat([cavity.clamp(-CERTAIN, CERTAIN), cavity.new_zeros(1)])
        result = torch.zeros_like(extended)
        for place, stack in enumerate(self.stacks):
            theta = extended[stack.members]
            theta = torch.where(stack.flipped, -theta, theta).masked_fill(stack.absent, -math.inf)
            start = self.tilts[place]
            if start is None:
                start = self.tilts[place] = theta.new_zeros(len(theta))
            messages = self._stack(theta, stack, start)
            result[stack.members] = torch.where(stack.flipped, -messages, messages)
        return result[:-1]

    def _stack(self, theta: Tensor, stack: _Stack, start: Tensor) -> Tensor:
        if theta.shape[1] <= EXACT_UP_TO:
            return exact_messages(theta, stack.least, stack.most, self.lambda_bag, start, stack.largest)
        start.copy_(tilt(theta, stack.least.to(theta.dtype), stack.most.to(theta.dtype), self.lambda_bag, start))
        p = (theta + start[:, None]).sigmoid()
        gaussian = (stack.least == stack.most) & ((p * (1 - p)).sum(1) >= SMALLEST_VARIANCE)
        messages = gaussian_messages(theta, stack.least, self.lambda_bag, start)
        # One by one on a CPU, as the largest of their counts says how much each costs.
        together = LARGE_CELLS // (theta.shape[1] * (theta.shape[1] + 1)) if self.large else 1
        for rows in (~gaussian).nonzero().flatten().split(max(1, together)):
            if len(rows):
                tilts = start[rows]
                messages[rows] = exact_messages(
                    theta[rows], stack.least[rows], stack.most[rows], self.lambda_bag, tilts
                )
                start[rows] = tilts
        return messages


class _Stack(NamedTuple):
    """Bags that are computed together, padded to the size of the largest."""

    members: Tensor
    """(bags, k) int64, positions of the variables; n = padding."""
    absent: Tensor
    """(bags, k) bool, True where padded."""
    flipped: Tensor
    """(bags, 1) bool, whether zeros are counted instead of ones."""
    least: Tensor
    """(bags,) int64."""
    most: Tensor
    """(bags,) int64."""
    largest: int
    """The largest of `most`."""


def _stacks(order: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yields the bags of `order`, sorted by size, in stacks of similar size that hold about `CELLS` numbers."""
    start = 0
    while start < len(sizes):
        alike = (sizes[start] <= EXACT_UP_TO) == (sizes[-1] <= EXACT_UP_TO)
        if alike and (len(sizes) - start) * (sizes[-1] + 1) <= CELLS:  # so few that a second pass takes longer
            yield order[start:]
            return
        end = start + max(1, CELLS // (sizes[start] + 1))
        largest = sizes[start] + sizes[start] // 4 + 1
        largest = min(largest, EXACT_UP_TO) if sizes[start] <= EXACT_UP_TO else largest
        end = min(end, bisect_right(sizes, largest))
        yield order[start:end]
        start = end


def _large_stacks(order: Tensor, sizes: Sequence[int], widths: Sequence[int]) -> Iterator[Tensor]:
    """Yields the bags of `order`, sorted by size, in as few stacks as hold `LARGE_CELLS` numbers each.

    Args:
        order: (bags,).
        sizes: of these bags.
        widths: numbers per position that a stack which ends with this bag has of each of its bags; not decreasing.
    """
    start, most_exact = 0, bisect_right(sizes, EXACT_UP_TO)
    while start < len(sizes):
        exact = start < most_exact

        def numbers(end: int, start: int = start, exact: bool = exact) -> int:
            return (end - start) * sizes[end - 1] * (widths[end - 1] if exact else TEMPORARIES)

        ends = range(start + 1, (most_exact if exact else len(sizes)) + 1)
        end = start + max(1, bisect_right(ends, LARGE_CELLS, key=numbers))
        yield order[start:end]
        start = end


class _Edges:
    """Messages between neighbours, log-odds."""

    def __init__(self, edges: Tensor, coupling: Tensor, n: int) -> None:
        self.first, self.second = edges.unbind(1)
        self.differs = (-coupling).exp()
        self._messages = coupling.new_zeros(2 * len(coupling))
        self.forward, self.backward = self._messages.tensor_split(2)
        self._arrivals = IndexedSums(torch.cat([self.second, self.first]), n)

    def send(self, total: Tensor, damping: float) -> None:
        """Updates the messages along both directions; total: (n,) beliefs."""
        onward = self._agree(total.index_select(0, self.first) - self.backward)
        back = self._agree(total.index_select(0, self.second) - self.forward)
        self.forward.lerp_(onward, 1 - damping)
        self.backward.lerp_(back, 1 - damping)

    def unrest(self, total: Tensor) -> float:
        """Returns the largest change of a message in the next update; total: (n,) beliefs."""
        onward = self._agree(total.index_select(0, self.first) - self.backward) - self.forward
        back = self._agree(total.index_select(0, self.second) - self.forward) - self.backward
        return float(torch.maximum(onward.abs_().amax(), back.abs_().amax()))

    def _agree(self, cavity: Tensor) -> Tensor:
        """Returns log (exp(-a) + exp(c)) / (1 + exp(c - a)): the message of a label with log-odds c along an edge of
        cost a.
        """
        against = (-cavity.abs()).clamp_min_(-_LARGEST_CAVITY).exp_()
        message = (against * self.differs).add_(1).div_(against.add_(self.differs)).log_()
        return message.copysign_(cavity)

    def arrived(self, like: Tensor) -> Tensor:
        """Returns the sum of the incoming messages of each variable, (n,)."""
        return self._arrivals.add_to(torch.zeros_like(like), self._messages)


def change(before: Tensor, after: Tensor) -> float:
    """Returns the largest difference of two beliefs, (n,) log-odds, see `Beliefs.residual`."""

    def seen(log_odds: Tensor) -> Tensor:
        return log_odds.clamp(-VISIBLE, VISIBLE) * 0.999 + log_odds * 0.001

    return float((seen(after) - seen(before)).abs().amax())


# ----------------------------------------------------------------------------------------------------- checks


def check_members(bag: Tensor, bags: int, n: int) -> Tensor:
    """Returns the number of samples of each bag, (bags,) int64."""
    if bag.dtype != torch.int64 or bag.shape != (n,):
        raise ValueError(
            f"`bag` ({bag.dtype} of shape {tuple(bag.shape)}) must be int64 of shape ({n},): each sample is in one "
            "bag, or in none (-1)."
        )
    wrong = ((bag < -1) | (bag >= bags)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"The bag of sample {first} (={int(bag[first])}) must lie in [0, {bags - 1}], or be -1 for none: "
            f"`bag_counts` has {bags} rows."
        )
    sizes = torch.bincount(bag[bag >= 0], minlength=bags)
    if bool((sizes == 0).any()):
        raise ValueError(f"Bag {int((sizes == 0).nonzero()[0])} is empty: no sample is in it. Leave out its count.")
    return sizes


def _checked_bags(log_odds: Tensor, bag: Tensor, bag_counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns least, most and size of each bag, (bags,) int64."""
    if log_odds.dim() != 1 or not log_odds.is_floating_point() or bool(log_odds.isnan().any()):
        raise ValueError(
            f"`log_odds` ({log_odds.dtype} of shape {tuple(log_odds.shape)}) must be (n,) numbers, not NaN."
        )
    if bag_counts.dim() not in (1, 2) or (bag_counts.dim() == 2 and bag_counts.shape[1] != 2):
        raise ValueError(f"`bag_counts` (of shape {tuple(bag_counts.shape)}) must be of shape (bags,) or (bags, 2).")
    sizes = check_members(bag, len(bag_counts), len(log_odds))
    least, most = (bag_counts, bag_counts) if bag_counts.dim() == 1 else bag_counts.unbind(1)
    check_counts(least, most, sizes)
    return least.long(), most.long(), sizes


def check_edges(edges: Tensor, edge_weight: Tensor, n: int) -> None:
    if edges.dtype != torch.int64 or edges.dim() != 2 or edges.shape[1] != 2:
        raise ValueError(f"`edges` ({edges.dtype} of shape {tuple(edges.shape)}) must be int64 of shape (e, 2).")
    wrong = ((edges < 0) | (edges >= n)).any(1) | (edges[:, 0] == edges[:, 1])
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(f"Edge {first} (={edges[first].tolist()}) must join two different samples of 0..{n - 1}.")
    if edge_weight.shape != (len(edges),) or not bool(((edge_weight >= 0) & edge_weight.isfinite()).all()):
        raise ValueError(
            f"`edge_weight` (of shape {tuple(edge_weight.shape)}) must be {len(edges)} finite numbers of at least 0, "
            "one per edge."
        )


def check_settings(
    lambda_bag: float, lambda_edge: float, factor: str, damping: float, max_iterations: int, tolerance: float
) -> None:
    if factor not in FACTORS:
        raise ValueError(f"`factor` (={factor}) must be one of {', '.join(FACTORS)}.")
    if not lambda_bag >= 0 or (factor == "pairwise" and lambda_bag == math.inf):
        raise ValueError(
            f"`lambda_bag` (={lambda_bag}) must be at least 0, and finite with factor=pairwise: a count that cannot be "
            "missed is no sum of pairs. Take factor=cardinality."
        )
    if not 0 <= lambda_edge < math.inf:
        raise ValueError(f"`lambda_edge` (={lambda_edge}) must be a finite number of at least 0.")
    if not 0 <= damping < 1:
        raise ValueError(f"`damping` (={damping}) must lie in [0, 1).")
    if max_iterations < 1:
        raise ValueError(f"`max_iterations` (={max_iterations}) must be at least 1.")
    if not tolerance > 0:
        raise ValueError(f"`tolerance` (={tolerance}) must be positive.")


def count_members(bag: Tensor, mask: Tensor, bags: int) -> Tensor:
    """Returns the number of each bag's samples in the mask, (bags,) int64."""
    return torch.bincount(bag[mask & (bag >= 0)], minlength=bags)


def of_bag(bag: Tensor, values: Tensor) -> Tensor:
    """Returns the value of each sample's bag, (n, ...) bool; False without a bag."""
    padded = torch.cat(
        [values, torch.zeros_like(values[:1]) if len(values) else values.new_zeros((1, *values.shape[1:]))]
    )
    return padded[torch.where(bag >= 0, bag, len(values))]
