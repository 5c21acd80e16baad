"""What the phantoms draw with: soft edges, bells, ramps, filters and random fields, all float32 numpy.

A value depends on its own row of the batch alone, so that rows can be drawn in any grouping with the same
bytes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def coverage(distance: Floats, softness: float) -> Floats:
    """How much of a pixel lies inside an edge, from the signed distance to it (positive inside): a ramp of
    width `softness`."""
    return np.clip(distance * np.float32(1 / softness) + np.float32(0.5), 0, 1)


def bell(distance: Floats, width: float) -> Floats:
    """Close to a Gaussian of height 1 and standard deviation `width`, but exactly 0 beyond 2.45 of them:
    tails of denormal numbers would slow everything that follows."""
    rest = np.maximum(1 - distance * distance * np.float32(1 / (6 * width * width)), 0)
    return rest * rest * rest


def ramp(t: Floats, start: float, stop: float) -> Floats:
    """0 before `start`, 1 after `stop`, smooth between (cubic)."""
    s = np.clip((t - np.float32(start)) * np.float32(1 / (stop - start)), 0, 1)
    return s * s * (np.float32(3) - np.float32(2) * s)


def between(limits: tuple[float, float], share: Floats) -> Floats:
    """`limits[0]` at share 0, `limits[1]` at share 1."""
    return limits[0] + (limits[1] - limits[0]) * share


def bumps(t: Floats) -> tuple[Floats, Floats, Floats]:
    """Where the factors of three thirds act along a structure, t from 0 to 1: each vanishes at the borders of
    its own."""
    upper = 1 - ramp(t, 0.12, 1 / 3)
    middle = ramp(t, 1 / 3, 0.48) * (1 - ramp(t, 0.52, 2 / 3))
    return upper, middle, ramp(t, 2 / 3, 0.88)


def upsample_matrix(size: int, cells: int) -> Floats:
    """(size, cells) weights of a smooth (cubic B-spline) interpolation, scaled so that unit noise on the
    cells keeps about unit variance on the pixels."""
    position = (np.arange(size) + 0.5) / size * (cells - 3) + 1
    distance = np.abs(position[:, None] - np.arange(cells)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)


def textures(seeds: NDArray[np.int64], size: int, grids: Sequence[int]) -> list[Floats]:
    """One smooth random field (n, H, W) per entry of `grids`, its cells along one side, regenerated from each
    image's seed."""
    counts = [cells * cells for cells in grids]
    noise = np.stack(
        [np.random.default_rng(seed).standard_normal(sum(counts), dtype=np.float32) for seed in seeds]
    )
    fields = []
    for cells, part in zip(grids, np.split(noise, np.cumsum(counts)[:-1], axis=1), strict=True):
        weights = upsample_matrix(size, cells)
        fields.append(np.asarray(weights @ part.reshape(-1, cells, cells) @ weights.T, np.float32))
    return fields


def blur_matrix(size: int, sigma: float) -> Floats:
    """(size, size) Gaussian filter; rows sum to 1, so that edges are not darkened."""
    if sigma <= 0:
        return np.eye(size, dtype=np.float32)
    distance = np.arange(size)[:, None] - np.arange(size)[None]
    weights = np.where(np.abs(distance) < 4 * sigma, np.exp(-0.5 * (distance / sigma) ** 2), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def noise_field(seeds: NDArray[np.int64], size: int) -> Floats:
    """White noise of variance 1, (n, size, size)."""
    return np.stack(
        [np.random.default_rng(seed).standard_normal((size, size), dtype=np.float32) for seed in seeds]
    )
