"""Figures per group with bootstrap intervals, and paired differences between two methods.

What enters: classes y (n,), scores (n, classes) and labels (n,) that divide the same test rows into groups.
What leaves: JSON-ready tables with the intervals of `cfssl.evaluate.bootstrap`, each resample shared by the
overall figure, every group and both methods.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import LEVEL, basic, figure, paired, resampled
from cfssl.evaluate.metrics import METRICS, OF_PROBABILITIES, Metric, MetricName

MISSING = "(missing)"  # the group of rows without a label; listed, but neither worst nor part of the gap


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
    """Every metric overall and in every group of every grouping:

        {"n", "patients", "resamples", "level", "seed", "overall": row, "groups": {grouping: of_grouping}}
        of_grouping: {"table": {group: row}, "worst": {metric: {"group", "value"}}, "gap": {metric: gap}}
        row: {"n", "positives", metric: {"value", "low", "high"}}
        gap: {"value", "low", "high", "best", "worst"}

    `positives` counts the rows of class 1, or lists those of each class where there are more than two. A row
    that lacks a class has value null and a `reason`. Resamples that lack one are left out of its interval;
    where they are more than half, the interval is null with a reason. `gap` is the highest minus the lowest
    group's value; its interval belongs to these two groups, because choosing the extremes anew in every
    resample would push it above the value. `probabilities` (n, classes): for the metrics of
    `OF_PROBABILITIES`. The interval of a calibration error is the basic one. Raises UserError for unknown
    metrics and without rows.
    """
    y, scores = checked(y, scores)
    chosen = [
        (_metric(name), _probabilities(name, y, probabilities) if name in OF_PROBABILITIES else scores)
        for name in metrics
    ]
    members = {grouping: _members(labels, len(y), grouping) for grouping, labels in groups.items()}
    subsets = [np.arange(len(y)), *(rows for table in members.values() for rows in table.values())]

    def of_all(weights: np.ndarray) -> np.ndarray:
        return np.array(
            [[metric(y[rows], of[rows], weights[:, rows]) for metric, of in chosen] for rows in subsets]
        )

    values, draws = resampled(of_all, len(y), patients, resamples, seed)  # (subsets, metrics[, resamples])

    def row(subset: int) -> dict[str, Any]:
        rows = subsets[subset]
        counts = np.bincount(y[rows], minlength=scores.shape[1]).tolist()
        result: dict[str, Any] = {"n": len(rows), "positives": counts[1] if len(counts) == 2 else counts}
        for index, name in enumerate(metrics):
            value = float(values[subset, index])
            interval = partial(basic, value) if name == "calibration_error" else None
            result[name] = figure(value, draws[subset, index], _absent(counts), interval)
        return result

    result: dict[str, Any] = {
        "n": len(y),
        "patients": None if patients is None else len(pd.unique(pd.Series(patients))),
        "resamples": resamples,
        "level": LEVEL,
        "seed": seed,
        "overall": row(0),
        "groups": {},
    }
    first = 1
    for grouping, table in members.items():
        place = {group: first + index for index, group in enumerate(table)}
        first += len(table)
        rows = {group: row(subset) for group, subset in place.items()}
        worst, gap = {}, {}
        for index, name in enumerate(metrics):
            of_metric = {group: draws[subset, index] for group, subset in place.items()}
            worst[name], gap[name] = _extremes(
                {group: rows[group][name]["value"] for group in rows}, of_metric, name in OF_PROBABILITIES
            )
        result["groups"][grouping] = {"table": rows, "worst": worst, "gap": gap}
    return result


def paired_difference(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    metric: MetricName = "auc",
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metric of a minus metric of b on the same test rows: {"value", "low", "high", "df", "seeds"}, whose
    interval `cfssl.evaluate.bootstrap.paired` explains.

    Scores are (n, classes), or lists of them, one per training seed; scores_a[s] and scores_b[s] belong
    together. Where a class is absent the value is null with a `reason`. Raises UserError when the arms differ
    in seeds or rows.
    """
    return _difference(y, scores_a, scores_b, [np.arange(len(y))], np.mean, metric, patients, resamples, seed)


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
    """As `paired_difference`, of the metric computed within each group in `names` and averaged over these
    groups with equal weight, e.g. over the two rare scanners. Raises UserError for a name without rows."""
    members = _members(labels, len(y), "labels")
    for name in names:
        if name not in members:
            raise UserError(
                f"The groups to average name {name!r}, expected some of {', '.join(members)}; "
                "correct the name."
            )
    subsets = [members[name] for name in names]
    return _difference(y, scores_a, scores_b, subsets, np.mean, metric, patients, resamples, seed)


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
    """As `paired_difference`, of the metric in each arm's own worst group: min over groups of a minus min
    over groups of b, the minima found anew for every seed and in every resample.

    To name the worst group by the figures of b and compare the arms there is another matter: that group is
    partly an unlucky draw of b, which a does not share, so a seems to gain though the arms are equal.
    "groups" lists the groups that were searched: those that hold every class, without rows that lack a label.
    """
    found = _with_every_class(y, labels)
    if not found:
        return _nothing("no group holds every class")
    subsets = list(found.values())
    difference = _difference(y, scores_a, scores_b, subsets, np.min, metric, patients, resamples, seed)
    return {**difference, "groups": list(found)}


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
    """As `paired_difference`, of the disparity: the gap between the highest and the lowest group of a minus
    that of b, e.g. the change of |AUC_M - AUC_F|; below 0 where a treats the groups more alike. Each arm's
    own extremes, found anew for every seed and in every resample.

    A gap is never negative, so noise adds to it: in small groups both arms' gaps are too wide, and the
    difference of two gaps is too small where one arm has none. "groups" as in `paired_worst_group`.
    """
    found = _with_every_class(y, labels)
    if len(found) < 2:
        return _nothing("fewer than two groups hold every class")
    subsets = list(found.values())
    difference = _difference(y, scores_a, scores_b, subsets, np.ptp, metric, patients, resamples, seed)
    return {**difference, "groups": list(found)}


