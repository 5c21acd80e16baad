"""CHRO-maps: pixel embeddings as colours, so that pixels of one colour have one embedding.

Enters: the views of one or more images (`Views`). Leaves: a state, fitted once, and what it makes of any
embeddings: coordinates, colours, and overlays on the images.

Two presets. `paper` is the published algorithm (Lafargue-Hauret et al. 2026, arXiv 2603.17110): UMAP of all
pixels of one image, the smallest ellipse around them, hue and saturation of HSV, half image and half colour;
its ellipse is the correct one (see ellipse.py). `default` is this project's: whitened PCA, a robust scale,
and OKLab colours that have the lightness of the image, so that anatomy stays as it is; deterministic, a
second instead of minutes, and comparable between images, epochs and models once states are aligned.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from scipy.linalg import orthogonal_procrustes

from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.errors import UserError
from cfssl.settings import STRICT, Count, Share
from cfssl.visualise import chromap_colour as colour
from cfssl.visualise.chromap_reduce import (
    Linear,
    border_rows,
    discriminant,
    neighbour_places,
    principal,
    sample_pixels,
    sampled_rows,
    standardised,
    umap_places,
)
from cfssl.visualise.chromap_views import Views, rows_of, unit_maps
from cfssl.visualise.ellipse import enclosing_ellipse

MOST_PIXELS = 50_000  # of all images together, in a sample
MAP_LIGHTNESS = 0.72  # of colour maps: most hues have most chroma about here
SMALLEST_PART = 0.01  # of the sample that Otsu's threshold may call foreground
BACKGROUND = 0.25  # share of its chroma that background keeps


@dataclass(frozen=True, config=STRICT)
class ChromapSettings:
    """`reducer`: lda needs masks, umap the extra of that name. `foreground`: where none is given, Otsu's
    threshold on the first principal component, or all pixels; colours are fitted on it and the rest is
    desaturated. `scale`: of the disc: the distance from its centre, or the ellipse, that holds the share
    `inner` of the pixels. `squash`: r / (1 + r) of the radius, else it is cut at 1. `colours`: oklch and hsv
    show two coordinates in a disc, rgb3 three as sigmoid(2 score), without scale. `sample_per_image`: pixels
    that an image gives to the fit; null takes all."""

    reducer: Literal["pca", "lda", "umap"] = "pca"
    foreground: Literal["otsu", "all"] = "otsu"
    scale: Literal["percentile", "ellipse"] = "percentile"
    inner: Share = 0.98
    squash: bool = True
    colours: Literal["oklch", "hsv", "rgb3"] = "oklch"
    sample_per_image: Count | None = 2000
    seed: int = 0

    @property
    def dimensions(self) -> int:
        return 3 if self.colours == "rgb3" else 2


PRESETS = {
    "default": ChromapSettings(),
    "paper": ChromapSettings(
        reducer="umap",
        foreground="all",
        scale="ellipse",
        inner=1.0,
        squash=False,
        colours="hsv",
        sample_per_image=None,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What colours mean. Coordinates of a unit embedding x (C,) are rotation @ root @ (score - centre).

    `mean` (C,), `components` (k, C) and `explained` as in `Linear`; for UMAP the z-scores, and `fitted`
    (n, C) with their `places` (n, k), else both empty. A pixel is foreground where direction @ x > offset.
    """

    settings: ChromapSettings
    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained: NDArray[np.float64]
    centre: NDArray[np.float64]
    root: NDArray[np.float64]
    rotation: NDArray[np.float64]
    direction: NDArray[np.float64]
    offset: float
    fitted: NDArray[np.float32]
    places: NDArray[np.float64]

    @property
    def name(self) -> str:
        """12 hex digits of everything in it: equal names mean equal colours."""
        digest = hashlib.blake2b(digest_size=6)
        for field in dataclasses.fields(self)[1:]:
            digest.update(np.ascontiguousarray(getattr(self, field.name)).tobytes())
        digest.update(json.dumps(self.plain_settings(), sort_keys=True).encode())
        return digest.hexdigest()

    def plain_settings(self) -> dict[str, object]:
        """As JSON."""
        return dict(TypeAdapter(ChromapSettings).dump_python(self.settings, mode="json"))


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Pixels of all images: unit embeddings (n, C), classes (n,) and given foreground (n,), where known."""

    rows: NDArray[np.float64]
    classes: NDArray[np.int64] | None
    foreground: NDArray[np.float64] | None


def fit(images: Sequence[Views], settings: ChromapSettings = PRESETS["default"]) -> State:
    """Fits colours to a balanced sample of the pixels of all images and views. Raises `UserError` when there
    are none, or what the reducer needs is missing."""
    sample = _sampled(images, settings)
    rows = sample.rows
    direction, offset = np.zeros(rows.shape[1]), -1.0  # all is foreground
    if settings.foreground == "otsu":
        direction, offset = _otsu(rows, np.concatenate([border_rows(views) for views in images]))
    known = sample.foreground
    kept = rows @ direction > offset if known is None else known > 0.5
    if kept.sum() <= settings.dimensions:
        raise UserError(
            f"The foreground has {kept.sum()} of {len(rows)} sampled pixels, too few to fit colours to; give "
            "a larger one or none."
        )
    linear, fitted, places = _reduced(rows[kept], sample.classes, kept, settings)
    centre, root = _scale(places if len(places) else linear.scores(rows[kept]), settings)
    turn = np.eye(settings.dimensions)
    maps = linear.mean, linear.components, linear.explained
    return State(settings, *maps, centre, root, turn, direction, offset, fitted, places)


def _sampled(images: Sequence[Views], settings: ChromapSettings) -> _Sample:
    if not images or sum(int(views.is_valid.sum()) for views in images) < 2:
        raise UserError(
            "There are fewer than two valid pixels to fit a CHRO-map to; give at least one image."
        )
    lengths = sorted({views.embeddings.shape[1] for views in images})
    if len(lengths) > 1:
        raise UserError(f"The images have embeddings of lengths {lengths}; give those of one model.")
    count = settings.sample_per_image
    count = count if count is None else max(1, min(count, MOST_PIXELS // len(images)))
    places = [sample_pixels(views, count, settings.seed) for views in images]

    def picked(name: str) -> np.ndarray | None:
        """Of an optional array, where all images have it."""
        arrays = [getattr(views, name) for views in images]
        if any(array is None for array in arrays):
            return None
        return np.concatenate([array.ravel()[at] for array, at in zip(arrays, places, strict=True)])

    rows = [sampled_rows(views, at) for views, at in zip(images, places, strict=True)]
    return _Sample(np.concatenate(rows), picked("masks"), picked("foreground"))


def _otsu(rows: NDArray[np.float64], border: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Direction and offset that part foreground from background: Otsu's threshold on the first component,
    with the side that most pixels at the edge of the images are not on. A part of less than a hundredth of
    the rows is an outlier, no foreground: all is, then."""
    from skimage.filters import threshold_otsu

    first = principal(rows, 1)
    if not first.components.any():
        return first.components[0], -1.0
    offset = float(threshold_otsu(rows @ first.components[0]))
    is_flipped = np.mean(border @ first.components[0] > offset) > 0.5
    direction, offset = (-1 if is_flipped else 1) * first.components[0], (-offset if is_flipped else offset)
    if np.mean(rows @ direction > offset) < SMALLEST_PART:
        return np.zeros_like(direction), -1.0
    return direction, offset


