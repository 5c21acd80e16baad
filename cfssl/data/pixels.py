"""Stored pixels (uint8, uint16) and the float32 in [-1, 1] that networks see; the two invert each other."""

import numpy as np
import torch


def to_signed(stored: np.ndarray) -> torch.Tensor:
    """Stored pixels, uint8 or uint16, any shape -> float32 in [-1, 1]."""
    return torch.from_numpy(stored.astype(np.float32) / _half_range(stored.dtype) - 1)


def to_stored(x: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Float images in [-1, 1] -> stored pixels: clipped and rounded to the nearest level, so that `to_stored`
    inverts `to_signed`.

    Truncation would make every counterfactual half a level darker than its real image, which an encoder can
    see. Not for NaN.
    """
    levels = (x.detach().cpu().numpy().astype(np.float32) + 1) * _half_range(dtype)
    return np.rint(levels).clip(0, np.iinfo(dtype).max).astype(dtype)


def _half_range(dtype: np.dtype) -> np.float32:
    return np.float32(np.iinfo(dtype).max / 2)
