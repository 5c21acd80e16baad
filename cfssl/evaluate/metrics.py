"""Metrics of classification, computed for many resamples at once.

What enters: classes y (n,), scores (n, classes), higher meaning likelier, and `weights` (R, n): how often
each row counts in each of R resamples. What leaves: one figure per resample (R,), NaN where a class is absent
from the resample: figures over different sets of classes cannot be compared, so one rule holds for all four.
Sorting is done once; a resample costs a cumulative sum.

With integer weights every figure equals scikit-learn's on the repeated rows (the tests' oracle).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

MetricName = Literal["auc", "average_precision", "balanced_accuracy", "macro_f1"]
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def auc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of class 1, or for more classes the mean of one-versus-rest areas."""
    return _one_versus_rest(_binary_auc, y, scores, weights)


def average_precision(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (no interpolation) of class 1, or for more classes their mean."""
    return _one_versus_rest(_binary_average_precision, y, scores, weights)


def balanced_accuracy(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes of the share recognised; the highest score decides, no threshold is tuned."""
    confusion = _confusion(y, scores, weights)  # (R, true, decided)
    with np.errstate(invalid="ignore"):
        return np.mean(_diagonal(confusion) / confusion.sum(2), axis=1)


def macro_f1(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes of F1; the highest score decides, no threshold is tuned."""
    confusion = _confusion(y, scores, weights)
    with np.errstate(invalid="ignore"):
        f1 = 2 * _diagonal(confusion) / (confusion.sum(2) + confusion.sum(1))
    return np.where((confusion.sum(2) > 0).all(1), f1.mean(1), np.nan)


METRICS: dict[MetricName, Metric] = {
    "auc": auc,
    "average_precision": average_precision,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
}


def once(metric: Metric, y: np.ndarray, scores: np.ndarray) -> float:
    """The metric on the rows as they are; NaN where a class is absent."""
    return float(metric(y, scores, np.ones((1, len(y))))[0])


def _one_versus_rest(binary: Metric, y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    return np.mean([binary(y == label, scores[:, label], weights) for label in classes], axis=0)


def _binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P(score of a positive > score of a negative) + P(equal) / 2: the Mann-Whitney form, ties at their
    middle rank.
    """
    hits, misses = _by_level(positive, score, weights)  # (R, levels), ascending
    below = misses.cumsum(1) - misses / 2
    with np.errstate(invalid="ignore"):
        return (hits * below).sum(1) / (hits.sum(1) * misses.sum(1))


def _binary_average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over thresholds of the gain in recall times the precision there."""
    hits, misses = _by_level(positive, -score, weights)  # descending
    true, false = hits.cumsum(1), misses.cumsum(1)
    precision = true / np.maximum(true + false, 1e-300)  # a level that nothing was drawn from gains no recall
    with np.errstate(invalid="ignore"):
        average = (hits * precision).sum(1) / true[:, -1]
    return np.where(false[:, -1] > 0, average, np.nan)


def _by_level(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, ascending: two arrays (R, levels)."""
    order = np.argsort(score, kind="stable")
    ascending = score[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    sorted_weights = weights[:, order].astype(np.float64)
    hits = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    return hits, np.add.reduceat(sorted_weights, starts, axis=1) - hits


def _confusion(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    classes = scores.shape[1]
    cell = y * classes + scores.argmax(1)
    return (weights @ np.eye(classes * classes)[cell]).reshape(-1, classes, classes)


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=1, axis2=2)
