"""The graph of neighbours for belief propagation: neighbours by cosine distance, weights by Euclidean distance.

Source: Havaldar et al., "Learning from Label Proportions: Bootstrapping Supervised Learners via Belief Propagation",
ICLR 2024 (arXiv 2310.08056): the k nearest by cosine distance, weight exp(-|x_i - x_j|), a Matern kernel of order 1/2
and length scale 1, which is nothing in many dimensions. Here the length scale is by default the median distance of
neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BACKENDS = ("sklearn", "faiss")
FAISS_CELLS, FAISS_PROBES = 1024, 16
"""Above `FAISS_EXACT` samples faiss looks into the 16 nearest of 1024 cells: its neighbours are then approximate."""
FAISS_EXACT = 50_000


class Graph(NamedTuple):
    """Undirected, without loops, each edge once."""

    edges: Tensor
    """(e, 2) int64, the smaller position first, sorted."""
    weight: Tensor
    """(e,) float32 in (0, 1]."""


def neighbor_graph(
    features: Tensor,
    num_neighbors: int = 5,
    max_distance: float = 2.0,
    length_scale: float | None = None,
    backend: str = "sklearn",
) -> Graph:
    """Connects every sample to its nearest neighbours; two are connected if either is among the nearest of the other.

    Args:
        features: (n, d) float.
        num_neighbors: how many; all others if there are fewer.
        max_distance: edges of this cosine distance or more, in [0, 2], are left out; 2: none is.
        length_scale: of the kernel; None: the median length of the edges.
        backend: sklearn is exact; faiss, an extra, is for hundreds of thousands of samples and then approximate.

    Raises:
        ValueError: an argument outside its range, features that are not finite, or a backend that is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` (={backend}) must be one of {', '.join(BACKENDS)}.")
    if num_neighbors < 0:
        raise ValueError(f"`num_neighbors` (={num_neighbors}) must be at least 0.")
    if length_scale is not None and not 0 < length_scale < float("inf"):
        raise ValueError(f"`length_scale` (={length_scale}) must be a positive number, or None.")
    values = features.detach().cpu().double().numpy()
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"`features` (of shape {values.shape}) must be (n, d) finite numbers.")
    n = len(values)
    count = min(num_neighbors, n - 1)
    if count < 1:
        return Graph(torch.zeros(0, 2, dtype=torch.int64, device=features.device), features.new_zeros(0))
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    directions = (values / np.maximum(norm, np.finfo(np.float64).tiny)).astype(np.float32)
    nearest = (_sklearn if backend == "sklearn" else _faiss)(directions, count)
    pairs = np.stack([np.repeat(np.arange(n), nearest.shape[1]), nearest.ravel()], 1)
    pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs[:, 1] >= 0)]
    edges = np.unique(np.sort(pairs, axis=1), axis=0)
    first, second = edges.T
    if max_distance < 2:
        edges = edges[1 - (directions[first] * directions[second]).sum(1) < max_distance]
    lengths = np.linalg.norm(values[edges[:, 0]] - values[edges[:, 1]], axis=1)
    scale = length_scale or (float(np.median(lengths)) if len(lengths) else 1.0) or 1.0
    weight = torch.from_numpy(np.exp(-lengths / scale).astype(np.float32))
    return Graph(torch.from_numpy(edges).to(features.device), weight.to(features.device))


def _sklearn(directions: np.ndarray, count: int) -> np.ndarray:
    """Returns (n, count) the nearest neighbours of each row; for rows of equal length Euclidean and cosine order
    agree.
    """
    from sklearn.neighbors import NearestNeighbors  # here: it takes a second to import

    found: np.ndarray = NearestNeighbors(n_neighbors=count).fit(directions).kneighbors(return_distance=False)
    return found


def _faiss(directions: np.ndarray, count: int) -> np.ndarray:
    """As `_sklearn`, with each row itself among its nearest and -1 where too few were found."""
    try:
        import faiss  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError("`backend` (=faiss) needs the package faiss-cpu: pip install 'fedlabel[faiss]'.") from None
    n, dimensions = directions.shape
    index: Any = faiss.IndexFlatIP(dimensions)
    if n > FAISS_EXACT:
        index = faiss.IndexIVFFlat(index, dimensions, FAISS_CELLS, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = FAISS_PROBES
        index.train(directions)
    index.add(directions)
    found: np.ndarray = index.search(directions, count + 1)[1]
    return found
