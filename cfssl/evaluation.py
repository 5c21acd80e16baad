"""The evaluations of a recipe's encoder: stages that follow from it and that nothing else depends on.

    encoder -> features, fine-tuned classifiers or segmenters -> evaluations -> results beside the report
    external tables -´

An external set is evaluated in two ways. Its own classifier is fitted on its training rows, chosen on its
validation rows and asked about its test rows: that measures the encoder alone. The transferred one is fitted
and chosen on the recipe's table and asked, unchanged, about the external test rows: that measures what would
happen if it were used there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from cfssl.agreement import check_external
from cfssl.data.datasets import MorphoMNISTSettings, TableSettings
from cfssl.data.table import ImageTable
from cfssl.engine.run import Run
from cfssl.evaluate.best import tuning_protocol
from cfssl.evaluate.evaluations import (
    Classifier,
    Question,
    evaluate,
    load_scores,
    probe,
    save_scores,
    subsets,
)
from cfssl.evaluate.external import compared
from cfssl.evaluate.features import extract, load_features, save_features
from cfssl.evaluate.finetune import finetune, load_tuned, tuned_scores
from cfssl.evaluate.segment import Origin
from cfssl.evaluate.settings import FineTuningSettings, ProbeSettings, SegmentSettings
from cfssl.evaluate.spread import over_seeds
from cfssl.experiment import AnyEvaluation, DataSettings
from cfssl.files import copy_file, read_json, write_json
from cfssl.production import Production
from cfssl.provenance import git_state
from cfssl.segmentation import Segmentations
from cfssl.stages import CLASSIFIER_CODE, EVALUATION_CODE, EXTERNAL_CODE, FEATURE_CODE, Stage

OVERLAYS = "overlays.png"
Way = Literal["own", "transferred"]


@dataclass(frozen=True)
class Trial:
    """One evaluation of the recipe on one set of test rows: those of its table, or (`external`, `way`) those
    of an external set."""

    index: int
    settings: AnyEvaluation
    external: str | None = None
    way: Way | None = None

    @property
    def label(self) -> str:
        """Names the result file."""
        return self.settings.label + (f"@{self.external}-{self.way}" if self.external else "")

    @property
    def fitted(self) -> str | None:
        """The external set that the classifier is fitted on; None: the recipe's table."""
        return self.external if self.way == "own" else None


