"""Where every pixel of a view comes from: sampled crops, flips and rotations as one affine map per view.

Coordinates are normalised pixel-centre coordinates: x = -1 and 1 are the left and right *edges* of an image,
so the centre of pixel j of W is (2 j + 1) / W - 1, as in torch's `affine_grid(..., align_corners=False)`. An
affine (2, 3) maps a point of the view to a point of the source. Because the whole geometry is one map,
matched points of two views are known exactly, and an image is interpolated once only.
"""

import math
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.settings import STRICT, PositiveRange, Probability, ShareRange

ROUNDING = 1e-6  # of float32 coordinates; a ten-thousandth of a pixel at 200 pixels
BORDERS = {"constant": cv2.BORDER_CONSTANT, "reflect": cv2.BORDER_REFLECT_101}


@dataclass(frozen=True, config=STRICT)
class GeometrySettings:
    """`crop_scale`: share of the source area, uniform and exact; `crop_ratio`: aspect ratio of the crop
    relative to the source's, log-uniform over what fits at that area; `rotation`: largest angle in degrees,
    either way; flips: probabilities."""

    crop_scale: ShareRange = (0.3, 1.0)
    crop_ratio: PositiveRange = (0.75, 4 / 3)
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0


def sample_affines(
    rng: np.random.Generator, count: int, settings: GeometrySettings, aspect: float = 1.0
) -> np.ndarray:
    """`count` independent maps view -> source, float64 (count, 2, 3). `aspect` is source width / height in
    pixels.

    The crop lies inside the source before it is rotated about its own centre; what rotation brings in from
    outside is marked by `valid_mask`.
    """
    area = rng.uniform(*settings.crop_scale, size=count)
    # Neither side may exceed the source's: sqrt(area ratio) <= 1 and sqrt(area / ratio) <= 1.
    low, high = (np.clip(math.log(ratio), np.log(area), -np.log(area)) for ratio in settings.crop_ratio)
    ratio = np.exp(rng.uniform(low, high))
    half_width = np.minimum(np.sqrt(area * ratio), 1.0)  # cuts rounding only
    half_height = np.minimum(np.sqrt(area / ratio), 1.0)
    centre_x = rng.uniform(-1, 1, size=count) * (1 - half_width)
    centre_y = rng.uniform(-1, 1, size=count) * (1 - half_height)
    angle = np.deg2rad(settings.rotation) * rng.uniform(-1, 1, size=count)
    flip_x = np.where(rng.random(count) < settings.horizontal_flip, -1.0, 1.0)
    flip_y = np.where(rng.random(count) < settings.vertical_flip, -1.0, 1.0)
    cosine, sine = np.cos(angle), np.sin(angle)
    # source = centre + A^-1 R A S view, with S = crop size and flip, and A = (aspect, 1) making rotation
    # rigid in pixels.
    affines = np.empty((count, 2, 3))
    affines[:, 0, 0] = cosine * half_width * flip_x
    affines[:, 0, 1] = -sine / aspect * half_height * flip_y
    affines[:, 1, 0] = sine * aspect * half_width * flip_x
    affines[:, 1, 1] = cosine * half_height * flip_y
    affines[:, 0, 2], affines[:, 1, 2] = centre_x, centre_y
    return affines


def pixel_matrix(affine: np.ndarray, view_size: tuple[int, int], source_size: tuple[int, int]) -> np.ndarray:
    """The same map between pixel indices (x, y), float64 (2, 3); sizes are (height, width)."""
    (view_height, view_width), (height, width) = view_size, source_size
    to_normalised = np.array(
        [[2 / view_width, 0, 1 / view_width - 1], [0, 2 / view_height, 1 / view_height - 1], [0, 0, 1]]
    )
    to_pixels = np.array([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2]])
    return to_pixels @ np.vstack([affine, [0, 0, 1]]) @ to_normalised


def warp(
    image: np.ndarray, affine: np.ndarray, view_size: tuple[int, int], border: str = "constant"
) -> np.ndarray:
    """The view of `image` (H, W) or (H, W, C), float32, through `affine`: bilinear, one interpolation; 0 or
    mirrored outside."""
    matrix = pixel_matrix(affine, view_size, image.shape[:2])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, matrix, (view_size[1], view_size[0]), flags=flags, borderMode=BORDERS[border]
    )


def warp_labels(masks: np.ndarray, affine: np.ndarray, view_size: tuple[int, int]) -> np.ndarray:
    """The view of `masks` (..., H, W) through `affine`, (..., h, w): every view pixel has the value of the
    source pixel that its centre falls into, and 0 outside of the source. Exact, where OpenCV rounds to 1/32
    of a pixel."""
    height, width = masks.shape[-2:]
    matrix = pixel_matrix(affine, view_size, (height, width))
    column, row = np.arange(view_size[1]), np.arange(view_size[0])[:, None]
    x, y = (np.rint(along_x * column + along_y * row + offset) for along_x, along_y, offset in matrix)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = np.where(inside, y * width + x, 0).astype(np.int64)
    found = masks.reshape(*masks.shape[:-2], -1)[..., place]
    return np.where(inside, found, 0).astype(masks.dtype)


def grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Normalised x (W,) and y (H,) of the pixel centres of a (height, width) image."""
    height, width = size
    return (2 * np.arange(width) + 1) / width - 1, (2 * np.arange(height) + 1) / height - 1


def valid_mask(affines: np.ndarray, view_size: tuple[int, int], source_size: tuple[int, int]) -> np.ndarray:
    """True where a view pixel is made of source pixels alone; bool (n, H, W) for affines (n, 2, 3), sizes as
    (height, width).

    That is where its point lies between the centres of the outermost source pixels: half a pixel nearer to
    the edge, interpolation already mixes in what is outside.
    """
    x, y = (centres.astype(np.float32) for centres in grid(view_size))
    inside = np.ones((len(affines), *view_size), dtype=bool)
    for axis, side in enumerate(reversed(source_size)):
        along_x, along_y, offset = affines[:, axis].T.astype(np.float32)
        limit = 1 - 1 / side + ROUNDING
        farthest = np.abs(along_x) * x[-1] + np.abs(along_y) * y[-1] + np.abs(offset)
        for place in np.flatnonzero(farthest > limit):  # the other views are inside with all their pixels
            row, column = along_x[place] * x + offset[place], along_y[place] * y
            inside[place] &= np.abs(row + column[:, None]) <= limit
    return inside


def to_source(affines: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., n, 2) of views, as (x, y), in source coordinates; affines (..., 2, 3)."""
    return points @ np.swapaxes(affines[..., :2], -1, -2) + affines[..., None, :, 2]


def to_view(affines: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., n, 2) of the source in view coordinates: the inverse of `to_source`."""
    return (points - affines[..., None, :, 2]) @ np.linalg.inv(np.swapaxes(affines[..., :2], -1, -2))
