"""A small table with masks, and silver masks for it, written by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable

COUNT, SIDE = 10, 8
OWN, STRUCTURES = ("lung", "heart"), ("heart", "lung", "rib")


def random_masks(seed: int, channels: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((COUNT, channels, SIDE, SIDE)) < 0.4).astype(np.uint8)


def save(folder: Path, names: tuple[str, ...] = OWN, channels: int = 1, **columns: np.ndarray) -> ImageTable:
    frame = pd.DataFrame({"split": ["train", "train", "train", "val", "test"] * 2, **columns})
    attributes = {name: Attribute(name, "continuous") for name in columns}
    images = np.random.default_rng(0).integers(0, 256, (COUNT, channels, SIDE, SIDE), dtype=np.uint8)
    masks = random_masks(1, len(names)) if names else None
    return save_prepared(folder, "toy", frame, attributes, images, masks, names)


def save_silver(folder: Path, fingerprint: str) -> tuple[np.ndarray, pd.DataFrame]:
    """A folder of silver masks, written by hand."""
    folder.mkdir()
    masks = random_masks(2, len(STRUCTURES))
    confidence = np.random.default_rng(3).random((COUNT, len(STRUCTURES)), dtype=np.float32)
    frame = pd.DataFrame(confidence, columns=list(STRUCTURES))
    record = {"format": 1, "table": fingerprint, "structures": STRUCTURES, "shape": masks.shape}
    np.save(folder / "masks.npy", masks)
    frame.to_parquet(folder / "confidence.parquet")
    (folder / "silver.json").write_text(json.dumps(record))
    return masks, frame
