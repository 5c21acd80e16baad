"""The data sets a recipe can name: the phantom, Morpho-MNIST, and any table of one's own.

Enters: a `data:` section. Leaves: a prepared, memory-mapped `ImageTable`.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.morphomnist import morphomnist_state, prepare_morphomnist
from cfssl.data.phantoms import chest
from cfssl.data.prepare import prepare, save_prepared, source_state
from cfssl.data.sources import AttributeSpec, TableSource
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attributes, ImageTable, Truth
from cfssl.engine.progress import ProgressBar
from cfssl.errors import UserError
from cfssl.settings import STRICT, Count, Probability

DOMAINS = {"A": 0.6, "B": 0.25, "C": 0.1, "D": 0.05}
SPLIT_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


@dataclass(frozen=True, config=STRICT)
class PhantomChestSettings:
    """Chest radiographs with a known causal model; see data/phantoms/chest.py. `splits`: shares of
    `count`."""

    name: Literal["phantom_chest"] = "phantom_chest"
    size: Literal[64, 128] = 64
    count: Count = 4000
    domains: dict[str, Probability] = Field(default_factory=lambda: dict(DOMAINS))
    rho: Probability = 0.0
    balanced_test: bool = True
    splits: dict[str, Probability] = Field(default_factory=lambda: dict(SPLIT_SHARES))
    seed: int = 0

    @property
    def world(self) -> chest.ChestWorld:
        return chest.ChestWorld(self.size, self.domains, self.rho, self.balanced_test)


@dataclass(frozen=True, config=STRICT)
class MorphoMNISTSettings:
    """`root`: the folder with the idx.gz files. `size`: digits are padded to it. `part`: "t10k" or
    "train"."""

    root: str
    name: Literal["morphomnist"] = "morphomnist"
    size: Count = 32
    part: Literal["t10k", "train"] = "t10k"
    split: SplitSettings = Field(default_factory=lambda: SplitSettings(stratify=("digit",)))


@dataclass(frozen=True, config=STRICT)
class TableSettings:
    """Any images: `path` (under `root`) is a CSV, Parquet, .npz or a folder. The rest as in data/sources.py
    TableSource; `size` is the side that images are brought to."""

    path: str
    name: Literal["table"] = "table"
    root: str = "."
    images: str | None = None
    masks: str | dict[str, str] | None = None
    size: Count | tuple[Count, Count] | None = None
    channels: Literal[1, 3] | None = None
    attributes: dict[str, AttributeSpec] | None = None
    group: str | None = None
    where: dict[str, tuple[Any, ...] | Literal["present"]] | None = None
    missing: tuple[str, ...] = ()
    split: SplitSettings = Field(default_factory=SplitSettings)

    @property
    def source(self) -> TableSource:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return TableSource(
            Path(self.root) / self.path,
            images=self.images,
            masks=self.masks,
            size=size,
            channels=self.channels,
            attributes=self.attributes,
            group=self.group,
            where=self.where,
            missing=self.missing,
            split=self.split,
        )


DataSettings = PhantomChestSettings | MorphoMNISTSettings | TableSettings


class PhantomTruth:
    """The phantom's true counterfactuals; its exogenous noise is drawn again when it is first asked for."""

    def __init__(self, settings: PhantomChestSettings) -> None:
        self.settings = settings

    @cached_property
    def chest(self) -> chest.ChestTruth:
        s = self.settings
        return chest.build(s.world, s.count, s.seed, s.splits)[3]

    def counterfactual(self, rows: np.ndarray, parents: Attributes) -> np.ndarray:
        """See `cfssl.data.table.Truth`."""
        return self.chest.counterfactual(rows, parents)


def data_source(settings: DataSettings) -> Mapping[str, Any]:
    """The state of the files behind a data set, for the content key; empty for the phantom, which needs
    none."""
    if isinstance(settings, PhantomChestSettings):
        return {}
    if isinstance(settings, MorphoMNISTSettings):
        return morphomnist_state(settings.root, settings.part)
    return source_state(settings.source)


def prepare_dataset(settings: DataSettings, folder: Path, quiet: bool = False) -> ImageTable:
    """Writes the prepared table to `folder` (whole or not at all) and opens it."""
    with ProgressBar("table", total=0, quiet=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(steps=done - bar.done, items=done - bar.items)

        if isinstance(settings, MorphoMNISTSettings):
            return prepare_morphomnist(
                settings.root, folder, settings.size, settings.part, settings.split, progress=progress
            )
        if isinstance(settings, TableSettings):
            return prepare(settings.source, folder, progress=progress)
        frame, images, masks, _ = chest.build(settings.world, settings.count, settings.seed, settings.splits)
        return save_prepared(
            folder,
            "phantom_chest",
            frame,
            chest.ATTRIBUTES,
            images,
            masks,
            chest.MASKS,
            group="patient",
            progress=progress,
        )


def open_dataset(settings: DataSettings, folder: Path) -> ImageTable:
    """Opens a prepared table; the phantom's with its truth."""
    if not folder.is_dir():
        raise UserError(f"The prepared table {folder} is missing; delete {folder.parent} and run again.")
    truth: Truth | None = PhantomTruth(settings) if isinstance(settings, PhantomChestSettings) else None
    return ImageTable.open(folder, truth)
