"""What the phantoms draw with: soft edges, bells, ramps and smooth random fields, all float32 numpy.

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
