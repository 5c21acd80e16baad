"""Geometry: matched points agree, matrices equal their definition, frequencies are what the settings say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cfssl.data.geometry import (
    GeometrySettings,
    grid,
    sample_affines,
    to_source,
    to_view,
    valid_mask,
    warp,
    warp_labels,
)
from cfssl.seeds import numpy_generator

STRONG = GeometrySettings(crop_scale=(0.2, 0.9), rotation=30, horizontal_flip=0.5, vertical_flip=0.5)


def test_warp_equals_torch_grid_sample() -> None:
    image = numpy_generator(1).random((32, 48, 1), dtype=np.float32)
    for affine in sample_affines(numpy_generator(2), 10, STRONG, 48 / 32):
        theta = torch.from_numpy(affine)[None].float()
        sampling = F.affine_grid(theta, [1, 1, 32, 48], align_corners=False)
        expected = F.grid_sample(
            torch.from_numpy(image).permute(2, 0, 1)[None], sampling, align_corners=False
        )[0, 0].numpy()
        # torch and OpenCV fill the last half pixel of the border alike only up to interpolation with zero
        np.testing.assert_allclose(warp(image, affine, (32, 48)), expected, atol=2e-4)


def test_valid_marks_exactly_the_points_between_the_outermost_pixel_centres() -> None:
    affines = sample_affines(numpy_generator(3), 30, STRONG, 40 / 24)
    x, y = grid((20, 28))
    points = np.stack(np.meshgrid(x, y), axis=2).reshape(1, -1, 2)
    beyond = (np.abs(to_source(affines, points)) - (1 - 1 / np.array([40, 24]))).max(-1).reshape(30, 20, 28)
    found = valid_mask(affines, (20, 28), (24, 40))
    clear = np.abs(beyond) > 1e-5  # float32 may put the others on either side
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(found[clear], (beyond <= 0)[clear])


@pytest.mark.parametrize("rotation", [0, 30])
@pytest.mark.parametrize("view", [16, 48])
def test_the_filling_darkens_no_valid_pixel_and_no_pixel_is_invalid_without_it(
    rotation: int, view: int
) -> None:
    settings = GeometrySettings(crop_scale=(0.5, 1.0), rotation=rotation)
    affines = sample_affines(numpy_generator(8), 40, settings, 40 / 24)
    white = np.ones((24, 40), dtype=np.float32)
    seen = np.stack([warp(white, affine, (view, view)) for affine in affines])
    valid = valid_mask(affines, (view, view), (24, 40))
    assert seen[valid].min() > 1 - 1e-4
    assert seen[~valid].max(initial=0) < 1
    assert valid.mean() > 0.5
    assert valid.all() == (rotation == 0 and view == 16)


def test_the_whole_image_is_valid_at_its_own_size() -> None:
    whole = GeometrySettings(crop_scale=(1, 1), horizontal_flip=0.5, vertical_flip=0.5)
    affines = sample_affines(numpy_generator(9), 10, whole, 224 / 200)
    assert valid_mask(affines, (200, 224), (200, 224)).all()


@given(st.integers(0, 2**32), st.floats(0.5, 2))
def test_without_rotation_every_crop_lies_inside_the_source(seed: int, aspect: float) -> None:
    affines = sample_affines(numpy_generator(seed), 8, GeometrySettings(crop_scale=(0.1, 1.0)), aspect)
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    assert np.abs(to_source(affines, corners)).max() <= 1 + 1e-12


@given(st.integers(0, 2**32), st.floats(0.5, 2))
def test_to_view_inverts_to_source(seed: int, aspect: float) -> None:
    affines = sample_affines(numpy_generator(seed), 4, STRONG, aspect)
    points = numpy_generator(seed, "points").uniform(-1, 1, (4, 7, 2))
    np.testing.assert_allclose(to_view(affines, to_source(affines, points)), points, atol=1e-12)


def test_rotation_is_rigid_in_pixels_of_a_wide_image() -> None:
    settings = GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1), rotation=45, horizontal_flip=0)
    aspect = 3.0
    pixel_of = np.diag([aspect, 1.0])
    for affine in sample_affines(numpy_generator(4), 20, settings, aspect):
        rotation = pixel_of @ affine[:, :2] @ np.linalg.inv(pixel_of)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(2), atol=1e-12)


def test_flips_and_areas_have_the_stated_frequencies() -> None:
    settings = GeometrySettings(
        crop_scale=(0.25, 0.5), crop_ratio=(1, 1), horizontal_flip=0.3, vertical_flip=0.1
    )
    affines = sample_affines(numpy_generator(5), 20_000, settings, 1.0)
    assert (affines[:, 0, 0] < 0).mean() == pytest.approx(0.3, abs=0.012)
    assert (affines[:, 1, 1] < 0).mean() == pytest.approx(0.1, abs=0.012)
    area = areas(affines)
    assert area.min() >= 0.25
    assert area.max() <= 0.5
    assert area.mean() == pytest.approx(0.375, abs=0.003)


def areas(affines: np.ndarray) -> np.ndarray:
    """Share of the source that each view shows."""
    return np.abs(np.linalg.det(affines[:, :, :2]))


@pytest.mark.parametrize("area", [0.3, 0.8, 1.0])
def test_the_area_of_a_crop_is_exact_whatever_ratios_fit(area: float) -> None:
    affines = sample_affines(numpy_generator(6), 1000, GeometrySettings(crop_scale=(area, area)), 0.7)
    np.testing.assert_allclose(areas(affines), area, rtol=1e-12)


def test_the_default_ratios_are_log_uniform_over_what_fits_at_the_area() -> None:
    def log_ratios(area: float, **ratio: tuple[float, float]) -> np.ndarray:
        settings = GeometrySettings(crop_scale=(area, area), **ratio)
        affines = sample_affines(numpy_generator(7), 20_000, settings, 1.0)
        return np.log(np.abs(affines[:, 0, 0] / affines[:, 1, 1]))

    for area, limit in [(0.3, 4 / 3), (0.9, 1 / 0.9)]:
        quantiles = np.quantile(log_ratios(area) / np.log(limit), [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quantiles, [-1, -0.5, 0, 0.5, 1], atol=0.03)
    # a ratio that fits nowhere gives way to the nearest that does
    np.testing.assert_allclose(log_ratios(0.8, crop_ratio=(2, 3)), -np.log(0.8), rtol=1e-9)


def test_labels_are_those_of_the_source_pixel_that_a_view_pixel_falls_into() -> None:
    rng = numpy_generator(5)
    size, view = (40, 28), (24, 32)
    masks = rng.integers(0, 2, (3, *size)).astype(np.uint8)
    wild = GeometrySettings(crop_scale=(0.05, 1.0), rotation=90.0, vertical_flip=0.5)
    for affine in sample_affines(rng, 30, wild, size[1] / size[0]):
        found = warp_labels(masks, affine, view)
        x, y = grid(view)
        points = np.stack(np.broadcast_arrays(x, y[:, None]), axis=-1).reshape(-1, 2)
        source = to_source(affine, points)
        for point, values in zip(source, found.reshape(3, -1).T, strict=True):
            column, row = ((point[axis] + 1) / 2 * side for axis, side in ((0, size[1]), (1, size[0])))
            if min(abs(column - round(column)), abs(row - round(row))) < 1e-9:
                continue  # on the border of two pixels
            inside = 0 <= column < size[1] and 0 <= row < size[0]
            expected = masks[:, int(row), int(column)] if inside else np.zeros(3)
            np.testing.assert_array_equal(values, expected)


def test_labels_of_the_whole_image_are_the_masks_themselves() -> None:
    masks = numpy_generator(6).integers(0, 256, (2, 30, 20)).astype(np.uint8)
    np.testing.assert_array_equal(warp_labels(masks, np.eye(2, 3), (30, 20)), masks)
    flipped = np.array([[-1.0, 0, 0], [0, 1.0, 0]])
    np.testing.assert_array_equal(warp_labels(masks, flipped, (30, 20)), masks[..., ::-1])
