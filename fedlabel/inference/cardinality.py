"""Independent labels with a count constraint: posteriors, likelihoods and the messages of one count factor per bag.

Labels z in {0, 1}^k with log-odds theta and a factor f on their sum have P(z) ~ exp(theta z) f(sum of z). A bag's
factor is given by the least and the most that its count may be, and by `lambda_bag`:

- inf: f(s) = 1[least <= s <= most]; a known count has least = most, "at least one" is (1, k);
- finite: f(s) = exp(-lambda_bag d^2), d the distance of s from that interval: LLP-BP's penalty.

All is computed after an exponential tilt: with theta + t in place of theta, for the t at which the expected sum meets
the factor, and f(s) exp(-t s) in place of f. That changes nothing, but what is needed is then never in a tail:
independent labels whose expected sum is an integer have their most likely sum there (Darroch, Annals of Mathematical
Statistics 1964). So sums of products of probabilities are enough, with no logarithm in the inner loop.

Source: Havaldar et al., "Learning from Label Proportions: Bootstrapping Supervised Learners via Belief Propagation",
ICLR 2024 (arXiv 2310.08056), for the penalty; Chen et al. (arXiv 2402.01922) for count posteriors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

EXACT_UP_TO = 256
"""The largest bag whose messages are exact; above, they are those of a Gaussian."""
LARGEST = 50.0
"""After the tilt log-odds are cut to this: the probability of the other class is then 2e-22."""
CERTAIN = 1e4
"""Log-odds that stand for certainty: no sum of messages comes near."""
MOST_CELLS = 200_000_000
"""The most numbers that the exact messages of one stack of bags are computed from: 0.8 GB in single precision."""
BLOCK, LARGE_BLOCK = 1 << 16, 1 << 25
"""Numbers that the backward pass of `exact_messages` works on together: what stays in a core's cache, and on a GPU."""
SMALLEST_VARIANCE = 10.0
"""A bag above `EXACT_UP_TO` whose count varies less than this has exact messages, too: it is far from Gaussian."""
NEARLY = 1e-9
"""What `tilt` leaves of the expected number of the other labels, where all of a bag's labels are 1, or 0."""
FIXED_STEPS, MOST_STEPS = 14, 60
"""Steps of `tilt` without and with looking whether it is done. Log-odds within +-30 need 12, whatever the count."""
CLASS_STATES = 100_000
"""The most count vectors that `class_posterior` looks at together."""


def wants_large_blocks(values: Tensor) -> bool:
    """Returns whether work on the device of `values` is best cut into few large pieces: on a GPU every call costs a
    launch, while a core is fastest on what fits its cache.
    """
    return values.is_cuda


def bag_posterior(log_odds: Tensor, count: int | Tensor) -> Tensor:
    """Returns p(z_i = 1 | sum of z = count) of independent z; exact whatever the size.

    p = (.9, .6, .2) with count 1 gives (.837209, .139535, .023256).

    Args:
        log_odds: (..., n) float, log p / (1 - p); +-inf is certainty.
        count: in 0..n: one integer for all, or (...).

    Returns:
        (..., n) float.

    Raises:
        ValueError: an impossible count, or certainties that contradict it.
    """
    log_odds = torch.as_tensor(log_odds)
    theta = log_odds.reshape(-1, log_odds.shape[-1])
    counts = torch.as_tensor(count, device=theta.device).expand(log_odds.shape[:-1]).reshape(-1)
    sizes = torch.full_like(counts, theta.shape[1])
    check_counts(counts, counts, sizes)
    check_evidence((theta == torch.inf).sum(1), (theta == -torch.inf).sum(1), counts, counts, sizes)
    cut = theta.clamp(-CERTAIN, CERTAIN)
    posterior = (cut + exact_messages(cut, counts, counts)).sigmoid()
    truth = torch.where(theta.isinf(), theta > 0, (counts > 0)[:, None])
    certain = theta.isinf() | (counts == 0)[:, None] | (counts == sizes)[:, None]
    return torch.where(certain, truth.to(posterior.dtype), posterior).reshape(log_odds.shape)


