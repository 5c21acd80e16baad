"""Points of views: exactly matched, inside of what both see, drawn as stated."""

import numpy as np
import pytest
import torch

from cfssl.data.geometry import GeometrySettings, sample_affines, to_source, to_view, valid_mask, warp
from cfssl.objectives.points import LEAST, draw, item_generators, matched_points, pixel_centres, view_points
from cfssl.seeds import numpy_generator

SIZE, SOURCE = (40, 32), (64, 48)
WILD = GeometrySettings(
    crop_scale=(0.1, 1.0), rotation=60.0, horizontal_flip=0.5, vertical_flip=0.5, crop_ratio=(0.5, 2.0)
)


def ramps(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 2): the normalised x and y of every pixel."""
    return pixel_centres(size, torch.device("cpu")).reshape(*size, 2).numpy().astype(np.float32)


def drawn(count: int, views: int = 2, settings: GeometrySettings = WILD) -> tuple[torch.Tensor, torch.Tensor]:
    """affine (count, views, 2, 3) and valid (count, views, H, W)."""
    affines = sample_affines(numpy_generator(3), count * views, settings, SOURCE[1] / SOURCE[0])
    valid = valid_mask(affines, SIZE, SOURCE)
    return (
        torch.from_numpy(affines.astype(np.float32)).unflatten(0, (count, views)),
        torch.from_numpy(valid).unflatten(0, (count, views)),
    )


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return item_generators(range(count), seed)


def sampled(images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(B, n, C) of images (B, C, H, W), bilinear."""
    found = torch.nn.functional.grid_sample(images, points[:, :, None], align_corners=False)
    return found[..., 0].mT


def test_an_image_of_its_own_coordinates_has_the_same_values_at_matched_points() -> None:
    affine, valid = drawn(64)
    pair = matched_points(affine, valid, 200, generators(64))
    source = ramps(SOURCE)
    warped = np.stack([[warp(source, a.double().numpy(), SIZE) for a in views] for views in affine])
    images = torch.from_numpy(warped).permute(0, 1, 4, 2, 3)  # (B, 2, xy, H, W)
    assert pair.is_known.sum() > 40
    first, second = (
        sampled(images[:, view], points)[pair.is_known]
        for view, points in enumerate((pair.first, pair.second))
    )
    # of a side of 2; OpenCV interpolates in 1/32 pixels
    drift = (first - second).abs().amax(-1) / 2
    assert drift.max() < 1e-3
    assert (first - pair.source[pair.is_known]).abs().max() / 2 < 1e-3
    assert (second - pair.source[pair.is_known]).abs().max() / 2 < 1e-3


def test_matched_points_are_those_of_the_views_own_maps() -> None:
    affine, valid = drawn(16)
    pair = matched_points(affine, valid, 100, generators(16, 1))
    maps = affine.double().numpy()
    np.testing.assert_allclose(to_source(maps[:, 0], pair.first.double().numpy()), pair.source, atol=1e-6)
    np.testing.assert_allclose(to_view(maps[:, 1], pair.source.double().numpy()), pair.second, atol=2e-6)


def test_points_lie_where_both_views_show_the_source_alone() -> None:
    affine, valid = drawn(64)
    pair = matched_points(affine, valid, 300, generators(64, 2))
    for view, points in enumerate((pair.first, pair.second)):
        x, y = (((points[..., axis] + 1) * side - 1) / 2 for axis, side in ((0, SIZE[1]), (1, SIZE[0])))
        assert x[pair.is_known].min() > -1e-3
        assert x[pair.is_known].max() < SIZE[1] - 1 + 1e-3
        for column in (x.floor(), x.ceil()):
            for row in (y.floor(), y.ceil()):
                # a neighbour that the point does not touch has no part in its value
                touches = ((x - column).abs() < 1 - 2e-3) & ((y - row).abs() < 1 - 2e-3)
                place = row.clamp(0, SIZE[0] - 1) * SIZE[1] + column.clamp(0, SIZE[1] - 1)
                found = valid[:, view].flatten(1).gather(1, place.long())
                assert found[pair.is_known[:, None] & touches].all()


def test_views_without_overlap_are_not_known() -> None:
    corner = torch.tensor([[0.2, 0, -0.8], [0, 0.2, -0.8]])
    other = torch.tensor([[0.2, 0, 0.8], [0, 0.2, 0.8]])
    affine = torch.stack([torch.stack([corner, corner]), torch.stack([corner, other])])
    pair = matched_points(affine, torch.ones(2, 2, 8, 8, dtype=torch.bool), 20, generators(2))
    assert pair.is_known.tolist() == [True, False]
    assert torch.equal(pair.first[0], pair.second[0]) or torch.allclose(
        pair.first[0], pair.second[0], atol=1e-6
    )
    assert all(torch.isfinite(points).all() for points in pair[:3])


@pytest.mark.parametrize(("open_places", "is_known"), [(LEAST - 1, False), (LEAST, True)])
def test_an_item_with_next_to_no_overlap_has_no_weight(open_places: int, is_known: bool) -> None:
    admissible = torch.zeros(1, 1, 100, dtype=torch.bool)
    admissible[0, 0, :open_places] = True
    assert draw(admissible, 8, generators(1))[1].tolist() == [[is_known]]


def test_no_pixel_is_drawn_twice_before_all_are_drawn_once() -> None:
    admissible = torch.zeros(3, 60, dtype=torch.bool)
    admissible[0, ::2], admissible[1, 5:25], admissible[2] = True, True, True
    (places,), _ = draw(admissible[None], 50, generators(1))
    for item, count in enumerate((30, 20, 60)):
        assert admissible[item][places[item]].all()
        often = np.bincount(places[item], minlength=60)[admissible[item].numpy()]
        assert set(often) <= {50 // count, -(-50 // count)}


def test_every_admissible_pixel_is_drawn_as_often() -> None:
    admissible = torch.arange(40) % 4 > 0
    places, _ = draw(admissible.expand(10_000, 2, -1), 6, generators(10_000))
    shares = np.bincount(places.flatten(), minlength=40) / 20_000
    np.testing.assert_allclose(shares, np.where(admissible, 6 / 30, 0), atol=0.01)


def test_view_points_are_valid_pixels_of_their_views() -> None:
    affine, valid = drawn(8, views=3)
    points, source, is_known = view_points(affine, valid, 50, generators(8))
    column, row = (((points[..., axis] + 1) * side - 1) / 2 for axis, side in ((0, SIZE[1]), (1, SIZE[0])))
    np.testing.assert_allclose(column, column.round(), atol=1e-4)
    place = row.round().long() * SIZE[1] + column.round().long()
    assert valid.flatten(2).gather(2, place)[is_known].all()
    maps = affine.double().numpy()
    np.testing.assert_allclose(to_source(maps, points.double().numpy()), source, atol=1e-6)


def test_the_same_generators_draw_the_same_points() -> None:
    affine, valid = drawn(4)
    first, second, other = (matched_points(affine, valid, 9, generators(4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first.first, second.first)
    assert not torch.equal(first.first, other.first)


def test_points_of_an_item_are_the_same_whichever_items_lie_beside_it() -> None:
    affine, valid = drawn(6)
    whole, part = (
        matched_points(affine[items], valid[items], 9, item_generators(range(6)[items], 0))
        for items in (slice(6), slice(2, 4))
    )
    assert all(torch.equal(found, expected[2:4]) for found, expected in zip(part, whole, strict=True))
    views, _, _ = view_points(affine, valid, 9, generators(6))
    assert torch.equal(view_points(affine[4:], valid[4:], 9, item_generators((4, 5), 0))[0], views[4:])