class Evaluation:
    """`table` and `encoder`: open the prepared table and the trained encoder when they are first needed; the
    keys are those of their stages. `origins`: what segmentations start from, and `origin_keys` their content
    keys. `folder`: where results are written for people to find."""

    def __init__(
        self,
        production: Production,
        folder: Path,
        table_key: str,
        encoder_key: str,
        table: Callable[[], ImageTable],
        encoder: Callable[[], nn.Module],
        origins: Mapping[str, Callable[[], Origin]],
        origin_keys: Mapping[str, Any],
    ) -> None:
        self.production, self.recipe, self.folder = production, production.recipe, folder
        self.table_key, self.encoder_key = table_key, encoder_key
        self._table, self._encoder = table, encoder
        self.segmentations = Segmentations(
            production, origins, origin_keys, lambda: (self.size, self.recipe.views.border)
        )

    @property
    def trials(self) -> list[Trial]:
        """Every evaluation of the recipe, each followed by those of its external sets."""
        found = []
        for index, settings in enumerate(self.recipe.evaluate):
            found.append(Trial(index, settings))
            for name in settings.external:
                found += [Trial(index, settings, name, way) for way in ("own", "transferred")]
        return found

    def table_key_of(self, external: str | None) -> str:
        """Of the stage of the recipe's table, or of an external one."""
        return (
            self.table_key
            if external is None
            else self.production.table_stage(self.recipe.external[external]).key
        )

    def features_stage(self, external: str | None = None) -> Stage:
        """Of the recipe's table, or of an external one."""
        keys = self.encoder_key, self.table_key_of(external)
        return self.production.stage("features", *keys, code=FEATURE_CODE)

    def external_stage(self, name: str) -> Stage:
        """Of the comparison of an external set with the recipe's table."""
        keys = self.table_key, self.table_key_of(name)
        content = same_ids(self.recipe.data, self.recipe.external[name])
        return self.production.stage("external", *keys, content, code=EXTERNAL_CODE)

    def classifier_stage(self, trial: Trial, fraction: float, seed: int) -> Stage:
        """Of an encoder that is fine-tuned on a share of the labels."""
        section = self._section(trial, "fractions", "seeds", "resamples")
        section["by"] = section["by"][:1]  # the first grouping stratifies the label subset
        keys = self.encoder_key, self.table_key_of(trial.fitted), self.recipe.hardware.precision
        return self.production.stage("classifier", section, fraction, seed, *keys, code=CLASSIFIER_CODE)

    def network_stages(self, trial: Trial) -> list[Stage]:
        """Of fine-tuned classifiers or segmenters; none where features are asked."""
        if isinstance(trial.settings, SegmentSettings):
            return self.segmentations.stages(
                trial.settings, self._section(trial), self.table_key_of(trial.fitted)
            )
        if not isinstance(trial.settings, FineTuningSettings):
            return []
        return [self.classifier_stage(trial, *subset) for subset in subsets(trial.settings)]

    def features_stages(self, trial: Trial) -> list[Stage]:
        """None where networks are trained."""
        if not isinstance(trial.settings, ProbeSettings):
            return []
        names = dict.fromkeys((trial.fitted, trial.external))
        return [self.features_stage(name) for name in names]

    def stage(self, trial: Trial) -> Stage:
        """Two recipes share an evaluation that fits and asks the same, whatever they call the table."""
        inputs = self.network_stages(trial) or self.features_stages(trial)
        keys = [*(stage.key for stage in inputs)]
        if not isinstance(trial.settings, ProbeSettings):
            keys.append(self.table_key_of(trial.external))
        return self.production.stage("evaluation", self._section(trial), *keys, code=EVALUATION_CODE)

    def _section(self, trial: Trial, *dropped: str) -> dict[str, Any]:
        """The settings of a trial that decide about it."""
        section = self.recipe.section("evaluate")[trial.index]
        return {key: value for key, value in section.items() if key not in ("external", *dropped)}

    def stages(self) -> list[Stage]:
        """All stages that follow from the encoder, and those of external tables, in order."""
        found = [self.production.table_stage(settings) for settings in self.recipe.external.values()]
        found += [self.external_stage(name) for name in self.recipe.external]
        for inputs in (self.features_stages, self.network_stages):
            found += [stage for trial in self.trials for stage in inputs(trial)]
        found += [self.stage(trial) for trial in self.trials]
        return list(dict.fromkeys(found))

    @cached_property
    def externals(self) -> dict[str, ImageTable]:
        """The external tables. Raises `UserError` for one that the evaluations cannot use, or of which the
        encoder has seen something."""
        return {name: self._external(name) for name in self.recipe.external}

    def _external(self, name: str) -> ImageTable:
        settings, stage = self.recipe.external[name], self.external_stage(name)
        external = self.production.table(settings)
        check_external(self.recipe, self._table(), name, external)
        has_same_ids = same_ids(self.recipe.data, settings)

        def make(_: Path) -> None:
            write_json(stage.product, compared(self._table(), external, name, has_same_ids))

        self.production.finish(stage, make)
        return external

    def table_of(self, external: str | None) -> ImageTable:
        """The recipe's table, or an external one."""
        return self._table() if external is None else self.externals[external]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the views that the encoder knows."""
        return self.recipe.views.shape(self._table().images.shape)[1]

    def features(self, external: str | None = None) -> np.ndarray:
        """Features (N, F) float32 of all rows of the recipe's table, or of an external one."""
        stage, views = self.features_stage(external), self.recipe.views

        def make(_: Path) -> None:
            table, quiet = self.table_of(external), self.production.quiet
            rows = np.arange(len(table))
            save_features(
                stage.product, extract(self._encoder(), table, rows, self.size, views.border, quiet=quiet)
            )

        self.production.finish(stage, make)
        return load_features(stage.product)

    def classifier(self, trial: Trial) -> Classifier:
        """What is asked in a trial of classes."""
        assert not isinstance(trial.settings, SegmentSettings)
        if isinstance(trial.settings, FineTuningSettings):
            return self._tuned(trial, trial.settings)
        return probe(trial.settings, self.features(trial.fitted), self.features(trial.external))

    def _tuned(self, trial: Trial, settings: FineTuningSettings) -> Classifier:
        fitted, tested = self.table_of(trial.fitted), self.table_of(trial.external)
        sight = self.size, self.recipe.views.border

        def classify(asked: Question) -> tuple[np.ndarray, dict[str, Any]]:
            stage, encoder = self.classifier_stage(trial, asked.fraction, asked.seed), self._encoder()

            def make(folder: Path) -> None:
                run = self.production.run(folder)
                finetune(settings, encoder, fitted, asked, *sight, run, stage.product)
                run.close()

            self.production.finish(stage, make)
            run = Run(stage.folder)
            run.checkpoint_path.unlink(missing_ok=True)
            network, how = load_tuned(stage.product, encoder, asked.classes)
            classifier = {"classifier": "encoder and linear head, trained together on augmented views"}
            return tuned_scores(network, tested, asked.test, *sight), classifier | tuning_protocol(how, run)

        return classify

    def results(self) -> list[dict[str, Any]]:
        """The result of every trial, also written beside the report, with their summary where there are
        several seeds; those of evaluations that the recipe no longer has are removed from there."""
        results: list[dict[str, Any]] = []
        labels = {trial.label for trial in self.trials}
        for file in [*self.folder.glob("*-*.json"), *self.folder.glob("segment-*.png")]:
            if file.stem.removesuffix("-seeds") not in labels:
                file.unlink()
        for trial in self.trials:
            stage = self.asked(trial)
            own: dict[str, Any] = {"train_seed": self.recipe.train.seed}
            if trial.external is not None:
                seen = read_json(self.external_stage(trial.external).product)
                own |= {"external": trial.external, "way": trial.way, "compared_with_training": seen}
            found = [{**result, **own} for result in read_json(stage.product)]
            write_json(self.folder / f"{trial.label}.json", found)
            if isinstance(trial.settings, SegmentSettings):
                copy_file(stage.folder / OVERLAYS, self.overlays(trial))
            summary = self.folder / f"{trial.label}-seeds.json"
            summary.unlink(missing_ok=True)
            if of_seeds := over_seeds(found):
                write_json(summary, of_seeds)
            results += found
        return results

    def asked(self, trial: Trial) -> Stage:
        """The stage of a trial, made."""
        stage = self.stage(trial)

        def make(folder: Path) -> None:
            found, scores = self._asked(trial, folder)
            save_scores(folder / "scores.npz", scores)
            made_by = {"encoder": self.encoder_key, "git": git_state()}
            write_json(stage.product, [{**result, **made_by} for result in found])

        self.production.finish(stage, make)
        return stage

    def _asked(self, trial: Trial, folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Results of a trial and the arrays behind them; pictures go to `folder`."""
        fitted, tested = self.table_of(trial.fitted), self.table_of(trial.external)
        if not isinstance(trial.settings, SegmentSettings):
            return evaluate(trial.settings, fitted, self.classifier(trial), tested)
        key, section = self.table_key_of(trial.fitted), self._section(trial)
        return self.segmentations.evaluated(trial.settings, section, key, fitted, tested, folder / OVERLAYS)

    def overlays(self, trial: Trial) -> Path:
        """The best, middle and worst cases of a segmentation, for people to find."""
        return self.folder / f"{trial.label}.png"

    def scores(self, label: str) -> dict[str, np.ndarray]:
        """The test scores behind the trial `label`, for paired comparisons: see `evaluations.evaluate`."""
        self.results()
        (trial,) = (trial for trial in self.trials if trial.label == label)
        return load_scores(self.stage(trial).folder / "scores.npz")


def same_ids(data: DataSettings, external: DataSettings) -> bool:
    """Whether an id means the same patient in both tables: where both are made from the same file or folder,
    or are drawn with the same seed in the same phantom world. Ids of different files are names in different
    lists, even where their columns are called alike."""
    return origin(data) == origin(external)


def origin(settings: DataSettings) -> tuple[str, str]:
    """Whose ids the table has."""
    if isinstance(settings, TableSettings):
        return settings.name, str(settings.source.path.resolve())
    if isinstance(settings, MorphoMNISTSettings):
        return settings.name, str(Path(settings.root).resolve())
    return settings.name, str(settings.seed)
