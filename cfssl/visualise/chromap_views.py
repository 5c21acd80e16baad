"""The views of one image as CHRO-maps take them: plain arrays, checked once.

Enters: embeddings of every pixel (or of every token, which are interpolated), the images they were computed
from, and what is known about the pixels. Leaves: unit embeddings at the images' own resolution, which pixels
of two views show the same point, and the similarity of every pixel to a chosen one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from cfssl.data.geometry import grid, to_source, to_view
from cfssl.errors import UserError

INTERPOLATION = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, eq=False)
class Views:
    """V views of one image or volume; `size` is (H, W) or (D, H, W). The first view is the factual one.

    `embeddings` (V, C, *any size) float, `images` (V, *size) grey levels in [0, 1]. `masks` (V, *size)
    integer classes, 0 is background. `valid` (V, *size) bool: False where a view shows what is outside of its
    source. `foreground` (V, *size) in [0, 1]: a mask or a probability. `affines` (V, 2, 3): view -> source as
    in `cfssl.data.geometry`; without them all views show the same points. `names`: of the views. Raises
    `UserError` when these do not fit each other.
    """

    embeddings: np.ndarray
    images: np.ndarray
    masks: np.ndarray | None = None
    valid: np.ndarray | None = None
    foreground: np.ndarray | None = None
    affines: np.ndarray | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = np.shape(self.images)
        if len(shape) not in (3, 4):
            raise UserError(f"images has the shape {shape}; give grey images (V, H, W) or volumes.")
        found = np.shape(self.embeddings)
        if len(found) != len(shape) + 1 or found[0] != shape[0]:
            raise UserError(
                f"embeddings has the shape {found} beside images of shape {shape}; give (V, C, *size) with "
                "as many views and axes."
            )
        for name in ("masks", "valid", "foreground"):
            given = getattr(self, name)
            if given is not None and np.shape(given) != shape:
                raise UserError(f"{name} has the shape {np.shape(given)}, but the images have {shape}.")
        if self.affines is not None and np.shape(self.affines) != (shape[0], 2, 3):
            raise UserError(
                f"affines has the shape {np.shape(self.affines)}, expected {(shape[0], 2, 3)}: one map per "
                "view; volumes have none."
            )
        if self.affines is not None and len(self.size) != 2:
            raise UserError("Affines of volumes are not known here; resample the views to one grid first.")
        if self.names and len(self.names) != shape[0]:
            raise UserError(f"There are {len(self.names)} names for {shape[0]} views; give one each.")
        if not np.isfinite(self.embeddings).all():
            raise UserError("embeddings has values that are not finite; look for a diverged training.")
        low, high = np.min(self.images), np.max(self.images)
        if not (low >= 0 and high <= 1):
            raise UserError(f"images has grey levels from {low:.4g} to {high:.4g}; give them in [0, 1].")

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(np.shape(self.images)[1:])

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def unit(self) -> np.ndarray:
        """(V, C, *size) float32 of norm 1. Tokens are interpolated, as embeddings and not as colours, between
        their centres."""
        return unit_maps(self.embeddings, self.size)

    @cached_property
    def is_valid(self) -> np.ndarray:
        """(V, *size) bool."""
        return np.ones(self.images.shape, bool) if self.valid is None else np.asarray(self.valid, bool)

    def name(self, view: int) -> str:
        return self.names[view] if self.names else f"view {view}" if view else "factual"


def unit_maps(embeddings: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(V, C, *any size) -> (V, C, *size) float32, every pixel of norm 1 (or 0, where it has none)."""
    maps = F.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, dtype=np.float32)), dim=1)
    if maps.shape[2:] != size:
        maps = F.interpolate(maps, size=size, mode=INTERPOLATION[len(size)], align_corners=False)
        maps = F.normalize(maps, dim=1)
    return maps.numpy()


def rows_of(maps: np.ndarray) -> np.ndarray:
    """(V, C, *size) -> (V * pixels, C)."""
    return np.moveaxis(maps, 1, -1).reshape(-1, maps.shape[1])


def matched(views: Views, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the factual view that `view` shows as well: their places (n,) in the flattened image, and the
    unit embeddings (n, C) of `view` there, interpolated between pixel centres."""
    channels = views.unit.shape[1]
    if views.affines is None:
        places = np.flatnonzero(views.is_valid[0] & views.is_valid[view])
        return places, views.unit[view].reshape(channels, -1)[:, places].T
    height, width = views.size
    x, y = grid((height, width))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)  # (H * W, [x, y])
    there = to_view(views.affines[view], to_source(views.affines[0], points))
    limit = 1 - 1 / np.array(views.size[::-1])  # the outermost pixel centres
    inside = (np.abs(there) <= limit + 1e-6).all(axis=1) & views.is_valid[0].ravel()
    places = np.flatnonzero(inside)
    # All four neighbours have to be valid.
    known = torch.from_numpy(views.is_valid[view][None].astype(np.float32))
    maps = torch.cat([torch.from_numpy(views.unit[view]), known])[None]
    spots = torch.from_numpy(there[places].astype(np.float32))[None, :, None]
    found = F.grid_sample(maps, spots, mode="bilinear", padding_mode="border", align_corners=False)
    sampled, whole = found[0, :channels, :, 0].T, found[0, channels, :, 0].numpy() > 1 - 1e-5
    return places[whole], F.normalize(sampled, dim=1).numpy()[whole]


def similarity_map(
    images: Sequence[Views], point: Sequence[int], view: int = 0, image: int = 0
) -> list[np.ndarray]:
    """Per image (V, *size) float32: the cosine of every pixel's embedding with that of pixel `point`, (x, y)
    or (x, y, z), of a view. Raises `UserError` for a point that is not there."""
    index, size = tuple(reversed(point)), images[image].size
    if len(index) != len(size) or not all(0 <= place < side for place, side in zip(index, size, strict=True)):
        raise UserError(
            f"The point {tuple(point)} does not lie in an image of {size[::-1]} pixels; give (x, y) from 0."
        )
    query = np.moveaxis(images[image].unit[view], 0, -1)[index]
    return [np.einsum("vc...,c->v...", views.unit, query) for views in images]
