"""The data sets a recipe can name: phantoms, Morpho-MNIST, and any table of one's own.

Enters: a `data:` section. Leaves: a prepared, memory-mapped `ImageTable`.
"""

import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.morphomnist import morphomnist_state, prepare_morphomnist
from cfssl.data.phantoms.chest import SILVER, ChestWorld, silver_masks
from cfssl.data.phantoms.tube import TubeWorld
from cfssl.data.phantoms.world import SPLIT_SHARES, WorldTruth, build_world
from cfssl.data.prepare import changed_files, plain, prepare, save_prepared, source_state
from cfssl.data.regions import Layout
from cfssl.data.sources import AttributeSpec, TableSource
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attributes, ImageTable, Truth
from cfssl.engine.progress import ProgressBar
from cfssl.errors import UserError
from cfssl.settings import STRICT, Count, Probability

DOMAINS = {"A": 0.6, "B": 0.25, "C": 0.1, "D": 0.05}
TUBE_DOMAINS = {"soft": 0.7, "sharp": 0.3}
COMPARED = 10_000  # files compared at every opening; `cfssl check` compares all


@dataclass(frozen=True, config=STRICT)
class PhantomChestSettings:
    """Chest radiographs with a known causal model; see data/phantoms/chest.py. `splits`: shares of
    `count`. `silver`: the table also has the masks of a segmenter that was trained on healthy lungs, called
    `silver_left_lung` and `silver_right_lung`."""

    name: Literal["phantom_chest"] = "phantom_chest"
    size: Literal[64, 128] = 64
    count: Count = 4000
    domains: dict[str, Probability] = Field(default_factory=lambda: dict(DOMAINS))
    rho: Probability = 0.0
    balanced_test: bool = True
    women: Probability = 0.5
    sex_effect: Probability = 0.0
    silver: bool = False
    splits: dict[str, Probability] = Field(default_factory=lambda: dict(SPLIT_SHARES))
    seed: int = 0

    @property
    def world(self) -> ChestWorld:
        return ChestWorld(self.size, self.domains, self.rho, self.balanced_test, self.women, self.sex_effect)


@dataclass(frozen=True, config=STRICT)
class PhantomTubeSettings:
    """Straightened coronary arteries with a known causal model; see data/phantoms/tube.py. `domains`: share
    of each kernel. `splits`: shares of `count`."""

    name: Literal["phantom_tube"] = "phantom_tube"
    size: Literal[32, 64] = 64
    count: Count = 4000
    domains: dict[str, Probability] = Field(default_factory=lambda: dict(TUBE_DOMAINS))
    splits: dict[str, Probability] = Field(default_factory=lambda: dict(SPLIT_SHARES))
    seed: int = 0

    @property
    def world(self) -> TubeWorld:
        return TubeWorld(self.size, self.domains)


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
    TableSource; `size` is the side that images are brought to. `areas`: mask name to region layout."""

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
    areas: dict[str, Layout] | None = None
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
            areas=self.areas,
            split=self.split,
        )


PhantomSettings = PhantomChestSettings | PhantomTubeSettings
DataSettings = PhantomSettings | MorphoMNISTSettings | TableSettings


class PhantomTruth:
    """A phantom's true counterfactuals; its exogenous noise is drawn again when it is first asked for."""

    def __init__(self, settings: PhantomSettings) -> None:
        self.settings = settings

    @cached_property
    def known(self) -> WorldTruth:
        s = self.settings
        return build_world(s.world, s.count, s.seed, s.splits)[3]

    def counterfactual(self, rows: np.ndarray, parents: Attributes) -> np.ndarray:
        """See `cfssl.data.table.Truth`."""
        return self.known.counterfactual(rows, parents)

    def attributes(self, rows: np.ndarray, do: Attributes) -> Attributes:
        """See `cfssl.data.table.Truth`."""
        return self.known.attributes(rows, do)


def data_source(settings: DataSettings) -> dict[str, Any]:
    """What the content key of a data set's table is made from: every setting, and the state of its files as
    far as it can be seen without opening them. A folder is the same under all its names."""
    if isinstance(settings, PhantomSettings):
        return plain(settings)
    if isinstance(settings, MorphoMNISTSettings):
        return plain(settings) | {"root": morphomnist_state(settings.root, settings.part)}
    return source_state(settings.source)


def prepare_dataset(settings: DataSettings, folder: Path, quiet: bool = False) -> ImageTable:
    """Writes the prepared table to `folder` (whole or not at all) and opens it. When it cannot, a folder that
    was made for it stays only if something else lies in it."""
    try:
        return _prepare(settings, folder, quiet)
    except BaseException:
        with suppress(OSError):
            folder.parent.rmdir()
        raise


def _prepare(settings: DataSettings, folder: Path, quiet: bool) -> ImageTable:
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
        world = settings.world
        frame, images, masks, _ = build_world(world, settings.count, settings.seed, settings.splits)
        mask_names = world.mask_names
        if isinstance(settings, PhantomChestSettings) and settings.silver:
            masks = np.concatenate([masks, silver_masks(masks)], axis=1)
            mask_names = (*mask_names, *SILVER)
        return save_prepared(
            folder,
            world.name,
            frame,
            world.attributes,
            images,
            masks,
            mask_names,
            group="patient",
            areas=world.areas,
            progress=progress,
        )


def open_dataset(settings: DataSettings, folder: Path) -> ImageTable:
    """Opens a prepared table; the phantom's with its truth. Raises `UserError` where files it was made from
    have changed, as far as these were compared."""
    if not folder.is_dir():
        raise UserError(f"The prepared table {folder} is missing; delete {folder.parent} and run again.")
    truth: Truth | None = PhantomTruth(settings) if isinstance(settings, PhantomSettings) else None
    table = ImageTable.open(folder, truth)
    if isinstance(settings, TableSettings):
        compared, total = check_files(settings, table, COMPARED)
        if compared < total:
            print(
                f"table: {compared:,} of its {total:,} files were compared with those it was made from; "
                "`cfssl check` compares all",
                file=sys.stderr,
            )
    return table


def check_files(settings: TableSettings, table: ImageTable, most: int | None = None) -> tuple[int, int]:
    """How many files were compared with those the table was made from, and how many it has. Raises
    `UserError` where one has changed: the table, whose key does not hold them, must not stand for it."""
    changed, compared, total = changed_files(table, most)
    if changed:
        path = settings.source.path
        raise UserError(
            f"{len(changed)} of {compared} compared files of {path} were changed or removed after the table "
            f"{table.folder} was made from them, the first being {changed[0]}; put them back, or touch "
            f"{path} so that the table and all that follows are made again."
        )
    return compared, total
