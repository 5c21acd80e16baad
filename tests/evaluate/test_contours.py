"""Overlap and distance of contours equal a search over all pixels, and MONAI's metrics."""

import math

import numpy as np
import pytest
import torch

from cfssl.evaluate.contours import MEASURES, contour_distances, diagonal, dice, measured
from cfssl.seeds import numpy_generator

SIZE = (9, 7)


def masks(name: str, count: int = 12) -> np.ndarray:
    """(count, 2, *SIZE) bool, blobs that touch the edges now and then, none empty."""
    rng = numpy_generator("contours", name)
    y, x = np.indices(SIZE)
    found = np.zeros((count, 2, *SIZE), dtype=bool)
    for place in np.ndindex(count, 2):
        for _ in range(2):
            centre, radius = rng.uniform(0, SIZE), rng.uniform(1, 3.5)
            found[place] |= np.hypot(y - centre[0], x - centre[1]) < radius
    return found


def contour(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of the mask with a neighbour outside of it, found one by one."""
    padded = np.pad(mask, 1)
    return [
        (y, x)
        for y, x in np.argwhere(mask).tolist()
        if not all(padded[y + 1 + dy, x + 1 + dx] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))
    ]


def searched(one: np.ndarray, other: np.ndarray) -> list[float]:
    """From each contour pixel of one to the nearest of the other."""
    return sorted(min(math.dist(here, there) for there in contour(other)) for here in contour(one))


def test_distances_are_those_of_a_search_over_all_contour_pixels() -> None:
    for one, other in zip(masks("a")[:, 0], masks("b")[:, 0], strict=True):
        there, back = contour_distances(one, other)
        np.testing.assert_allclose(np.sort(there), searched(one, other))
        np.testing.assert_allclose(np.sort(back), searched(other, one))


def test_every_measure_is_that_of_monai() -> None:
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    found, true = masks("found"), masks("true")
    pair = [torch.from_numpy(of).float() for of in (found, true)]
    expected = {
        "dice": compute_dice(*pair, include_background=True),
        "hd95": compute_hausdorff_distance(*pair, include_background=True, percentile=95),
        "asd": compute_average_surface_distance(*pair, include_background=True, symmetric=True),
        "surface_dice": compute_surface_dice(*pair, [1.5, 1.5], include_background=True),
    }
    figures = measured(found, true, tolerance=1.5)
    assert tuple(figures) == MEASURES
    for name, of in figures.items():
        np.testing.assert_allclose(of, expected[name], rtol=1e-5, err_msg=name)


def test_dice_counts_pixels() -> None:
    found, true = masks("found"), masks("true")
    for place in np.ndindex(len(found), 2):
        here, there = (set(map(tuple, np.argwhere(of[place]).tolist())) for of in (found, true))
        assert dice(found, true)[place] == 2 * len(here & there) / (len(here) + len(there))


@pytest.mark.parametrize(
    ("found", "true", "expected"),
    [
        (False, False, {"dice": 1, "hd95": 0, "asd": 0, "surface_dice": 1}),
        (True, False, {"dice": 0, "hd95": 10, "asd": 10, "surface_dice": 0}),
        (False, True, {"dice": 0, "hd95": 10, "asd": 10, "surface_dice": 0}),
        (True, True, {"dice": 1, "hd95": 0, "asd": 0, "surface_dice": 1}),
    ],
)
def test_empty_masks_agree_with_each_other_and_are_as_far_as_possible_from_others(
    found: bool, true: bool, expected: dict[str, float]
) -> None:
    of = [np.zeros((1, 1, 9, 7), dtype=bool) for _ in range(2)]  # of 6 x 8 steps, 10 from corner to corner
    for mask, is_there in zip(of, (found, true), strict=True):
        mask[..., 2:5, 1:4] = is_there
    assert {name: float(values[0, 0]) for name, values in measured(*of, tolerance=1).items()} == expected


def test_no_two_masks_are_farther_apart_than_the_diagonal() -> None:
    corners = np.zeros((2, 1, 1, *SIZE), dtype=bool)
    corners[0, ..., 0, 0] = corners[1, ..., -1, -1] = True
    assert measured(*corners, tolerance=1)["hd95"].item() == pytest.approx(diagonal(SIZE)) == 10