def count_log_likelihood(log_odds: Tensor, count: int | Tensor) -> Tensor:
    """Returns log p(sum of z = count) of independent z; differentiable by the log-odds, also under `torch.func.vmap`.

    p = (.9, .6, .2) with count 1 gives log .344. The gradient is `bag_posterior` minus p. Exact up to `EXACT_UP_TO`
    labels; above, after the tilt, the mass that a Gaussian of the same variance has within half a label of its mean: at
    most 1, exact again where all labels are certain, and measured to be within .2, and .2 over that variance, of it.

    Args:
        log_odds: (..., n), finite, or -inf where there is no label, for bags smaller than n.
        count: in 0..n (not checked): one integer for all, or (...).

    Returns:
        (...) float.
    """
    size = log_odds.shape[-1]
    counts = torch.as_tensor(count, device=log_odds.device).expand(log_odds.shape[:-1])
    target = counts.to(log_odds.dtype)
    t = tilt(log_odds.detach(), target, target, tolerance=1e-6, checks=False)[..., None]
    there = log_odds > -math.inf
    share = (target / there.sum(-1).clamp_min(1))[..., None]
    terms = logsigmoid(-log_odds) - logsigmoid(-log_odds - t) - torch.where(there, t * share, torch.zeros_like(t))
    p, q = (log_odds + t).sigmoid(), (-log_odds - t).sigmoid()
    if size > EXACT_UP_TO:
        # The tilt moves with the log-odds: one more step of Newton's, which moves nothing, has its derivative.
        step = (p.sum(-1) - target) / (p * q).sum(-1).detach().clamp_min(1e-3)
        moved = log_odds + t - step[..., None]
        variance = (moved.sigmoid() * (-moved).sigmoid()).sum(-1).clamp_min(1e-4)  # erf is 1 there
        return terms.sum(-1) + (0.5 / (2 * variance).sqrt()).erf().log()
    row = pad(torch.ones_like(p[..., :1]), (0, size))
    for one, zero in zip(p.unbind(-1), q.unbind(-1), strict=True):
        row = row * zero[..., None] + pad(row[..., :-1], (1, 0)) * one[..., None]
    reached = torch.arange(size + 1, device=row.device) == counts[..., None]
    return terms.sum(-1) + (row * reached).sum(-1).log()


def tilt(
    theta: Tensor,
    least: Tensor,
    most: Tensor,
    lambda_bag: float = math.inf,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
    checks: bool = True,
) -> Tensor:
    """Returns t such that the expected sum of labels with log-odds theta + t satisfies the factor; 0 if it already
    does.

    It solves sum of sigmoid(theta + t) + t / (2 lambda_bag) = the nearest of `least` and `most`. Without the penalty
    the log-odds of both sides are compared, which are equal at once where all theta are, and nearly linear in tails.
    Newton's method inside a bracket: what is solved is kept, and the bracket is halved where a step would reach its
    end or, with a penalty, is more than half as long as the one before: from flat part to flat part they go to and fro
    (Press et al., Numerical Recipes, section 9.4). A count of none or all has no root: t is where the expected sum
    misses it by `NEARLY`.

    Args:
        theta: (..., k); -inf: no variable.
        least: (...) float.
        most: (...) float.
        lambda_bag: see the top of this file.
        start: (...) a guess; None: 0.
        tolerance: on the expected sum, or what the type of `theta` can tell if that is more.
        checks: whether to stop as soon as all are within `tolerance`; False: always `FIXED_STEPS`, for
            `torch.func.vmap`.

    Returns:
        (...) float.
    """
    soft = lambda_bag < math.inf
    stiffness = 1 / (2 * lambda_bag) if lambda_bag > 0 else math.inf
    expected = theta.sigmoid().sum(-1)
    target = torch.minimum(torch.maximum(expected, least), most)
    tolerance = max(tolerance, 4 * torch.finfo(theta.dtype).eps * theta.shape[-1])
    t = torch.zeros_like(target) if start is None else start
    for number in range(MOST_STEPS if checks else FIXED_STEPS):
        p = (theta + t[..., None]).sigmoid()
        total = p.sum(-1)
        gap = total + stiffness * t - target if soft else total - target
        solved = gap.abs() <= tolerance
        if checks and bool(solved.all()):
            break
        if number == 0:  # not before: a good start needs none
            size, odds, low, high = _bracket(theta, target, stiffness if soft else 0.0)
            low, high = low.masked_fill(target == expected, 0), high.masked_fill(target == expected, 0)
            moved = high - low
        slope = (p * (1 - p)).sum(-1)
        low = torch.where(gap < 0, torch.maximum(low, t), low)
        high = torch.where(gap > 0, torch.minimum(high, t), high)
        if soft:
            newton = t - gap / (slope + stiffness)
            good = (newton > low) & (newton < high) & ((newton - t).abs() <= moved / 2)
        else:
            share = total / size
            newton = t - (share.logit() - odds) * share * (size - total) / slope
            good = (newton > low) & (newton < high)  # False also for what is not a number, in a flat part
        before, t = t, torch.where(solved, t, torch.where(good, newton, (low + high) / 2))
        moved = (t - before).abs() if soft else moved
    return t


