"""Found masks over their images beside the true ones: the best, middle and worst cases of a segmentation.

Enters: images with found and true masks. Leaves: a PNG. What was found is a tint, the truth a line, in the
colour of the structure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from scipy.ndimage import binary_erosion

from cfssl.visualise import COLOURS
from cfssl.visualise.layout import Key, Line, Tile, draw
from cfssl.visualise.views import SMALLEST_TILE, as_float, as_rgb, enlarge

TINT = 0.4  # share of the colour where a structure was found
LINE = 2  # width of the line in pixels of the sheet


@dataclass(frozen=True)
class Case:
    """`line`: where it stands, such as "best"; cases of a line follow each other. `image` (C, H, W) integers,
    masks (S, H, W) bool."""

    line: str
    caption: str
    image: np.ndarray
    true: np.ndarray
    found: np.ndarray


def overlay_sheet(path: Path, cases: Sequence[Case], structures: Sequence[str], measure: str) -> None:
    """Writes the sheet. `measure`: of what the Dice in the captions is."""
    lines, across = [], max(sum(case.line == other.line for other in cases) for case in cases)
    for name in dict.fromkeys(case.line for case in cases):
        own = [case for case in cases if case.line == name]
        tiles: list[Tile | None] = [
            Tile(painted(case), case.caption, "" if place else name) for place, case in enumerate(own)
        ]
        lines.append(Line([*tiles, *[None] * (across - len(own))]))
    legend = [
        Key(name, np.full((12, 24, 3), colour_of(place), np.uint8)) for place, name in enumerate(structures)
    ]
    legend.append(Key(f"tint: found; line: true; numbers: row of the table, Dice ({measure})"))
    draw(path, lines, [""] * across, legend=legend)


def painted(case: Case) -> np.ndarray:
    """(h, w, 3) uint8, enlarged by a whole factor; the lines are as fine as its pixels allow."""
    factor = math.ceil(SMALLEST_TILE / min(case.image.shape[1:]))
    pixels = enlarge(as_rgb(as_float(case.image)), factor).astype(np.float64)
    for place, mask in enumerate(case.found):
        found = enlarge(mask, factor)
        pixels[found] += TINT * (colour_of(place) - pixels[found])
    for place, mask in enumerate(case.true):  # over all tints
        true = enlarge(mask, factor)
        pixels[true & ~binary_erosion(true, iterations=LINE)] = colour_of(place)
    return np.rint(pixels).astype(np.uint8)


def colour_of(place: int) -> np.ndarray:
    """(3,) in [0, 255]."""
    return 255 * np.array(to_rgb(COLOURS[place % len(COLOURS)]))
