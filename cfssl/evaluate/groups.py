"""Figures of classification per group with bootstrap intervals, and paired differences between two methods.

What enters: classes y (n,), scores (n, classes) and labels (n,) that divide the same test rows into groups.
What leaves: the JSON-ready tables and differences of grouped.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cfssl.errors import UserError
from cfssl.evaluate.grouped import Arms, Measure, Statistic, tabulated
from cfssl.evaluate.metrics import METRICS, OF_PROBABILITIES, Metric, MetricName


def report(
    y: np.ndarray,
    scores: np.ndarray,
    groups: Mapping[str, np.ndarray],
    metrics: Sequence[MetricName] = ("auc",),
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every metric overall and in every group of every grouping, see `cfssl.evaluate.grouped.tabulated`; a
    row also has "positives", the number of rows of class 1, or of each class where there are more than two.

    A row that lacks a class has no value. `probabilities` (n, classes): for the metrics of
    `OF_PROBABILITIES`. The interval of a calibration error is the basic one. Raises UserError for unknown
    metrics and without rows.
    """
    y, scores = checked(y, scores)

    def positives(rows: np.ndarray) -> dict[str, Any]:
        counts = np.bincount(y[rows], minlength=scores.shape[1]).tolist()
        return {"positives": counts[1] if len(counts) == 2 else counts}

    measures: dict[str, Measure] = {
        name: Measure(
            _statistic(
                name, y, _probabilities(name, y, probabilities) if name in OF_PROBABILITIES else scores
            ),
            _absent(y, scores.shape[1]),
            less_is_better=name in OF_PROBABILITIES,
            is_raised=name == "calibration_error",
        )
        for name in metrics
    }
    return tabulated(len(y), groups, measures, positives, patients, resamples, seed)


def paired_difference(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metric of a minus metric of b on the same test rows, see `cfssl.evaluate.grouped.Arms`.

    Scores are (n, classes), or lists of them, one per training seed; scores_a[s] and scores_b[s] belong
    together. Where a class is absent the value is null with a `reason`. Raises UserError when the arms differ
    in seeds or rows.
    """
    return classification_arms(y, scores_a, scores_b, metric, patients, resamples, seed).overall()


def paired_mean_of_groups(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    names: Sequence[str],
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """As `paired_difference`, see `Arms.mean_of_groups`."""
    arms = classification_arms(y, scores_a, scores_b, metric, patients, resamples, seed)
    return arms.mean_of_groups(labels, names)


def paired_worst_group(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """As `paired_difference`, see `Arms.worst_group`; groups that lack a class are not searched."""
    return classification_arms(y, scores_a, scores_b, metric, patients, resamples, seed).worst_group(labels)


def paired_gap(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray,
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """As `paired_difference`, see `Arms.gap`; groups that lack a class are not searched."""
    return classification_arms(y, scores_a, scores_b, metric, patients, resamples, seed).gap(labels)


def classification_arms(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Arms:
    """Two methods to be compared in several ways, as the functions above do in one each."""
    arms = [[arm] if isinstance(arm, np.ndarray) else list(arm) for arm in (scores_a, scores_b)]
    arms = [[checked(y, scores)[1] for scores in arm] for arm in arms]
    if metric in OF_PROBABILITIES:
        arms = [[_probabilities(metric, y, scores) for scores in arm] for arm in arms]
    first = next((scores for arm in arms for scores in arm), None)
    classes = 2 if first is None else first.shape[1]
    y = np.asarray(y).astype(np.int64)
    a, b = ([_statistic(metric, y, scores) for scores in arm] for arm in arms)
    less_is_better = metric in OF_PROBABILITIES
    return Arms(a, b, len(y), _absent(y, classes), less_is_better, patients, resamples, seed)


def _statistic(name: MetricName, y: np.ndarray, scores: np.ndarray) -> Statistic:
    metric = _metric(name)
    return lambda rows, weights: metric(y[rows], scores[rows], weights)


def _absent(y: np.ndarray, classes: int) -> Callable[[np.ndarray], str]:
    """Why a metric has no value in some rows; empty where no class is absent there."""

    def reason(rows: np.ndarray) -> str:
        counts = np.bincount(y[rows], minlength=classes)
        absent = ", ".join(map(str, np.flatnonzero(counts == 0).tolist()))
        return f"no row of class {absent} among {len(rows)} rows" if absent else ""

    return reason


def checked(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes (n,) int64 and scores (n, classes) float64. Raises UserError without rows and for scores that
    are not finite, ValueError where shapes or classes do not fit."""
    y, scores = np.asarray(y), np.asarray(scores, dtype=np.float64)
    if not len(y):
        raise UserError(
            "There are no test rows to evaluate, expected at least one; check the splits and the target's "
            "missing values."
        )
    if scores.ndim != 2 or len(scores) != len(y) or scores.shape[1] < 2:
        raise ValueError(f"scores have shape {scores.shape}, expected ({len(y)}, classes)")
    if not np.isfinite(scores).all():
        raise UserError(
            "The scores of the test rows hold values that are not finite, expected numbers; the encoder "
            "may have diverged."
        )
    if y.min() < 0 or y.max() >= scores.shape[1]:
        raise ValueError(f"classes run from {y.min()} to {y.max()}, expected 0 to {scores.shape[1] - 1}")
    return y.astype(np.int64), scores


def _probabilities(name: str, y: np.ndarray, probabilities: np.ndarray | None) -> np.ndarray:
    """(n, classes) float64. Raises ValueError unless they are given, from 0 to 1, and sum to 1."""
    if probabilities is None:
        raise ValueError(f"{name} is a metric of probabilities, and there are none")
    found = checked(y, probabilities)[1]
    if found.min() < 0 or not np.allclose(found.sum(1), 1, atol=1e-6):
        raise ValueError(f"{name} is a metric of probabilities, and the rows given do not sum to 1")
    return found


def _metric(name: MetricName) -> Metric:
    if name not in METRICS:
        raise UserError(
            f"The metric {name!r} is unknown, expected one of {', '.join(METRICS)}; correct the name."
        )
    return METRICS[name]
