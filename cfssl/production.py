"""How the stages of a recipe are made: each once, kept under its key, and noted as used.

A stage lives in `RUNS/stages/<stage>-<key>/` and is finished when its `done.json` is there. One that was
interrupted goes on where it stopped.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cfssl.data.datasets import data_source, open_dataset, prepare_dataset
from cfssl.data.table import ImageTable
from cfssl.engine.interruption import Interruption
from cfssl.engine.processes import rank
from cfssl.engine.run import Run, Tracker, torch_threads
from cfssl.errors import UserError
from cfssl.experiment import DataSettings, Recipe
from cfssl.files import made_folders, write_json
from cfssl.measure import MeasureSettings, create_measure
from cfssl.measure.frozen import as_json
from cfssl.provenance import environment
from cfssl.stages import MEASURE_CODE, TABLE_CODE, Stage, keyed_stage


class Production:
    """One recipe's stages under the folder `runs`. `used`: folder name -> what was used, made or reused.
    `interruption`: asked between stages, and by trainings between steps."""

    def __init__(
        self, recipe: Recipe, runs: Path, quiet: bool = False, interruption: Interruption | None = None
    ) -> None:
        self.recipe, self.runs, self.quiet = recipe, runs, quiet
        self.interruption = interruption or Interruption()
        self.used: dict[str, dict[str, Any]] = {}

    def stage(self, name: str, *content: Any, code: tuple[str, ...]) -> Stage:
        """See `keyed_stage`."""
        return keyed_stage(self.runs, name, *content, code=code)

    def table_stage(self, settings: DataSettings) -> Stage:
        """Of a prepared table."""
        return self.stage("table", data_source(settings), code=TABLE_CODE)

    def table(self, settings: DataSettings) -> ImageTable:
        """A prepared table, opened."""
        stage = self.table_stage(settings)

        def make(folder: Path) -> None:
            prepare_dataset(settings, folder / "table", self.quiet)

        self.finish(stage, make)
        return open_dataset(settings, stage.folder / "table")

    def measure_stage(self, settings: MeasureSettings, table_key: str) -> Stage:
        """Of a frozen network that is trained on the table with this key."""
        section = TypeAdapter(type(settings)).dump_python(settings, mode="json")
        precision = self.recipe.hardware.precision
        return self.stage("measure", section, precision, table_key, code=MEASURE_CODE)

    def measure(self, settings: MeasureSettings, table_key: str, table: ImageTable) -> Any:
        """A frozen network trained on the real images of `table`, on the device of the recipe."""
        stage = self.measure_stage(settings, table_key)
        network = create_measure(settings, table)

        def make(folder: Path) -> None:
            run = self.run(folder)
            network.fit(table, run)
            network.save(stage.product)
            write_json(folder / "score.json", as_json(network.score(table, "val")))
            run.close()

        self.finish(stage, make)
        Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
        network.load(stage.product)
        network.to(self.recipe.hardware.device)
        return network

    def run(self, folder: Path) -> Run:
        """What a training writes to and computes on."""
        own = trackers(self.recipe, folder)
        return Run(
            folder, self.recipe.hardware, quiet=self.quiet, trackers=own, interruption=self.interruption
        )

    def finish(self, stage: Stage, make: Callable[[Path], None]) -> None:
        """Runs `make` unless the stage is done already, and notes what was used."""
        reused = stage.done
        if not reused and rank():
            raise UserError(
                f"Process {rank()} does not find {stage.folder}, which the first one has made; all of them "
                "need the same file system under --runs."
            )
        if not reused:
            self.interruption.check()
            started = time.monotonic()
            with made_folders(stage.folder), torch_threads(self.recipe.hardware.threads):
                make(stage.folder)
            record = {"stage": stage.name, "key": stage.key, "seconds": round(time.monotonic() - started, 2)}
            write_json(stage.folder / "done.json", {**record, **environment()})
        self.note(stage, reused)

    def note(self, stage: Stage, reused: bool) -> None:
        """Remembers the first use of a stage."""
        record = {"stage": stage.name, "folder": str(stage.folder), "reused": reused}
        self.used.setdefault(stage.folder.name, record)


def trackers(recipe: Recipe, folder: Path) -> tuple[Tracker, ...]:
    """What takes metrics besides metrics.jsonl. Raises `UserError` where TensorBoard's writer is asked for
    and not installed."""
    match recipe.track:
        case "wandb":
            return (wandb_run(recipe, folder),)
        case "tensorboard":
            return (TensorBoard(folder / "tensorboard"),)
        case _:
            return ()


def wandb_run(recipe: Recipe, folder: Path) -> Tracker:
    """Offline unless WANDB_MODE says otherwise: a forgotten online mode blocks for minutes on compute nodes
    without a network."""
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    settings = recipe.model_dump(mode="json")
    run: Tracker = wandb.init(
        project="cfssl", name=recipe.name, dir=folder, id=folder.name, resume="allow", config=settings
    )
    return run


class TensorBoard:
    """Event files in `folder`; steps that are done again after a resume replace the earlier ones."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "track: tensorboard needs the package tensorboardX, which is not installed; install "
                "cfssl[tensorboard], or leave track: none (metrics.jsonl is always written)."
            ) from None
        self._new_writer = partial(SummaryWriter, str(folder))
        self._writer: Any = None  # purging needs the first step

    def log(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl; what is no number stays there."""
        step = metrics["step"]
        if self._writer is None:
            self._writer = self._new_writer(purge_step=step)
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
