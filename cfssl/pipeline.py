"""The stages of a recipe, in order, each kept under the key of everything it depends on.

    table -> generator -> bank -> encoder -> features -> evaluations -> report

The key of a stage = hash(its section of the recipe + keys of its inputs + code version of its rooms). A stage
lives in `RUNS/stages/<stage>-<key>/` and is finished when its `done.json` is there; recipes that agree up to
a stage share it. A stage that was interrupted goes on where it stopped. `RUNS/<recipe name>/` holds what a
person looks for: the resolved recipe, the environment, which stages were used, and the report.
"""

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cfssl.agreement import check_against_table
from cfssl.bank.build import build, plan_views
from cfssl.bank.store import Bank
from cfssl.data.datasets import data_source, open_dataset, prepare_dataset
from cfssl.data.plan import ViewSource
from cfssl.data.table import ImageTable
from cfssl.data.views import ViewData
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.loop import fit
from cfssl.engine.progress import ProgressBar
from cfssl.engine.run import Run, Tracker, torch_threads
from cfssl.evaluate.evaluations import evaluate, load_scores, save_scores
from cfssl.evaluate.features import extract, load_features, save_features
from cfssl.files import made_folders, read_json, write_json
from cfssl.generators import FittedGenerator, create_generator
from cfssl.models.backbone import create_backbone
from cfssl.models.export import export_encoder, refuse_used_folder
from cfssl.objectives import create_objective
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.provenance import environment, git_state
from cfssl.recipe import Recipe, write_recipe
from cfssl.stages import (
    BANK_CODE,
    ENCODER_CODE,
    EVALUATION_CODE,
    FEATURE_CODE,
    GENERATOR_CODE,
    TABLE_CODE,
    Stage,
    keyed_stage,
)


