"""The interactive CHRO-map: one HTML page, without a server and without anything to load.

Enters: the views of images with their overlays. Leaves: a page on which a person points at a pixel and sees
the pixels of all views whose embeddings are nearest to its own. The embeddings are in it, as directions in
few dimensions of 8 bits each; the page says how far its cosines are from the true ones.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from cfssl.errors import UserError
from cfssl.files import write_text
from cfssl.seeds import numpy_generator
from cfssl.visualise.cells import DASH
from cfssl.visualise.chromap import State
from cfssl.visualise.chromap_consistency import class_name
from cfssl.visualise.chromap_figure import as_bytes, color_wheel, explanation, measure, wheel_words
from cfssl.visualise.chromap_views import Views, rows_of

DIMENSIONS = (4, 8, 12, 16, 24, 32, 48, 64)  # that a page may keep
ERROR = 0.01  # of cosines, root mean square, at which fewer dimensions are enough
PAIRS = 4000  # of random pixels, on which the error is measured
LEVELS = 127


@dataclass(frozen=True, eq=False)
class Codes:
    """`values` (n, k) int8: directions of embeddings. `error` and `largest_error` of their cosines, over
    random pairs of pixels; `median`: the median cosine of such pairs."""

    values: NDArray[np.int8]
    error: float
    largest_error: float
    median: float


@dataclass(frozen=True, eq=False)
class Shown:
    """An image on the page: its views (of two dimensions), their overlays (V, H, W, 3) in [0, 1], and what
    `consistency` says of them."""

    name: str
    views: Views
    overlay: np.ndarray
    entries: Sequence[Mapping[str, Any]] = ()


def encoded(rows: NDArray[np.float32]) -> Codes:
    """Unit embeddings (n, C) in the fewest dimensions that keep cosines to a hundredth, or in 64.

    Dimensions are the main directions of the embeddings themselves, not of their deviations from the mean:
    cosines are angles at the origin. One scale for all, so that angles stay.
    """
    channels = rows.shape[1]
    _, directions = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
    directions = directions[:, ::-1].astype(np.float32)
    first, second = numpy_generator("chromap page").integers(len(rows), size=(2, PAIRS))
    true = np.einsum("nc,nc->n", rows[first], rows[second], dtype=np.float64)
    for count in sorted({min(count, channels) for count in DIMENSIONS}):
        values = _quantised(rows @ directions[:, :count])
        gap = np.abs(_cosines(values[first], values[second]) - true)
        error = float(np.sqrt(np.mean(gap**2)))
        if error <= ERROR:
            break
    return Codes(values, error, float(gap.max()), float(np.median(true)))


def _quantised(values: np.ndarray) -> NDArray[np.int8]:
    scale = LEVELS / max(float(np.abs(values).max()), 1e-12)
    return np.rint(scale * values).astype(np.int8)


def _cosines(first: np.ndarray, second: np.ndarray) -> NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def write_page(
    path: Path,
    state: State,
    images: Sequence[Shown],
    class_names: Mapping[int, str] | None = None,
    title: str = "CHRO-map",
) -> dict[str, Any]:
    """Writes the page and returns {"dimensions", "error", "largest_error", "bytes"} of its embeddings. Raises
    `UserError` for volumes."""
    if any(len(image.views.size) != 2 for image in images):
        raise UserError("The page shows images of two dimensions; give slices of a volume as images.")
    codes = encoded(np.concatenate([rows_of(image.views.unit) for image in images]))
    views = [
        {
            "image": image.name,
            "view": image.views.name(view),
            "width": image.views.size[1],
            "height": image.views.size[0],
            "grey": png(as_bytes(image.views.images[view])),
            "colours": png(as_bytes(image.overlay[view])),
        }
        for image in images
        for view in range(len(image.views))
    ]
    masks = [image.views.masks for image in images]
    labels = [
        np.zeros(image.views.images.shape, np.uint8) if mask is None else mask.astype(np.uint8)
        for image, mask in zip(images, masks, strict=True)
    ]
    data = {
        "views": views,
        "dimensions": codes.values.shape[1],
        "classes": {} if all(mask is None for mask in masks) else _known_classes(labels, class_names),
        "codes": base64.b64encode(codes.values.tobytes()).decode(),
        "labels": base64.b64encode(b"".join(one.tobytes() for one in labels)).decode(),
    }
    columns, measured = _measured(images)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        (resources.files(__package__) / "chromap.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        data=data,
        codes=codes,
        channels=images[0].views.embeddings.shape[1],
        kilobytes=round(codes.values.nbytes / 1000),
        wheel=png(as_bytes(color_wheel(state))),
        wheel_words=wheel_words(state),
        explanation=explanation(state, has_measures=True),
        columns=columns,
        measured=measured,
        is_disc=state.settings.dimensions == 2,
    )
    write_text(Path(path), page)
    return {
        "dimensions": codes.values.shape[1],
        "error": codes.error,
        "largest_error": codes.largest_error,
        "bytes": codes.values.nbytes,
    }


def _measured(images: Sequence[Shown]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """View consistency as a table: the names of the classes, and a row per view with colour, cosine, and the
    cosine of every class."""
    found = [(f"{image.name}, {entry['view']}", entry) for image in images for entry in image.entries]
    classes = list(dict.fromkeys(name for _, entry in found for name in entry["classes"]))
    rows = []
    for name, entry in found:
        cells = [measure(entry, "colour"), measure(entry, "cosine")]
        known = entry["classes"]
        cells += [measure(known[one], "cosine") if one in known else DASH for one in classes]
        rows.append((name, cells))
    return classes, rows


def _known_classes(labels: Sequence[np.ndarray], names: Mapping[int, str] | None) -> dict[str, str]:
    found = set().union(*(np.unique(one).tolist() for one in labels))
    return {str(label): class_name(label, names) for label in sorted(found)}


def png(pixels: np.ndarray) -> str:
    """(h, w) or (h, w, 3) uint8 as an address that holds the picture."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
