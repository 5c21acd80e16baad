"""What probe and kNN share: features checked before use, and the choice of a setting on validation rows.

The test rows play no part in a choice; they are scored by the chosen setting only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfssl.errors import UserError
from cfssl.evaluate.metrics import auc, once


@dataclass(frozen=True)
class Choice:
    """`best`: the chosen setting. `table`: for every setting {name: setting, "auc": on validation rows, and
    what else was noted}.
    """

    best: float
    table: tuple[dict[str, Any], ...]


def choose(
    name: str,
    grid: Sequence[float],
    score: Callable[[float], tuple[np.ndarray, dict[str, Any]]],
    val_y: np.ndarray,
) -> Choice:
    """The setting with the highest AUC (macro one-versus-rest) on validation; of equals the first in `grid`.

    `score(setting)` returns validation scores (n, classes) and notes for the table. Raises UserError where
    the AUC is not defined.
    """
    table: list[dict[str, Any]] = []
    for setting in grid:
        scores, notes = score(setting)
        absent = sorted(set(range(scores.shape[1])) - set(np.unique(val_y).tolist()))
        if absent:
            raise UserError(
                f"The {len(val_y)} validation rows have none of class {', '.join(map(str, absent))}, "
                f"expected every class, since {name} is chosen there by AUC; enlarge the validation split."
            )
        table.append({name: setting, "auc": once(auc, val_y, scores), **notes})
    best = max(table, key=lambda line: line["auc"])  # max keeps the first of equals
    return Choice(best[name], tuple(table))


def checked(features: np.ndarray, labels: np.ndarray | None, where: str) -> np.ndarray:
    """`features` (n, F) unchanged. Raises UserError when there are none or one is not finite."""
    if not len(features):
        raise UserError(
            f"There are no {where} rows, expected at least one; check the splits and the target's missing "
            "values."
        )
    if labels is not None and len(labels) != len(features):
        raise ValueError(f"{where}: {len(features)} features but {len(labels)} labels")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(1).sum())
        raise UserError(
            f"{bad} of {len(features)} {where} features are not finite, expected numbers; the encoder may "
            "have diverged."
        )
    return features
