"""Worlds of the amplification benchmark: binary attributes that are plainly visible, and whose recorded
labels are partly wrong, so that the best possible AUC of every attribute is known.

A true class a* decides the look, the recorded label is a = a* flipped with probability rho. Nobody who only
sees images and labels can reach an AUC against a above that of a* itself; an image model that makes images
whose AUC against a lies higher has drawn the label into the image.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arms import rendered_table
from scipy.stats import norm

from cfssl.data.datasets import PhantomChestSettings
from cfssl.data.morphomnist import ATTRIBUTES, read_attributes, read_idx
from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable
from cfssl.seeds import numpy_generator

# How often the recorded label is wrong. The graded attribute of the digits has no wrong labels but classes
# that overlap: its signal is N(-d/2, 1) or N(d/2, 1).
FLIPPED_DIGITS = {"ramp": 0.2, "grating": 0.3}
GRADED = {"patch": 2.0}
FLIPPED_CHEST = {"sex": 0.2, "scanner": 0.3, "disease": 0.2}
DIGIT_SPLITS = {"train": 7000, "val": 1000, "test": 2000}
CHEST = {
    "count": 6000,
    "domains": {"A": 0.5, "B": 0.5},
    "balanced_test": False,
    "splits": {"train": 0.6, "val": 0.1, "test": 0.3},
}


def digits(root: Path | str, folder: Path, draw: int) -> ImageTable:
    """Morpho-MNIST at 32 px with three binary attributes added, independent of the digit and of each other:
    `ramp` (the stroke is brighter on the left or on the right), `grating` (faint horizontal or vertical
    stripes behind the digit), `patch` (a corner square, graded brightness). True signals stand in columns
    `true_...`. `draw` seeds it."""
    root, rng = Path(root), numpy_generator("digits", draw)
    images = np.pad(read_idx(root / "t10k-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    frame = read_attributes(root)
    count, size = len(images), images.shape[1]
    true = {name: rng.integers(2, size=count) for name in (*FLIPPED_DIGITS, *GRADED)}
    place = np.linspace(-1, 1, size, dtype=np.float32)
    sign = (2 * true["ramp"] - 1).astype(np.float32)[:, None, None]
    images *= 1 - 0.35 * (1 - sign * place[None, None, :]) / 2
    stripes = np.cos(2 * np.pi * np.arange(size) / 6).astype(np.float32)
    phase_free = np.where(true["grating"][:, None, None] == 1, stripes[None, None, :], stripes[None, :, None])
    images = np.maximum(images, 20 + 14 * phase_free)
    signal = (true["patch"] - 0.5) * GRADED["patch"] + rng.standard_normal(count)
    images[:, 1:6, 1:6] = np.clip(100 + 28 * signal, 0, 255)[:, None, None]
    images += rng.normal(0, 3, images.shape)
    recorded = {name: flipped(true[name], rho, rng) for name, rho in FLIPPED_DIGITS.items()}
    recorded["patch"] = true["patch"]
    for name, value in recorded.items():
        frame[name] = np.array(["0", "1"])[value]
        frame[f"true_{name}"] = signal if name in GRADED else true[name].astype(np.float64)
    frame["split"] = split_column(count, DIGIT_SPLITS, numpy_generator("digits", draw, "split"))
    binary = {name: Attribute(name, "binary", ("0", "1"), declared=True) for name in recorded}
    pixels = np.rint(images.clip(0, 255)).astype(np.uint8)[:, None]
    return save_prepared(folder, "digits", frame, {**ATTRIBUTES, **binary}, pixels)


def chest(runs: Path, folder: Path, draw: int) -> ImageTable:
    """phantom_chest with two scanners, whose recorded sex, scanner and disease are partly wrong."""
    table = rendered_table(runs, PhantomChestSettings(seed=draw, **CHEST))  # type: ignore[arg-type]
    rng = numpy_generator("chest", draw)
    frame = table.frame[["sex", "scanner", "disease", "age", "split"]].copy()
    attributes = {"age": table.attributes["age"]}
    for name, rho in FLIPPED_CHEST.items():
        values = ("A", "B") if name == "scanner" else table.attributes[name].categories
        true = (frame[name] == values[1]).to_numpy().astype(np.int64)
        frame[f"true_{name}"] = true.astype(np.float64)
        frame[name] = np.array(values)[flipped(true, rho, rng)]
        attributes[name] = Attribute(name, "binary", values, declared=True)
    images = table.images.read(np.arange(len(table)))
    return save_prepared(folder, "chest", frame, attributes, images)


def settings(world: str) -> dict[str, Any]:
    """What a world was made with, JSON-serialisable."""
    of_chest = {"flipped": FLIPPED_CHEST, **CHEST}
    of_digits = {"flipped": FLIPPED_DIGITS, "graded": GRADED, "splits": DIGIT_SPLITS}
    return of_chest if world == "chest" else of_digits


def flipped(true: np.ndarray, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Labels (N,) that differ from `true` with probability `rho`."""
    return np.where(rng.random(len(true)) < rho, 1 - true, true)


def split_column(count: int, sizes: dict[str, int], rng: np.random.Generator) -> pd.Series:
    """The split of each of `count` rows, in random order."""
    names = np.repeat(list(sizes), list(sizes.values()))
    assert len(names) == count
    return pd.Series(rng.permutation(names))


def population_ceiling(name: str) -> float:
    """The best AUC against the recorded label, for balanced classes."""
    if name in GRADED:
        return float(norm.cdf(GRADED[name] / 2**0.5))
    rho: Any = {**FLIPPED_DIGITS, **FLIPPED_CHEST}[name]
    return 1 - rho
