"""Client priors: the class prior of each client, in its model where it learns and where it guesses.

All clients share p(x | y), and client k has a class prior pi_k of its own: p_k(y | x) = softmax(f(x) + log pi_k). With
log pi_k added to the logits of student and teachers, labels and pseudo-labels that follow pi_k no longer pull the
network f, which is what is sent and evaluated, towards the client's classes. The prior is estimated anew in each round,
from the client's labels, or by EM with the received model (Saerens, Latinne, Decaestecker, Neural Computation 2002),
and stays with the client.

Relatives: logit adjustment (Menon et al., ICLR 2021), balanced softmax (Ren et al., NeurIPS 2020), FedLC (Zhang et al.,
ICML 2022). docs/ideas/client-priors.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, one_of
from fedlabel.data.labels.supervision import Supervision
from fedlabel.methods.batch import Model

KINDS = ("none", "labels", "em")
FLOOR = 1e-6
"""The smallest probability of a class."""
CLASS_LOGITS = ((), ("all",), ("classify",))
"""The parts of a network that end in class logits."""
NO_PRIOR = torch.zeros(0)
"""In place of log probabilities: nothing is added."""


@dataclass(frozen=True)
class PriorConfig:
    """The class prior of each client (see fedlabel/learning/prior.py)."""

    kind: str = "none"
    """none; labels: from the client's labels and bag counts; em: from all of its samples, by EM with the received
    model that begins at the former."""
    smoothing: float = 1.0
    """Samples in each class that are added to a client's own."""
    strength: float = 1.0
    """Factor of the logarithm that is added to the logits."""
    warmup_rounds: int = 0
    """Rounds of a run with kind=em in which the labels decide alone, as the model knows little."""
    steps: int = 10
    """em: its steps."""

    def __post_init__(self) -> None:
        one_of(self, "prior", kind=KINDS)
        finite(self, "prior", "smoothing", "strength")
        at_least(self, "prior", 0, "warmup_rounds")
        at_least(self, "prior", 1, "steps")


def label_counts(supervision: Supervision) -> Tensor:
    """Returns (classes,) float, how many samples of each class are known of: a label counts 1, a candidate set in equal
    parts, noisy labels as they are, samples of a bag by its counts; others count nothing.
    """
    candidates, in_bag = supervision.candidates.float(), supervision.bag >= 0
    alone = supervision.has_supervision & ~in_bag & ~candidates.bool().all(1)
    shares = candidates[alone] / candidates[alone].sum(1, keepdim=True)
    return shares.sum(0) + supervision.bag_counts.to(shares.dtype).sum(0)


def smoothed(counts: Tensor, smoothing: float) -> Tensor:
    """Returns probabilities (classes,) of counts with `smoothing` more in each class; at least `FLOOR`."""
    total = counts.sum() + smoothing * len(counts)
    uniform = torch.full_like(counts, 1 / len(counts))
    return torch.where(total > 0, (counts + smoothing) / total, uniform).clamp_min(FLOOR)


def em_step(log_likelihood: Tensor, prior: Tensor, fixed: Tensor, smoothing: float) -> Tensor:
    """Returns the prior after one step of EM.

    Args:
        log_likelihood: (n, classes), log p(x | y) up to a constant per sample, plus log p(label | y), -inf where y is
            impossible.
        prior: (classes,).
        fixed: (classes,) counts of further samples, whose classes are known.
        smoothing: see `PriorConfig`.
    """
    posterior = (log_likelihood + prior.log()).softmax(1)
    return smoothed(posterior.sum(0) + fixed, smoothing)


def client_prior(config: PriorConfig, supervision: Supervision, logits: Tensor | None) -> Tensor:
    """Returns a client's class prior, (classes,).

    Args:
        config: how it is estimated.
        supervision: of the client's n samples.
        logits: (n, classes) of the received model; None: the labels decide alone.
    """
    prior = smoothed(label_counts(supervision), config.smoothing)
    if logits is None:
        return prior
    alone = supervision.bag < 0
    possible = supervision.candidates | supervision.noisy[:, None]  # a noisy label rules nothing out
    log_likelihood = logits.float().masked_fill(~possible.to(logits.device), -torch.inf)[alone.to(logits.device)]
    prior, fixed = prior.to(logits.device), supervision.bag_counts.sum(0).to(logits.device, torch.float32)
    for _ in range(config.steps):
        prior = em_step(log_likelihood, prior, fixed, config.smoothing)
    return prior


def with_prior(model: Model, log_prior: Tensor) -> Model:
    """Returns a model whose class logits have a client's log prior added.

    Args:
        model: any.
        log_prior: (classes,); (0,): nothing is added.

    Raises:
        ValueError: (when it is called) its outputs are no logits of the classes.
    """
    if not log_prior.shape[-1]:
        return model

    def adjusted(inputs: Tensor, *part: str) -> Tensor:
        outputs = model(inputs, *part)
        if part not in CLASS_LOGITS:
            return outputs
        if outputs.shape[-1] != log_prior.shape[-1]:
            raise ValueError(
                f"`prior.kind` needs a network whose outputs are the {log_prior.shape[-1]} classes, and this one has "
                f"{outputs.shape[-1]}: set prior.kind=none."
            )
        return outputs + log_prior

    return adjusted


def all_with_prior(models: Mapping[str, Model], log_prior: Tensor) -> Mapping[str, Model]:
    """Returns models as `with_prior` does."""
    return {name: with_prior(model, log_prior) for name, model in models.items()} if log_prior.shape[-1] else models
