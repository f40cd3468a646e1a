"""Prototypes of the classes over a federation, and labels that lie nearer to another class's prototype.

A prototype is the mean of the unit-length embeddings of a class's samples (Snell et al., "Prototypical Networks for
Few-shot Learning", NeurIPS 2017; federated: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous
Clients", AAAI 2022). Sums and numbers add up, so the prototypes of a federation are those of the union of its data. A
label is suspect if the embedding is more similar (cosine) to another class's prototype. Unit length, so that no sample
has more say than another; embeddings must come from one model, or the spaces do not match.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedlabel.inference.sums import add_at


def embedding_sums(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns for each class the sum of the unit-length embeddings with this label and, last, their number, (classes,
    features + 1) float64; sums over clients.

    Args:
        embeddings: (n, features), of one model.
        labels: (n,) int64, the given ones.
        num_classes: how many classes.
    """
    units = normalize(embeddings.double(), dim=1)
    rows = torch.cat([units, units.new_ones(len(units), 1)], 1)
    return add_at(rows.new_zeros(num_classes, rows.shape[1]), labels, rows)


def prototypes_of(total: Tensor) -> Tensor:
    """Returns the prototypes (classes, features) of unit length, from summed `embedding_sums`; NaN for a class that is
    nobody's label.
    """
    means = normalize(total[:, :-1], dim=1)
    return torch.where(total[:, -1:] > 0, means, torch.nan)


def similarities(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Returns the cosines of embeddings (n, features) and prototypes (classes, features), (n, classes) float64; -1 for
    a class without a prototype.
    """
    return (normalize(embeddings.double(), dim=1) @ prototypes.T).nan_to_num(-1.0)


def nearest_differs(similarity: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) bool, the samples that are more similar to another class's prototype than to that of their label.

    Args:
        similarity: (n, classes).
        labels: (n,) int64, the given ones.
    """
    return similarity.argmax(1) != labels


def nearest_other(similarity: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) int64, the class of the most similar prototype that is not the given label's."""
    return similarity.scatter(1, labels[:, None], -2.0).argmax(1)


def similarity_margin(similarity: Tensor, labels: Tensor) -> Tensor:
    """Returns the quality of each label, (n,) float64 in [0, 1]: 1/2 + (similarity to the given class's prototype -
    the largest other one) / 4; below 0.5 another class is nearer.
    """
    own = similarity.gather(1, labels[:, None])
    best = similarity.gather(1, nearest_other(similarity, labels)[:, None])
    return (0.5 + (own - best) / 4)[:, 0]
