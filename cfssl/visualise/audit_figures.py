"""The pictures of an audit.

Enters: the tables of `cfssl.evaluate.amplification`, and figures {"value", "low", "high"} with their names.
Leaves: PNG files: the matrix of changes, bars with intervals, and how probabilities moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from cfssl.files import atomic_path
from cfssl.visualise import COLOURS
from cfssl.visualise.cells import DASH, figure
from cfssl.visualise.layout import INK

RELATIONS = {"intervened": COLOURS[0], "descendant": COLOURS[2], "unrelated": "#98a2ad"}
MARK, DISTANCE = COLOURS[1], COLOURS[5]
SOFT, GRID, DPI = "#5b6673", "#e5e5e5", 108
LEAST_SCALE = 5.0  # points of AUC at which the colours end at least, so that noise does not look alarming
STYLES = ("-", "--", ":", "-.")  # once the colours are used up


@dataclass(frozen=True)
class Bar:
    """A figure with its name, and a `reference` to read it by: that of the real or the unchanged images."""

    name: str
    entry: Mapping[str, Any]
    reference: float | None = None
    colour: str = COLOURS[0]


@dataclass(frozen=True)
class Panel:
    """Bars of one unit under one title, on an axis that ends at `end` at least. `best`: where a perfect
    generator would be. `mark`: what the references are."""

    title: str
    unit: str
    bars: Sequence[Bar]
    best: float | None = None
    end: float = 0.0
    mark: str = ""


def amplification_map(path: Path, amplified: Mapping[str, Any]) -> None:
    """The matrix: discrete attributes in points of AUC, coloured; continuous ones in words, with their unit.

    Colours are symmetric about 0 and end at the largest change that was not asked for; what was set may lie
    beyond."""
    matrix, attributes = amplified["matrix"], list(amplified["attributes"])
    values, end = coloured(amplified)
    longest = max(map(len, matrix))
    width = 1.9 + 0.085 * longest + 1.3 * len(attributes)
    drawing = blank(max(width, 5.5), 1.2 + 0.68 * len(matrix))
    axes = drawing.add_subplot()
    image = axes.imshow(values, cmap="RdBu_r", norm=Normalize(-end, end), aspect="auto", alpha=0.9)
    axes.set_facecolor("#f1f3f5")  # seen where a cell has no colour
    for row, cells in enumerate(matrix.values()):
        for column, name in enumerate(attributes):
            _write_cell(axes, cells[name], row, column, values[row, column] / end)
    words(axes.set_xticks, attributes)
    words(axes.set_yticks, [f"do({name})" for name in matrix])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    axes.set_xticks(np.arange(1, len(attributes)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(matrix)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    beyond = np.nanmax(np.abs(values), initial=0) > end
    bar = drawing.colorbar(image, ax=axes, extend="both" if beyond else "neither", shrink=0.9, pad=0.02)
    bar.set_label("change of the AUC, points", fontsize=9, color=SOFT)
    bar.ax.spines[:].set_visible(False)
    bar.ax.tick_params(labelsize=8.5, colors=SOFT)
    marks = [
        Patch(facecolor="white", edgecolor=INK, linewidth=2, label="set by the do()"),
        Patch(facecolor="white", edgecolor=INK, linewidth=1, linestyle="--", label="descends from it"),
    ]
    drawing.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(drawing, path)


def coloured(amplified: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """The changes of discrete attributes (do, attributes) in points, NaN for the rest, and where the colours
    end."""
    attributes, end = amplified["attributes"], LEAST_SCALE
    values = np.full((len(amplified["matrix"]), len(attributes)), np.nan)
    for row, cells in enumerate(amplified["matrix"].values()):
        for column, (name, of) in enumerate(attributes.items()):
            change = cells[name]["change"]["value"]
            if of["kind"] == "discrete" and change is not None:
                values[row, column] = change
                if cells[name]["relation"] != "intervened":
                    end = max(end, abs(change))
    return values, end


def _write_cell(axes: Axes, cell: Mapping[str, Any], row: int, column: int, depth: float) -> None:
    """Value, interval (and unit) in the cell; its frame. `depth`: the value's place in the colours."""
    discrete = np.isfinite(depth)
    shown = figure(cell["change"], signed=True, decimals=1 if "accuracy" in cell else 2)
    colour = "white" if discrete and abs(depth) > 0.7 else INK
    below, lift = shown.interval, 0.14
    if "accuracy" not in cell:
        below, lift = f"{below}\n{cell['unit']}".strip(), 0.2
    elif cell["change"]["value"] is None:
        below = f"recognised in {cell['accuracy']['value']:.0%}"
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": colour, "parse_math": False}
    bold = "bold" if cell["relation"] == "intervened" else "normal"
    axes.text(column, row - lift, shown.text, fontsize=11, fontweight=bold, **centred)
    axes.text(column, row + lift, below, fontsize=7, linespacing=1.2, **centred)
    if cell["relation"] != "unrelated":
        set_here = cell["relation"] == "intervened"
        frame = Rectangle(
            (column - 0.46, row - 0.44),
            0.92,
            0.88,
            fill=False,
            edgecolor=colour if discrete and not set_here else INK,
            linewidth=2 if set_here else 1,
            linestyle="-" if set_here else (0, (4, 3)),
        )
        axes.add_patch(frame)


