"""Colours of CHRO-maps: OKLab and what a screen can show of it.

Enters: OKLab (..., 3): lightness L in [0, 1], a (green to red) and b (blue to yellow), or places in a disc.
Leaves: sRGB (..., 3) in [0, 1]. Equal distances in OKLab look about equally large, and L alone says how light
a colour is (Ottosson 2020, "A perceptual color space for image processing"); in HSV yellow and blue of one
value differ by half of the range.
"""

import numpy as np
from matplotlib.colors import hsv_to_rgb

# Ottosson (2020): linear sRGB -> cone responses, and their cube roots -> OKLab.
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OPPONENTS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
FROM_CONES, FROM_OPPONENTS = np.linalg.inv(CONES), np.linalg.inv(OPPONENTS)
MOST_CHROMA = 0.3  # at the rim of the disc, of which a screen shows what it can
HALVINGS = 10  # of the chroma, where it has to be reduced: to a thousandth of it
SLACK = 1e-5  # beyond [0, 1], in shares of the light: rounding of greys in float32


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 1] -> OKLab (..., 3), of the same float type."""
    return np.cbrt(_linear(rgb) @ CONES.T.astype(rgb.dtype)) @ OPPONENTS.T.astype(rgb.dtype)


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) -> sRGB (..., 3), clipped to [0, 1]: give colours that `fitted_chroma` has passed."""
    return _gamma(np.clip(_linear_from_oklab(lab), 0, 1))


def lightness(grey: np.ndarray) -> np.ndarray:
    """L of grey levels (sRGB) in [0, 1]."""
    return np.cbrt(_linear(grey))


def grey(lightness: np.ndarray) -> np.ndarray:
    """The grey level (sRGB) in [0, 1] of lightness L: the inverse of `lightness`."""
    return _gamma(np.clip(lightness, 0, 1) ** 3)


def fitted_chroma(lab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) that a screen can show: hue and lightness are kept, chroma is reduced where it has to
    be. L must lie in [0, 1]."""
    flat = lab.reshape(-1, 3).copy()
    outside = np.flatnonzero(~_is_shown(flat))
    if len(outside):
        colours = flat[outside]
        low, high = np.zeros((2, len(colours), 1), lab.dtype)
        high += 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            scaled = np.concatenate([colours[:, :1], middle * colours[:, 1:]], axis=1)
            shown = _is_shown(scaled)[:, None]
            low, high = np.where(shown, middle, low), np.where(shown, high, middle)
        flat[outside, 1:] = low * colours[:, 1:]
    return flat.reshape(lab.shape)


def hsv_disc(places: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) of places (..., 2) in the unit disc as published: hue from the angle, saturation from the
    radius, value 1, so that the centre is white. (The published code rounds hues to 2 degrees.)"""
    hue = (np.arctan2(places[..., 1], places[..., 0]) + np.pi) / (2 * np.pi)
    radius = np.minimum(np.linalg.norm(places, axis=-1), 1)
    return hsv_to_rgb(np.stack([np.clip(hue, 0, 1), radius, np.ones_like(radius)], axis=-1))


def _linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB -> linear light (IEC 61966-2-1)."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)


def _gamma(linear: np.ndarray) -> np.ndarray:
    """Linear light >= 0 -> sRGB."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _linear_from_oklab(lab: np.ndarray) -> np.ndarray:
    return (lab @ FROM_OPPONENTS.T.astype(lab.dtype)) ** 3 @ FROM_CONES.T.astype(lab.dtype)


def _is_shown(lab: np.ndarray) -> np.ndarray:
    """(n,) whether sRGB has the colour."""
    red, green, blue = _linear_from_oklab(lab).T
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return (least >= -SLACK * lab[:, 0] ** 3) & (most <= 1 + SLACK)
