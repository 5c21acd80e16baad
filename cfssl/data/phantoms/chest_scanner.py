"""The machine of `phantom_chest`: an attenuation field and a scanner in, the 8-bit radiograph out.

The chain, in this order: blur and noise (white or grainy) of the detector, window, gamma, vignetting,
collimation, marker, 8 bits. The noise field is regenerated from each image's seed and is the same for every
scanner; a scanner filters and scales it. Lengths are in pixels of a 64-pixel image and grow with the size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cfssl.data.phantoms.fields import Floats, blur_matrix


@dataclass(frozen=True)
class Scanner:
    window: tuple[float, float]  # attenuation shown as black and as white
    gamma: float  # grey value = windowed attenuation ** gamma
    blur: float  # standard deviation
    noise: float  # standard deviation as a share of the window
    grain: float  # standard deviation of the filter that makes the noise grainy
    vignette: float  # loss of brightness in the corners
    border: tuple[float, float, float, float]  # collimated top, bottom, left, right
    marker: tuple[int, int]  # x, y of the letter's upper left corner; negative: from the right or lower edge
    glyph: str  # 5 rows of 3 pixels, as in "1.. 1.. 1.. 1.. 111"


GLYPH_L = "1.. 1.. 1.. 1.. 111"
GLYPH_R = "11. 1.1 11. 1.1 1.1"

# Fixed with the effusion constants of chest_anatomy from SimCLR and supervised runs: a change voids
# benchmarks/results.
SCANNERS = {
    "A": Scanner((0.02, 1.02), 1.0, 0.35, 0.012, 0.0, 0.05, (0, 0, 0, 0), (-6, 3), GLYPH_L),
    "B": Scanner((-0.05, 1.05), 0.75, 0.55, 0.020, 0.6, 0.10, (4, 4, 0, 0), (-6, 6), GLYPH_L),
    "C": Scanner((-0.30, 1.25), 1.0, 0.90, 0.030, 0.9, 0.20, (0, 0, 3, 3), (5, 3), GLYPH_R),
    "D": Scanner((0.0, 1.0), 2.4, 0.80, 0.045, 1.2, 0.40, (3, 3, 3, 3), (5, -9), GLYPH_R),
}


def marker_stamp(size: int, scanner: Scanner) -> tuple[slice, slice, Floats]:
    """Where the corner letter stands and its pattern of 0 and 1."""
    cell = size // 64
    pattern = np.array([[mark == "1" for mark in row] for row in scanner.glyph.split()], np.float32)
    pattern = pattern.repeat(cell, 0).repeat(cell, 1)
    left, top = (int(place * cell) % size for place in scanner.marker)
    return slice(top, top + pattern.shape[0]), slice(left, left + pattern.shape[1]), pattern


def acquire(attenuation: Floats, scanner: Scanner, noise: Floats) -> NDArray[np.uint8]:
    """The radiographs (n, H, W) that `scanner` makes of `attenuation` (n, H, W) with white noise (n, H,
    W)."""
    size = attenuation.shape[-1]
    scale = size / 64
    blur = blur_matrix(size, scanner.blur * scale)
    low, high = scanner.window
    image = (blur @ attenuation @ blur.T - np.float32(low)) * np.float32(1 / (high - low))
    grain = blur_matrix(size, scanner.grain * scale)
    strength = np.sqrt((grain**2).sum(1))  # what the filter leaves of white noise
    image += (grain @ noise @ grain.T) * (np.float32(scanner.noise) / (strength[:, None] * strength[None]))
    image = np.clip(image, 0, 1)
    if scanner.gamma != 1:
        image **= np.float32(scanner.gamma)
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1
    image *= 1 - np.float32(scanner.vignette / 2) * (place[:, None] ** 2 + place[None] ** 2)
    top, bottom, left, right = (round(width * scale) for width in scanner.border)
    image[:, :top], image[:, size - bottom :] = 0, 0
    image[:, :, :left], image[:, :, size - right :] = 0, 0
    rows, columns, pattern = marker_stamp(size, scanner)
    image[:, rows, columns] = np.maximum(image[:, rows, columns], pattern * np.float32(0.95))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