def _bracket(theta: Tensor, target: Tensor, stiffness: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the number of variables, the log-odds of `target` among them, and a bracket of `tilt`'s root, (...) each.

    Were all log-odds the least of them, or all the largest, the root would be known: it lies between the two.
    """
    there = theta > -math.inf
    size = there.sum(-1)
    odds = target.clamp_min(NEARLY).log() - (size - target).clamp_min(NEARLY).log()
    low, high = odds - theta.amax(-1), odds - torch.where(there, theta, math.inf).amin(-1)
    if stiffness > 0:  # the penalty pulls t towards 0, and the expected sum stays in 0..size
        low = torch.maximum(low.clamp_max(0), (target - size) / stiffness)
        high = torch.minimum(high.clamp_min(0), target / stiffness)
        return size, odds, low, high
    return size, odds, torch.where(target >= size, high, low), torch.where(target <= 0, low, high)


def exact_messages(
    theta: Tensor,
    least: Tensor,
    most: Tensor,
    lambda_bag: float = math.inf,
    start: Tensor | None = None,
    largest: int | None = None,
) -> Tensor:
    """Returns the factors' messages to their variables; O(k * most) for a hard factor, O(k^2) for a soft one.

    With A_i the distribution of the sum of the first i variables and C_i(s) the weight of all that may follow a sum s,
    the message to variable i is log sum_s A_{i-1}(s) C_i(s + 1) - log sum_s A_{i-1}(s) C_i(s). p = (.9, .6, .2) with
    count 1 gives (-.559616, -2.224624, -2.351375).

    Args:
        theta: (bags, k) cavity log-odds; -inf: no variable, for bags smaller than k.
        least: (bags,) integers.
        most: (bags,) integers.
        lambda_bag: see the top of this file.
        start: (bags,) a guess of `tilt`, replaced by its value; None: 0.
        largest: the largest of `most`; None: looked up, for which a GPU has to finish first.

    Returns:
        (bags, k) log-odds; anything where there is no variable.

    Raises:
        ValueError: it would take too much memory.
    """
    bags, size = theta.shape
    largest = int(most.max()) if largest is None else largest
    if size * bags * (size + 1 if lambda_bag < math.inf else largest + 1) > MOST_CELLS:
        raise ValueError(
            f"The exact messages of {bags} bags of {size} samples and counts up to {largest} need more than "
            f"{MOST_CELLS} numbers. Take smaller bags, or one exact count for each."
        )
    t = tilt(theta, least.to(theta.dtype), most.to(theta.dtype), lambda_bag, start)
    if start is not None:
        start.copy_(t)
    last = min(size, largest) if lambda_bag == math.inf else size
    shifted = (theta + t[:, None]).clamp(-LARGEST, LARGEST).masked_fill(theta == -math.inf, -math.inf)
    one, zero = (p.t()[..., None].unbind() for p in (shifted.sigmoid(), (-shifted).sigmoid()))
    # Views are made at once and sums taken for a block of variables: of a few small bags the calls take the time.
    before = theta.new_zeros(size, bags, last + 1)
    before[0, :, 0] = 1
    state, lower, upper = before.unbind(), before[..., :-1].unbind(), before[..., 1:].unbind()
    for i in range(size - 1):
        torch.mul(state[i], zero[i], out=state[i + 1])
        upper[i + 1].addcmul_(lower[i], one[i])
    block = LARGE_BLOCK if wants_large_blocks(theta) else BLOCK
    after = theta.new_empty(min(size, max(1, block // (bags * (last + 1)))), bags, last + 1)
    state, lower, upper = after.unbind(), after[..., :-1].unbind(), after[..., 1:].unbind()
    messages, end = theta.new_empty(size, bags), size
    following = _tilted_factor(t, least, most, lambda_bag, last)
    while end > 0:
        begin = max(0, end - len(after))
        state[end - begin - 1].copy_(following)
        for i in range(end - begin - 1, 0, -1):
            torch.mul(state[i], zero[begin + i], out=state[i - 1])
            lower[i - 1].addcmul_(upper[i], one[begin + i])
        here, there = before[begin:end], after[: end - begin]
        with_one = (here[..., :-1] * there[..., 1:]).sum(2)
        messages[begin:end] = with_one.log() - (here * there).sum(2).log()
        following = state[0] * zero[begin]
        following[:, :-1].addcmul_(upper[0], one[begin])
        end = begin
    messages = messages.t()
    return messages.nan_to_num(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST) + t[:, None]


def gaussian_messages(
    theta: Tensor, count: Tensor, lambda_bag: float = math.inf, start: Tensor | None = None
) -> Tensor:
    """Returns the messages of factors of one count each, approximating the sum of the other variables as Gaussian;
    O(k).

    With mean m and variance v of the sum of the others after the tilt: t + (2 (s - m) - 1) / (2 v + 1 / lambda_bag)
    for s = count - t / (2 lambda_bag). Arguments and result: see `exact_messages`.
    """
    counts = count.to(theta.dtype)
    t = tilt(theta, counts, counts, lambda_bag, start)
    if start is not None:
        start.copy_(t)
    p = (theta + t[:, None]).sigmoid()
    variance = p * (1 - p)
    others, spread = p.sum(1, keepdim=True) - p, variance.sum(1, keepdim=True) - variance
    sought = (counts - t / (2 * lambda_bag))[:, None]
    return t[:, None] + ((2 * (sought - others) - 1) / (2 * spread + 1 / lambda_bag)).clamp_(-LARGEST, LARGEST)


def class_posterior(log_probs: Tensor, counts: Tensor) -> Tensor:
    """Returns p(y_i = c | class c occurs counts[c] times, for all c) of independent y; exact.

    ((.7, .2, .1), (.3, .5, .2), (.2, .2, .6)) with counts (1, 1, 1) has first row (.798658, .147651, .053691).

    Args:
        log_probs: (..., n, classes) float, need not be normalised; -inf is impossible.
        counts: (..., classes) integers with sum n.

    Returns:
        (..., n, classes) float.

    Raises:
        ValueError: counts that are impossible, contradicted, or with more than `CLASS_STATES` vectors up to them.
    """
    return (class_messages(log_probs, counts) + log_probs).softmax(-1)


def class_messages(log_probs: Tensor, counts: Tensor) -> Tensor:
    """Returns the messages log p(counts | y_i = c), up to a constant per sample, given the other samples; as
    `class_posterior`.
    """
    n, classes = log_probs.shape[-2:]
    given, limits = log_probs.reshape(-1, n, classes), counts.reshape(-1, classes)
    wrong = ((limits < 0).any(1) | (limits.sum(1) != n)).nonzero()
    if len(wrong):
        raise ValueError(
            f"The counts of bag {int(wrong[0])} (={limits[int(wrong[0])].tolist()}) must be non-negative and sum to "
            f"its number of samples, {n}."
        )
    states = int((limits + 1).prod(1).max())
    if states > CLASS_STATES:
        raise ValueError(
            f"The counts have up to {states} vectors below them, more than {CLASS_STATES}: take `class_marginals`, "
            "which then has one factor per class."
        )
    # A state is how often each class occurred so far, written with digit c in 0..counts[c].
    strides = torch.cat([torch.ones_like(limits[:, :1]), (limits + 1).cumprod(1)[:, :-1]], 1)[:, None]
    state = torch.arange(states, device=counts.device)[:, None]
    digit = state // strides % (limits + 1)[:, None]
    nowhere = given.new_full((len(given), 1), -math.inf)
    target = torch.where(digit < limits[:, None], state + strides, states)
    source = torch.where(digit > 0, state - strides, states)
    source = torch.where(state < (limits + 1).prod(1)[:, None, None], source, states)

    def moved(weights: Tensor, index: Tensor) -> Tensor:
        return torch.cat([weights, nowhere], 1).gather(1, index.clamp_max(states).flatten(1)).view(index.shape)

    before = [torch.where(state[:, 0] == 0, 0.0, nowhere)]
    for i in range(n - 1):
        before.append((moved(before[-1], source) + given[:, i, None]).logsumexp(2))
    after = torch.where(state[:, 0] == (limits + 1).prod(1)[:, None] - 1, 0.0, nowhere)
    messages = torch.empty_like(given)
    for i in range(n - 1, -1, -1):
        following = moved(after, target)
        messages[:, i] = (before[i][:, :, None] + following).logsumexp(1)
        after = (following + given[:, i, None]).logsumexp(2)
    wrong = (messages + given == -math.inf).all(2).any(1).nonzero()
    if len(wrong):
        raise ValueError(f"Bag {int(wrong[0])} contradicts itself: none of its possible labels have its counts.")
    return messages.view(log_probs.shape)


def check_counts(least: Tensor, most: Tensor, sizes: Tensor, classes: int = 1) -> None:
    """Checks the counts of bags, (bags * classes,) each.

    Raises:
        ValueError: a count is fractional, negative, above its bag's size, or the least is above the most.
    """
    for values in (least, most):
        wrong = ((values != values.round()) | (values < 0) | ~(values <= sizes)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(
                f"The count of bag {place // classes} (={values[place].item():g}) must be an integer in "
                f"[0, {int(sizes[place])}], the number of its samples."
            )
    wrong = (least > most).nonzero()
    if len(wrong):
        bag = int(wrong[0])
        raise ValueError(f"The least count of bag {bag} (={int(least[bag])}) is above the most (={int(most[bag])}).")


def check_evidence(ones: Tensor, zeros: Tensor, least: Tensor, most: Tensor, sizes: Tensor) -> None:
    """Checks the numbers of certain ones and zeros in each bag of `sizes` samples; (bags,) each.

    Raises:
        ValueError: no labels of a bag agree with its count.
    """
    wrong = ((ones > most) | (sizes - zeros < least)).nonzero()
    if len(wrong):
        bag = int(wrong[0])
        raise ValueError(
            f"Bag {bag} contradicts itself: {int(ones[bag])} of its {int(sizes[bag])} samples are certainly 1 and "
            f"{int(zeros[bag])} certainly 0, but its count must lie in [{int(least[bag])}, {int(most[bag])}]."
        )


def _tilted_factor(t: Tensor, least: Tensor, most: Tensor, lambda_bag: float, last: int) -> Tensor:
    """Returns f(s) exp(-t s) for s = 0..last, (bags, last + 1), largest value 1."""
    sums = torch.arange(last + 1, device=t.device)
    distance = (least[:, None] - sums).clamp_min(0) + (sums - most[:, None]).clamp_min(0)
    if lambda_bag == math.inf:
        log_factor = torch.where(distance == 0, 0.0, -math.inf).to(t.dtype)
    else:
        log_factor = -lambda_bag * distance.to(t.dtype).square()
    log_factor = log_factor - t[:, None] * sums
    return (log_factor - log_factor.amax(1, keepdim=True)).exp()
