"""The segmentations of a recipe's encoder: a stage per network, of every label fraction, seed and fold.

encoder (and decoder), table -> segmenters -> figures of the test rows, overlays
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.data.table import ImageTable, MaskReader
from cfssl.engine.run import Run
from cfssl.evaluate.best import tuning_protocol
from cfssl.evaluate.evaluations import subsets
from cfssl.evaluate.masked import shares
from cfssl.evaluate.segment import Origin, load_segmenter, segmented, train_segmenter
from cfssl.evaluate.segmented import evaluate_segments, targets
from cfssl.evaluate.settings import SegmentSettings
from cfssl.production import Production
from cfssl.stages import SEGMENTER_CODE, Stage
from cfssl.visualise.overlays import Case, overlay_sheet

OF_FIGURES = {"fractions", "seeds", "resamples", "external", "tolerance"}  # what moves no network
SHOWN = 4  # best, median and worst cases each


class Segmentations:
    """`origins`: what a network starts from, by `start`, and `keys`: the content keys of that. `sight`: size
    (height, width) and border of the views that the encoder knows."""

    def __init__(
        self,
        production: Production,
        origins: Mapping[str, Callable[[], Origin]],
        keys: Mapping[str, Any],
        sight: Callable[[], tuple[tuple[int, int], str]],
    ) -> None:
        self.production, self.origins, self.keys, self.sight = production, origins, keys, sight

    def stage(
        self, section: Mapping[str, Any], table_key: str, fraction: float, seed: int, fold: int
    ) -> Stage:
        """Of one network. `section`: the settings as JSON; what only figures depend on does not count."""
        own = {name: value for name, value in section.items() if name not in OF_FIGURES}
        own["by"] = own["by"][:1]  # the first grouping stratifies label subsets and folds
        keys = self.keys[section["start"]], table_key, self.production.recipe.hardware.precision
        return self.production.stage("segmenter", own, fraction, seed, fold, *keys, code=SEGMENTER_CODE)

    def stages(self, settings: SegmentSettings, section: Mapping[str, Any], table_key: str) -> list[Stage]:
        """Of all networks."""
        return [
            self.stage(section, table_key, *subset, fold)
            for subset in subsets(settings)
            for fold in range(settings.folds)
        ]

    def evaluated(
        self,
        settings: SegmentSettings,
        section: Mapping[str, Any],
        table_key: str,
        fitted: ImageTable,
        tested: ImageTable,
        picture: Path,
    ) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Trains what is missing on `fitted`, and asks all of it about the test rows of `tested`: see
        `evaluate_segments`. `picture`: where overlays are drawn, of the network of the most labels, the first
        seed and the first fold."""
        origin, sight = self.origins[settings.start](), self.sight()
        channels = fitted.images.shape[0]

        def network(fraction: float, seed: int, fold: int) -> tuple[Any, dict[str, Any]]:
            stage = self.stage(section, table_key, fraction, seed, fold)
            rows = shares(settings, fitted, fraction, seed, fold)

            def make(folder: Path) -> None:
                run = self.production.run(folder)
                train_segmenter(settings, origin, fitted, rows, *sight, run, stage.product)
                run.close()

            self.production.finish(stage, make)
            run = Run(stage.folder)
            run.checkpoint_path.unlink(missing_ok=True)
            found, how = load_segmenter(settings, stage.product, origin, channels)
            counted = {"train_rows": len(rows.train), "val_rows": len(rows.val)}
            return found, counted | tuning_protocol(how, run, "val_dice", "Dice")

        def find(
            fraction: float, seed: int, fold: int, rows: np.ndarray
        ) -> tuple[Iterator[tuple[slice, np.ndarray]], dict[str, Any]]:
            found, how = network(fraction, seed, fold)
            return segmented(found, tested, rows, *sight), how

        results, arrays = evaluate_segments(settings, tested, find, fitted)
        fraction, seed = max(settings.fractions), settings.seeds[0]
        shown, dice = arrays["row"], arrays[f"dice-{fraction:g}-{seed}"].mean(1)
        places = extremes(dice, SHOWN)
        rows = shown[[place for of in places.values() for place in of]]
        ((_, found),) = find(fraction, seed, 0, rows)[0]
        true, cases = MaskReader(tested, settings.structures)(rows) > 0, []
        cases_of = [(name, place) for name, of in places.items() for place in of]
        for index, (name, place) in enumerate(cases_of):
            image = tested.images.read(rows[[index]])[0]
            cases.append(
                Case(name, f"row {rows[index]}, {dice[place]:.3f}", image, true[index], found[index])
            )
        overlay_sheet(picture, cases, settings.structures, targets(settings)[0][0])
        return results, arrays


def extremes(figures: np.ndarray, count: int) -> dict[str, list[int]]:
    """Places of the best, middle and worst of `figures` (n,), up to `count` each and none twice, the better
    ones first."""
    order = np.argsort(-figures, kind="stable").tolist()
    each = min(count, max(1, len(order) // 3))
    best = order[:each]
    worst = [place for place in order[-each:] if place not in best]
    start = (len(order) - each + 1) // 2
    median = [place for place in order[start : start + each] if place not in (*best, *worst)]
    return {"best": best, "median": median, "worst": worst}
