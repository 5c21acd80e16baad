"""The stages of a recipe, in order, each kept under the key of everything it depends on.

    table -> generator -> bank -> encoder -> features, networks -> evaluations -> report
       |     `-- generation.py --'           `-- evaluation.py, segmentation.py --'
       `-> silver masks (labelling.py)

The key of a stage = hash(its section of the recipe + keys of its inputs + code version of its rooms). A stage
lives in `RUNS/stages/<stage>-<key>/` and is finished when its `done.json` is there; recipes that agree up to
a stage share it. A stage that was interrupted goes on where it stopped. `RUNS/<recipe name>/` holds what a
person looks for: the resolved recipe, the environment, which stages were used, and the report.
"""

import json
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from cfssl.agreement import check_against_table
from cfssl.data.order import EpochOrder
from cfssl.data.plan import ViewSource, domain_counts
from cfssl.data.table import ImageTable
from cfssl.data.views import ViewData
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.interruption import Interruption
from cfssl.engine.loop import fit
from cfssl.engine.processes import dismiss, follow, meeting, together
from cfssl.engine.run import Run, torch_threads
from cfssl.engine.world import world
from cfssl.errors import UserError
from cfssl.evaluate.monitor import Monitor
from cfssl.evaluate.segment import Origin
from cfssl.evaluation import Evaluation
from cfssl.experiment import Recipe
from cfssl.files import write_json
from cfssl.generation import Generation
from cfssl.labelling import Labelling
from cfssl.models.dense import DenseNetwork
from cfssl.models.export import export_encoder, refuse_used_folder
from cfssl.models.initial import described, hold_backbone, init_key, initial_encoder
from cfssl.objectives import (
    coded_columns,
    create_objective,
    known_attributes,
    labelling_masks,
    weighs_changes,
    weighs_labels,
)
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.production import Production
from cfssl.provenance import environment
from cfssl.recipe import parse_recipe, write_recipe
from cfssl.stages import ENCODER_CODE, Stage
from cfssl.visualise.views import slot_names, view_grid


