"""The figure of a CHRO-map: image, overlay and colours of every view, with all that is needed to read them.

Enters: a state, the views of one image, and their colours. Leaves: a PNG with colour wheel, variance
explained, the state's name, contours of the masks and view consistency. Of a volume, its middle slice is
shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.visualise.cells import DASH, number
from cfssl.visualise.chromap import State, colorize
from cfssl.visualise.chromap_consistency import class_name
from cfssl.visualise.chromap_views import Views
from cfssl.visualise.layout import Key, Line, Tile, draw
from cfssl.visualise.views import enlarge

SMALLEST_TILE, WHEEL = 200, 190  # pixels
DASHES = (0, 8, 3, 16)  # pixels of the pieces of a contour, a class each; 0 is an unbroken line
JUST_SEEN = "a distance of 0.02 is just seen"
REDUCERS = {"pca": "principal component", "lda": "discriminant", "umap": "UMAP coordinate"}


@dataclass(frozen=True, eq=False)
class Colours:
    """sRGB (V, *size, 3) float32 in [0, 1]: at one lightness, and as overlay on the images."""

    flat: np.ndarray
    overlay: np.ndarray


def draw_figure(
    path: Path,
    state: State,
    views: Views,
    colours: Colours,
    entries: Sequence[Mapping[str, Any]] = (),
    class_names: Mapping[int, str] | None = None,
    title: str = "CHRO-map",
) -> None:
    """Writes the PNG. `entries`: those of `consistency`, one for every view after the first."""
    is_volume, labels = len(views.size) == 3, mask_labels(views)
    factor = math.ceil(SMALLEST_TILE / min(views.size[-2:]))

    def tiles(pixels: np.ndarray, side: str, captions: Sequence[str], outlined: bool) -> list[Tile]:
        found = []
        for view, caption in enumerate(captions):
            shown = enlarge(as_bytes(middle(pixels[view], is_volume)), factor)
            if outlined and views.masks is not None:
                shown = contoured(shown, enlarge(middle(views.masks[view], is_volume), factor), labels)
            found.append(Tile(shown, caption, side if view == 0 else ""))
        return found

    greys = np.repeat(np.asarray(views.images)[..., None], 3, axis=-1)
    blank, measured = [""] * len(views), ["", *map(measures, entries)]
    captions = measured if len(measured) == len(views) else blank
    wheel = Tile(as_bytes(color_wheel(state)), "\n".join(wheel_words(state)))
    lines = [
        Line([*tiles(greys, "image", blank, False), wheel]),
        Line([*tiles(colours.overlay, "with colours", blank, True), None]),
        Line([*tiles(colours.flat, "colours alone", captions, True), None]),
    ]
    names = [views.name(view) for view in range(len(views))]
    legend = [Key(words) for words in explanation(state, bool(entries))]
    legend += [
        Key(class_name(label, class_names), contour_sample(place)) for place, label in enumerate(labels)
    ]
    draw(path, lines, [*names, ""], [(title, len(views)), ("", 1)], legend)


def mask_labels(views: Views) -> list[int]:
    """The classes of the masks without background, in order."""
    return [] if views.masks is None else [label for label in np.unique(views.masks).tolist() if label]


def middle(pixels: np.ndarray, is_volume: bool) -> np.ndarray:
    return pixels[len(pixels) // 2] if is_volume else pixels


def as_bytes(colours: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8."""
    return np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)


def color_wheel(state: State, side: int = WHEEL) -> np.ndarray:
    """(side, side, 3) in [0, 1]: the colours of the disc, its rim an infinite distance where radii are
    squashed; for three coordinates the first two, at three values of the third."""
    axis = (2 * np.arange(side) + 1) / side - 1
    places = np.stack(np.meshgrid(axis, -axis), axis=-1).astype(np.float32)
    if state.settings.dimensions == 3:
        flat = 2 * places[::3, ::3]
        thirds = [np.full_like(flat[..., :1], value) for value in (-1, 0, 1)]
        squares = [np.concatenate([flat, third], axis=-1) for third in thirds]
        return np.concatenate([colorize(state, square) for square in squares], axis=1)
    radius = np.linalg.norm(places, axis=-1, keepdims=True)
    inside = np.minimum(radius, 0.999)
    spread = inside / (1 - inside) if state.settings.squash else inside
    shown = colorize(state, places / np.maximum(radius, 1e-6) * spread)
    return np.where(radius <= 1, shown, 1.0)


