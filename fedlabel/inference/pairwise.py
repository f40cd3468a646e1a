"""LLP-BP's own inference: bags as pairwise potentials, and plain sum-product on them.

Source: Havaldar et al., "Learning from Label Proportions: Bootstrapping Supervised Learners via Belief Propagation",
ICLR 2024 (arXiv 2310.08056) and its released code: synchronous messages from 0, damping .5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlabel.inference.sums import IndexedSums, add_at


def sum_product(
    unary: Tensor,
    pairs: Tensor,
    coupling: Tensor,
    damping: float,
    max_iterations: int,
    tolerance: float,
    change: Callable[[Tensor, Tensor], float],
) -> tuple[Tensor, int, float]:
    """Runs plain sum-product on exp(sum u_i z_i + sum J_ij z_i z_j), updating all messages at once.

    With cavity log-odds c of i without j, the message of i to j is log (1 + exp(c + J)) - log (1 + exp(c)).

    Args:
        unary: (n,) u.
        pairs: (p, 2) int64.
        coupling: (p,) J.
        damping: share of the old message in the new one.
        max_iterations: at least 1.
        tolerance: it stops when no belief is to change by this.
        change: how far apart two beliefs are, (n,) log-odds each.

    Returns:
        (n,) log-odds; iterations; the largest change that the last one asked for.
    """
    first, second = pairs.unbind(1)
    messages = coupling.new_zeros(2 * len(coupling))
    forward, backward = messages.tensor_split(2)
    arrivals = IndexedSums(torch.cat([second, first]), len(unary))
    total, residual, iteration = unary, float("inf"), 0

    def wanted() -> tuple[Tensor, Tensor]:
        onward, back = total[first] - backward, total[second] - forward
        return (
            logsigmoid(-onward) - logsigmoid(-onward - coupling),
            logsigmoid(-back) - logsigmoid(-back - coupling),
        )

    while residual >= tolerance and iteration < max_iterations:
        iteration += 1
        onward, back = wanted()
        forward.lerp_(onward, 1 - damping)
        backward.lerp_(back, 1 - damping)
        before, total = total, arrivals.add_to(unary.clone(), messages)
        residual = change(before, total) / (1 - damping)
        if residual < tolerance and len(pairs):  # what arrives may cancel where what is sent on does not
            onward, back = wanted()
            residual = max(residual, float((onward - forward).abs().max()), float((back - backward).abs().max()))
    return total, iteration, residual


def ising(
    log_odds: Tensor, bag: Tensor, counts: Tensor, sizes: Tensor, edges: Tensor, weight: Tensor, lambda_bag: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the paper's form of the same distribution, exp(sum u_i z_i + sum J_ij z_i z_j) up to a factor.

    u_i = log_odds_i - lambda_bag (1 - 2 Y) - sum_j weight_ij; J_ij = -2 lambda_bag in a bag, + 2 weight_ij on an edge.

    Args:
        log_odds: (n,).
        bag: (n,) int64, -1 for none.
        counts: (bags,) Y.
        sizes: (bags,).
        edges: (e, 2).
        weight: (e,) lambda_edge K.
        lambda_bag: finite.

    Returns:
        u (n,); pairs (p, 2) int64, each once; J (p,).
    """
    n = len(log_odds)
    inside = bag >= 0
    unary = add_at(add_at(log_odds.clone(), edges[:, 0], -weight), edges[:, 1], -weight)
    penalty = lambda_bag * (1 - 2 * counts.to(unary.dtype))
    unary = unary - torch.where(inside, penalty[bag.clamp_min(0)], 0.0) if len(counts) else unary
    order = bag.argsort(stable=True)[int((~inside).sum()) :]
    first = sizes.cumsum(0) - sizes
    keys, couplings = [edges.min(1).values * n + edges.max(1).values], [2 * weight]
    for size in sizes.unique().tolist():
        members = order[first[sizes == size, None] + torch.arange(size, device=bag.device)]
        i, j = torch.triu_indices(size, size, 1, device=bag.device)
        a, b = members[:, i].flatten(), members[:, j].flatten()
        keys.append(torch.minimum(a, b) * n + torch.maximum(a, b))
        couplings.append(torch.full(keys[-1].shape, -2 * lambda_bag, dtype=unary.dtype, device=bag.device))
    key, place = torch.cat(keys).unique(return_inverse=True)
    coupling = add_at(unary.new_zeros(len(key)), place, torch.cat(couplings))
    return unary, torch.stack([key // n, key % n], 1), coupling
