"""Sheets of images: what the generator imagines, and what an objective sees.

Enters: arrays (H, W) or (C, H, W) with 1 or 3 channels, as integers (uint8, uint16: full range) or floats in
[0, 1]. Leaves: a PNG. Tiles are enlarged by a whole factor, so that the picture shows the image and no
interpolation of it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from cfssl.bank.store import Bank
from cfssl.data.views import ViewBatch
from cfssl.errors import UserError
from cfssl.visualise import COLOURS
from cfssl.visualise.layout import GAP, Key, Line, Tile, draw

SMALLEST_TILE, SMALLEST_LOCAL_TILE = 110, 84  # pixels
TILES_ACROSS = 6  # of a view grid
BLANK = np.uint8(240)  # the grey of places without an image
REAL = "#595959"  # the frame of real views
HATCH = np.array((86, 180, 233), np.uint8)  # no tissue is blue


def contact_sheet(
    path: Path,
    rows: Sequence[Sequence[np.ndarray | None]],
    columns: Sequence[str],
    row_labels: Sequence[str] | None = None,
    differences: bool = False,
    groups: Sequence[tuple[str, int]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes a labelled grid of equally sized images; None leaves a grey place.

    `differences` adds below each row the signed difference of every image from the first of its row, on one
    colour scale for the sheet, which the legend states. `groups`: headings over neighbouring columns, as
    (heading, number of columns). `notes`: lines below the sheet. Raises `UserError` when rows, labels or
    image shapes do not fit each other, or values are outside of their range.
    """
    check_grid(rows, columns, row_labels, groups)
    images = [[None if image is None else as_float(image) for image in row] for row in rows]
    height, width = common_shape([image for row in images for image in row if image is not None])
    factor = math.ceil(SMALLEST_TILE / min(height, width))
    blank = np.full((height, width, 3), BLANK)
    lines = []
    for index, row in enumerate(images):
        tiles = [enlarge(blank if image is None else as_rgb(image), factor) for image in row]
        side = row_labels[index] if row_labels else ""
        lines.append(Line([Tile(tiles[0], side=side), *map(Tile, tiles[1:])]))
    legend = [Key(note) for note in notes]
    if differences:
        changes = [changes_from_first(row) for row in images]
        limit = difference_limit([entry for row in changes for entry in row if entry is not None])
        legend.insert(0, difference_key(limit, columns[0]))
        paired = []
        for line, row in zip(lines, changes, strict=True):
            maps = [
                None if entry is None else Tile(enlarge(diverging(entry, limit), factor)) for entry in row
            ]
            paired += [Line(line.tiles, GAP), Line([None, *maps])]
        lines = paired
    draw(path, lines, columns, groups, legend)


def counterfactual_sheet(
    path: Path,
    originals: np.ndarray,
    counterfactuals: np.ndarray,
    truths: np.ndarray | None,
    names: Sequence[str],
    factual: Sequence[str],
    available: np.ndarray | None = None,
) -> None:
    """Writes per patient: the original and, for each do(), the counterfactual (beside the true one, where
    there is one), with the signed change from the original below.

    `originals` (n, C, H, W), `counterfactuals` and `truths` (n, K, C, H, W). `names`: K interventions, e.g.
    "do(scanner=B)"; `factual`: n labels of the patients, e.g. "scanner=A" (lines are parted by a line break).
    `available` (n, K) bool: False leaves the place grey. Raises `UserError` when these do not fit each other.
    """
    count, interventions = counterfactuals.shape[:2]
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "originals": (originals.shape, (count, *counterfactuals.shape[2:])),
        "names": ((len(names),), (interventions,)),
        "factual": ((len(factual),), (count,)),
    }
    if truths is not None:
        sizes["truths"] = (truths.shape, counterfactuals.shape)
    if available is not None:
        sizes["available"] = (available.shape, (count, interventions))
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise UserError(f"{name} has the shape {found}, expected {expected} beside the counterfactuals.")
    rows: list[list[np.ndarray | None]] = []
    for patient in range(count):
        row: list[np.ndarray | None] = [originals[patient]]
        for slot in range(interventions):
            shown = available is None or bool(available[patient, slot])
            pair = counterfactuals[patient, slot], None if truths is None else truths[patient, slot]
            row += [image if shown else None for image in pair[: 1 if truths is None else 2]]
        rows.append(row)
    if truths is None:
        columns, groups = ["original", *names], [("", 1)] * (1 + interventions)
    else:
        columns = ["original", *["generated", "true"] * interventions]
        groups = [("", 1), *((name, 2) for name in names)]
    note = "Grey: the image has this value already, or lacks an attribute that the intervention needs."
    notes = [note] if available is not None and not available.all() else []
    contact_sheet(path, rows, columns, factual, differences=True, groups=groups, notes=notes)


