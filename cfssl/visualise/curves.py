"""Curves of training. Enters: the metrics.jsonl of every arm. Leaves: a PNG, one line an arm."""

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
SHARE = 0.05  # of a curve's points that one smoothed point averages, at either side together


def loss_curves(path: Path, runs: Mapping[str, Path]) -> None:
    """Draws the loss over the optimiser steps: per arm the logged values, faint, and their running mean.

    `runs`: the metrics.jsonl of every arm. Raises `UserError` when there is no arm, a file is missing or none
    of its lines has a loss.
    """
    if not runs:
        raise UserError("There are no runs to draw curves of; give at least one metrics.jsonl.")
    figure = Figure(figsize=(9, 4), dpi=108, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth: list[Line2D] = []
    for index, metrics in enumerate(runs.values()):
        steps, values = read_curve(metrics)
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        smooth += axes.plot(steps, running_mean(values), color=colour, linestyle=style, linewidth=1.6)
    legend = axes.legend(smooth, [" "] * len(smooth), frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), runs, strict=True):
        # Set afterwards: names are neither mathematics nor, with a leading underscore, to be left out.
        text.set(text=name, parse_math=False)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(color="#888888", labelsize=9)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def read_curve(metrics: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the lines that have a loss; what is not finite becomes NaN, a gap in the
    curve."""
    if not Path(metrics).is_file():
        raise UserError(f"{metrics} does not exist; give the metrics.jsonl of a run that has trained.")
    lines = read_metrics(Path(metrics))
    found = [line for line in lines if "loss" in line]
    if not found:
        known = sorted({name for line in lines for name in line}) or "nothing"
        raise UserError(
            f"{metrics} has no values of 'loss', but of {known}; give the metrics.jsonl of a pre-training."
        )
    values = np.array([line["loss"] for line in found], dtype=np.float64)
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