def _with_every_class(y: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of the groups that hold every class, without rows that lack a label."""
    classes = len(np.unique(y))
    members = _members(labels, len(y), "labels")
    return {
        name: rows for name, rows in members.items() if name != MISSING and len(np.unique(y[rows])) == classes
    }


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "reason": reason, "seeds": [], "groups": []}


def _difference(
    y: np.ndarray,
    scores_a: np.ndarray | Sequence[np.ndarray],
    scores_b: np.ndarray | Sequence[np.ndarray],
    subsets: Sequence[np.ndarray],
    over_subsets: Callable[..., np.ndarray],
    metric_name: MetricName,
    patients: np.ndarray | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """`over_subsets` makes one figure of those of all subsets, along an axis."""
    arms = [[arm] if isinstance(arm, np.ndarray) else list(arm) for arm in (scores_a, scores_b)]
    count = len(arms[0])
    if count != len(arms[1]) or not count:
        raise UserError(
            f"The arms of a paired difference have {count} and {len(arms[1])} seeds, expected the same "
            "number; train the missing ones."
        )
    arms = [[checked(y, scores)[1] for scores in arm] for arm in arms]
    y = checked(y, arms[0][0])[0]
    metric = _metric(metric_name)
    if metric_name in OF_PROBABILITIES:
        arms = [[_probabilities(metric_name, y, scores) for scores in arm] for arm in arms]

    def differences(weights: np.ndarray) -> np.ndarray:
        """(R, n) -> (seeds, R): a minus b."""
        figures = np.array(
            [[[metric(y[r], scores[r], weights[:, r]) for r in subsets] for scores in arm] for arm in arms]
        )  # (2, seeds, subsets, R)
        first, second = over_subsets(figures, axis=2)
        return first - second

    fewest = min((np.bincount(y[r], minlength=arms[0][0].shape[1]).tolist() for r in subsets), key=min)
    return paired(differences, len(y), patients, resamples, seed, _absent(fewest))


def _absent(counts: Sequence[int]) -> str:
    """Why a metric has no value; `counts`: rows of each class."""
    absent = ", ".join(str(label) for label, count in enumerate(counts) if not count)
    return f"no row of class {absent} among {sum(counts)} rows"


def _extremes(
    values: Mapping[str, float | None], draws: Mapping[str, np.ndarray], less_is_better: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The worst group, and the gap between the lowest and the highest; null where too few groups have a
    value."""
    known = {group: value for group, value in values.items() if value is not None and group != MISSING}
    if not known:
        return None, None
    low = min(known, key=known.__getitem__)
    # Searched from the other end, so that equal groups still make a pair.
    high = max(reversed(known), key=known.__getitem__)
    best, worst = (low, high) if less_is_better else (high, low)
    named = {"group": worst, "value": known[worst]}
    if len(known) == 1:
        return named, None
    gap = figure(known[high] - known[low], draws[high] - draws[low], "no value")
    return named, {**gap, "best": best, "worst": worst}


def _members(labels: np.ndarray, count: int, where: str) -> dict[str, np.ndarray]:
    """Rows of each group, by the group's name in sorted order, rows without a label last."""
    series = pd.Series(labels)
    if len(series) != count:
        raise ValueError(f"{where} has {len(series)} labels for {count} rows")
    absent = series.isna().to_numpy()
    names = np.where(absent, MISSING, series.astype(str).to_numpy(dtype=object))
    order = sorted(set(names[~absent])) + ([MISSING] if absent.any() else [])
    return {name: np.flatnonzero(names == name) for name in order}


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