def wheel_words(state: State) -> list[str]:
    """What the directions of the wheel are, in two short lines."""
    explained, turned = state.explained, not np.allclose(state.rotation, np.eye(len(state.rotation)))
    if len(explained) == 0 or turned:
        return ["coordinate 1 to the right", "coordinate 2 up"]
    short = {"pca": "PC", "lda": "LD"}[state.settings.reducer]
    return [f"{short} 1 to the right: {explained[0]:.0%}", f"{short} 2 up: {explained[1]:.0%}"]


def explanation(state: State, has_measures: bool) -> list[str]:
    """How to read the figure, a sentence each."""
    settings = state.settings
    lines = ["Equal embeddings have equal colours, in all views and images that this state colours."]
    if settings.colours != "hsv":
        lines.append("Lightness is the image's. Grey is the mean embedding, strong colour is far from it.")
        lines.append("Pale colour is background.")
    kind = REDUCERS[settings.reducer]
    if len(state.explained):
        shares = " + ".join(f"{share:.1%}" for share in state.explained)
        of = "between classes" if settings.reducer == "lda" else "of the fitted pixels"
        lines.append(f"Coordinates: {kind}s, {shares} of the variance {of}.")
    else:
        lines.append(f"Coordinates: {kind}s; distances between colours are not distances of embeddings.")
    lines.append(f"State {state.name}, seed {settings.seed}.")
    if has_measures:
        lines.append("Cosine of embeddings and OKLab distance of colours: means over the pixels that a view")
        lines.append(f"shares with the first one ({JUST_SEEN}); in brackets at shuffled locations.")
    return lines


def measures(entry: Mapping[str, Any]) -> str:
    """An entry of `consistency` as the lines under its view."""
    lines = [f"cosine {measure(entry, 'cosine')}  colour {measure(entry, 'colour')}"]
    if len(entry["classes"]) > 1:
        lines += [f"{name}: {measure(of, 'cosine')}" for name, of in entry["classes"].items()]
    return "\n".join(lines)


def measure(entry: Mapping[str, Any], name: str) -> str:
    """One of the measures, in brackets the same at shuffled locations."""
    if entry[name] is None:
        return DASH
    decimals = 2 if name == "cosine" else 3
    return (
        f"{number(entry[name], decimals=decimals)} ({number(entry[f'{name}_shuffled'], decimals=decimals)})"
    )


def contoured(pixels: np.ndarray, mask: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """`pixels` (h, w, 3) with the outline of every class (h, w): white inside, black around it, so that it is
    seen on any colour."""
    pixels = pixels.copy()
    for place, label in enumerate(labels):
        inside = mask == label
        line, halo = inside & _touches(~inside), ~inside & _touches(inside)
        row, column = np.nonzero(line)
        is_drawn = _is_drawn(place, row, column)
        pixels[halo] = pixels[halo] // 3
        pixels[row[is_drawn], column[is_drawn]] = 255
    return pixels


def _is_drawn(place: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Which pixels of a contour belong to a dash, whatever way it runs: the white squares of a chessboard."""
    length = DASHES[place % len(DASHES)]
    return np.ones(row.shape, bool) if length == 0 else (row // length + column // length) % 2 == 0


def _touches(where: np.ndarray) -> np.ndarray:
    """(h, w) true beside (above, below) a true pixel."""
    found = np.zeros_like(where)
    found[1:] |= where[:-1]
    found[:-1] |= where[1:]
    found[:, 1:] |= where[:, :-1]
    found[:, :-1] |= where[:, 1:]
    return found


def contour_sample(place: int) -> np.ndarray:
    """A piece of contour for the legend."""
    sample = np.full((12, 48, 3), 130, np.uint8)
    sample[[5, 7]] = 43
    along = np.arange(48)
    sample[6, _is_drawn(place, np.zeros_like(along), along)] = 255
    return sample