def _reduced(
    rows: NDArray[np.float64], classes: np.ndarray | None, kept: np.ndarray, settings: ChromapSettings
) -> tuple[Linear, NDArray[np.float32], NDArray[np.float64]]:
    """The linear map, and for UMAP the fitted rows with their places."""
    channels, count = rows.shape[1], settings.dimensions
    nothing = np.zeros((0, channels), np.float32), np.zeros((0, count))
    if settings.reducer == "pca":
        return principal(rows, count), *nothing
    if settings.reducer == "lda":
        if classes is None:
            raise UserError(
                "LDA parts classes, and not every image has masks; give them or take reducer: pca."
            )
        return discriminant(rows, classes[kept], count), *nothing
    linear = standardised(rows)
    scores = linear.scores(rows).astype(np.float32)
    return linear, scores, umap_places(scores, count, settings.seed)


def _scale(scores: NDArray[np.float64], settings: ChromapSettings) -> tuple[np.ndarray, np.ndarray]:
    """Centre (k,) and root (k, k) of the disc; rgb3 keeps the scores."""
    count = settings.dimensions
    if settings.colours == "rgb3":
        return np.zeros(count), np.eye(count)
    centre = scores.mean(axis=0)
    radius = np.linalg.norm(scores - centre, axis=1)
    end = float(np.quantile(radius, settings.inner))
    if settings.scale == "percentile":
        return centre, np.eye(count) / end if end > 0 else np.zeros((count, count))
    ellipse = enclosing_ellipse(scores[radius <= end])
    return ellipse.centre, ellipse.root


