"""Features of a frozen encoder: computed once per checkpoint and table, then read by every evaluation."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from cfssl.data.geometry import warp
from cfssl.data.table import ImageTable
from cfssl.engine.progress import ProgressBar
from cfssl.files import atomic_path

IDENTITY = np.eye(2, 3)  # the affine of a view that shows the whole image


@torch.no_grad()
def extract(
    encoder: nn.Module,
    table: ImageTable,
    rows: np.ndarray,
    size: tuple[int, int] | None = None,
    border: str = "constant",
    batch: int = 512,
    quiet: bool = False,
) -> np.ndarray:
    """Features (len(rows), F) float32 of whole, unaugmented images in [0, 1].

    The encoder is put into eval mode (a probe on batch statistics would measure the batch). `size` (height,
    width) and `border` are those of the views that it was trained on: an image of another size goes through
    the same interpolation, because another one would show the encoder sharper or smoother noise than it
    knows.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    features = []
    with ProgressBar("features", total=len(rows), quiet=quiet) as bar:
        for start in range(0, len(rows), batch):
            images = to_unit(table.images.read(rows[start : start + batch]))
            if size is not None and images.shape[-2:] != size:
                images = np.stack([whole_view(image, size, border) for image in images])
            on_device = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
            features.append(encoder(on_device).float().cpu().numpy())
            bar.advance(steps=len(images), items=len(images))
    return np.concatenate(features)


def to_unit(stored: np.ndarray) -> np.ndarray:
    """Integer pixels -> float32 in [0, 1]."""
    return stored.astype(np.float32) * np.float32(1 / np.iinfo(stored.dtype).max)


def whole_view(image: np.ndarray, size: tuple[int, int], border: str) -> np.ndarray:
    """(C, H, W) float32 -> (C, *size): the view that shows all of the image and nothing else."""
    view = warp(np.ascontiguousarray(image.transpose(1, 2, 0)), IDENTITY, size, border)
    return view.reshape(*size, -1).transpose(2, 0, 1)  # OpenCV drops a single channel


def save_features(path: Path, features: np.ndarray) -> None:
    """Writes a plain .npy atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, features, allow_pickle=False)


def load_features(path: Path) -> np.ndarray:
    """Memory-mapped features (N, F)."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
