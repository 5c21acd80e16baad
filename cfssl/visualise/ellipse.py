"""The smallest ellipse around points. Enters: points (n, d). Leaves: its centre and its matrix.

Khachiyan (1996) in the lifted form q = (x, 1), as Todd and Yildirim (2007) compute it: with steps away from
points that carry too much weight, which is what makes it converge quickly. The ellipse that the CHRO-map's
published code draws mixes centred and lifted quantities and stops early: its area was found to be 2 to 14 %
above the smallest one.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import ConvexHull, QhullError

MOST_STEPS = 100_000
NEGLIGIBLE = 1e-9  # an extent below this share of the largest is rounding


@dataclass(frozen=True)
class Ellipse:
    """All x with (x - centre)' matrix (x - centre) <= 1. `centre` (d,), `matrix` (d, d) symmetric, without
    curvature along directions in which the points have no extent."""

    centre: np.ndarray
    matrix: np.ndarray

    @property
    def root(self) -> np.ndarray:
        """(d, d) symmetric: `root @ (x - centre)` lies in the unit disc."""
        values, vectors = np.linalg.eigh(self.matrix)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def enclosing_ellipse(points: np.ndarray, tolerance: float = 1e-6) -> Ellipse:
    """The ellipse of least volume that holds all points (n, d), n >= 1; its volume is at most
    (1 + tolerance)^(d + 1) times the least one."""
    points = np.asarray(points, dtype=np.float64)
    middle = points.mean(axis=0)
    _, extents, directions = np.linalg.svd(points - middle, full_matrices=False)
    spread = np.linalg.norm(points, axis=1).max()
    kept = directions[extents > NEGLIGIBLE * max(extents[0], spread)]
    if len(kept) == 0:
        return Ellipse(middle, np.zeros((points.shape[1],) * 2))
    flat = _corners((points - middle) @ kept.T)
    centre, matrix = _khachiyan(flat, tolerance)
    # Rounding and the tolerance may leave a corner just outside.
    outermost = np.einsum("ni,ij,nj->n", flat - centre, matrix, flat - centre).max()
    return Ellipse(middle + centre @ kept, kept.T @ matrix @ kept / max(outermost, 1.0))


def _corners(points: np.ndarray) -> np.ndarray:
    """Those points that an ellipse around all of them can touch."""
    if points.shape[1] == 1:
        return np.array([points.min(axis=0), points.max(axis=0)])
    try:
        return points[ConvexHull(points).vertices]
    except QhullError:  # so nearly flat that no hull can be told from rounding
        return points


def _khachiyan(points: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre and matrix for points (n, d) that span d dimensions."""
    count, dimensions = points.shape
    lifted = np.column_stack([points, np.ones(count)])
    weights, size = np.full(count, 1 / count), dimensions + 1
    for _ in range(MOST_STEPS):
        inverse = np.linalg.inv((lifted * weights[:, None]).T @ lifted)
        distances = np.einsum("ni,ij,nj->n", lifted, inverse, lifted)  # M_i; their weighted mean is d + 1
        far = int(distances.argmax())
        near = int(np.where(weights > 0, distances, np.inf).argmin())
        if max(distances[far] - size, size - distances[near]) < tolerance * size:
            break
        chosen = far if distances[far] - size >= size - distances[near] else near
        step = (distances[chosen] - size) / (size * (distances[chosen] - 1))
        if chosen == near:  # takes weight away, at most all of it
            step = max(step if distances[near] > 1 else -np.inf, -weights[near] / (1 - weights[near]))
        weights *= 1 - step
        weights[chosen] = max(weights[chosen] + step, 0.0)
    centre = weights @ points
    scatter = (points * weights[:, None]).T @ points - np.outer(centre, centre)
    return centre, np.linalg.inv(scatter) / dimensions
