"""Linear probe: logistic regression on the standardised features of a frozen encoder, and label fractions to
fit it on.

What enters: features (n, F) and classes (n,) of the three splits. What leaves: log-odds of the test rows
(probabilities of a nearly separable fit round to 0 and 1, and what they tie cannot be ranked), and how the
strength of regularisation was chosen. The fit is convex, so there is no seed and no schedule; seeds redraw
label subsets.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from cfssl.errors import UserError
from cfssl.evaluate.choice import checked, choose
from cfssl.seeds import numpy_generator

GRID_OF_C = tuple(float(c) for c in np.logspace(-5, 2, 8))


@dataclass(frozen=True)
class ProbeResult:
    """`scores` (n, classes) float64 of the test rows, log(p / (1 - p)) of each class; `C` as in scikit-learn,
    the inverse strength; `table`: for every C {"C", "auc", "converged", "iterations"} on validation rows;
    `has_converged`: the chosen fit did."""

    scores: np.ndarray
    C: float
    table: tuple[dict[str, Any], ...]
    has_converged: bool


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    test_x: np.ndarray,
    classes: int,
    grid_of_C: Sequence[float] = GRID_OF_C,
    max_iterations: int = 2000,
) -> ProbeResult:
    """Fits on training rows for every C, chooses C by validation AUC (ties: the smallest), scores test.

    Features are standardised by the training rows, in float64. A fit that does not converge is marked in the
    table, not hidden. Raises UserError where the training or validation rows lack a class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    absent = sorted(set(range(classes)) - set(np.unique(train_y).tolist()))
    if absent:
        raise UserError(
            f"The {len(train_y)} training rows of the probe have none of class "
            f"{', '.join(map(str, absent))}, expected every class; label more rows."
        )
    scaler = StandardScaler()
    train = scaler.fit_transform(checked(train_x, train_y, "training").astype(np.float64))
    val = scaler.transform(checked(val_x, val_y, "validation").astype(np.float64))
    test = scaler.transform(checked(test_x, None, "test").astype(np.float64))

    # Ascending C, each fit starting from the one before: a path of near solutions is several times faster.
    model = LogisticRegression(solver="lbfgs", max_iter=max_iterations, warm_start=True)
    solutions: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def score(c: float) -> tuple[np.ndarray, dict[str, Any]]:
        model.C = c
        has_converged = _fit(model, train, train_y)
        solutions[c] = (model.coef_.copy(), model.intercept_.copy())
        return log_odds(model.decision_function(val)), {
            "converged": has_converged,
            "iterations": int(model.n_iter_.max()),
        }

    choice = choose("C", sorted(grid_of_C), score, val_y)
    model.coef_, model.intercept_ = solutions[choice.best]
    has_converged = next(line["converged"] for line in choice.table if line["C"] == choice.best)
    scores = log_odds(model.decision_function(test))
    return ProbeResult(scores, choice.best, choice.table, has_converged)


def log_odds(decision: np.ndarray) -> np.ndarray:
    """Log-odds (n, classes) of each class: of the sigmoid of `decision` (n,), or of the softmax of (n,
    classes), where log(p_c / (1 - p_c)) = d_c - log sum_{k != c} exp(d_k)."""
    if decision.ndim == 1:
        return np.stack([-decision, decision], axis=1)
    others = [logsumexp(np.delete(decision, label, axis=1), axis=1) for label in range(decision.shape[1])]
    return decision - np.stack(others, axis=1)


def subset_labels(y: np.ndarray, strata: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Rows (ascending) that keep their label when only a `fraction` of the n rows has one: round(fraction n),
    at least one per class.

    Stratified by class and by `strata` (n,), e.g. the scanner: each stratum's share is kept to within a row
    or so. Subsets are nested: for one seed, 1 % lies within 10 % within 100 %, so that a curve over fractions
    compares like with like. Raises UserError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"The label fraction is {fraction}, expected a number above 0 and up to 1; correct it."
        )
    rng = numpy_generator(seed, "label fraction")
    groups = pd.Series("" if strata is None else strata, index=range(len(y))).astype(str)
    stratum = pd.MultiIndex.from_arrays([y, groups]).factorize(sort=True)[0]
    # Row r of a stratum of m rows stands at (r + offset) / m: every stratum is spread evenly over (0, 1), in
    # random order, so that any prefix holds the same share of each.
    position = np.empty(len(y))
    for code in range(int(stratum.max()) + 1):
        rows = rng.permutation(np.flatnonzero(stratum == code))
        position[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order = np.argsort(position, kind="stable")
    _, first = np.unique(y[order], return_index=True)  # the earliest row of each class goes first
    order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[: max(len(first), round(fraction * len(y)))])


def _fit(model: Any, features: np.ndarray, classes: np.ndarray) -> bool:
    """Fits in place; whether the solver converged. Its other warnings pass."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features, classes)
    failures = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in failures:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not failures
