"""Metrics as pure functions of counts, and sums of counts over steps and clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.inference.label_model import coverage_normalized_votes, vote_tallies
from fedlabel.methods.batch import PseudoLabels

Counts = dict[str, list[float]]
"""Name -> numbers that add up over clients: what travels from a client to the server beside the model."""


def add_counts(parts: Iterable[Mapping[str, list[float]]]) -> Counts:
    """Returns the element-wise sum over `parts`, in their order, in double precision; a missing name counts as 0."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, values in part.items():
            array = np.asarray(values, dtype=np.float64)
            total[name] = total[name] + array if name in total else array
    return {name: array.tolist() for name, array in total.items()}


def means(sums: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns sum / count of every name whose value is (sum, count); names with count 0 are omitted."""
    return {name: pair[0] / pair[1] for name, pair in sums.items() if pair[1] > 0}


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """Returns numerator / denominator, NaN where the denominator is 0."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Returns (classes, classes) int64 counts: row = truth, column = prediction; from two (n,) int64 tensors."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Returns the probability that a sample of class 1 scores higher than one of class 0, ties counting half.

    This is the area under the ROC curve; NaN without samples of both classes, or if a score is not finite.

    Args:
        scores: (n,) the higher, the rather class 1.
        labels: (n,) int64, 0 or 1.
    """
    # Imported here: scikit-learn takes a second to import, and only tasks of two classes need it.
    from sklearn.metrics import roc_auc_score

    values, truth = scores.cpu().numpy(), labels.cpu().numpy()
    if not np.isfinite(values).all() or len(np.unique(truth)) < 2:
        return math.nan
    return float(roc_auc_score(truth, values))


def jain_index(values: np.ndarray) -> float:
    """Returns Jain's fairness index (sum x)^2 / (n sum x^2) in [1/n, 1]; 1 = all equal (also when all are 0)."""
    squares = float((values**2).sum())
    return float(values.sum() ** 2 / (len(values) * squares)) if squares > 0 else 1.0


def worst_share_mean(values: np.ndarray, share: float = 0.1) -> float:
    """Returns the mean of the lowest `share` of the values, of at least one of them."""
    count = max(1, int(np.ceil(share * len(values))))
    return float(np.sort(values)[:count].mean())


def best_share_mean(values: np.ndarray, share: float = 0.1) -> float:
    """Returns the mean of the highest `share` of the values, of at least one of them."""
    return -worst_share_mean(-values, share)


def tenths(values: np.ndarray) -> tuple[float, float]:
    """Returns the means of the lowest and of the highest tenth of the finite ones among (n,) values; NaN of none."""
    finite = values[np.isfinite(values)]
    return (worst_share_mean(finite), best_share_mean(finite)) if len(finite) else (math.nan, math.nan)


RATES = ("coverage", "overlap", "conflict", "accuracy")
OF_SAMPLES = ("voted", "majority_accuracy", "normalized_vote_accuracy")
COUNTED = ("function_votes", "function_counts", "function_samples")
"""See `function_counts`."""
CALIBRATION_BINS = 15
"""Equal-width bins of confidence: [0, 1/15), [1/15, 2/15), ..., [14/15, 1]."""


def calibration_bins(confidence: Tensor, correct: Tensor) -> np.ndarray:
    """Returns (3, bins) float64 per confidence bin: number of samples, sum of their confidence, number correct.

    All three add up over clients.

    Args:
        confidence: (n,) in [0, 1]; NaN, of a network that diverged, counts as 0.
        correct: (n,) bool.
    """
    values = confidence.double().cpu().numpy()  # there sums do not depend on the order in which threads arrive
    values = np.nan_to_num(values)
    places = np.clip((values * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    weights = (np.ones_like(values), values, correct.double().cpu().numpy())
    bins = np.stack([np.bincount(places, weight, CALIBRATION_BINS) for weight in weights])
    return bins.astype(np.float64)  # numpy counts nothing in integers


def calibration_error(bins: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al., 2017) of `calibration_bins`; NaN without a sample.

    The mean over samples of their bin's |accuracy - mean confidence|: sum over bins of |correct - sum of confidence|,
    divided by the number of samples.
    """
    count, confidence, correct = bins
    return float(np.abs(correct - confidence).sum() / count.sum()) if count.sum() > 0 else math.nan


def pseudo_label_counts(pseudo: PseudoLabels, truth: Tensor, num_classes: int, kind: Tensor) -> Counts:
    """Returns the evaluator's counts on a client: pseudo-labels against the hidden labels.

    Args:
        pseudo: all pseudo-labels of a client in a round, (n,) each.
        truth: (n,) int64 hidden labels of the same samples; -1 where nobody knows.
        num_classes: number of classes.
        kind: (n,) int64, kind of label of each sample, see `Supervision.kind`.

    Returns:
        "drawn", "kept", "correct" per true class (classes,), and the same "..._by_expert" (local, global);
        "kept_by_both", "correct_by_both" per class and expert, (classes, 2) flattened;
        "confidence_by_expert", the sum of the confidences of the kept ones, per expert;
        "drawn_by_kind", "correct_by_kind", where a label counts as correct whether or not it was kept;
        `calibration_bins` of all draws and of the kept ones, a list per row (see `bins_of`); of two classes "beliefs",
        how many draws have p(class 1) in each of `BELIEF_BINS` equal parts of [0, 1]; empty without true labels.
    """
    has_truth = truth >= 0
    if not has_truth.any():
        return {}
    truth, kind, pseudo = truth[has_truth], kind[has_truth], PseudoLabels(*(values[has_truth] for values in pseudo))
    correct = pseudo.keep & (pseudo.label == truth)

    def per_class(mask: Tensor) -> list[float]:
        return torch.bincount(truth[mask], minlength=num_classes).double().tolist()

    def per_expert(mask: Tensor) -> list[float]:
        return torch.bincount(pseudo.from_global[mask].long(), minlength=2).double().tolist()

    def per_both(mask: Tensor) -> list[float]:
        place = 2 * truth[mask] + pseudo.from_global[mask].long()
        return torch.bincount(place, minlength=2 * num_classes).double().tolist()

    sure = pseudo.confidence.double().nan_to_num().cpu() * pseudo.keep.cpu()
    by_expert = [(sure * (pseudo.from_global.cpu() == expert)).sum().item() for expert in (False, True)]
    return {
        "drawn": per_class(torch.ones_like(pseudo.keep)),
        "kept": per_class(pseudo.keep),
        "correct": per_class(correct),
        "drawn_by_expert": per_expert(torch.ones_like(pseudo.keep)),
        "kept_by_expert": per_expert(pseudo.keep),
        "correct_by_expert": per_expert(correct),
        "kept_by_both": per_both(pseudo.keep),
        "correct_by_both": per_both(correct),
        "confidence_by_expert": by_expert,
        "drawn_by_kind": torch.bincount(kind, minlength=len(KIND_NAMES)).double().tolist(),
        "correct_by_kind": torch.bincount(kind[pseudo.label == truth], minlength=len(KIND_NAMES)).double().tolist(),
        **({"beliefs": _belief_bins(pseudo)} if num_classes == 2 else {}),
        **_to_lists("bins", calibration_bins(pseudo.confidence, pseudo.label == truth)),
        **_to_lists("kept_bins", calibration_bins(pseudo.confidence[pseudo.keep], correct[pseudo.keep])),
    }


BELIEF_BINS = 20


def _belief_bins(pseudo: PseudoLabels) -> list[float]:
    one = torch.where(pseudo.label == 1, pseudo.confidence, 1 - pseudo.confidence).double()
    place = (one * BELIEF_BINS).long().clamp(0, BELIEF_BINS - 1)
    return torch.bincount(place, minlength=BELIEF_BINS).double().tolist()


_BIN_ROWS = ("count", "confidence", "correct")


def _to_lists(name: str, bins: np.ndarray) -> Counts:
    return {f"{name}_{row}": values.tolist() for row, values in zip(_BIN_ROWS, bins, strict=True)}


def bins_of(counts: Mapping[str, list[float]], name: str = "bins") -> np.ndarray:
    """Returns the `calibration_bins` in summed `pseudo_label_counts`: of all draws, or of the kept ("kept_bins")."""
    return np.array([counts[f"{name}_{row}"] for row in _BIN_ROWS])


def pseudo_label_metrics(counts: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns `pseudo/...` scalars from summed `pseudo_label_counts`; those without a sample are left out.

    Coverage is kept / drawn; accuracy is correct / kept, over all, and per expert; confidence per expert is the mean of
    the kept; correct_wrong_ratio is correct / wrong among the kept; posterior/accuracy_<kind> is over all draws with
    that kind of label; ece is the calibration error over all draws, ece_kept over the kept ones.
    """
    if not counts:
        return {}
    local, from_global = ratio(counts["correct_by_expert"], counts["kept_by_expert"])
    local_coverage, global_coverage = ratio(counts["kept_by_expert"], counts["drawn_by_expert"])
    local_confidence, global_confidence = ratio(counts["confidence_by_expert"], counts["kept_by_expert"])
    kept, correct = sum(counts["kept"]), sum(counts["correct"])
    values = {
        "pseudo/accuracy": ratio([correct], [kept])[0],
        "pseudo/accuracy_local": local,
        "pseudo/accuracy_global": from_global,
        "pseudo/coverage_local": local_coverage,
        "pseudo/coverage_global": global_coverage,
        "pseudo/confidence_local": local_confidence,
        "pseudo/confidence_global": global_confidence,
        "pseudo/correct_wrong_ratio": ratio([correct], [kept - correct])[0],
        "pseudo/ece": calibration_error(bins_of(counts)),
        "pseudo/ece_kept": calibration_error(bins_of(counts, "kept_bins")),
    }
    by_kind = ratio(counts["correct_by_kind"], counts["drawn_by_kind"])
    values |= {
        f"posterior/accuracy_{name.replace(' ', '_')}": value for name, value in zip(KIND_NAMES, by_kind, strict=True)
    }
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def function_counts(votes: Tensor, class_sets: Tensor, truth: Tensor) -> Counts:
    """Returns the evaluator's counts of labelling functions' votes on a client.

    Args:
        votes: (n, K) int64, -1 = abstained.
        class_sets: (K, C) bool, what each may vote for.
        truth: (n,) int64 hidden labels; -1 where nobody knows.

    Returns:
        "function_votes": (K, C) flattened, votes for each class; "function_counts": (K, 4) flattened, votes on samples
        that another function votes on, too; that another one votes otherwise on; that are right; with a true label;
        "function_samples": (5,) samples; those with any vote; those with a true label; of these, how many the
        majority gets right and how many the votes by class, divided by how many functions may vote for it. A tie, as of
        a sample without votes, counts by the chance to draw the right one.
    """
    classes = class_sets.shape[1]
    cast, right = votes >= 0, votes == truth[:, None]
    tallies = vote_tallies(votes, classes)
    others = cast.sum(1, keepdim=True) - cast.long()
    alike = torch.where(cast, tallies.gather(1, votes.clamp_min(0)) - 1, 0)
    has_truth = truth >= 0
    per_function = [cast & (others > 0), cast & (others > alike), cast & right, cast & has_truth[:, None]]
    by_class = torch.stack([(votes == label).sum(0) for label in range(classes)], 1)
    samples = [torch.ones_like(has_truth), cast.any(1), has_truth]
    for scores in (tallies, coverage_normalized_votes(votes, class_sets)):
        top = (scores == scores.amax(1, keepdim=True)).double()
        samples.append(has_truth * (top / top.sum(1, keepdim=True)).gather(1, truth.clamp_min(0)[:, None]).squeeze(1))
    return {
        "function_votes": by_class.double().flatten().tolist(),
        "function_counts": torch.stack([mask.sum(0) for mask in per_function], 1).double().flatten().tolist(),
        "function_samples": torch.stack([mask.sum() for mask in samples]).double().tolist(),
    }
