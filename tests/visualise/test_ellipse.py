"""The enclosing ellipse holds all points and is the smallest: closed forms, an optimiser, invariance."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import ortho_group

from cfssl.seeds import numpy_generator
from cfssl.visualise.ellipse import Ellipse, enclosing_ellipse

SQUARE = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
TRIANGLE = np.array([[0.0, 0], [1, 0], [0.5, 3**0.5 / 2]])


def volume(ellipse: Ellipse) -> float:
    """In units of the unit ball's."""
    return float(np.linalg.det(ellipse.matrix) ** -0.5)


def reach(ellipse: Ellipse, points: np.ndarray) -> np.ndarray:
    """(n,) at most 1 inside."""
    return np.linalg.norm((points - ellipse.centre) @ ellipse.root, axis=1)


@pytest.mark.parametrize(
    ("points", "matrix"),
    [
        (TRIANGLE, 3 * np.eye(2)),  # the circumscribed circle, radius 1 / sqrt(3)
        (SQUARE, np.eye(2) / 2),
        (SQUARE * [3, 0.5], np.diag([1 / 18, 2])),
        (np.vstack([np.eye(3), -np.eye(3)]), np.eye(3)),
    ],
)
def test_known_smallest_ellipses(points: np.ndarray, matrix: np.ndarray) -> None:
    moved = points + 7
    ellipse = enclosing_ellipse(np.vstack([moved, moved.mean(axis=0)]), 1e-9)
    np.testing.assert_allclose(ellipse.centre, moved.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(ellipse.matrix, matrix, rtol=1e-5, atol=1e-5)


def cloud(kind: str) -> np.ndarray:
    rng = numpy_generator("ellipse", kind)
    points = rng.standard_normal((300, 2)) @ [[3, 0], [1.5, 0.4]]
    if kind == "clusters":
        points = 0.2 * points + rng.standard_normal((3, 2))[rng.integers(3, size=300)] * 4
    if kind == "outlier":
        points[0] = [40, -30]
    return points


@pytest.mark.parametrize("kind", ["blob", "clusters", "outlier"])
def test_no_smaller_ellipse_is_found_by_a_general_optimiser(kind: str) -> None:
    points = cloud(kind)

    def unpacked(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|root (p - centre)| <= 1 with a triangular root."""
        return np.array([[np.exp(x[0]), 0], [x[2], np.exp(x[1])]]), x[3:]

    def slack(x: np.ndarray) -> np.ndarray:
        root, centre = unpacked(x)
        return 1 - (((points - centre) @ root.T) ** 2).sum(axis=1)

    middle, width = points.mean(axis=0), np.abs(points - points.mean(axis=0)).max()
    found = minimize(
        lambda x: -x[0] - x[1],  # log volume
        np.array([-np.log(2 * width), -np.log(2 * width), 0, *middle]),
        constraints={"type": "ineq", "fun": slack},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    ellipse = enclosing_ellipse(points)
    assert reach(ellipse, points).max() <= 1 + 1e-9
    assert volume(ellipse) == pytest.approx(np.exp(found.fun), rel=1e-4)


def test_the_ellipse_moves_with_its_points() -> None:
    """John's ellipsoid is equivariant under every affine map."""
    points, rng = cloud("blob"), numpy_generator("map")
    map_, shift = ortho_group.rvs(2, random_state=1) @ np.diag([5, 0.1]), rng.standard_normal(2)
    before, after = enclosing_ellipse(points, 1e-9), enclosing_ellipse(points @ map_.T + shift, 1e-9)
    back = np.linalg.inv(map_)
    np.testing.assert_allclose(after.matrix, back.T @ before.matrix @ back, rtol=1e-5)
    np.testing.assert_allclose(after.centre, map_ @ before.centre + shift, rtol=1e-5)


def test_points_without_extent_give_a_flat_ellipse_and_no_nan() -> None:
    line = np.array([[1.0, 2], [2, 3], [3, 4]])
    ellipse = enclosing_ellipse(line)
    np.testing.assert_allclose(reach(ellipse, line), [1, 0, 1], atol=1e-6)
    point = enclosing_ellipse(np.full((5, 2), 3.0))
    assert (point.matrix == 0).all()
    assert point.centre.tolist() == [3, 3]
