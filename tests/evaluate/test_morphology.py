"""Thickness and intensity of strokes whose width and grey level are known, and of the real digits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cfssl.data.morphomnist import read_attributes, read_idx
from cfssl.data.pixels import to_signed
from cfssl.errors import UserError
from cfssl.evaluate.morphology import Axis, agreement, calibrate, intensity, thickness


def strokes(widths: list[float], level: int = 200, size: int = 32) -> torch.Tensor:
    """Discs swept along a horizontal line, with edges smoothed over one pixel (N, 1, size, size)."""
    y, x = np.mgrid[:size, :size]
    across = np.abs(y - (size - 1) / 2)
    beyond = np.maximum(np.abs(x - (size - 1) / 2) - 8, 0)
    away = np.hypot(across, beyond)
    drawn = [level * np.clip(width / 2 - away + 0.5, 0, 1) for width in widths]
    return torch.tensor(np.array(drawn)[:, None] / 127.5 - 1, dtype=torch.float32)


@pytest.mark.parametrize("axis", ["medial", "skeleton"])
@pytest.mark.parametrize("level", [80, 255])
def test_thickness_is_the_width_of_a_stroke_whatever_its_grey_level(axis: Axis, level: int) -> None:
    widths = [2.0, 3.0, 4.0, 6.0]
    found = thickness(strokes(widths, level), axis)
    np.testing.assert_allclose(found, widths, atol=0.45)
    assert (np.diff(found) > 0).all()
    alike = thickness(strokes(widths, 160), axis)
    np.testing.assert_allclose(found, alike, atol=0.05)


def test_the_skeleton_has_no_side_branches_to_the_corners_of_a_stroke() -> None:
    bar = torch.full((1, 1, 32, 32), -1.0)
    bar[0, 0, 12:18, 6:26] = 1.0
    assert thickness(bar, "skeleton")[0] == pytest.approx(6, abs=0.4)
    assert thickness(bar, "medial")[0] < thickness(bar, "skeleton")[0] - 0.3


def test_a_stroke_that_runs_off_the_image_ends_at_its_border() -> None:
    images = torch.full((1, 1, 32, 32), -1.0)
    images[0, 0, 14:18] = 1.0
    assert thickness(images, "skeleton")[0] == pytest.approx(4, abs=0.5)


def test_intensity_is_the_median_of_the_upper_half_of_the_range() -> None:
    image = np.array([[0, 10, 99], [100, 180, 200], [200, 190, 0]], np.float64)
    batch = torch.tensor(image[None, None] / 127.5 - 1, dtype=torch.float32)
    assert intensity(batch)[0] == pytest.approx(np.median([100, 180, 200, 200, 190]), abs=1e-3)
    np.testing.assert_allclose(intensity(strokes([4.0, 5.0], 173)), 173, atol=1e-3)


def test_a_blank_image_has_no_thickness_and_is_left_out_of_the_agreement() -> None:
    blank = torch.full((1, 1, 16, 16), -1.0)
    assert np.isnan(thickness(blank)[0])
    assert intensity(blank)[0] == 0
    assert agreement(np.array([1.0, np.nan, 3.0]), np.array([1.5, 2.0, 2.5]))["n"] == 2
    with pytest.raises(UserError, match="choose one channel"):
        thickness(torch.zeros(2, 3, 8, 8))


def test_a_calibration_undoes_a_linear_error_of_the_measure() -> None:
    recorded = np.linspace(1, 6, 50)
    measured = np.append(0.1 + 1.1 * recorded, np.nan)
    fitted = calibrate(measured, np.append(recorded, 9))
    np.testing.assert_allclose(fitted(measured[:-1]), recorded)
    report = agreement(fitted(measured), np.append(recorded, 9))
    assert report["mae"]["value"] == pytest.approx(0, abs=1e-9)
    assert report["correlation"] == pytest.approx(1)
    with pytest.raises(UserError, match="A calibration was asked for on 1 measured images"):
        calibrate(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


@pytest.mark.real_data
def test_measures_of_real_digits_agree_with_what_is_recorded(shared_data: Path) -> None:
    root, count = shared_data / "morphomnist", 600
    digits = np.pad(read_idx(root / "t10k-images-idx3-ubyte.gz")[:count], ((0, 0), (2, 2), (2, 2)))
    images, recorded = to_signed(digits[:, None]), read_attributes(root)[:count]
    grey = agreement(intensity(images), recorded["intensity"].to_numpy())
    assert grey["mae"]["value"] < 0.6
    width = recorded["thickness"].to_numpy()
    for axis, correlation, highest in (("medial", 0.97, 0.13), ("skeleton", 0.975, 0.12)):
        some = slice(None, None, 4 if axis == "medial" else 1)
        measured, truth = thickness(images[some], axis), width[some]
        raw = agreement(measured, truth)
        assert raw["correlation"] > correlation
        assert raw["mae"]["value"] < highest
        half = len(truth) // 2
        fitted = calibrate(measured[:half], truth[:half])
        assert agreement(fitted(measured[half:]), truth[half:])["mae"]["value"] < raw["mae"]["value"]
