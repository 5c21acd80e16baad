"""Views: tokens are interpolated as embeddings, matched pixels show one point, similarities are cosines."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chromap_toys import SIZE, some_views
from scipy.interpolate import RegularGridInterpolator

from cfssl.data.geometry import GeometrySettings, grid, sample_affines, to_source, to_view, valid_mask
from cfssl.errors import UserError
from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap import ChromapSettings, colorize, coordinates, fit
from cfssl.visualise.chromap_colour import to_oklab
from cfssl.visualise.chromap_consistency import consistency, overall
from cfssl.visualise.chromap_views import Views, matched, rows_of, similarity_map, unit_maps

PLAIN = ChromapSettings(foreground="all")


def test_tokens_are_interpolated_between_their_centres_and_renormalised() -> None:
    tokens = numpy_generator("tokens").standard_normal((1, 5, 3, 4)).astype(np.float32)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    found = unit_maps(tokens, (24, 32))
    y, x = grid((3, 4))[1], grid((3, 4))[0]
    fine_x, fine_y = grid((24, 32))
    inside = np.stack(np.meshgrid(fine_y.clip(y[0], y[-1]), fine_x.clip(x[0], x[-1]), indexing="ij"), -1)
    expected = np.stack([RegularGridInterpolator((y, x), plane)(inside) for plane in unit[0]])
    expected /= np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def warped_views() -> Views:
    """Views of one source whose first two channels are its x and y (exact under bilinear interpolation), with
    crops, rotations and flips."""
    settings = GeometrySettings(crop_scale=(0.4, 1.0), rotation=20, vertical_flip=0.5)
    affines = sample_affines(numpy_generator("affines"), 4, settings, SIZE[1] / SIZE[0])
    x, y = grid(SIZE)
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    source = np.stack([to_source(affine, points).T.reshape(2, *SIZE) for affine in affines])
    embeddings = np.concatenate([source, np.full((4, 1, *SIZE), 2.0)], axis=1)
    valid = valid_mask(affines, SIZE, SIZE)
    valid[1, 3, 5] = False
    return Views(embeddings, np.full((4, *SIZE), 0.5), affines=affines, valid=valid)


def test_matched_pixels_show_the_same_point_of_the_source() -> None:
    views = warped_views()
    for view in range(1, 4):
        places, partners = matched(views, view)
        assert len(places) > 16
        assert views.is_valid[0].ravel()[places].all()
        own = rows_of(views.unit[:1])[places]
        # Interpolated unit vectors bend by a hundredth between neighbours of different directions.
        here, there = own[:, :2] / own[:, 2:], partners[:, :2] / partners[:, 2:]
        assert np.abs(here - there).max() < 5e-3


def test_no_pixel_is_matched_with_one_that_is_invalid_or_outside() -> None:
    views = warped_views()
    x, y = grid(SIZE)
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    for view in range(1, 4):
        there = to_view(views.affines[view], to_source(views.affines[0], points))  # type: ignore[index]
        column = ((there[:, 0] + 1) * SIZE[1] - 1) / 2
        row = ((there[:, 1] + 1) * SIZE[0] - 1) / 2
        expected = []
        for place in range(len(points)):
            if not views.is_valid[0].ravel()[place]:
                continue
            corners = [
                (r, c)
                for r in {int(np.floor(row[place])), int(np.ceil(row[place]))}
                for c in {int(np.floor(column[place])), int(np.ceil(column[place]))}
            ]
            inside = all(0 <= r < SIZE[0] and 0 <= c < SIZE[1] for r, c in corners)
            if inside and all(views.is_valid[view][corner] for corner in corners):
                expected.append(place)
        assert matched(views, view)[0].tolist() == expected


def test_views_without_affines_match_pixel_by_pixel() -> None:
    views = some_views()
    places, partners = matched(views, 2)
    assert places.tolist() == list(range(SIZE[0] * SIZE[1]))
    np.testing.assert_array_equal(partners, rows_of(views.unit[2:]))


def test_identity_affines_match_the_same_pixels() -> None:
    views = some_views()
    with_affines = replace(views, affines=np.tile(np.eye(2, 3), (3, 1, 1)))
    (places, partners), (others, sampled) = matched(views, 1), matched(with_affines, 1)
    assert places.tolist() == others.tolist()
    np.testing.assert_allclose(sampled, partners, atol=1e-4)


def test_similarities_are_cosines_of_all_images() -> None:
    images = [some_views(0), some_views(1)]
    maps = similarity_map(images, point=(7, 4), view=1, image=1)
    query = images[1].embeddings[1, :, 4, 7].astype(np.float64)
    for views, found in zip(images, maps, strict=True):
        assert found.shape == views.images.shape
        dots = np.einsum("vchw,c->vhw", views.embeddings, query)
        expected = dots / np.linalg.norm(views.embeddings, axis=1) / np.linalg.norm(query)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert maps[1][1, 4, 7] == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="24"):
        similarity_map(images, (24, 0))


def test_consistency_is_the_mean_over_pixels_and_classes() -> None:
    masks = np.zeros((3, *SIZE), int)
    masks[:, 5:9, 3:20] = 2
    masks[:, 0, :3] = 1  # too few pixels
    views = some_views(masks=masks)
    state = fit([views], PLAIN)
    entries = consistency(state, views, {2: "lung"})
    for view, entry in enumerate(entries, 1):
        own, partners = rows_of(views.unit[:1]), rows_of(views.unit[view : view + 1])
        lab = [to_oklab(colorize(state, coordinates(state, rows))) for rows in (own, partners)]
        cosine, colour = (own * partners).sum(axis=1), np.linalg.norm(lab[0] - lab[1], axis=1)
        assert entry["pixels"] == len(own)
        assert entry["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
        assert entry["colour"] == pytest.approx(colour.mean(), abs=1e-5)
        lung = masks[0].ravel() == 2
        assert entry["classes"]["lung"]["cosine"] == pytest.approx(cosine[lung].mean(), abs=1e-5)
        assert entry["classes"]["lung"]["pixels"] == lung.sum()
        assert entry["classes"]["class 1"] | {"pixels": 0} == dict.fromkeys(
            ("cosine", "cosine_shuffled", "colour", "colour_shuffled"), None
        ) | {"pixels": 0}
    assert overall(entries)["cosine"] == pytest.approx(np.mean([entry["cosine"] for entry in entries]))


def test_shuffled_partners_are_as_alike_as_any_two_pixels() -> None:
    views = some_views()
    entry = consistency(fit([views], PLAIN), views)[0]
    every_pair = rows_of(views.unit[:1]).mean(axis=0) @ rows_of(views.unit[1:2]).mean(axis=0)
    spread = 3 / np.sqrt(SIZE[0] * SIZE[1])
    assert entry["cosine_shuffled"] == pytest.approx(every_pair, abs=spread)
    assert entry["cosine"] > entry["cosine_shuffled"] + 0.3
    assert entry["colour"] < entry["colour_shuffled"] - 0.05


def test_identical_views_are_perfectly_consistent() -> None:
    one = some_views()
    same = Views(np.repeat(one.embeddings[:1], 2, axis=0), np.repeat(one.images[:1], 2, axis=0))
    entry = consistency(fit([same], PLAIN), same)[0]
    assert entry["cosine"] == pytest.approx(1, abs=1e-6)
    assert entry["colour"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((20, 24))}, "grey images"),
        ({"embeddings": np.zeros((2, 4, 5, 5))}, "embeddings"),
        ({"embeddings": np.full((3, 4, 5, 5), np.nan)}, "finite"),
        ({"masks": np.zeros((3, 4, 4), int)}, "masks"),
        ({"affines": np.zeros((2, 2, 3))}, "affines"),
        ({"images": np.full((3, *SIZE), 2.0)}, "grey levels"),
        ({"names": ("a",)}, "names"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(some_views(), **change)