def view_grid(path: Path, batch: ViewBatch, names: Sequence[str], items: int = 8) -> None:
    """Writes the first `items` of a batch as objectives see it: the views of an item side by side, its local
    ones after them, framed and captioned by the stored image that they show; pixels from outside of the image
    are hatched.

    `names`: what slots 0..K show, e.g. "real", "do(scanner=A)", "do(scanner=B)".
    """
    kinds: list[ViewBatch] = [batch] if batch.local is None else [batch, batch.local]
    highest = max(int(kind.slot[:items].max()) for kind in kinds)
    if highest >= len(names):
        raise UserError(
            f"The batch shows slot {highest}, but names has {len(names)}; name slot 0 and every do()."
        )
    tiles = [
        [tile for kind in kinds for tile in view_tiles(kind, item, names, is_local=kind is not batch)]
        for item in range(min(items, len(batch)))
    ]
    views = len(tiles[0])
    across = max(1, min(len(tiles), TILES_ACROSS // views))
    lines = []
    for first in range(0, len(tiles), across):
        shown = [tile for item in tiles[first : first + across] for tile in item]
        lines.append(Line([*shown, *[None] * (across * views - len(shown))]))
    legend = []
    if not all(kind.valid[:items].all() for kind in kinds):
        swatch = hatched(np.zeros((12, 24, 3), np.uint8), np.ones((12, 24), bool))
        legend = [Key("outside of the stored image", swatch)]
    columns = [f"view {view}" for view in range(views)] * across
    groups = [("", views)] * across
    if batch.local is not None:
        groups = [("global", batch.images.shape[1]), ("local", batch.local.images.shape[1])] * across
    draw(path, lines, columns, groups, legend)


def view_tiles(batch: ViewBatch, item: int, names: Sequence[str], is_local: bool) -> list[Tile]:
    """The views of one item."""
    images, valid = batch.images[item].numpy(), batch.valid[item].numpy()
    factor = math.ceil((SMALLEST_LOCAL_TILE if is_local else SMALLEST_TILE) / min(images.shape[2:]))
    tiles = []
    for view, slot in enumerate(batch.slot[item].tolist()):
        pixels = enlarge(as_rgb(as_float(images[view])), factor)
        pixels = hatched(pixels, ~enlarge(valid[view], factor))
        side = f"row {batch.row[item]}" if view == 0 and not is_local else ""
        frame = COLOURS[(slot - 1) % len(COLOURS)] if slot else REAL
        caption = names[slot].replace(", ", ",\n")  # of a joint do()
        tiles.append(Tile(pixels, caption, side, frame))
    return tiles


def slot_names(bank: Bank) -> list[str]:
    """ "real", then do(...) of every slot."""
    done = [", ".join(f"{name}={value}" for name, value in view.items()) for view in bank.views]
    return ["real", *(f"do({values})" for values in done)]


def as_float(image: np.ndarray) -> np.ndarray:
    """An image of any accepted shape and depth -> (H, W, C) float64 in [0, 1]."""
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise UserError(
            f"An image of shape {np.shape(image)} cannot be shown; give (H, W), (1, H, W) or (3, H, W)."
        )
    if array.dtype in (np.uint8, np.uint16):
        array = array / np.iinfo(array.dtype).max
    elif array.dtype.kind != "f":
        raise UserError(f"An image of {array.dtype} cannot be shown; give uint8, uint16 or floats in [0, 1].")
    elif not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):  # refuses NaN too; float32 rounding may pass
        low, high = array.min(), array.max()
        raise UserError(f"An image has values from {low:.4g} to {high:.4g}; give floats in [0, 1].")
    return np.clip(array, 0, 1).transpose(1, 2, 0).astype(np.float64)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) in [0, 1] -> (H, W, 3) uint8."""
    return np.broadcast_to(np.rint(image * 255).astype(np.uint8), (*image.shape[:2], 3))


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(h, w, ...) -> (factor * h, factor * w, ...), every pixel a square."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def changes_from_first(row: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """(H, W) signed difference of every later image from the first, the mean over channels, in shares of the
    range."""
    first, *others = row
    return [None if first is None or image is None else (image - first).mean(axis=2) for image in others]


def difference_limit(changes: Sequence[np.ndarray]) -> float:
    """The end of the colour scale: the 98th percentile of the absolute changes, rounded up to whole
    hundredths. A few large changes, such as a moved edge, would otherwise fade everything else."""
    if not changes:
        return 0.01
    return max(0.01, math.ceil(100 * float(np.percentile(np.abs(changes), 98)) - 1e-9) / 100)


def diverging(values: np.ndarray, limit: float) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: blue below 0, red above, nearly white at 0, full colour from `limit`."""
    return colormaps["RdBu_r"](np.clip(values / limit, -1, 1) / 2 + 0.5, bytes=True)[..., :3]


def difference_key(limit: float, first: str) -> Key:
    """The colour scale of the difference maps."""
    ramp = np.tile(np.linspace(-limit, limit, 120), (12, 1))
    scale = f"−{limit:.2f} or less to +{limit:.2f} or more"
    return Key(f"change from the {first}: {scale}, in shares of the intensity range", diverging(ramp, limit))


def hatched(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`pixels` (h, w, 3) with thin diagonal stripes where `where` (h, w) is true."""
    row, column = np.indices(where.shape)
    stripes = where & ((row + column) % 8 < 2)
    return np.where(stripes[..., None], HATCH, pixels)


def check_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    columns: Sequence[str],
    row_labels: Sequence[str] | None,
    groups: Sequence[tuple[str, int]],
) -> None:
    """Raises `UserError` unless rows, headings and labels fit each other."""
    if len(rows) == 0 or len(columns) == 0:  # either may be an array
        found = f"{len(rows)} rows and {len(columns)} columns"
        raise UserError(f"A sheet of {found} shows nothing; give at least one image.")
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            found = f"Row {index} has {len(row)} images for {len(columns)} columns"
            raise UserError(f"{found}; give None for empty places.")
    if row_labels is not None and len(row_labels) != len(rows):
        raise UserError(f"There are {len(row_labels)} row labels for {len(rows)} rows; give one a row.")
    if groups and sum(size for _, size in groups) != len(columns):
        found = f"The groups {list(groups)} do not add up to {len(columns)} columns"
        raise UserError(f"{found}; give their sizes in order.")


def common_shape(images: Sequence[np.ndarray]) -> tuple[int, int]:
    """(H, W) of all images; raises `UserError` when they differ or there are none."""
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) != 1:
        raise UserError(
            f"The images of a sheet have the sizes {shapes}; give at least one, and all of one size."
        )
    return shapes[0]
