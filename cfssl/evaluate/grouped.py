"""Figures of any kind per group with bootstrap intervals, and paired differences between two methods.

What enters: statistics of weighted rows, and labels (n,) that divide the same test rows into groups. What
leaves: JSON-ready tables with the intervals of `cfssl.evaluate.bootstrap`, each resample shared by the
overall figure, every group and both methods. groups.py asks with scores of classes, segmented.py with
measures of masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import LEVEL, basic, figure, paired, resampled
from cfssl.evaluate.settings import Grouping

MISSING = "(missing)"  # the group of rows without a label; listed, but neither worst nor part of the gap

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows (m,) of the test set, and how often each of them counts in each of R resamples (R, m) -> a figure per
resample (R,), NaN where it is undefined."""


@dataclass(frozen=True)
class Measure:
    """A statistic and how it is read: `undefined(rows)` says why it has no value there; `is_raised`: an error
    that is not negative and that resampling raises, whose interval is the basic one."""

    of: Statistic
    undefined: Callable[[np.ndarray], str]
    less_is_better: bool = False
    is_raised: bool = False


def tabulated(
    count: int,
    groups: Mapping[str, np.ndarray],
    measures: Mapping[str, Measure],
    about: Callable[[np.ndarray], Mapping[str, Any]],
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every measure of the `count` rows, overall and in every group of every grouping:

        {"n", "patients", "resamples", "level", "seed", "overall": row, "groups": {grouping: of_grouping}}
        of_grouping: {"table": {group: row}, "worst": {metric: {"group", "value"}}, "gap": {metric: gap}}
        row: {"n", **about(rows), metric: {"value", "low", "high"}}
        gap: {"value", "low", "high", "best", "worst"}

    A row in which a measure is undefined has value null and a `reason`. Resamples in which it is are left out
    of its interval; where they are more than half, the interval is null with a reason. `gap` is the highest
    minus the lowest group's value; its interval belongs to these two groups, because choosing the extremes
    anew in every resample would push it above the value.
    """
    members = {grouping: members_of(labels, count, grouping) for grouping, labels in groups.items()}
    subsets = [np.arange(count), *(rows for table in members.values() for rows in table.values())]

    def of_all(weights: np.ndarray) -> np.ndarray:
        return np.array(
            [[measure.of(rows, weights[:, rows]) for measure in measures.values()] for rows in subsets]
        )

    values, draws = resampled(of_all, count, patients, resamples, seed)  # (subsets, measures[, resamples])

    def row(subset: int) -> dict[str, Any]:
        rows = subsets[subset]
        result: dict[str, Any] = {"n": len(rows), **about(rows)}
        for index, (name, measure) in enumerate(measures.items()):
            value = float(values[subset, index])
            interval = partial(basic, value) if measure.is_raised else None
            result[name] = figure(value, draws[subset, index], measure.undefined(rows), interval)
        return result

    result: dict[str, Any] = {
        "n": count,
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
        for index, (name, measure) in enumerate(measures.items()):
            of_metric = {group: draws[subset, index] for group, subset in place.items()}
            worst[name], gap[name] = _extremes(
                {group: rows[group][name]["value"] for group in rows}, of_metric, measure.less_is_better
            )
        result["groups"][grouping] = {"table": rows, "worst": worst, "gap": gap}
    return result


@dataclass(frozen=True)
class Arms:
    """Two methods on the same `count` test rows: `a` and `b` hold a statistic per training seed, a[s] and
    b[s] belong together, and every difference is a minus b: {"value", "low", "high", "df", "seeds"}, whose
    interval `cfssl.evaluate.bootstrap.paired` explains. `undefined(rows)`: why the statistic has no value
    there, empty where it has one; `less_is_better` of it."""

    a: Sequence[Statistic]
    b: Sequence[Statistic]
    count: int
    undefined: Callable[[np.ndarray], str]
    less_is_better: bool = False
    patients: np.ndarray | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.a) != len(self.b) or not self.a:
            raise UserError(
                f"The arms of a paired difference have {len(self.a)} and {len(self.b)} seeds, expected the "
                "same number; train the missing ones."
            )

    def overall(self) -> dict[str, Any]:
        """The difference on all rows."""
        return self._difference([np.arange(self.count)], np.mean)

    def mean_of_groups(self, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        """Of the figures within each group in `names`, averaged over these groups with equal weight, e.g.
        over the two rare scanners. Raises UserError for a name without rows."""
        members = members_of(labels, self.count, "labels")
        for name in names:
            if name not in members:
                raise UserError(
                    f"The groups to average name {name!r}, expected some of {', '.join(members)}; "
                    "correct the name."
                )
        return self._difference([members[name] for name in names], np.mean)

    def worst_group(self, labels: np.ndarray) -> dict[str, Any]:
        """Of the figures in each arm's own worst group, found anew for every seed and in every resample.

        To name the worst group by the figures of b and compare the arms there is another matter: that group
        is partly an unlucky draw of b, which a does not share, so a seems to gain though the arms are equal.
        "groups" lists the groups that were searched: those that have a value, without rows that lack a label.
        """
        found = self._defined(labels)
        if not found:
            return _nothing("no group holds every class")
        worst = np.max if self.less_is_better else np.min
        return {**self._difference(list(found.values()), worst), "groups": list(found)}

    def gap(self, labels: np.ndarray) -> dict[str, Any]:
        """Of the disparities: the gap between the highest and the lowest group of a minus that of b, e.g. the
        change of |AUC_M - AUC_F|; below 0 where a treats the groups more alike. Each arm's own extremes,
        found anew for every seed and in every resample.

        A gap is never negative, so noise adds to it: in small groups both arms' gaps are too wide, and the
        difference of two gaps is too small where one arm has none. "groups" as in `worst_group`.
        """
        found = self._defined(labels)
        if len(found) < 2:
            return _nothing("fewer than two groups hold every class")
        return {**self._difference(list(found.values()), np.ptp), "groups": list(found)}

    def _defined(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        members = members_of(labels, self.count, "labels")
        return {name: rows for name, rows in members.items() if name != MISSING and not self.undefined(rows)}

    def _difference(
        self, subsets: Sequence[np.ndarray], over_subsets: Callable[..., np.ndarray]
    ) -> dict[str, Any]:
        """`over_subsets` makes one figure of those of all subsets, along an axis."""

        def differences(weights: np.ndarray) -> np.ndarray:
            """(R, n) -> (seeds, R): a minus b."""
            figures = np.array(
                [
                    [[statistic(rows, weights[:, rows]) for rows in subsets] for statistic in arm]
                    for arm in (self.a, self.b)
                ]
            )  # (2, seeds, subsets, R)
            first, second = over_subsets(figures, axis=2)
            return first - second

        undefined = next(filter(None, map(self.undefined, subsets)), "no value")
        return paired(differences, self.count, self.patients, self.resamples, self.seed, undefined)


def mean_of(values: np.ndarray) -> Statistic:
    """The weighted mean of finite values (n,); NaN where nothing was drawn."""

    def of(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = weights.sum(1)
        return np.where(total > 0, weights @ values[rows] / np.maximum(total, 1), np.nan)

    return of


def name_of(grouping: Grouping) -> str:
    """As results and tables call it: `scanner`, or of several attributes `scanner x disease`."""
    return grouping if isinstance(grouping, str) else " x ".join(grouping)


def labels_of(frame: pd.DataFrame, grouping: Grouping) -> np.ndarray:
    """The group of every row (n,), missing where one of its attributes is."""
    if isinstance(grouping, str):
        return frame[grouping].to_numpy()
    columns = frame[list(grouping)]
    joined = np.array(
        [" x ".join(map(str, values)) for values in columns.itertuples(index=False)], dtype=object
    )
    joined[columns.isna().any(axis=1).to_numpy()] = None
    return joined


def members_of(labels: np.ndarray, count: int, where: str) -> dict[str, np.ndarray]:
    """Rows of each group, by the group's name in sorted order, rows without a label last."""
    series = pd.Series(labels)
    if len(series) != count:
        raise ValueError(f"{where} has {len(series)} labels for {count} rows")
    absent = series.isna().to_numpy()
    names = np.where(absent, MISSING, series.astype(str).to_numpy(dtype=object))
    order = sorted(set(names[~absent])) + ([MISSING] if absent.any() else [])
    return {name: np.flatnonzero(names == name) for name in order}


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "reason": reason, "seeds": [], "groups": []}


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
