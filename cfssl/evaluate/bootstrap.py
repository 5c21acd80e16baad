"""Bootstrap intervals of 95 %, for figures of any kind.

What enters: a statistic of weighted rows, and whose rows belong together. What leaves: JSON-ready figures
{"value", "low", "high"}. Intervals of one method are percentile intervals (Efron and Tibshirani 1993, chapter
13), those of differences between methods add the variance between training seeds (see `paired`). One
resample of the whole test set serves every statistic, so that what depends on several of them has the right
interval; with a `patients` array whole patients are drawn (cluster bootstrap), because images of one patient
are no independent evidence.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from cfssl.errors import UserError
from cfssl.seeds import numpy_generator

LEVEL = 0.95
CELLS = 4_000_000  # weights held at a time

Name = TypeVar("Name", bound=Hashable)
Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights (R, n), how often each row counts in each of R resamples -> figures (..., R), NaN where
undefined."""


def weights(count: int, patients: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, (some resamples, count) at a time; a patient's rows are drawn together.
    Raises `UserError` where a row has no patient."""
    codes = None if patients is None else pd.factorize(_keys(patients, count), use_na_sentinel=False)[0]
    units = count if codes is None else int(codes.max()) + 1
    rng, chunk = numpy_generator(seed, "bootstrap"), max(1, CELLS // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)
        yield times if codes is None else times[:, codes]


def resampled(
    statistic: Statistic, count: int, patients: np.ndarray | None, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The statistic of the `count` rows as they are (...), and of every resample (..., resamples)."""
    draws = [statistic(some) for some in weights(count, patients, resamples, seed)]
    return statistic(np.ones((1, count)))[..., 0], np.concatenate(draws, axis=-1)


def mean_figures(
    values: Mapping[Name, np.ndarray],
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    undefined: str = "no row has a value",
) -> dict[Name, dict[str, Any]]:
    """The mean of every (n,) array over the same rows, {"value", "low", "high", "n"}. Rows that are NaN are
    left out; their number is "without", and where none is left the reason is `undefined`."""
    known = {name: np.isfinite(row) for name, row in values.items()}
    filled = {name: np.where(known[name], row, 0) for name, row in values.items()}
    found = ratio_figures(filled, known, patients, resamples, seed, undefined)
    for name, figure_ in found.items():
        count = int(known[name].sum())
        figure_ |= {"n": count} | ({"without": len(known[name]) - count} if count < len(known[name]) else {})
    return found


def mean_figure(
    values: np.ndarray,
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    undefined: str = "no row has a value",
) -> dict[str, Any]:
    """As `mean_figures`, of one array."""
    return mean_figures({"": values}, patients, resamples, seed, undefined)[""]


def ratio_figures(
    above: Mapping[Name, np.ndarray],
    below: Mapping[Name, np.ndarray],
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    undefined: str = "the sum to divide by is 0",
) -> dict[Name, dict[str, Any]]:
    """The sum of `above` over the sum of `below`, (n,) each and without NaN; null where the latter is 0."""
    tops = np.stack([np.asarray(above[name], np.float64) for name in above], axis=1)  # (n, figures)
    bottoms = np.stack([np.asarray(below[name], np.float64) for name in above], axis=1)

    def statistic(some: np.ndarray) -> np.ndarray:
        bottom = some @ bottoms
        return np.where(bottom != 0, some @ tops / np.where(bottom != 0, bottom, 1), np.nan).T

    values, draws = resampled(statistic, len(tops), patients, resamples, seed)
    lacking = "there is nothing to divide by in"
    return {
        name: figure(float(value), drawn, undefined, lacking=lacking)
        for name, value, drawn in zip(above, values, draws, strict=True)
    }


def paired(
    differences: Statistic,
    count: int,
    patients: np.ndarray | None,
    resamples: int,
    seed: int,
    undefined: str = "no value",
) -> dict[str, Any]:
    """A difference between two methods with S training seeds each: {"value", "low", "high", "df", "seeds"}.

    `differences`: weights (R, n) -> d_s (S, R). `value` is the mean of the d_s, which "seeds" lists. Its
    interval speaks of other test sets and other training runs: value +/- t_df sqrt(v_rows + v_seeds), where

    - v_rows is the variance of `value` over bootstrap resamples of the test rows (or patients), each drawn
      for both arms and all seeds alike;
    - v_seeds = sum_s (d_s - value)^2 / (S - 1) / S;
    - df = (v_rows + v_seeds)^2 / (v_seeds^2 / (S - 1)): the few seeds set the degrees of freedom, v_rows is
      taken as known (Satterthwaite 1946; Welch 1947).

    What rows do to one seed and not to another is counted in both variances, which errs on the wide side; the
    df are an approximation, which with three seeds costs up to 3 % of coverage where v_rows is a tenth to a
    half of v_seeds. With one seed v_seeds is unknown and taken as 0: the interval is normal (`df` null) and
    speaks of other test sets only. Where the value is undefined it is null, with the reason `undefined`.
    """
    observed, draws = resampled(differences, count, patients, resamples, seed)

    def interval(defined: np.ndarray) -> dict[str, float | None]:
        return welch_satterthwaite(observed, float(defined.var()))

    result = figure(float(observed.mean()), draws.mean(0), undefined, interval)
    return {**result, "seeds": [None if np.isnan(d) else float(d) for d in observed]}


def figure(
    value: float,
    draws: np.ndarray,
    undefined: str,
    interval: Callable[[np.ndarray], dict[str, float | None]] | None = None,
    lacking: str = "a class is absent from",
) -> dict[str, Any]:
    """Value and interval, by default of percentiles; null with the reason `undefined` where the value is NaN.
    Resamples that are NaN are left out; where they are more than half, the interval is null and the reason
    says what is `lacking`."""
    if np.isnan(value):
        return {"value": None, "low": None, "high": None, "reason": undefined}
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < len(draws):
        reason = f"{lacking} {len(draws) - len(defined)} of {len(draws)} resamples"
        return {"value": value, "low": None, "high": None, "reason": reason}
    return {"value": value, **(interval or percentiles)(defined)}


def percentiles(draws: np.ndarray) -> dict[str, float | None]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def basic(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """The basic interval, 2 value - quantiles (Davison and Hinkley 1997, section 5.2), of a figure that is
    not negative and that resampling raises as sampling did: the percentiles would lie above the truth, and
    often above the value. The value stays inside."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": max(0.0, 2 * value - float(high)), "high": max(value, 2 * value - float(low))}


def welch_satterthwaite(of_seeds: np.ndarray, row_variance: float) -> dict[str, float | None]:
    """The interval of the mean of `of_seeds` (S,); see `paired`."""
    count, df = len(of_seeds), None
    seed_variance = float(of_seeds.var(ddof=1)) / count if count > 1 else 0.0
    variance = row_variance + seed_variance
    if seed_variance > 0:
        df = variance**2 / (seed_variance**2 / (count - 1))
    reach = float(stdtrit(np.inf if df is None else df, (1 + LEVEL) / 2)) * variance**0.5
    value = float(of_seeds.mean())
    return {"low": value - reach, "high": value + reach, "df": df}


def _keys(patients: np.ndarray, count: int) -> pd.Series:
    series = pd.Series(patients)
    if len(series) != count:
        raise ValueError(f"{len(series)} patients given for {count} rows")
    if series.isna().any():
        raise UserError(
            f"{int(series.isna().sum())} of {count} test rows have no patient, expected one each; fill the "
            "column or drop the rows."
        )
    return series
