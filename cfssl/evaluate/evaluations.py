"""One evaluation of a recipe: features and labels in, result dicts (as ARCHITECTURE lays them out) and test
scores out.

Choices are made on the validation rows; the test rows are scored once. Rows whose target is missing take no
part and are counted.
"""

from typing import Any

import numpy as np

from cfssl.data.table import ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.groups import report
from cfssl.evaluate.knn import TEMPERATURE, knn
from cfssl.evaluate.metrics import MetricName
from cfssl.evaluate.probe import linear_probe, subset_labels
from cfssl.evaluate.settings import EvaluationSettings

METRICS: tuple[MetricName, ...] = ("auc", "average_precision", "balanced_accuracy", "macro_f1")


def evaluate(
    settings: EvaluationSettings, features: np.ndarray, table: ImageTable
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Results, one per label fraction and subset seed, and the arrays behind them: "row" and "y" of the test
    images and, per result, "scores-FRACTION-SEED" (n, classes).

    `features` (N, F) of all rows of the table. Raises `UserError` when a split has no row with a known
    target.
    """
    target = settings.target
    attribute = table.attributes[target]
    rows = {split: table.rows(split, known=(target,)) for split in ("train", "val", "test")}
    empty = [split for split, found in rows.items() if len(found) == 0]
    if empty:
        raise UserError(
            f"No row of the split {' and '.join(empty)} of {table.name} has a known {target!r}; the "
            "evaluation "
            f"{settings.label} needs train, val and test rows."
        )
    y = {split: table.encode((target,), found)[target].numpy() for split, found in rows.items()}
    x = {split: np.asarray(features[found]) for split, found in rows.items()}
    frame = table.frame
    test = frame.iloc[rows["test"]]
    unit = "images" if table.group is None else f"images, whole groups ({table.group}) at a time"
    patients = None if table.group is None else test[table.group].to_numpy()
    strata = frame[settings.by[0]].iloc[rows["train"]].to_numpy() if settings.by else None
    results, arrays = [], {"row": rows["test"], "y": y["test"]}
    for fraction in settings.fractions:
        # With all labels there is nothing to redraw.
        for seed in settings.seeds if fraction < 1 else settings.seeds[:1]:
            kept = subset_labels(y["train"], strata, fraction, seed)
            data = (
                x["train"][kept],
                y["train"][kept],
                x["val"],
                y["val"],
                x["test"],
                len(attribute.categories),
            )
            protocol: dict[str, Any] = {
                "features": "frozen encoder in eval mode, whole images, no augmentation"
            }
            if settings.name == "linear_probe":
                probe = linear_probe(*data)
                scores = probe.scores
                protocol |= {
                    "classifier": "logistic regression on standardised features",
                    "C": probe.C,
                    "C_chosen_on": "validation AUC",
                    "C_grid": list(probe.table),
                    "converged": probe.has_converged,
                }
            else:
                neighbours = knn(*data)
                scores = neighbours.scores
                protocol |= {
                    "classifier": f"cosine kNN, votes weighted by softmax(similarity / {TEMPERATURE})",
                    "k": neighbours.k,
                    "k_chosen_on": "validation AUC",
                    "k_grid": list(neighbours.table),
                }
            groups = {name: test[name].to_numpy() for name in settings.by}
            found = report(y["test"], scores, groups, METRICS, patients, settings.resamples, seed=0)
            arrays[f"scores-{fraction:g}-{seed}"] = scores
            protocol |= {
                "split": "test",
                "label_fraction": fraction,
                "train_rows": len(kept),
                "val_rows": len(rows["val"]),
                "rows_without_target": len(table) - sum(map(len, rows.values())),
                "intervals": f"95 %, percentile bootstrap, {settings.resamples} resamples of test {unit}",
            }
            results.append(
                {
                    "evaluation": settings.name,
                    "target": target,
                    "classes": list(attribute.categories),
                    "metrics": list(METRICS),
                    "protocol": protocol,
                    "data": {"table": table.name, "fingerprint": table.fingerprint},
                    "seeds": {"labels": seed, "bootstrap": found["seed"]},
                    "n": found["n"],
                    "overall": found["overall"],
                    "groups": found["groups"],
                }
            )
    return results, arrays
