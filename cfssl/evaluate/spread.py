"""What the seeds of an evaluation differ by: the mean and the standard deviation over label subsets and, of
fine-tuning, over heads and orders.

Enter: the results of one evaluation. Leaves: a summary per label fraction of which there are several. It says
how much one seed is worth; an interval over test rows says nothing of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def over_seeds(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every target and label fraction with several seeds {"target", "label_fraction", "seeds", "overall":
    of_metrics, "groups": {grouping: {group: of_metrics}}}, where of_metrics is {metric: {"mean", "sd", "n"}}
    and the sd that of n - 1. Seeds whose value is null are left out; without any the mean is null, without
    two the sd.
    """
    alike: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for result in results:
        alike.setdefault((result["target"], result["protocol"]["label_fraction"]), []).append(result)
    return [summary(*of, found) for of, found in alike.items() if len(found) > 1]


def summary(target: str, fraction: float, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """See `over_seeds`; `results`: those of one target and fraction."""
    first = results[0]

    def of_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {metric: moments([row[metric]["value"] for row in rows]) for metric in first["metrics"]}

    return {
        "target": target,
        "label_fraction": fraction,
        "seeds": [result["seeds"]["labels"] for result in results],
        "overall": of_metrics([result["overall"] for result in results]),
        "groups": {
            grouping: {
                group: of_metrics([result["groups"][grouping]["table"][group] for result in results])
                for group in content["table"]
            }
            for grouping, content in first["groups"].items()
        },
    }


def moments(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation of the known values."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }
