"""One evaluation of a recipe: features and labels in, result dicts (as ARCHITECTURE lays them out) and test
scores out.

Choices are made on the validation rows; the test rows are scored once. Rows whose target is missing take no
part and are counted. The encoder is given: intervals speak of other test rows, not of other trainings or
label subsets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.special import expit

from cfssl.data.table import SPLITS, ImageTable
from cfssl.errors import UserError, quoted
from cfssl.evaluate.groups import report
from cfssl.evaluate.knn import TEMPERATURE, knn
from cfssl.evaluate.metrics import MetricName
from cfssl.evaluate.probe import linear_probe, subset_labels
from cfssl.evaluate.settings import EvaluationSettings
from cfssl.files import atomic_path

METRICS: tuple[MetricName, ...] = get_args(MetricName)


def lacking(table: ImageTable, target: str, splits: Sequence[str] = SPLITS) -> list[str]:
    """What keeps the discrete attribute `target` from being evaluated, in words: for each split the
    categories that no image with a known target has. Empty where there is nothing."""
    found = []
    for split in splits:
        rows = table.rows(split, known=(target,))
        present = set(table.encode((target,), rows)[target].tolist())
        absent = [
            name for code, name in enumerate(table.attributes[target].categories) if code not in present
        ]
        if absent and present:
            found.append(f"no {split} image is {quoted(absent)}")
        elif absent:
            found.append(f"no {split} image has a known {target!r}")
    return found


def evaluate(
    settings: EvaluationSettings, features: np.ndarray, table: ImageTable
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Results, one per label fraction and subset seed, and the arrays behind them: "row" and "y" of the test
    images and, per result, "scores-FRACTION-SEED" (n, classes), log-odds of the linear probe or votes of kNN.

    `features` (N, F) of all rows of the table. Raises `UserError` when a split lacks a category of the
    target.
    """
    target = settings.target
    absent = lacking(table, target)
    if absent:
        raise UserError(
            f"The evaluation {settings.label} of {table.name} cannot work: {'; '.join(absent)}; every "
            "category is needed in every split, so change the splits or the target's categories."
        )
    attribute = table.attributes[target]
    rows = {split: table.rows(split, known=(target,)) for split in SPLITS}
    y = {split: table.encode((target,), found)[target].numpy() for split, found in rows.items()}
    x = {split: np.asarray(features[found]) for split, found in rows.items()}
    frame = table.frame
    test = frame.iloc[rows["test"]]
    unit = "images" if table.group is None else f"images, whole groups ({table.group}) at a time"
    patients = None if table.group is None else test[table.group].to_numpy()
    strata = frame[settings.by[0]].iloc[rows["train"]].to_numpy() if settings.by else None
    groups = {name: test[name].to_numpy() for name in settings.by}
    results, arrays = [], {"row": rows["test"], "y": y["test"]}
    for fraction in settings.fractions:
        # With all labels there is nothing to redraw.
        for seed in settings.seeds if fraction < 1 else settings.seeds[:1]:
            kept = subset_labels(y["train"], strata, fraction, seed)
            scores, choice = classify(
                settings.name,
                x["train"][kept],
                y["train"][kept],
                x["val"],
                y["val"],
                x["test"],
                len(attribute.categories),
            )
            arrays[f"scores-{fraction:g}-{seed}"] = scores
            found = report(
                y["test"],
                scores,
                groups,
                METRICS,
                patients,
                settings.resamples,
                seed=0,
                probabilities=probabilities(settings.name, scores),
            )
            intervals = f"95 %, percentile bootstrap, {settings.resamples} resamples of test {unit}"
            subset = "all labels"
            if fraction < 1:
                intervals += "; the variance between label subsets is not in them"
                subset = f"drawn with seed {seed}, the same rows for every encoder"
            results.append(
                {
                    "evaluation": settings.name,
                    "target": target,
                    "classes": list(attribute.categories),
                    "metrics": list(METRICS),
                    "protocol": {
                        "features": "frozen encoder in eval mode, whole images, no augmentation",
                        **choice,
                        "split": "test",
                        "label_fraction": fraction,
                        "label_subset": subset,
                        "train_rows": len(kept),
                        "val_rows": len(rows["val"]),
                        "rows_without_target": len(table) - sum(map(len, rows.values())),
                        "intervals": intervals,
                    },
                    "data": {"table": table.name, "fingerprint": table.fingerprint},
                    "seeds": {"labels": seed, "bootstrap": found["seed"]},
                    "n": found["n"],
                    "patients": found["patients"],
                    "overall": found["overall"],
                    "groups": found["groups"],
                }
            )
    return results, arrays


def classify(name: str, *data: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Test scores (n, classes) and, for the protocol, how they came about. `data`: features and classes as
    `linear_probe` and `knn` take them."""
    if name == "linear_probe":
        probe = linear_probe(*data)
        how: dict[str, Any] = {
            "classifier": "logistic regression on standardised features",
            "converged": probe.has_converged,
        }
        return probe.scores, how | choice_of("C", probe.C, probe.table)
    votes = knn(*data)
    how = {"classifier": f"cosine kNN, votes weighted by softmax(similarity / {TEMPERATURE})"}
    return votes.scores, how | choice_of("k", votes.k, votes.table)


def probabilities(name: str, scores: np.ndarray) -> np.ndarray:
    """(n, classes) of the `scores` of an evaluation: votes are shares already, log-odds become those of the
    softmax or sigmoid they came from."""
    return scores if name == "knn" else expit(scores)


def choice_of(setting: str, chosen: float, grid: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How a setting was chosen; at an edge of its grid a value outside might have been better."""
    return {
        setting: chosen,
        f"{setting}_chosen_on": "validation AUC",
        f"{setting}_at_edge_of_grid": chosen in (grid[0][setting], grid[-1][setting]),
        f"{setting}_grid": list(grid),
    }


def save_scores(path: Path, scores: dict[str, np.ndarray]) -> None:
    """Plain arrays in one .npz, written atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **scores)  # type: ignore[arg-type]  # the stub mistakes names for options


def load_scores(path: Path) -> dict[str, np.ndarray]:
    """What `save_scores` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
