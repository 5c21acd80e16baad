"""Features of a frozen encoder: computed once per checkpoint and table, then read by every evaluation."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cfssl.data.table import ImageTable
from cfssl.engine.progress import ProgressBar
from cfssl.files import atomic_path


@torch.no_grad()
def extract(
    encoder: nn.Module,
    table: ImageTable,
    rows: np.ndarray,
    size: int | None = None,
    batch: int = 512,
    quiet: bool = False,
) -> np.ndarray:
    """Features (len(rows), F) float32 of whole, unaugmented images in [0, 1].

    The encoder is put into eval mode (a probe on batch statistics would measure the batch). `size`: side that
    the encoder was trained at, when it is not the stored one.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    features = []
    with ProgressBar("features", total=len(rows), quiet=quiet) as bar:
        for start in range(0, len(rows), batch):
            images = to_unit(table.images.read(rows[start : start + batch])).to(device)
            if size is not None and images.shape[-1] != size:
                images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
            features.append(
                encoder(images.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
            )
            bar.advance(steps=len(images), items=len(images))
    return np.concatenate(features)


def to_unit(stored: np.ndarray) -> torch.Tensor:
    """Integer pixels -> float32 in [0, 1]."""
    return torch.from_numpy(stored.astype(np.float32) / np.float32(np.iinfo(stored.dtype).max))


def save_features(path: Path, features: np.ndarray) -> None:
    """Writes a plain .npy atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, features, allow_pickle=False)


def load_features(path: Path) -> np.ndarray:
    """Memory-mapped features (N, F)."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
