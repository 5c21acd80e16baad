"""Lays out sheets of tiles: headings, labels, frames, legend.

Enters: lines of RGB tiles with their words; a column is as wide as its widest tile, a line as high as its
highest. Leaves: a PNG. The canvas is an array, so that every tile keeps its exact pixels; matplotlib only
sets the words. All places are pixels from the top left corner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from cfssl.files import atomic_path

DPI = 128  # a power of two: width / DPI inches come back as the same whole number of pixels
GAP, GROUP_GAP, ROW_GAP, MARGIN, FRAME, LINE = 6, 18, 14, 14, 4, 18  # pixels; LINE is one line of text
POINTS = 7.5
INK, RULE = "#222222", 150


@dataclass(frozen=True)
class Tile:
    """`pixels` (h, w, 3) uint8, a caption below, a label at the left (rotated), and the colour of a frame
    around it."""

    pixels: np.ndarray
    caption: str = ""
    side: str = ""
    frame: str | None = None


@dataclass(frozen=True)
class Line:
    """Tiles side by side (None leaves a place empty), `gap` pixels above the next line."""

    tiles: Sequence[Tile | None]
    gap: int = ROW_GAP


@dataclass(frozen=True)
class Key:
    """An entry of the legend: words, after a small picture (h, w, 3) uint8 if there is one."""

    words: str
    swatch: np.ndarray | None = None

    @property
    def indent(self) -> int:
        return 0 if self.swatch is None else self.swatch.shape[1] + 8


class Sheet:
    """What has been put where so far; `save` makes the picture."""

    def __init__(self) -> None:
        self.pictures: list[tuple[np.ndarray, int, int]] = []
        self.words: list[tuple[float, float, str, dict[str, Any]]] = []

    def paste(self, pixels: np.ndarray, left: int, top: int) -> None:
        self.pictures.append((pixels, left, top))

    def write(self, words: str, x: float, y: float, room: int, **style: Any) -> None:
        """Words at (x, y), shortened to `room` pixels. `y` is the top unless `va` says otherwise."""
        style = {"size": POINTS, "color": INK, "va": "top", **style}
        font = FontProperties(size=style["size"], weight=style.get("weight"))
        lines = [fitted(line, room, font) for line in words.split("\n")]
        self.words.append((x, y, "\n".join(lines), style))

    def save(self, path: Path, height: int, width: int) -> None:
        """Writes the PNG. A user's words are never read as mathematics."""
        canvas = np.full((height, width, 3), 255, np.uint8)
        for pixels, left, top in self.pictures:
            canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.figimage(canvas, origin="upper")
        for x, y, words, style in self.words:
            figure.text(x / width, 1 - y / height, words, parse_math=False, **style)
        with atomic_path(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)


def draw(
    path: Path,
    lines: Sequence[Line],
    columns: Sequence[str],
    groups: Sequence[tuple[str, int]] = (),
    legend: Sequence[Key] = (),
) -> None:
    """Writes the sheet. `groups`: headings over neighbouring columns, as (heading, number of columns)."""
    widths = column_widths(lines, len(columns))
    frame = FRAME if any(tile is not None and tile.frame for line in lines for tile in line.tiles) else 0
    lefts = left_edges(lines, groups, widths, frame)
    font = FontProperties(size=POINTS)
    key_width = max((key.indent + text_width(key.words, font) for key in legend), default=0)
    sheet_width = MARGIN + max(lefts[-1] + widths[-1] + frame, MARGIN + key_width)

    sheet, y = Sheet(), MARGIN
    if any(heading for heading, _ in groups):
        first = 0
        for heading, size in groups:
            left, right = lefts[first], lefts[first + size - 1] + widths[first + size - 1]
            if heading:
                sheet.write(heading, (left + right) / 2, y, right - left, ha="center", weight="bold")
                sheet.paste(np.full((1, right - left, 3), RULE, np.uint8), left, y + LINE)
            first += size
        y += LINE + 4
    if any(columns):
        for left, width, heading in zip(lefts, widths, columns, strict=True):
            sheet.write(heading, left + width / 2, y, width + GAP, ha="center")
        y += LINE + frame
    for line in lines:
        for left, tile in zip(lefts, line.tiles, strict=True):
            if tile is not None:
                put(sheet, tile, left, y, frame)
        y += max((below(tile) for tile in line.tiles if tile is not None), default=0)
        y += frame + line.gap + frame
    for key in legend:
        if key.swatch is not None:
            sheet.paste(key.swatch, MARGIN, y + 2)
        sheet.write(key.words, MARGIN + key.indent, y, key_width)
        y += LINE
    sheet.save(path, y + (MARGIN if legend else 0), sheet_width)


def below(tile: Tile) -> int:
    """Pixels from the top of a tile to the end of its caption."""
    return tile.pixels.shape[0] + (LINE * len(tile.caption.split("\n")) if tile.caption else 0)


def column_widths(lines: Sequence[Line], columns: int) -> list[int]:
    """Of the widest tile of every column; 0 of a column that is empty."""
    tiles = [[line.tiles[column] for line in lines] for column in range(columns)]
    return [max((tile.pixels.shape[1] for tile in column if tile is not None), default=0) for column in tiles]


def left_edges(
    lines: Sequence[Line], groups: Sequence[tuple[str, int]], widths: Sequence[int], frame: int
) -> list[int]:
    """The left edge of the tiles in every column: a group keeps its distance from the last, and columns with
    labelled tiles leave room for the labels."""
    starts, first = set(), 0
    for _, size in groups:
        starts.add(first)
        first += size
    labels = [
        [tile.side for line in lines if (tile := line.tiles[column]) is not None]
        for column in range(len(widths))
    ]
    room = [max((LINE * len(label.split("\n")) for label in column if label), default=0) for column in labels]
    edges: list[int] = []
    for column in range(len(widths)):
        before = (
            edges[-1] + widths[column - 1] + frame + (GROUP_GAP if column in starts else GAP)
            if edges
            else MARGIN
        )
        edges.append(before + room[column] + frame)
    return edges


def put(sheet: Sheet, tile: Tile, left: int, top: int, frame: int) -> None:
    """One tile with its frame, label and caption."""
    height, width = tile.pixels.shape[:2]
    if tile.frame:
        colour = np.rint(255 * np.array(to_rgb(tile.frame))).astype(np.uint8)
        outer = np.broadcast_to(colour, (height + 2 * frame, width + 2 * frame, 3))
        sheet.paste(outer, left - frame, top - frame)
    sheet.paste(tile.pixels, left, top)
    if tile.side:
        middle = top + height / 2
        sheet.write(tile.side, left - frame - 4, middle, height, rotation=90, ha="right", va="center")
    if tile.caption:
        under, colour = top + height + frame + 2, tile.frame or INK
        sheet.write(tile.caption, left + width / 2, under, width + GAP, ha="center", color=colour)


def text_width(text: str, font: FontProperties) -> int:
    """Pixels that one line of text takes."""
    return math.ceil(RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, False)[0])


def fitted(text: str, room: int, font: FontProperties) -> str:
    """`text` with its middle left out until it fits: the start names the variable, the end its value."""
    if text_width(text, font) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if text_width(shorter, font) <= room:
            return shorter
    return "…"