def transform(state: State, embeddings: np.ndarray, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Coordinates (V, *size, k) float32 of embeddings (V, C, *any size), which are interpolated to `size`
    where it is another one. In a disc, 1 is where the scale ends."""
    maps = unit_maps(embeddings, tuple(size or embeddings.shape[2:]))
    return coordinates(state, rows_of(maps)).reshape(len(maps), *maps.shape[2:], -1)


def coordinates(state: State, rows: np.ndarray) -> NDArray[np.float32]:
    """Coordinates (n, k) of unit embeddings (n, C)."""
    if rows.shape[1] != len(state.mean):
        raise UserError(
            f"The embeddings have {rows.shape[1]} channels and the CHRO-map was fitted to {len(state.mean)}; "
            "fit another one and align it."
        )
    # Contiguous, so that a loaded state computes the same to the last bit.
    components = np.ascontiguousarray(state.components, dtype=np.float32)
    scores = rows @ components.T - components @ state.mean.astype(np.float32)
    if len(state.places):
        scores = neighbour_places(scores, state.fitted, state.places)
    turned = np.ascontiguousarray(state.rotation @ np.ascontiguousarray(state.root), dtype=np.float32)
    return (scores - state.centre).astype(np.float32) @ turned.T


def is_foreground(state: State, embeddings: np.ndarray, size: tuple[int, ...] | None = None) -> np.ndarray:
    """(V, *size) bool, of embeddings as in `transform`."""
    maps = unit_maps(embeddings, tuple(size or embeddings.shape[2:]))
    return np.einsum("vc...,c->v...", maps, state.direction.astype(np.float32)) > state.offset


def colorize(state: State, coordinates: np.ndarray, foreground: np.ndarray | None = None) -> np.ndarray:
    """sRGB (..., 3) float32 in [0, 1] of coordinates (..., k), at one lightness. Where `foreground` (...) in
    [0, 1] is 0, colours are pale."""
    if state.settings.colours == "hsv":
        return colour.hsv_disc(coordinates).astype(np.float32)
    return colour.from_oklab(_lab(state, coordinates, foreground, None))


def overlay(
    state: State, coordinates: np.ndarray, images: np.ndarray, foreground: np.ndarray | None = None
) -> np.ndarray:
    """sRGB (..., 3) float32 in [0, 1]: colours of coordinates (..., k) with the lightness of `images` (...),
    grey levels in [0, 1]; with hsv, as published, half image and half colour."""
    images = np.asarray(images, dtype=np.float32)
    if state.settings.colours == "hsv":
        return 0.5 * images[..., None] + 0.5 * colorize(state, coordinates)
    return colour.from_oklab(_lab(state, coordinates, foreground, colour.lightness(images)))


def _lab(
    state: State, coordinates: np.ndarray, foreground: np.ndarray | None, lightness: np.ndarray | None
) -> np.ndarray:
    """OKLab (..., 3) that a screen can show."""
    if state.settings.colours == "rgb3":
        lab = colour.to_oklab(1 / (1 + np.exp(-2 * coordinates)))
    else:
        places = _in_disc(state, coordinates)
        lab = np.concatenate([np.full_like(places[..., :1], MAP_LIGHTNESS), colour.MOST_CHROMA * places], -1)
    if foreground is not None:
        share = np.asarray(foreground, dtype=lab.dtype)[..., None]
        lab[..., 1:] *= BACKGROUND + (1 - BACKGROUND) * share
    if lightness is not None:
        lab[..., 0] = lightness
    return colour.fitted_chroma(lab)


def _in_disc(state: State, coordinates: np.ndarray) -> np.ndarray:
    """Coordinates with a radius of at most 1."""
    radius = np.linalg.norm(coordinates, axis=-1, keepdims=True)
    return coordinates / (1 + radius if state.settings.squash else np.maximum(radius, 1))


def align(state: State, coordinates: np.ndarray, reference: np.ndarray) -> State:
    """`state` turned (and mirrored) so that its `coordinates` (..., k) come nearest to `reference` (..., k),
    those of another state for the same pixels: colours of two epochs, seeds or models can then be compared.

    Orthogonal Procrustes: distances within a map stay as they are.
    """
    if coordinates.shape != reference.shape or coordinates.shape[-1] != state.settings.dimensions:
        raise UserError(
            f"The coordinates to align have the shapes {coordinates.shape} and {reference.shape}; give those "
            "of the same pixels under both states."
        )
    count = state.settings.dimensions
    turn, _ = orthogonal_procrustes(
        _in_disc(state, coordinates).reshape(-1, count).astype(np.float64),
        _in_disc(state, reference).reshape(-1, count).astype(np.float64),
    )
    return dataclasses.replace(state, rotation=turn.T @ state.rotation)


def save(state: State, path: Path) -> None:
    """Writes a safetensors file: arrays, and the settings in its header."""
    arrays = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)[1:]}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    save_checkpoint(Path(path), {"chromap": state.plain_settings(), **tensors})


def load(path: Path) -> State:
    """The state of a file. Raises `UserError` when it is missing, damaged or something else."""
    content = load_checkpoint(Path(path))
    if not isinstance(content, dict) or "chromap" not in content:
        raise UserError(f"{path} holds no CHRO-map; give the state.safetensors of one.")
    settings = TypeAdapter(ChromapSettings).validate_python(content.pop("chromap"))
    arrays = {name: tensor.numpy() for name, tensor in content.items()}
    return State(settings, **arrays | {"offset": float(arrays["offset"])})
