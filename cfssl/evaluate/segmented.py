"""What a segmentation is worth: the masks that networks find in the test images against the true ones, per
structure and group.

What enters: for every label fraction and seed the masks found by its network, or by those of all folds. What
leaves: result dicts, one per structure and one of their mean, and the figures of every image, for paired
comparisons. Every image counts in every mean, also where a structure is absent: see contours.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cfssl.data.table import ImageTable, MaskReader
from cfssl.errors import UserError
from cfssl.evaluate.contours import DISTANCES, MEASURES, measured
from cfssl.evaluate.evaluations import subsets
from cfssl.evaluate.grouped import Measure, labels_of, mean_of, name_of, tabulated
from cfssl.evaluate.masked import labelled_rows
from cfssl.evaluate.settings import SegmentSettings

Found = Callable[[float, int, int, np.ndarray], tuple[Iterator[tuple[slice, np.ndarray]], dict[str, Any]]]
"""(label fraction, seed, fold, test rows) -> places in the rows and masks (n, S, H, W) bool, and for the
protocol how they came about."""

EMPTY = "both empty: Dice 1, distances 0; one empty: Dice 0, distances the diagonal of the image"


def evaluate_segments(
    settings: SegmentSettings, tested: ImageTable, find: Found, fitted_on: ImageTable
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Results, one per label fraction, seed and structure (of several their mean, too, which comes first),
    and the arrays behind them: "row" of the test images, "present" (n, S), and per fraction and seed
    "MEASURE-FRACTION-SEED" (n, S), means over the folds. `fitted_on`: the table of the training rows.

    Raises `UserError` where no test row has masks."""
    rows = labelled_rows(tested, settings, "test")
    without = len(tested.rows("test")) - len(rows)
    if not len(rows):
        raise UserError(
            f"{settings.label} has no test row of {tested.name} with masks; change the splits or "
            "evaluate.labelled."
        )
    masks = MaskReader(tested, settings.structures)
    test = tested.frame.iloc[rows]
    patients = None if tested.group is None else test[tested.group].to_numpy()
    groups = {name_of(grouping): labels_of(test, grouping) for grouping in settings.by}
    unit = "images" if tested.group is None else f"images, whole groups ({tested.group}) at a time"
    present = np.concatenate([masks(rows[places]).any((2, 3)) for places in chunks(len(rows))])
    results, arrays = [], {"row": rows, "present": present}
    for fraction, seed in subsets(settings):
        networks = [find(fraction, seed, fold, rows) for fold in range(settings.folds)]
        found = [compared(masks, rows, of_network, settings.tolerance) for of_network, _ in networks]
        values = {name: np.mean([of_fold[name] for of_fold in found], axis=0) for name in MEASURES}
        empty = np.array([of_fold["empty"] for of_fold in found]) > 0  # (folds, n, S)
        arrays |= {f"{name}-{fraction:g}-{seed}": values[name] for name in MEASURES}
        intervals = (
            f"95 %, percentile bootstrap, {settings.resamples} resamples of test {unit}; the variance "
            "between trainings is not in them"
        )
        how = [of_fold for _, of_fold in networks]
        for target, columns in targets(settings):
            table = tabulated(
                len(rows),
                groups,
                {
                    name: Measure(mean_of(of_all[:, columns].mean(1)), lambda _: "no row", name in DISTANCES)
                    for name, of_all in values.items()
                },
                counts(present[:, columns], empty[:, :, columns]),
                patients,
                settings.resamples,
            )
            results.append(
                {
                    "evaluation": settings.name,
                    "target": target,
                    "variant": settings.variant,
                    "metrics": list(MEASURES),
                    "protocol": {
                        "network": "encoder, U-Net decoder and pointwise head, trained on augmented views",
                        "learns": settings.learns,
                        "start": settings.start,
                        **(how[0] if settings.folds == 1 else {"folds": how}),
                        "fitted_on": {"table": fitted_on.name, "fingerprint": fitted_on.fingerprint},
                        "split": "test",
                        "label_fraction": fraction,
                        "label_subset": "all labels"
                        if fraction == 1
                        else f"patients, drawn with seed {seed}, the same for every encoder",
                        "test_rows_without_masks": without,
                        "surface_dice_within": settings.tolerance,
                        "distances": "pixels of the stored image",
                        "empty_masks": EMPTY,
                        "intervals": intervals,
                    },
                    "data": {"table": tested.name, "fingerprint": tested.fingerprint},
                    "seeds": {"labels": seed, "bootstrap": table["seed"]},
                    "n": table["n"],
                    "patients": table["patients"],
                    "overall": table["overall"],
                    "groups": table["groups"],
                }
            )
    return results, arrays


def targets(settings: SegmentSettings) -> list[tuple[str, list[int]]]:
    """What results are about, and its channels: the mean over structures, where there are several, and each
    of them."""
    single = [(name, [place]) for place, name in enumerate(settings.structures)]
    if len(single) == 1:
        return single
    return [(f"mean of {', '.join(settings.structures)}", list(range(len(single)))), *single]


def counts(present: np.ndarray, empty: np.ndarray) -> Callable[[np.ndarray], dict[str, Any]]:
    """About test rows: "positives", the images that show a structure, and how many masks are empty: of the
    truth, of what was found, and both. `present` (n, S), `empty` (folds, n, S); with several folds, masks
    found by all networks are counted, and those of the truth as often."""

    def of(rows: np.ndarray) -> dict[str, Any]:
        truth, found = np.broadcast_to(~present[rows], empty[:, rows].shape), empty[:, rows]
        return {
            "positives": int(present[rows].any(1).sum()),
            "empty": {
                "truth": int(truth.sum()),
                "found": int(found.sum()),
                "both": int((truth & found).sum()),
            },
        }

    return of


def compared(
    masks: MaskReader, rows: np.ndarray, found: Iterator[tuple[slice, np.ndarray]], tolerance: float
) -> dict[str, np.ndarray]:
    """Every measure of the masks found in `rows`, and "empty", 1 where none was, (n, S) each."""
    parts = []
    for places, here in found:
        true = masks(rows[places]) > 0
        parts.append({**measured(here, true, tolerance), "empty": 1.0 - here.any((2, 3))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def chunks(count: int, size: int = 512) -> list[slice]:
    """Places of `count` rows, some at a time."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
