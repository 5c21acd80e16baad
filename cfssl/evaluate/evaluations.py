"""One evaluation of a recipe: a table and a classifier in, result dicts (as ARCHITECTURE lays them out) and
test scores out.

A classifier is fitted on labelled training rows, chosen on the validation rows, and asked once about the test
rows, of the same table or of another one (an external set). Rows whose target is missing take no part and are
counted. The encoder is given: intervals speak of other test rows, not of other trainings or label subsets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.special import expit

from cfssl.data.table import SPLITS, ImageTable
from cfssl.errors import UserError, quoted
from cfssl.evaluate.grouped import labels_of, name_of
from cfssl.evaluate.groups import report
from cfssl.evaluate.knn import TEMPERATURE, knn
from cfssl.evaluate.metrics import MetricName
from cfssl.evaluate.probe import linear_probe, subset_labels
from cfssl.evaluate.settings import ClassificationSettings, EvaluationSettings, ProbeSettings
from cfssl.files import atomic_path

BOOTSTRAP = "percentile bootstrap (basic, of calibration errors)"
METRICS: tuple[MetricName, ...] = get_args(MetricName)


@dataclass(frozen=True)
class Question:
    """Rows of a table to fit and choose a classifier on, with their classes (0 to `classes` - 1), and rows of
    the tested table to classify. `fraction` and `seed`: of the labels that `train` has kept."""

    train: np.ndarray
    train_y: np.ndarray
    val: np.ndarray
    val_y: np.ndarray
    test: np.ndarray
    classes: int
    fraction: float
    seed: int


Classifier = Callable[[Question], tuple[np.ndarray, dict[str, Any]]]
"""Test scores (n, classes), log-odds (of kNN: votes), and for the protocol how they came about."""


def lacking(table: ImageTable, target: str, splits: Iterable[str] = SPLITS) -> list[str]:
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
    settings: ClassificationSettings,
    table: ImageTable,
    classify: Classifier,
    tested: ImageTable | None = None,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Results, one per label fraction and seed, and the arrays behind them: "row" and "y" of the test images
    and, per result, "scores-FRACTION-SEED" (n, classes).

    Fitted and chosen on `table`, tested on the test rows of `tested` (None: of the same table), which must
    have the same categories of the target. Raises `UserError` when a split that is used lacks one.
    """
    target, tested = settings.target, tested or table
    tables = {"train": table, "val": table, "test": tested}
    absent = [lack for split, of in tables.items() for lack in lacking(of, target, (split,))]
    if absent:
        raise UserError(
            f"The evaluation {settings.label} of {tested.name} cannot work: {'; '.join(absent)}; every "
            "category is needed in every split, so change the splits or the target's categories."
        )
    classes = table.attributes[target].categories
    rows = {split: of.rows(split, known=(target,)) for split, of in tables.items()}
    y = {split: of.encode((target,), rows[split])[target].numpy() for split, of in tables.items()}
    unknown = sum(len(of.rows(split)) - len(rows[split]) for split, of in tables.items())
    test = tested.frame.iloc[rows["test"]]
    unit = "images" if tested.group is None else f"images, whole groups ({tested.group}) at a time"
    patients = None if tested.group is None else test[tested.group].to_numpy()
    strata = labels_of(table.frame.iloc[rows["train"]], settings.by[0]) if settings.by else None
    groups = {name_of(grouping): labels_of(test, grouping) for grouping in settings.by}
    results, arrays = [], {"row": rows["test"], "y": y["test"]}
    for fraction, seed in subsets(settings):
        kept = subset_labels(y["train"], strata, fraction, seed)
        labels = rows["train"][kept], y["train"][kept], rows["val"], y["val"]
        scores, how = classify(Question(*labels, rows["test"], len(classes), fraction, seed))
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
        intervals = f"95 %, {BOOTSTRAP}, {settings.resamples} resamples of test {unit}"
        subset = "all labels"
        if settings.name == "finetune":
            intervals += "; the variance between trainings is not in them"
        if fraction < 1:
            intervals += "; the variance between label subsets is not in them"
            subset = f"drawn with seed {seed}, the same rows for every encoder"
        results.append(
            {
                "evaluation": settings.name,
                "target": target,
                "classes": list(classes),
                "metrics": list(METRICS),
                "protocol": {
                    **how,
                    "fitted_on": {"table": table.name, "fingerprint": table.fingerprint},
                    "split": "test",
                    "label_fraction": fraction,
                    "label_subset": subset,
                    "train_rows": len(kept),
                    "val_rows": len(rows["val"]),
                    "rows_without_target": unknown,
                    "intervals": intervals,
                },
                "data": {"table": tested.name, "fingerprint": tested.fingerprint},
                "seeds": {"labels": seed, "bootstrap": found["seed"]},
                "n": found["n"],
                "patients": found["patients"],
                "overall": found["overall"],
                "groups": found["groups"],
            }
        )
    return results, arrays


def subsets(settings: EvaluationSettings) -> list[tuple[float, int]]:
    """(label fraction, seed) of every network or probe. With all labels a probe has nothing to redraw."""
    first = settings.seeds if settings.name in ("finetune", "segment") else settings.seeds[:1]
    return [
        (fraction, seed)
        for fraction in settings.fractions
        for seed in (settings.seeds if fraction < 1 else first)
    ]


def probe(settings: ProbeSettings, features: np.ndarray, tested: np.ndarray | None = None) -> Classifier:
    """Of the frozen features (N, F) of all rows of the table, and those of the tested one."""
    tested = features if tested is None else tested

    def classify(asked: Question) -> tuple[np.ndarray, dict[str, Any]]:
        known = features[asked.train], asked.train_y, features[asked.val], asked.val_y
        data = *known, tested[asked.test], asked.classes
        how: dict[str, Any] = {"features": "frozen encoder in eval mode, whole images, no augmentation"}
        if settings.name == "linear_probe":
            fitted = linear_probe(*data)
            how |= {
                "classifier": "logistic regression on standardised features",
                "converged": fitted.has_converged,
            }
            return fitted.scores, how | choice_of("C", fitted.C, fitted.table)
        votes = knn(*data)
        how["classifier"] = f"cosine kNN, votes weighted by softmax(similarity / {TEMPERATURE})"
        return votes.scores, how | choice_of("k", votes.k, votes.table)

    return classify


def probabilities(name: str, scores: np.ndarray) -> np.ndarray:
    """(n, classes) of the `scores` of an evaluation: votes are shares already, log-odds become those of the
    softmax or sigmoid they came from."""
    return scores if name == "knn" else expit(scores)


def choice_of(
    setting: str, chosen: float, grid: Sequence[dict[str, Any]], figure: str = "AUC"
) -> dict[str, Any]:
    """How a setting was chosen by the validation rows' `figure`; at an edge of its grid a value outside might
    have been better."""
    return {
        setting: chosen,
        f"{setting}_chosen_on": f"validation {figure}",
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
