"""Metrics of classification, computed for many resamples at once.

What enters: classes y (n,), scores (n, classes), higher meaning likelier, and `weights` (R, n): how often
each row counts in each of R resamples. Metrics `OF_PROBABILITIES` take probabilities (n, classes) in the
place of scores. What leaves: one figure per resample (R,), NaN where a class is absent from the resample:
figures over different sets of classes cannot be compared, so one rule holds for all. Sorting is done once; a
resample costs a cumulative sum.

With integer weights every figure equals that of the repeated rows (the tests' oracle is scikit-learn).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

MetricName = Literal[
    "auc", "average_precision", "balanced_accuracy", "macro_f1", "brier", "calibration_error"
]
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

BINS = 10  # of equal mass; more make the calibration error of some hundred rows mostly noise


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


def brier(y: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared distance of the probability of class 1 from what it was, 0 to 1; for more classes the sum
    over all of them, 0 to 2 (Brier 1950)."""
    missed = np.square(probabilities - np.eye(probabilities.shape[1])[y])
    of_rows = missed[:, 1] if probabilities.shape[1] == 2 else missed.sum(1)
    return _where_all_classes(y, probabilities, weights, weights @ of_rows / _total(weights))


def calibration_error(y: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: the mean over `BINS` bins of equal mass of |frequency - mean probability|,
    of class 1, or for more classes of the likeliest class (Guo et al. 2017; equal mass as Nixon et al. 2019).

    Rows with the same probability are one level, whose mass is divided where the edge of a bin falls into it.
    An estimate from n rows lies above the truth, by most (about sqrt(BINS / n) / 3) where there is no error.
    """
    is_binary = probabilities.shape[1] == 2
    confidence = probabilities[:, 1] if is_binary else probabilities.max(1)
    happened = y == (1 if is_binary else probabilities.argmax(1))
    hits, misses = _by_level(happened, confidence, weights)  # (R, levels), ascending
    mass = hits + misses
    excess = (hits - mass * np.unique(confidence)).cumsum(1)  # of events over what was expected so far
    upto = mass.cumsum(1)
    at_edges = np.array(
        [
            np.interp(np.linspace(0, last[-1], BINS + 1), np.r_[0, last], np.r_[0, of])
            for last, of in zip(upto, excess, strict=True)
        ]
    )  # (R, BINS + 1)
    error = np.abs(np.diff(at_edges)).sum(1) / _total(weights)
    return _where_all_classes(y, probabilities, weights, error)


METRICS: dict[MetricName, Metric] = {
    "auc": auc,
    "average_precision": average_precision,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "brier": brier,
    "calibration_error": calibration_error,
}
OF_PROBABILITIES = frozenset({"brier", "calibration_error"})  # of which less is better


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


def _total(weights: np.ndarray) -> np.ndarray:
    return np.maximum(weights.sum(1), 1e-300)


def _where_all_classes(
    y: np.ndarray, scores: np.ndarray, weights: np.ndarray, figures: np.ndarray
) -> np.ndarray:
    """`figures` (R,), NaN where a class is absent."""
    return np.where((weights @ np.eye(scores.shape[1])[y] > 0).all(1), figures, np.nan)


def _confusion(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    classes = scores.shape[1]
    cell = y * classes + scores.argmax(1)
    return (weights @ np.eye(classes * classes)[cell]).reshape(-1, classes, classes)


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=1, axis2=2)
