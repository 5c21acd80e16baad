"""Masks over images: outlines that leave the anatomy inside them visible.

Enters: images (C, H, W) and masks (M, H, W). Leaves: RGB pixels, or a PNG of many of them. Outlines are drawn
after the image is enlarged, inside the mask, so that they cover no pixel that does not belong to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_erosion

from cfssl.errors import UserError
from cfssl.visualise.layout import Key, Line, Tile, draw
from cfssl.visualise.overlays import colour_of
from cfssl.visualise.views import SMALLEST_TILE, as_float, as_rgb, enlarge

WIDTH = 2  # of an outline, pixels of the picture


def colour(place: int) -> np.ndarray:
    """RGB (3,) uint8 of the structure at `place`."""
    return np.rint(colour_of(place)).astype(np.uint8)


def outlined(image: np.ndarray, masks: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """An image (C, H, W) with the outlines of `masks` (M, H, W), coloured by their `places` (M) -> (h, w, 3)
    uint8, enlarged by a whole factor. Raises `UserError` where masks and image differ in size."""
    pixels = as_rgb(as_float(image))
    if masks.shape != (len(places), *pixels.shape[:2]):
        found = f"Masks of shape {masks.shape} and {len(places)} colours do not fit"
        raise UserError(f"{found} an image of {pixels.shape[:2]}; give a mask per colour, of its size.")
    factor = math.ceil(SMALLEST_TILE / min(pixels.shape[:2]))
    pixels = enlarge(pixels, factor).copy()
    for mask, place in zip(masks, places, strict=True):
        inside = enlarge(mask > 0, factor)
        pixels[inside & ~binary_erosion(inside, iterations=WIDTH, border_value=1)] = colour(place)
    return pixels


@dataclass(frozen=True)
class Side:
    """One side of a sheet: `images` (n, C, H, W), `masks` (n, M, H, W), and perhaps `others` (n, O, H, W) to
    compare them with; `captions` of the images and `notes` of the masks, n each."""

    heading: str
    images: np.ndarray
    masks: np.ndarray
    others: np.ndarray | None
    captions: Sequence[str]
    notes: Sequence[str]


def outline_sheet(
    path: Path, sides: Sequence[Side], structures: Sequence[str], compared: Sequence[str] = ()
) -> None:
    """Writes the sides beside each other: every image, its silver masks, and the table's own masks of the
    structures `compared` (in the order of `others`), where these are not empty. Raises `UserError` when the
    sides differ in length."""
    if len(lengths := {len(side.images) for side in sides}) != 1:
        raise UserError(f"The sides of a sheet have {sorted(lengths)} images; give as many to each.")
    lines = []
    everything, chosen = list(range(len(structures))), [structures.index(name) for name in compared]
    for row in range(len(sides[0].images)):
        tiles: list[Tile | None] = []
        for side in sides:
            image = side.images[row]
            tiles.append(Tile(outlined(image, side.masks[row, :0], []), side.captions[row]))
            tiles.append(Tile(outlined(image, side.masks[row], everything), side.notes[row]))
            if side.others is not None:
                other = side.others[row]
                tiles.append(Tile(outlined(image, other, chosen)) if other.any() else None)
        lines.append(Line(tiles))
    columns = ["image", "silver", *(["own"] if compared else [])]
    legend = [Key(name, np.broadcast_to(colour(place), (12, 24, 3))) for place, name in enumerate(structures)]
    groups = [(side.heading, len(columns)) for side in sides]
    draw(path, lines, columns * len(sides), groups, legend)
