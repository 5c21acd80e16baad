"""CHRO-maps: colours are stable, robust and readable, and leave the image's lightness alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromap_toys import CHANNELS, SIZE, some_views
from scipy.stats import ortho_group
from sklearn.decomposition import PCA

from cfssl.errors import UserError
from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap import (
    BACKGROUND,
    PRESETS,
    ChromapSettings,
    State,
    align,
    colorize,
    coordinates,
    fit,
    is_foreground,
    load,
    overlay,
    save,
    transform,
)
from cfssl.visualise.chromap_colour import fitted_chroma, grey, lightness, to_oklab
from cfssl.visualise.chromap_reduce import neighbour_places, principal, sample_pixels
from cfssl.visualise.chromap_views import Views, rows_of
from cfssl.visualise.ellipse import enclosing_ellipse

PLAIN = ChromapSettings(foreground="all")
ARRAYS = ("mean", "components", "explained", "centre", "root", "rotation", "direction", "fitted", "places")


def colours_of(state: State, views: Views) -> np.ndarray:
    return colorize(state, transform(state, views.embeddings))


def chroma(colours: np.ndarray) -> np.ndarray:
    return np.linalg.norm(to_oklab(colours)[..., 1:], axis=-1)


def test_the_coordinates_are_whitened_principal_components() -> None:
    views = some_views()
    state = fit([views], replace(PLAIN, sample_per_image=None))
    rows = rows_of(views.unit).astype(np.float64)
    reference = PCA(2, whiten=True, svd_solver="full").fit(rows)
    scores = reference.transform(rows) * np.sqrt(len(rows) / (len(rows) - 1))
    end = np.quantile(np.linalg.norm(scores, axis=1), 0.98)
    found = coordinates(state, rows_of(views.unit))
    signs = np.sign((found * scores).sum(axis=0))
    np.testing.assert_allclose(found, signs * scores / end, atol=1e-4)
    np.testing.assert_allclose(state.explained, reference.explained_variance_ratio_, rtol=1e-6)


def test_the_loading_of_largest_magnitude_is_positive() -> None:
    components = principal(rows_of(some_views().unit).astype(np.float64), 3).components
    assert (components[range(3), np.abs(components).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("colours", ["oklch", "rgb3", "hsv"])
def test_a_rotated_and_mirrored_embedding_has_the_same_colours_once_aligned(colours: str) -> None:
    views, settings = some_views(), replace(PLAIN, colours=colours)  # type: ignore[arg-type]
    turn = ortho_group.rvs(CHANNELS, random_state=3).astype(np.float32)
    turned = replace(views, embeddings=np.einsum("dc,vchw->vdhw", turn, views.embeddings))
    # The draw of pixels depends on the embeddings; all of them are few enough here.
    state, other = fit([views], settings), fit([turned], settings)
    here, there = transform(state, views.embeddings), transform(other, turned.embeddings)
    aligned = align(other, there, here)
    np.testing.assert_allclose(colours_of(aligned, turned), colours_of(state, views), atol=2e-3)
    np.testing.assert_allclose(aligned.rotation @ aligned.rotation.T, np.eye(settings.dimensions), atol=1e-9)


def test_alignment_undoes_any_rotation_of_the_coordinates() -> None:
    views = some_views()
    state = fit([views], PLAIN)
    here = transform(state, views.embeddings)
    quarter = replace(state, rotation=np.array([[0.0, 1], [1, 0]]))  # a mirror image
    back = align(quarter, transform(quarter, views.embeddings), here)
    np.testing.assert_allclose(transform(back, views.embeddings), here, atol=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_pixels(tmp_path: Path) -> None:
    views, settings = some_views(), replace(PLAIN, sample_per_image=100)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save(fit([some_views()], replace(settings, seed=seed)), tmp_path / name)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != third
    found = load(tmp_path / "a")
    state = fit([views], settings)
    assert found.name == state.name
    assert found.name != load(tmp_path / "c").name
    assert (colours_of(found, views) == colours_of(state, views)).all()


def test_the_order_of_images_changes_nothing_but_rounding() -> None:
    images = [some_views(seed) for seed in range(3)]
    settings = replace(PLAIN, sample_per_image=100)
    state, other = fit(images, settings), fit(images[::-1], settings)
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(other, name), getattr(state, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("colours", ["oklch", "rgb3"])
@pytest.mark.parametrize("foreground", ["all", "otsu"])
@pytest.mark.parametrize("scale", ["percentile", "ellipse"])
def test_a_constant_embedding_is_grey(colours: str, foreground: str, scale: str) -> None:
    views = some_views(embeddings=np.ones((3, CHANNELS, *SIZE), np.float32))
    settings = ChromapSettings(colours=colours, foreground=foreground, scale=scale)  # type: ignore[arg-type]
    shown = overlay(fit([views], settings), transform(fit([views], settings), views.embeddings), views.images)
    np.testing.assert_allclose(shown, np.repeat(views.images[..., None], 3, axis=-1), atol=1e-3)


def test_one_outlier_moves_the_median_chroma_by_less_than_a_percent() -> None:
    views = some_views()
    embeddings = views.embeddings.copy()
    embeddings[0, :, 5, 5] = -1e4 * embeddings[0, :, 5, 5] + 1e4
    spoilt = replace(views, embeddings=embeddings)
    before, after = (np.median(chroma(colours_of(fit([v], PLAIN), v))) for v in (views, spoilt))
    assert after == pytest.approx(before, rel=0.01)


def test_identical_views_have_identical_colours() -> None:
    one = some_views()
    same = Views(np.repeat(one.embeddings[:1], 2, axis=0), np.repeat(one.images[:1], 2, axis=0))
    state = fit([one, same])
    first, second = colours_of(state, same)
    assert (first == second).all()
    assert chroma(first).max() > 0.1


@pytest.mark.parametrize("colours", ["oklch", "rgb3"])
def test_the_overlay_keeps_every_grey_level(colours: str) -> None:
    views, settings = some_views(), replace(PLAIN, colours=colours)  # type: ignore[arg-type]
    state = fit([views], settings)
    shown = np.rint(255 * overlay(state, transform(state, views.embeddings), views.images)) / 255
    levels = grey(to_oklab(shown)[..., 0])
    assert np.abs(levels - views.images).max() < 1 / 255
    assert chroma(shown).max() > 0.08  # while there are colours


def test_the_angle_is_the_hue_and_the_squashed_radius_the_chroma() -> None:
    state = fit([some_views()], PLAIN)
    places = np.array([[0.1, 0], [0, 0.1], [-0.3, -0.3], [0, 0]], np.float32)
    lab = to_oklab(colorize(state, places))
    radius = np.linalg.norm(places, axis=1)
    np.testing.assert_allclose(lab[:, 0], 0.72, atol=1e-4)
    np.testing.assert_allclose(lab[:, 1:], 0.3 * places / (1 + radius)[:, None], atol=1e-3)


def test_foreground_is_the_side_of_the_threshold_that_the_border_is_not_on() -> None:
    """A square of one embedding on a ground of another, both with a little noise, either way round."""
    rng = numpy_generator("square")
    mask = np.zeros((2, *SIZE), bool)
    mask[:, 6:14, 5:18] = True
    for sign in (1, -1):
        embeddings = 0.05 * rng.standard_normal((2, CHANNELS, *SIZE)) + 1
        embeddings[:, 0] += sign * np.where(mask, 2.0, -2.0)
        views = Views(embeddings, np.full((2, *SIZE), 0.5))
        state = fit([views])
        assert (is_foreground(state, views.embeddings) == mask).all()
        pale = colorize(state, transform(state, embeddings), mask)
        strong = colorize(state, transform(state, embeddings))
        assert (pale[mask] == strong[mask]).all()
        lab, full = to_oklab(pale)[~mask], to_oklab(strong)[~mask]
        assert np.median(np.hypot(*lab[:, 1:].T)) < 0.5 * np.median(np.hypot(*full[:, 1:].T))


def test_a_single_outlier_is_no_foreground_and_an_empty_one_is_refused() -> None:
    embeddings = np.ones((1, CHANNELS, *SIZE), np.float32)
    embeddings += 0.01 * numpy_generator("flat").standard_normal(embeddings.shape)
    embeddings[0, :, 9, 9] = np.arange(CHANNELS) - 3
    views = Views(embeddings, np.full((1, *SIZE), 0.5))
    assert is_foreground(fit([views]), embeddings).all()
    with pytest.raises(UserError, match="foreground"):
        fit([replace(views, foreground=np.zeros(views.images.shape))])


@pytest.mark.parametrize(
    "change",
    [
        {"foreground": "all"},
        {"scale": "ellipse"},
        {"inner": 0.5},
        {"squash": False},
        {"colours": "rgb3"},
        {"colours": "hsv"},
        {"sample_per_image": 50},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_setting_changes_the_picture(change: dict[str, Any]) -> None:
    masks = np.zeros((3, *SIZE), int)
    masks[:, 8:], masks[:, :, 12:] = 1, 2
    views, settings = some_views(masks=masks), ChromapSettings(sample_per_image=200)

    def picture(chosen: ChromapSettings) -> np.ndarray:
        state = fit([views], chosen)
        places = transform(state, views.embeddings)
        return overlay(state, places, views.images, is_foreground(state, views.embeddings))

    assert np.abs(picture(replace(settings, **change)) - picture(settings)).max() > 0.02


def test_background_keeps_a_quarter_of_its_chroma() -> None:
    state = fit([some_views()], PLAIN)
    places = np.array([[0.2, 0.1]], np.float32)
    full, none = (chroma(colorize(state, places, np.array([share]))) for share in (1.0, 0.0))
    np.testing.assert_allclose(none, BACKGROUND * full, rtol=1e-2)


def test_colours_are_fitted_to_the_given_foreground_alone() -> None:
    views = some_views()
    mask = np.zeros(views.images.shape)
    mask[:, :, :12] = 1
    spoilt = views.embeddings.copy()
    spoilt[..., 12:] = 5 * numpy_generator("other half").standard_normal((3, CHANNELS, 20, 12))
    settings = replace(PLAIN, sample_per_image=None)
    clean, other = (
        fit([replace(views, embeddings=e, foreground=mask)], settings) for e in (views.embeddings, spoilt)
    )
    np.testing.assert_allclose(other.components, clean.components)
    np.testing.assert_allclose(other.root, clean.root)


def test_the_sample_has_as_many_pixels_of_every_class_and_none_that_is_invalid() -> None:
    masks = np.zeros((3, *SIZE), int)
    masks[0, :5, :6], masks[1, 10:] = 1, 2  # 30 and 240 pixels
    valid = np.ones(masks.shape, bool)
    valid[2] = False
    views = some_views(masks=masks, valid=valid)
    places = sample_pixels(views, 300, seed=0)
    assert len(np.unique(places)) == 300
    assert valid.ravel()[places].all()
    assert np.bincount(masks.ravel()[places]).tolist() == [135, 30, 135]
    levels = np.floor(8 * some_views().images.ravel()[sample_pixels(some_views(), 80, 0)]).clip(max=7)
    assert np.bincount(levels.astype(int), minlength=8).tolist() == [10] * 8


@pytest.mark.parametrize("inner", [1.0, 0.9])
def test_the_scale_ends_where_the_inner_share_of_the_pixels_does(inner: float) -> None:
    views = some_views()
    settings = replace(PLAIN, sample_per_image=None, inner=inner)
    rows = rows_of(views.unit)
    radius = np.linalg.norm(coordinates(fit([views], settings), rows), axis=1)
    assert np.mean(radius <= 1 + 1e-5) == pytest.approx(inner, abs=1e-3)
    ellipse = np.linalg.norm(coordinates(fit([views], replace(settings, scale="ellipse")), rows), axis=1)
    assert np.mean(ellipse <= 1 + 1e-5) >= inner - 1e-3
    if inner == 1.0:
        assert ellipse.max() == pytest.approx(1, abs=1e-3)  # it touches


def test_lda_parts_classes_that_pca_does_not_see() -> None:
    """Three classes differ along faint channels; the loudest ones are noise."""
    rng = numpy_generator("lda")
    masks = rng.integers(3, size=(2, *SIZE))
    embeddings = rng.standard_normal((2, CHANNELS, *SIZE)) * 0.02
    embeddings[:, 0] += 5
    embeddings[:, 3:6] += rng.standard_normal((2, 3, *SIZE))
    embeddings[:, 1] += 0.2 * (masks == 1)
    embeddings[:, 2] += 0.2 * (masks == 2)
    views = Views(embeddings, np.full((2, *SIZE), 0.5), masks=masks)

    def separation(reducer: str) -> float:
        places = transform(fit([views], replace(PLAIN, reducer=reducer)), embeddings)  # type: ignore[arg-type]
        means = np.stack([places[masks == label].mean(axis=0) for label in range(3)])
        within = np.mean([places[masks == label].std(axis=0).mean() for label in range(3)])
        return float(np.linalg.norm(means - means.mean(axis=0), axis=1).mean() / within)

    assert separation("lda") > 2 > 0.5 > separation("pca")
    with pytest.raises(UserError, match="masks"):
        fit([replace(views, masks=None)], replace(PLAIN, reducer="lda"))
    with pytest.raises(UserError, match="one class more"):
        fit([replace(views, masks=masks % 2)], replace(PLAIN, reducer="lda"))


def test_a_fitted_pixel_keeps_its_place_and_a_new_one_lies_among_its_neighbours() -> None:
    rng = numpy_generator("places")
    fitted, places = rng.standard_normal((200, 4)), rng.standard_normal((200, 2))
    np.testing.assert_allclose(neighbour_places(fitted, fitted, places), places, atol=1e-3)
    (new,) = neighbour_places(fitted[:1] + 0.01, fitted, places)
    squared = ((fitted - fitted[:1] - 0.01) ** 2).sum(axis=1)
    nearest = np.argsort(squared)[:15]
    weights = 1 / squared[nearest]
    np.testing.assert_allclose(new, weights @ places[nearest] / weights.sum(), rtol=1e-3)


@pytest.mark.slow
def test_the_published_preset_fills_the_smallest_ellipse_with_hsv_of_umap(tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed: pip install 'cfssl[umap]'")
    # Two tissues far apart in the embedding.
    mask = np.zeros((2, 10, 12), bool)
    mask[:, :, 6:] = True
    embeddings = 0.1 * numpy_generator("umap").standard_normal((2, 6, 10, 12)).astype(np.float32)
    embeddings[:, 0], embeddings[:, 1] = np.where(mask, 1, 0), np.where(mask, 0, 1)
    views = Views(embeddings, np.full(mask.shape, 0.5))
    state = fit([views], PRESETS["paper"])
    again = fit([views], PRESETS["paper"])
    assert (again.places == state.places).all()
    places = transform(state, embeddings)
    ellipse = enclosing_ellipse(state.places)
    expected = (state.places - ellipse.centre) @ ellipse.root
    np.testing.assert_allclose(places.reshape(-1, 2), expected, atol=1e-3)
    assert np.linalg.norm(places, axis=-1).max() == pytest.approx(1, abs=1e-3)
    first, second = places[~mask], places[mask]
    apart = np.linalg.norm(first.mean(axis=0) - second.mean(axis=0))
    assert apart > 3 * max(first.std(axis=0).max(), second.std(axis=0).max())
    shown = overlay(state, places, views.images)
    np.testing.assert_allclose(shown, 0.25 + 0.5 * colorize(state, places), atol=1e-6)
    save(state, tmp_path / "state.safetensors")
    np.testing.assert_array_equal(transform(load(tmp_path / "state.safetensors"), embeddings), places)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    views = some_views()
    state = fit([views])
    with pytest.raises(UserError, match="12"):
        coordinates(state, np.zeros((4, 5), np.float32))
    with pytest.raises(UserError, match="lengths"):
        fit([views, replace(views, embeddings=views.embeddings[:, :4])])
    with pytest.raises(UserError, match="valid pixels"):
        fit([replace(views, valid=np.zeros(views.images.shape, bool))])
    with pytest.raises(UserError, match="same pixels"):
        align(state, np.zeros((4, 2)), np.zeros((5, 2)))
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")


def test_reduced_chroma_is_the_only_thing_that_leaves_the_disc() -> None:
    """Where the screen has the colour, the overlay's hue and chroma are those of the map."""
    views = some_views(images=np.full((3, *SIZE), float(grey(np.array(0.72)))))
    state = fit([views], PLAIN)
    places = transform(state, views.embeddings)
    np.testing.assert_allclose(overlay(state, places, views.images), colorize(state, places), atol=1e-3)
    lab = to_oklab(overlay(state, places, views.images))
    np.testing.assert_allclose(fitted_chroma(lab), lab, atol=1e-3)
    np.testing.assert_allclose(lab[..., 0], lightness(np.float64(views.images)), atol=1e-3)
