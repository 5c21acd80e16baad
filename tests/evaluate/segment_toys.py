"""A table of discs with their masks, and a small network to find them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable, MaskReader
from cfssl.evaluate.segment import Origin
from cfssl.evaluate.settings import SegmentSettings
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.seeds import numpy_generator

ROWS, SIDE = 48, 32
SIZE = (SIDE, SIDE)
TRAIN, VAL, TEST = np.arange(28), np.arange(28, 36), np.arange(36, ROWS)
STRUCTURES = ("disc", "lower")  # the lower half is a part of the disc
DECODER = {"widths": [8, 8, 8, 8, 8]}


def table_of_discs(
    folder: Path,
    other_test: bool = False,
    without: tuple[int, ...] = (),
    disjoint: bool = False,
    silver: bool = False,
) -> ImageTable:
    """Bright discs on noise, two images of each patient; `other_test`: the test rows show others; `without`:
    rows whose masks are empty and whose column `has_mask` says so; `silver`: the disc has a silver mask too,
    there as well."""
    rng = numpy_generator("discs")
    y, x = np.indices(SIZE)
    images = rng.integers(0, 120, (ROWS, 1, *SIZE), dtype=np.uint8)
    masks = np.zeros((ROWS, 2 + silver, *SIZE), dtype=np.uint8)
    for row in range(ROWS):
        if other_test and row == TEST[0]:
            rng = numpy_generator("other discs")
        centre, radius = rng.uniform(9, 23, 2), rng.uniform(5, 9)
        disc = np.hypot(y - centre[0], x - centre[1]) < radius
        lower = disc & (y > centre[0])
        images[row, 0][disc] += 100
        images[row, 0][lower] += 35
        masks[row, :2] = disc & ~lower if disjoint else disc, lower
        masks[row, 2:] = disc
    masks[list(without), :2] = 0
    has_mask = np.ones(ROWS, np.int64)
    has_mask[list(without)] = 0
    kinds = {"scanner": ("A", "B"), "sex": ("F", "M")}
    frame = pd.DataFrame(
        {
            "patient": [f"p{row // 2:02d}" for row in range(ROWS)],
            "scanner": np.array(["A", "B"])[np.arange(ROWS) // 2 % 2],
            "sex": np.array(["F", "M"])[np.arange(ROWS) // 4 % 2],
            "has_mask": has_mask,
            "split": np.repeat(["train", "val", "test"], [len(TRAIN), len(VAL), len(TEST)]),
        }
    )
    attributes = {name: Attribute(name, "binary", values) for name, values in kinds.items()}
    names = (*STRUCTURES, "silver_disc") if silver else STRUCTURES
    return save_prepared(folder, "discs", frame, attributes, images, masks, names, group="patient")


def masks_of(table: ImageTable, rows: np.ndarray, structures: tuple[str, ...] = STRUCTURES) -> np.ndarray:
    """(n, S, H, W) bool."""
    return MaskReader(table, structures)(rows) > 0


def settings(**changes: Any) -> SegmentSettings:
    train = {"epochs": 3, "batch": 7, "lr": 0.01, "checkpoint_every": 4} | changes.pop("train", {})
    usual = {"structures": STRUCTURES, "decoder": DECODER, "checks": 3, "least_steps": 1}
    return SegmentSettings(name="segment", train=train, **{**usual, **changes})


def encoder(seed: int = 0) -> nn.Module:
    return create_backbone(BackboneSettings("test_resnet"), 1, SIDE, seed)


def origin(seed: int = 0) -> Origin:
    return Origin(encoder(seed))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())