def draw_bars(path: Path, panels: Sequence[Panel]) -> None:
    """One panel below the other, as high as it has bars; figures without a value say why."""
    heights = [len(panel.bars) + 2.2 for panel in panels]
    drawing = blank(9, 0.27 * sum(heights) + 0.6)
    spots = np.atleast_1d(drawing.subplots(len(panels), 1, height_ratios=heights))
    for axes, panel in zip(spots, panels, strict=True):
        _draw_panel(axes, panel)
    shown = {bar.colour for panel in panels for bar in panel.bars}
    names = {"intervened": "set by the do()", "descendant": "descends from it", "unrelated": "unrelated"}
    keys: list[Patch | Line2D] = [
        Patch(facecolor=colour, label=names[relation])
        for relation, colour in RELATIONS.items()
        if colour in shown and len(shown & set(RELATIONS.values())) > 1
    ]
    for mark in dict.fromkeys(panel.mark for panel in panels if panel.mark):
        keys.append(
            Line2D([], [], color=MARK, marker="|", markersize=11, markeredgewidth=2, ls="", label=mark)
        )
    if keys:
        drawing.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(drawing, path)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for place, bar in enumerate(panel.bars):
        entry = bar.entry
        if entry["value"] is None:
            reason = f"{DASH} {entry.get('reason', 'no value')}"
            axes.annotate(
                reason, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=SOFT
            )
            continue
        axes.barh(place, entry["value"], height=0.62, color=bar.colour, alpha=0.85)
        if entry["low"] is not None:
            axes.plot([entry["low"], entry["high"]], [place, place], color=INK, linewidth=1.4)
        cell, gutter = figure(entry), axes.get_yaxis_transform()  # beside the axes, clear of every mark
        shown = f"{cell.text} {cell.interval}"
        axes.text(1.015, place, shown, transform=gutter, va="center", fontsize=8, color=SOFT)
        if bar.reference is not None:
            axes.plot([bar.reference] * 2, [place - 0.42, place + 0.42], color=MARK, linewidth=2)
    words(axes.set_yticks, [bar.name for bar in panel.bars])
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    if panel.best:
        axes.axvline(panel.best, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0), max(high, 1.02 * panel.end))
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(panel.unit, fontsize=8.5, color=SOFT, parse_math=False)
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.6)


def sharpness_plot(path: Path, amplified: Mapping[str, Any]) -> None:
    """The shares of images by the probability of their recorded class: real (filled) and under each do()."""
    names = unrelated_discrete(amplified)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    drawing = blank(max(3.4 * columns, 5.5), 2.7 * rows + 0.6)
    spots = np.atleast_1d(drawing.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    do_places = {do: place for place, do in enumerate(amplified["matrix"])}
    handles: dict[str, Any] = {"real images": None} | {f"do({do})": None for do in do_places}
    for axes, name in zip(spots, names, strict=False):
        for do, row in amplified["matrix"].items():
            if "recorded_class" not in row[name]:
                continue
            shares = row[name]["recorded_class"]
            edges = np.linspace(0, 1, len(shares["real"]) + 1)
            if not axes.patches:
                handles["real images"] = axes.stairs(
                    100 * np.array(shares["real"]), edges, fill=True, color="#cfd5db"
                )
            place = do_places[do]
            handles[f"do({do})"] = axes.stairs(
                100 * np.array(shares["counterfactual"]),
                edges,
                color=COLOURS[place % len(COLOURS)],
                linestyle=STYLES[place // len(COLOURS) % len(STYLES)],
                linewidth=1.6,
            )
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)
        axes.set_xlim(0, 1)
        plain(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    for axes in spots[len(names) :]:
        axes.set_visible(False)
    drawing.supxlabel("probability of the recorded class", fontsize=9, color=SOFT)
    drawing.supylabel("images, %", fontsize=9, color=SOFT)
    handles = {name: handle for name, handle in handles.items() if handle is not None}
    legend = drawing.legend(
        list(handles.values()),
        [" "] * len(handles),
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=9,
    )
    for text, label in zip(legend.get_texts(), handles, strict=True):
        text.set(text=label, parse_math=False)
    save(drawing, path)


def unrelated_discrete(amplified: Mapping[str, Any]) -> list[str]:
    """Attributes that some do() should leave alone and that have probabilities."""
    return [
        name
        for name in amplified["attributes"]
        if any("recorded_class" in row[name] for row in amplified["matrix"].values())
    ]


def blank(width: float, height: float) -> Figure:
    """A figure of inches."""
    drawing = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(drawing)
    return drawing


def words(set_ticks: Any, names: Sequence[str]) -> None:
    """Ticks named by a user's words, which are never read as mathematics."""
    set_ticks(np.arange(len(names)), names, parse_math=False)


def plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=8.5)


def save(drawing: Figure, path: Path) -> None:
    with atomic_path(Path(path)) as temporary:
        drawing.savefig(temporary, format="png")
