"""Curves show what metrics.jsonl holds; smoothing neither lags nor bends a straight line."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from cfssl.errors import UserError
from cfssl.visualise import COLOURS
from cfssl.visualise.curves import MONITORED, SHARE, read_curve, running_mean, training_curves


def metrics(path: Path, values: list[float], key: str = "loss") -> Path:
    path.write_text("".join(json.dumps({"step": 10 * i, key: v}) + "\n" for i, v in enumerate(values)))
    return path


def test_running_mean_is_the_mean_of_a_symmetric_window() -> None:
    values = np.random.default_rng(0).normal(size=203)
    values[[0, 50, 51, 120, 202]] = np.nan
    reach = int(len(values) * SHARE / 2)
    assert reach > 1
    smooth = running_mean(values)
    for place, value in enumerate(values):
        side = min(reach, place, len(values) - 1 - place)
        expected = np.nan if np.isnan(value) else np.nanmean(values[place - side : place + side + 1])
        assert smooth[place] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("count", [1, 2, 39, 500])
def test_a_straight_line_is_its_own_running_mean(count: int) -> None:
    line = 3.0 - 0.01 * np.arange(count)
    assert running_mean(line) == pytest.approx(line)


def test_curves_hold_the_logged_values_without_a_line_cut_short(tmp_path: Path) -> None:
    path = metrics(tmp_path / "metrics.jsonl", [3.0, 2.5, float("nan")])
    with path.open("a") as file:
        file.write('{"step": 30, "audit": 1.0}\n{"step": 40, "lo')
    steps, values = read_curve(path, "loss")
    assert steps.tolist() == [0, 10, 20]
    assert values[:2].tolist() == [3.0, 2.5]
    assert np.isnan(values[2])


def test_every_arm_is_drawn_in_its_own_colour(tmp_path: Path) -> None:
    names = ["SimCLR", "_plain", "$unclosed_{$"]
    runs = {
        name: metrics(tmp_path / f"{index}.jsonl", [index + 1 - 0.01 * step for step in range(60)])
        for index, name in enumerate(names)
    }
    training_curves(tmp_path / "loss.png", runs)
    with Image.open(tmp_path / "loss.png") as picture:
        found = {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    for index, colour in enumerate(COLOURS):
        assert (tuple(np.rint(255 * np.array(to_rgb(colour))).astype(int)) in found) == (index < len(names))


def test_what_a_monitor_saw_is_drawn_below_the_loss_of_the_arms_that_have_one(tmp_path: Path) -> None:
    plain = metrics(tmp_path / "plain.jsonl", [2.0, 1.0])
    watched = metrics(tmp_path / "watched.jsonl", [2.0, 1.0])
    seen = {"probe_auc": 0.8, "knn_auc": 0.7, "effective_rank": 12.0, "feature_std": 0.3, "collapse": []}
    with watched.open("a") as file:
        file.write(json.dumps({"step": 10, **seen}) + "\n")
    assert [read_curve(watched, key)[1].tolist() for key in MONITORED] == [[0.8], [0.7], [12.0], [0.3]]
    heights = {}
    for name, runs in {"plain": {"a": plain}, "watched": {"a": plain, "b": watched}}.items():
        training_curves(tmp_path / f"{name}.png", runs)
        with Image.open(tmp_path / f"{name}.png") as picture:
            heights[name] = picture.height
    assert heights["watched"] == pytest.approx(2.5 * heights["plain"], abs=2)  # 4 inches, and 3 panels of 2


def test_missing_files_keys_and_runs_are_named(tmp_path: Path) -> None:
    path = metrics(tmp_path / "metrics.jsonl", [1.0], key="reconstruction")
    with pytest.raises(UserError, match="reconstruction"):
        training_curves(tmp_path / "loss.png", {"arm": path})
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        training_curves(tmp_path / "loss.png", {"arm": tmp_path / "nowhere.jsonl"})
    with pytest.raises(UserError, match="no runs"):
        training_curves(tmp_path / "loss.png", {})
    assert not (tmp_path / "loss.png").exists()