class Pipeline:
    """One recipe's stages under the folder `runs`. Each method makes what is missing and returns the
    product. `generation_type`: what makes the bank."""

    generation_type: type[Generation] = Generation

    def __init__(
        self, recipe: Recipe, runs: Path, quiet: bool = False, interruption: Interruption | None = None
    ) -> None:
        self.recipe, self.runs, self.quiet = recipe, runs, quiet
        self.folder = runs / recipe.name
        self.production = Production(recipe, runs, quiet, interruption)
        self.labelling = Labelling(self.production, self.table_stage.key, lambda: self.table)
        self.generation = self.generation_type(self.production, self.table_stage.key, lambda: self.table)
        keys = self.table_stage.key, self.encoder_stage.key
        origins = {"pretrained": self.pretrained, "initial": self.initial}
        origin_keys = {"pretrained": self.encoder_stage.key, "initial": self.initial_key}
        self.evaluation = Evaluation(
            self.production,
            self.folder,
            *keys,
            lambda: self.table,
            lambda: self.encoder,
            origins,
            origin_keys,
        )

    @cached_property
    def table_stage(self) -> Stage:
        return self.production.table_stage(self.recipe.data)

    @cached_property
    def encoder_stage(self) -> Stage:
        sections = [self.recipe.section(name) for name in ("views", "objective", "backbone", "train")]
        keys = self.recipe.hardware.precision, self.generation.bank_stage.key, init_key(self.recipe.init)
        silver = self.labelling.keys(labelling_masks(self.recipe.objective))
        return self.production.stage("encoder", sections, *keys, *silver, code=ENCODER_CODE)

    def stages(self) -> list[Stage]:
        """All stages of the recipe, in order."""
        before = [self.table_stage, *self.labelling.stages(), *self.generation.stages(), self.encoder_stage]
        return list(dict.fromkeys([*before, *self.evaluation.stages()]))

    @cached_property
    def table(self) -> ImageTable:
        """The prepared table; raises `UserError` when the recipe asks for attributes it does not have."""
        table = self.production.table(self.recipe.data)
        check_against_table(self.recipe, table)
        return table

    def view_data(self) -> ViewData:
        """The batches of the pre-training, as functions of the step."""
        recipe, bank = self.recipe, self.generation.staged_bank
        names = known_attributes(recipe.objective)
        source: ViewSource = bank.subset(self.table.rows("train", known=names)) if names else bank
        attributes = self.table.encode(names, source.rows)
        attributes |= {name: self.table.codes(name, source.rows) for name in coded_columns(recipe.objective)}
        train = recipe.train
        plan = recipe.views.counterfactual
        domains = None if plan is None else domain_counts(self.table, plan.variables, source.rows)
        names = labelling_masks(recipe.objective)
        return ViewData(
            source,
            recipe.views,
            train.batch,
            train.epochs,
            train.seed,
            train.accumulate,
            attributes,
            domains,
            self.labelling.table.masks_of(names).read if names else None,
            partial(self.labelling.table.confidence, names) if weighs_labels(recipe.objective) else None,
            weighs_changes(recipe.objective),
        )

    def new_encoder(self) -> tuple[nn.Module, dict[str, Any] | None]:
        """The encoder as it is before training, and the record of the weights that it starts from; a trained
        one needs none."""
        recipe = self.recipe
        channels, size = recipe.views.shape(self.table.images.shape)
        init, any_size = None if self.encoder_stage.done else recipe.init, recipe.views.local is not None
        return initial_encoder(recipe.backbone, init, channels, size, recipe.train.seed, any_size)

    @property
    def initial_key(self) -> list[Any]:
        """What decides about the encoder before training."""
        recipe = self.recipe
        views = recipe.views.size, recipe.views.border, recipe.views.local is not None
        return [recipe.section("backbone"), init_key(recipe.init), recipe.train.seed, *views]

    def initial(self) -> Origin:
        """The encoder as it is before training, also after it."""
        recipe = self.recipe
        channels, size = recipe.views.shape(self.table.images.shape)
        any_size = recipe.views.local is not None
        encoder, _ = initial_encoder(
            recipe.backbone, recipe.init, channels, size, recipe.train.seed, any_size
        )
        return Origin(encoder.to(recipe.hardware.device))

    def pretrained(self) -> Origin:
        """The trained encoder, and where the objective trains a decoder on it, that too."""
        network = getattr(self.objective, "network", None)
        return Origin(self.encoder, network if isinstance(network, DenseNetwork) else None)

    def new_objective(self) -> nn.Module:
        """The objective as it is before training: the same weights for every recipe with this backbone, init,
        objective and seed."""
        recipe = self.recipe
        encoder, _ = self.new_encoder()
        classes = None
        if isinstance(recipe.objective, SupervisedSettings):
            classes = len(self.table.attributes[recipe.objective.target].categories)
        train, images = recipe.train, len(self.table.rows("train", known=known_attributes(recipe.objective)))
        steps = len(EpochOrder(images, train.batch, train.epochs, train.seed))
        channels, _ = recipe.views.shape(self.table.images.shape)
        counts = {"images": images, "steps": steps, "channels": channels}
        return create_objective(recipe.objective, encoder, train.seed, **counts, classes=classes)

    @cached_property
    def objective(self) -> nn.Module:
        """The trained objective; its `student` is the encoder."""
        stage = self.encoder_stage

        def make(folder: Path) -> None:
            run = self.production.run(folder)
            self.first_batch()
            if self.recipe.init is not None:
                _, record = self.new_encoder()
                assert record is not None
                write_json(folder / "init.json", record)
                print(described(record), file=sys.stderr)
            self.view_data()  # makes what the others have to find
            with together(self.recipe.hardware, self.order()):
                self.train(run)
            save_checkpoint(stage.product, load_checkpoint(run.checkpoint_path, ["task"])["task"])
            run.close()

        self.production.finish(stage, make)
        # Not before the stage counts as finished: a run killed in between would train again from nothing.
        Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
        objective = self.new_objective()
        objective.load_state_dict(load_checkpoint(stage.product))
        return objective.to(self.recipe.hardware.device).eval()

    def train(self, run: Run) -> None:
        """Trains the objective, alone or as one of several processes that all call this; the checkpoint of
        `run` holds it afterwards."""
        recipe, data, objective = self.recipe, self.view_data(), self.new_objective()
        if recipe.init is not None:
            hold_backbone(objective, recipe.init.head_warmup * data.order.steps_per_epoch)
        label = f"{recipe.name}: {recipe.objective.name}"
        fit(objective, data, recipe.train, run, label, self.monitor(objective, run))

    def order(self) -> str:
        """What other processes are told, to train along."""
        recipe, runs = self.recipe.model_dump(mode="json"), str(self.runs.resolve())
        return json.dumps({"recipe": recipe, "runs": runs, "encoder": self.encoder_stage.key})

    @classmethod
    def train_along(cls, order: str, interruption: Interruption) -> None:
        """Obeys the first of several processes. Raises `UserError` when this one does not understand the same
        by it, or does not find what the first one has made."""
        told = json.loads(order)
        job = cls(parse_recipe(told["recipe"], "of the first process"), Path(told["runs"]), quiet=True)
        stage = job.encoder_stage
        if stage.key != told["encoder"]:
            raise UserError(
                f"This process would train {stage.folder.name} where the first one trains "
                f"encoder-{told['encoder']}; all have to run the same code and see the same files."
            )
        hardware = job.recipe.hardware
        with torch_threads(hardware.threads):
            job.train(Run(stage.folder, hardware, quiet=True, interruption=interruption))

    @property
    def encoder(self) -> nn.Module:
        """The trained encoder, a timm model without classifier."""
        student = self.objective.student
        assert isinstance(student, nn.Module)
        return student

    def monitor(self, objective: nn.Module, run: Run) -> Monitor | None:
        """What looks at the encoder while it is trained."""
        settings, views = self.recipe.monitor, self.recipe.views
        if settings is None:
            return None
        every = settings.every * self.view_data().order.steps_per_epoch
        student = objective.student
        assert isinstance(student, nn.Module)
        _, size = views.shape(self.table.images.shape)
        return Monitor(settings, student, self.table, size, views.border, every, run)

    def first_batch(self) -> Path:
        """A picture of the first batch, in the folder of the encoder; drawn before its first step, so that a
        mistake in the views is seen before hours of training."""
        path = self.encoder_stage.folder / "views.png"
        if not path.exists():
            view_grid(path, self.view_data()[0][0], names=slot_names(self.generation.bank))
        return path

    @property
    def metrics_path(self) -> Path:
        """The loss of every logged step of the pre-training, and what its monitor saw."""
        return self.encoder_stage.folder / "metrics.jsonl"

    def run(self) -> list[dict[str, Any]]:
        """Everything, and the run folder's records. Returns the evaluation results."""
        self.table, self.evaluation.externals  # noqa: B018  bad data is refused before anything is written
        if self.recipe.silver is not None:
            self.labelling.source  # noqa: B018
        write_recipe(self.recipe, self.folder / "recipe.yaml")
        write_json(
            self.folder / "environment.json", {**environment(), "data_fingerprint": self.table.fingerprint}
        )
        self.labelling.table  # noqa: B018  with silver masks, where the recipe has any
        if self.recipe.audit is not None:  # a poor bank is known before hours of training
            self.generation.audited()
        self.objective  # noqa: B018  trained also when nothing is evaluated
        results = self.evaluation.results()
        for stage in self.stages():  # what was not even opened, because what follows from it was there
            self.production.note(stage, reused=True)
        write_json(self.folder / "stages.json", self.production.used)
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
        export_encoder(self.encoder, folder, self.recipe.backbone, (channels, *size), provenance)


def lead(work: Callable[[], None], interruption: Interruption) -> None:
    """Does `work` in the first of the processes that were started together; the others train along, whenever
    it trains an encoder, until it is done."""
    if world().size == 1:
        work()
    elif world().rank:
        follow(partial(Pipeline.train_along, interruption=interruption))
    else:
        meeting()  # before hours of other stages
        try:
            work()
        finally:
            dismiss()
