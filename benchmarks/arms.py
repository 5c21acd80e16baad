"""What the benchmarks of generators share: guides, judges, base generators and fine-tuned arms, each kept
under the key of everything it depends on, so that an interrupted benchmark goes on where it stopped."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from cfssl.data.datasets import PhantomChestSettings, PhantomTubeSettings, open_dataset, prepare_dataset
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.files import made_folders, read_json, write_json
from cfssl.generators.finetune import FinetuneSettings, finetune
from cfssl.generators.hvae import HVAEGenerator, HVAESettings
from cfssl.generators.targets import TargetRule
from cfssl.measure.predictor import AttributePredictor, PredictorSettings
from cfssl.measure.segmentor import Segmentor, SegmentorSettings
from cfssl.stages import FINETUNE_CODE, GENERATOR_CODE, MEASURE_CODE, TABLE_CODE, Stage, keyed_stage

HARDWARE = HardwareSettings(accelerator="cpu", threads=1)


def finished(stage: Stage, make: Callable[[Path], None]) -> Path:
    """The product of `stage`, made unless it is there."""
    if not stage.done:
        started = time.monotonic()
        with made_folders(stage.folder):
            make(stage.folder)
        write_json(stage.folder / "done.json", {"seconds": time.monotonic() - started})
    return stage.product


def seconds_spent(runs: Path) -> float:
    """Of one core, in all stages under `runs`; generators and fine-tuning are made inside the scores."""
    kinds = ("table", "measure", "scores")
    done = [path for kind in kinds for path in (runs / "stages").glob(f"{kind}-*/done.json")]
    return float(sum(read_json(path)["seconds"] for path in done))


def plain(settings: Any) -> Any:
    """Settings as JSON."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")


def rendered_table(runs: Path, settings: PhantomChestSettings | PhantomTubeSettings) -> ImageTable:
    """The table of a phantom, prepared or opened."""
    stage = keyed_stage(runs, "table", plain(settings), code=TABLE_CODE)
    finished(stage, lambda folder: prepare_dataset(settings, folder / "table", quiet=True))
    return open_dataset(settings, stage.folder / "table")


def predictor(runs: Path, table: ImageTable, settings: PredictorSettings) -> AttributePredictor:
    """Trained on real images, or loaded."""
    found = AttributePredictor(settings, table.attributes, table.images.shape)
    return _measure(runs, table, settings, found)


def segmentor(runs: Path, table: ImageTable, settings: SegmentorSettings) -> Segmentor:
    """Trained on real images, or loaded."""
    return _measure(runs, table, settings, Segmentor(settings, table.mask_names, table.images.shape))


def _measure(runs: Path, table: ImageTable, settings: Any, network: Any) -> Any:
    stage = keyed_stage(runs, "measure", plain(settings), table.fingerprint, code=MEASURE_CODE)

    def make(folder: Path) -> None:
        network.fit(table, Run(folder, HARDWARE, quiet=True))
        network.save(stage.product)

    network.load(finished(stage, make))
    return network


def base(runs: Path, table: ImageTable, settings: HVAESettings) -> tuple[HVAEGenerator, str]:
    """The generator before fine-tuning, and the key of its stage."""
    stage = keyed_stage(runs, "generator", plain(settings), table.fingerprint, code=GENERATOR_CODE)
    generator = HVAEGenerator(settings, table.attributes, table.images.shape)

    def make(folder: Path) -> None:
        generator.fit(table, Run(folder, HARDWARE, quiet=True))
        generator.save(stage.product)

    generator.load(finished(stage, make))
    return generator, stage.key


def arm(
    runs: Path,
    table: ImageTable,
    settings: HVAESettings,
    finetuning: FinetuneSettings,
    rules: Sequence[TargetRule],
    label: str,
) -> HVAEGenerator:
    """The base generator of `settings`, fine-tuned with `rules`; `label` tells rules apart that share
    settings and guides."""
    generator, key = base(runs, table, settings)
    guides = [rule.fingerprint for rule in rules]
    stage = keyed_stage(runs, "finetune", label, plain(finetuning), guides, key, code=FINETUNE_CODE)

    def make(folder: Path) -> None:
        finetune(generator, table, rules, finetuning, Run(folder, HARDWARE, quiet=True))
        generator.save(stage.product)

    generator.load(finished(stage, make))
    return generator


def in_processes(tasks: Sequence[Sequence[str]], jobs: int) -> None:
    """Runs this script once per task with these arguments added, `jobs` at a time, a thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def run(task: Sequence[str]) -> None:
        subprocess.run([sys.executable, *sys.argv, *task], env=environment, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, tasks))


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def seeded(settings: Any, seed: int) -> Any:
    """`settings` with another seed of training."""
    return replace(settings, train=replace(settings.train, seed=seed))


@torch.no_grad()
def in_batches(count: int, make: Callable[[slice], Any], size: int = 100) -> list[Any]:
    """`make` of every batch of `count` items."""
    return [make(slice(start, min(start + size, count))) for start in range(0, count, size)]
