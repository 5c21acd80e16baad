"""Curves of training. Enters: the metrics.jsonl of every arm. Leaves: a PNG, one colour an arm."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cfssl.engine.run import read_metrics
from cfssl.errors import UserError
from cfssl.files import atomic_path
from cfssl.visualise import COLOURS

STYLES = ("-", "--", ":", "-.")  # once the colours are used up
# What a monitor logs, in words, and the panels that show it.
MONITORED = {
    "probe_auc": "linear probe",
    "knn_auc": "kNN",
    "effective_rank": "effective rank",
    "feature_std": "feature std",
}
PANELS = {
    ("probe_auc", "knn_auc"): "validation AUC",
    ("effective_rank",): "effective rank",
    ("feature_std",): "feature std",
}
HOLLOW = {"knn_auc"}  # its markers
SHARE = 0.05  # of a curve's points that one smoothed point averages, at either side together


def training_curves(path: Path, runs: Mapping[str, Path]) -> None:
    """Draws the loss over the optimiser steps: per arm the logged values, faint, and their running mean.
    Below it, where an arm was monitored, what its monitor saw.

    `runs`: the metrics.jsonl of every arm. Raises `UserError` when there is no arm, a file is missing or none
    of its lines has a loss.
    """
    if not runs:
        raise UserError("There are no runs to draw curves of; give at least one metrics.jsonl.")
    monitored = {key for metrics in runs.values() for key in MONITORED if len(read_curve(metrics, key)[0])}
    panels = [keys for keys in PANELS if monitored & set(keys)]
    figure = Figure(figsize=(9, 4 + 2 * len(panels)), dpi=108, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [4.0, *[2.0] * len(panels)]
    loss, *below = np.ravel(figure.subplots(1 + len(panels), sharex=True, height_ratios=ratios))
    smooth: list[Line2D] = []
    for index, metrics in enumerate(runs.values()):
        steps, values = read_loss(metrics)
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        loss.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        smooth += loss.plot(steps, running_mean(values), color=colour, linestyle=style, linewidth=1.6)
        for axes, keys in zip(below, panels, strict=True):
            for key in keys:
                face = "white" if key in HOLLOW else colour
                axes.plot(
                    *read_curve(metrics, key),
                    color=colour,
                    linestyle=style,
                    linewidth=1.2,
                    marker="o",
                    markersize=4,
                    markerfacecolor=face,
                )
    legend = loss.legend(smooth, [" "] * len(smooth), frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), runs, strict=True):
        # Set afterwards: names are neither mathematics nor, with a leading underscore, to be left out.
        text.set(text=name, parse_math=False)
    loss.set_ylabel("loss")
    for axes, keys in zip(below, panels, strict=True):
        axes.set_ylabel(PANELS[keys])
        if len(keys) > 1:
            marks = [
                Line2D([], [], color="#595959", marker="o", markersize=4, markerfacecolor=face, linestyle="")
                for face in ("white" if key in HOLLOW else "#595959" for key in keys)
            ]
            axes.legend(marks, [MONITORED[key] for key in keys], frameon=False, fontsize=9)
    for axes in (loss, *below):
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(color="#888888", labelsize=9)
    figure.get_axes()[-1].set_xlabel("optimiser step")
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def read_loss(metrics: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the loss; raises `UserError` when there is none."""
    steps, values = read_curve(metrics, "loss")
    if not len(steps):
        known = sorted({name for line in read_metrics(Path(metrics)) for name in line}) or "nothing"
        raise UserError(
            f"{metrics} has no values of 'loss', but of {known}; give the metrics.jsonl of a pre-training."
        )
    return steps, values


def read_curve(metrics: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the lines that have `key`; what is not finite becomes NaN, a gap in the
    curve."""
    if not Path(metrics).is_file():
        raise UserError(f"{metrics} does not exist; give the metrics.jsonl of a run that has trained.")
    found = [line for line in read_metrics(Path(metrics)) if key in line]
    values = np.array([line[key] for line in found], dtype=np.float64)
    return np.array([line["step"] for line in found]), np.where(np.isfinite(values), values, math.nan)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of every value with its neighbours, equally many at either side: no lag, and the ends are
    kept. NaN are left out of the means and stay NaN."""
    reach = int(len(values) * SHARE / 2)
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    side = np.minimum(reach, np.minimum(place, place[::-1]))
    low, high = place - side, place + side + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, math.nan)