class Pipeline:
    """One recipe's stages under the folder `runs`. Each method makes what is missing and returns the
    product."""

    def __init__(self, recipe: Recipe, runs: Path, quiet: bool = False) -> None:
        self.recipe, self.runs, self.quiet = recipe, runs, quiet
        self.folder = runs / recipe.name
        self.used: dict[str, dict[str, Any]] = {}

    def _stage(self, name: str, *content: Any, code: tuple[str, ...]) -> Stage:
        return keyed_stage(self.runs, name, *content, code=code)

    @cached_property
    def table_stage(self) -> Stage:
        return self._stage("table", data_source(self.recipe.data), code=TABLE_CODE)

    @cached_property
    def generator_stage(self) -> Stage | None:
        if self.recipe.generator is None:
            return None
        section, precision = self.recipe.section("generator"), self.recipe.hardware.precision
        return self._stage("generator", section, precision, self.table_stage.key, code=GENERATOR_CODE)

    @cached_property
    def bank_stage(self) -> Stage:
        generator = self.generator_stage.key if self.generator_stage else None
        return self._stage(
            "bank", self.recipe.section("bank"), self.table_stage.key, generator, code=BANK_CODE
        )

    @cached_property
    def encoder_stage(self) -> Stage:
        sections = [self.recipe.section(name) for name in ("views", "objective", "backbone", "train")]
        precision = self.recipe.hardware.precision
        return self._stage("encoder", sections, precision, self.bank_stage.key, code=ENCODER_CODE)

    @cached_property
    def features_stage(self) -> Stage:
        return self._stage("features", self.encoder_stage.key, self.table_stage.key, code=FEATURE_CODE)

    def evaluation_stage(self, index: int) -> Stage:
        section = self.recipe.section("evaluate")[index]
        return self._stage("evaluation", section, self.features_stage.key, code=EVALUATION_CODE)

    def stages(self) -> list[Stage]:
        """All stages of the recipe, in order."""
        early = [self.table_stage, self.generator_stage, self.bank_stage, self.encoder_stage]
        found = [stage for stage in early if stage is not None]
        if self.recipe.evaluate:
            evaluations = [self.evaluation_stage(index) for index in range(len(self.recipe.evaluate))]
            found += [self.features_stage, *evaluations]
        return found

    @cached_property
    def table(self) -> ImageTable:
        """The prepared table; raises `UserError` when the recipe asks for attributes it does not have."""
        settings = self.recipe.data

        def make(folder: Path) -> None:
            prepare_dataset(settings, folder / "table", self.quiet)

        self._finish(self.table_stage, make)
        table = open_dataset(settings, self.table_stage.folder / "table")
        check_against_table(self.recipe, table)
        return table

    @cached_property
    def generator(self) -> FittedGenerator | None:
        stage, settings = self.generator_stage, self.recipe.generator
        if stage is None or settings is None:
            return None
        generator = create_generator(settings, self.table)

        def make(folder: Path) -> None:
            run = self._run(folder)
            generator.fit(self.table, run)
            generator.save(stage.product)
            run.close()

        self._finish(stage, make)
        Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
        generator.load(stage.product)
        generator.to(self.recipe.hardware.device)
        return generator

    @cached_property
    def bank(self) -> Bank:
        """The opened bank; raises `UserError` when one of its files is missing or truncated."""
        self._finish(self.bank_stage, self.build_bank)
        made_by = self.generator.fingerprint if self.generator is not None else None
        folder = self.bank_stage.folder / "bank"
        return Bank.open(folder, table_fingerprint=self.table.fingerprint, generator_fingerprint=made_by)

    def build_bank(self, stage_folder: Path, check: bool = False) -> None:
        """Writes the shards that are missing or incomplete, and with `check` those whose bytes fail; also
        mends a finished bank whose files were lost."""
        table, generator, settings = self.table, self.generator, self.recipe.bank
        graph = generator.graph if generator is not None else None
        views = plan_views(settings.do, graph, table.attributes) if settings.do else []
        rows = table.rows("train")
        with ProgressBar("bank", total=len(rows), quiet=self.quiet) as bar:
            build(
                stage_folder / "bank",
                table,
                rows,
                generator,
                views,
                megabytes=settings.shard_megabytes,
                device=self.recipe.hardware.device,
                check=check,
                progress=lambda done, _: bar.advance(steps=done - bar.done, items=done - bar.items),
            )

    def view_data(self) -> ViewData:
        """The batches of the pre-training, as functions of the step."""
        recipe, bank = self.recipe, self.bank
        names: tuple[str, ...] = ()
        source: ViewSource = bank
        if isinstance(recipe.objective, SupervisedSettings):
            names = (recipe.objective.target,)
            source = bank.subset(self.table.rows("train", known=names))
        attributes = self.table.encode(names, source.rows)
        train = recipe.train
        plan = recipe.views.counterfactual
        categories = self.table.attributes[plan.variable].categories if plan is not None else ()
        return ViewData(
            source,
            recipe.views,
            train.batch,
            train.epochs,
            train.seed,
            train.accumulate,
            attributes,
            categories,
        )

    def new_objective(self) -> nn.Module:
        """The objective as it is before training: the same weights for every recipe with this backbone,
        objective and seed."""
        recipe = self.recipe
        channels, size = recipe.views.shape(self.table.images.shape)
        encoder = create_backbone(recipe.backbone, channels, size, recipe.train.seed)
        classes = None
        if isinstance(recipe.objective, SupervisedSettings):
            classes = len(self.table.attributes[recipe.objective.target].categories)
        return create_objective(recipe.objective, encoder, classes, recipe.train.seed)

    @cached_property
    def objective(self) -> nn.Module:
        """The trained objective; its `student` is the encoder."""
        objective = self.new_objective()
        stage = self.encoder_stage
        label = f"{self.recipe.name}: {self.recipe.objective.name}"

        def make(folder: Path) -> None:
            run = self._run(folder)
            fit(objective, self.view_data(), self.recipe.train, run, label)
            save_checkpoint(stage.product, objective.state_dict())
            run.close()

        self._finish(stage, make)
        # Not before the stage counts as finished: a run killed in between would train again from nothing.
        Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
        objective.load_state_dict(load_checkpoint(stage.product))
        return objective.to(self.recipe.hardware.device).eval()

    @property
    def encoder(self) -> nn.Module:
        """The trained encoder, a timm model without classifier."""
        student = self.objective.student
        assert isinstance(student, nn.Module)
        return student

    @property
    def metrics_path(self) -> Path:
        """The loss of every logged step of the pre-training."""
        return self.encoder_stage.folder / "metrics.jsonl"

    @cached_property
    def features(self) -> np.ndarray:
        """Features (N, F) float32 of all rows of the table."""
        stage, rows = self.features_stage, np.arange(len(self.table))

        def make(_: Path) -> None:
            views = self.recipe.views
            found = extract(self.encoder, self.table, rows, views.size, views.border, quiet=self.quiet)
            save_features(stage.product, found)

        self._finish(stage, make)
        return load_features(stage.product)

    def evaluations(self) -> list[dict[str, Any]]:
        """The result of every evaluation of the recipe, also written beside the report; those of evaluations
        that the recipe no longer has are removed from there."""
        results: list[dict[str, Any]] = []
        for file in self.folder.glob("*-*.json"):
            if file.stem not in {settings.label for settings in self.recipe.evaluate}:
                file.unlink()
        for index, settings in enumerate(self.recipe.evaluate):
            stage = self.evaluation_stage(index)

            def make(folder: Path, settings: Any = settings, product: Path = stage.product) -> None:
                found, scores = evaluate(settings, self.features, self.table)
                save_scores(folder / "scores.npz", scores)
                made_by = {"encoder": self.encoder_stage.key, "git": git_state()}
                write_json(product, [{**result, **made_by} for result in found])

            self._finish(stage, make)
            found = [{**result, "train_seed": self.recipe.train.seed} for result in read_json(stage.product)]
            write_json(self.folder / f"{settings.label}.json", found)
            results += found
        return results

    def scores(self, index: int) -> dict[str, np.ndarray]:
        """The test scores behind evaluation `index`, for paired comparisons: see `evaluations.evaluate`."""
        self.evaluations()
        return load_scores(self.evaluation_stage(index).folder / "scores.npz")

    def run(self) -> list[dict[str, Any]]:
        """Everything, and the run folder's records. Returns the evaluation results."""
        self.table  # noqa: B018  bad data is refused before anything is written into the run folder
        write_recipe(self.recipe, self.folder / "recipe.yaml")
        write_json(
            self.folder / "environment.json", {**environment(), "data_fingerprint": self.table.fingerprint}
        )
        self.objective  # noqa: B018  trained also when nothing is evaluated
        results = self.evaluations()
        for stage in self.stages():  # what was not even opened, because what follows from it was there
            self.used.setdefault(stage.folder.name, self._record(stage, reused=True))
        write_json(self.folder / "stages.json", self.used)
        return results

    def export(self, folder: Path) -> None:
        """The encoder in timm's layout, with its provenance."""
        refuse_used_folder(folder)
        channels, size = self.recipe.views.shape(self.table.images.shape)
        provenance = {
            "recipe": self.recipe.model_dump(mode="json"),
            "encoder_key": self.encoder_stage.key,
            "data_fingerprint": self.table.fingerprint,
        }
        export_encoder(self.encoder, folder, self.recipe.backbone.name, (channels, *size), provenance)

    def _run(self, folder: Path) -> Run:
        return Run(folder, self.recipe.hardware, quiet=self.quiet, trackers=trackers(self.recipe, folder))

    def _finish(self, stage: Stage, make: Callable[[Path], None]) -> None:
        """Runs `make` unless the stage is done already, and notes what was used."""
        reused = stage.done
        if not reused:
            started = time.monotonic()
            with made_folders(stage.folder), torch_threads(self.recipe.hardware.threads):
                make(stage.folder)
            record = {"stage": stage.name, "key": stage.key, "seconds": round(time.monotonic() - started, 2)}
            write_json(stage.folder / "done.json", {**record, **environment()})
        self.used.setdefault(stage.folder.name, self._record(stage, reused))

    def _record(self, stage: Stage, reused: bool) -> dict[str, Any]:
        return {"stage": stage.name, "folder": str(stage.folder), "reused": reused}


def trackers(recipe: Recipe, folder: Path) -> tuple[Tracker, ...]:
    """wandb is offline unless WANDB_MODE says otherwise: a forgotten online mode blocks for minutes on
    compute nodes without a network."""
    if recipe.track == "none":
        return ()
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    settings = recipe.model_dump(mode="json")
    run = wandb.init(
        project="cfssl", name=recipe.name, dir=folder, id=folder.name, resume="allow", config=settings
    )
    return (run,)
