"""How far found masks are from the true ones: overlap and distance of contours, image by image.

What enters: masks (n, S, H, W) of S structures, found and true. What leaves: figures (n, S) that are all
finite, so that every image counts in every mean. A contour is the pixels of a mask that have one of their
four neighbours outside of it, what is beyond the image's edge being outside; distances are Euclidean, between
pixel centres, in pixels. MONAI's metrics are the tests' oracle: theirs go through the same erosion and
distance transform of scipy once per metric.

- `dice` = 2 |P and T| / (|P| + |T|).
- `hd95`: the greater of the two 95 % quantiles, of the distances from each pixel of one contour to the other
  contour, and the other way round (Hausdorff distance without the farthest 5 %).
- `asd`: mean of the same distances, of both directions together (average symmetric surface distance).
- `surface_dice`: share of both contours that lies within a tolerance of the other (Nikolov et al. 2018).

Where both masks are empty they agree: Dice and surface Dice are 1, distances 0. Where one is empty there is
no contour to be near to: Dice and surface Dice are 0, and distances the diagonal of the image, the largest
that two pixels of it can have.
"""

import math

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt

MEASURES = ("dice", "hd95", "asd", "surface_dice")
DISTANCES = frozenset({"hd95", "asd"})  # of which less is better
QUANTILE = 0.95


def measured(found: np.ndarray, true: np.ndarray, tolerance: float) -> dict[str, np.ndarray]:
    """Every one of `MEASURES` (n, S) float64 of masks (n, S, H, W) bool; `tolerance` in pixels."""
    figures = {name: np.empty(found.shape[:2]) for name in MEASURES}
    figures["dice"] = dice(found, true)
    farthest = diagonal(found.shape[2:])
    for place in np.ndindex(*found.shape[:2]):
        here, there = found[place], true[place]
        if here.any() and there.any():
            one, other = contour_distances(here, there)
            both = np.concatenate([one, other])
            of_contours = (
                float(max(np.quantile(one, QUANTILE), np.quantile(other, QUANTILE))),
                float(both.mean()),
                float((both <= tolerance).mean()),
            )
        elif here.any() or there.any():
            of_contours = (farthest, farthest, 0.0)
        else:
            of_contours = (0.0, 0.0, 1.0)
        figures["hd95"][place], figures["asd"][place], figures["surface_dice"][place] = of_contours
    return figures


def dice(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(n, S) of masks (n, S, H, W) bool; 1 where both are empty."""
    both = (found & true).sum((2, 3))
    sizes = found.sum((2, 3)) + true.sum((2, 3))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def contour_distances(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From every contour pixel of a mask (H, W) to the other's contour, both ways; neither may be empty."""
    contours = [mask & ~binary_erosion(mask) for mask in (one, other)]
    away = [distance_transform_edt(~contour) for contour in contours]
    return away[1][contours[0]], away[0][contours[1]]


def diagonal(size: tuple[int, ...]) -> float:
    """From the centre of the first pixel of an image to that of the last."""
    return math.hypot(*(side - 1 for side in size))
