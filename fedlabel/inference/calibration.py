"""How sure two models should be: a temperature for each, and the weights of their mixture, from held-out labels.

Sources: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling: one
number that divides all logits, fitted on held-out labels); the weight of a mixture of fixed models by EM is textbook.

What differs: few labels are held out, so both fits have a prior of `PSEUDO` samples: one whose label is distributed as
the model itself says (temperature 1), and one that each of the two models explains (equal weights).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PSEUDO = 1.0
"""Samples that the prior counts for."""
LARGEST = 20.0
"""Inverse temperatures lie in [1 / LARGEST, LARGEST]."""
BISECTIONS = 40
EM_STEPS = 50


def inverse_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns b, (), for which softmax(b * logits) explains the labels best: below 1 for a model that is too sure.

    The negative log-likelihood is convex in b, with the derivative sum_i E_b[z_i] - z_i[y_i]; the prior adds
    E_b[z] - E_1[z], averaged over the samples. Its zero is found by bisection.

    Args:
        logits: (n, classes) of samples that the model was not trained on.
        labels: (n,) int64.
    """
    if not len(logits):
        return logits.new_ones(())
    z = logits.double()
    prior = PSEUDO / len(z)
    pulls = z.gather(1, labels[:, None]).sum() + prior * (z.softmax(1) * z).sum()
    low, high = -z.new_full((), math.log(LARGEST)), z.new_full((), math.log(LARGEST))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_large = (1 + prior) * ((middle.exp() * z).softmax(1) * z).sum() > pulls
        low, high = torch.where(too_large, low, middle), torch.where(too_large, middle, high)
    return ((low + high) / 2).exp().to(logits.dtype)


def mixture_weight(first: Tensor, second: Tensor) -> Tensor:
    """Returns w, (), for which the mixture w * p_first + (1 - w) * p_second explains the labels best, by EM.

    Args:
        first: (n,) log-probability of each label under the first model.
        second: (n,) likewise, under the second one.
    """
    weight = first.new_full((), 0.5)
    for _ in range(EM_STEPS):
        responsibility = (first - second + torch.logit(weight)).sigmoid()
        weight = (responsibility.sum() + PSEUDO) / (len(first) + 2 * PSEUDO)
    return weight
