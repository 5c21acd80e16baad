"""The evaluations of a recipe's encoder: stages that follow from it and that nothing else depends on.

encoder -> features -> evaluations -> results beside the report
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cfssl.data.table import ImageTable
from cfssl.evaluate.evaluations import evaluate, load_scores, save_scores
from cfssl.evaluate.features import extract, load_features, save_features
from cfssl.files import read_json, write_json
from cfssl.production import Production
from cfssl.provenance import git_state
from cfssl.stages import EVALUATION_CODE, FEATURE_CODE, Stage


class Evaluation:
    """`table` and `encoder`: open the prepared table and the trained encoder when they are first needed; the
    keys are those of their stages. `folder`: where results are written for people to find."""

    def __init__(
        self,
        production: Production,
        folder: Path,
        table_key: str,
        encoder_key: str,
        table: Callable[[], ImageTable],
        encoder: Callable[[], nn.Module],
    ) -> None:
        self.production, self.recipe, self.folder = production, production.recipe, folder
        self.table_key, self.encoder_key = table_key, encoder_key
        self._table, self._encoder = table, encoder

    @cached_property
    def features_stage(self) -> Stage:
        return self.production.stage("features", self.encoder_key, self.table_key, code=FEATURE_CODE)

    def stage(self, index: int) -> Stage:
        """Of evaluation `index` of the recipe."""
        section = self.recipe.section("evaluate")[index]
        return self.production.stage("evaluation", section, self.features_stage.key, code=EVALUATION_CODE)

    def stages(self) -> list[Stage]:
        """All stages that follow from the encoder, in order."""
        if not self.recipe.evaluate:
            return []
        return [self.features_stage, *(self.stage(index) for index in range(len(self.recipe.evaluate)))]

    @cached_property
    def features(self) -> np.ndarray:
        """Features (N, F) float32 of all rows of the table."""
        stage, table, views = self.features_stage, self._table(), self.recipe.views

        def make(_: Path) -> None:
            rows, quiet = np.arange(len(table)), self.production.quiet
            save_features(
                stage.product, extract(self._encoder(), table, rows, views.size, views.border, quiet=quiet)
            )

        self.production.finish(stage, make)
        return load_features(stage.product)

    def results(self) -> list[dict[str, Any]]:
        """The result of every evaluation of the recipe, also written beside the report; those of evaluations
        that the recipe no longer has are removed from there."""
        results: list[dict[str, Any]] = []
        for file in self.folder.glob("*-*.json"):
            if file.stem not in {settings.label for settings in self.recipe.evaluate}:
                file.unlink()
        for index, settings in enumerate(self.recipe.evaluate):
            stage = self.stage(index)

            def make(folder: Path, settings: Any = settings, product: Path = stage.product) -> None:
                found, scores = evaluate(settings, self.features, self._table())
                save_scores(folder / "scores.npz", scores)
                made_by = {"encoder": self.encoder_key, "git": git_state()}
                write_json(product, [{**result, **made_by} for result in found])

            self.production.finish(stage, make)
            found = [{**result, "train_seed": self.recipe.train.seed} for result in read_json(stage.product)]
            write_json(self.folder / f"{settings.label}.json", found)
            results += found
        return results

    def scores(self, index: int) -> dict[str, np.ndarray]:
        """The test scores behind evaluation `index`, for paired comparisons: see `evaluations.evaluate`."""
        self.results()
        return load_scores(self.stage(index).folder / "scores.npz")
