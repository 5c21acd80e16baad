"""OKLab agrees with published values, and what leaves the gamut comes back with its hue and lightness."""

import numpy as np
import pytest

from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap_colour import (
    MOST_CHROMA,
    fitted_chroma,
    from_oklab,
    grey,
    hsv_disc,
    lightness,
    to_oklab,
)


@pytest.mark.parametrize(
    ("rgb", "lch"),
    [  # CSS Color 4, sections 6.1 and 9: lightness, chroma, hue in degrees
        ((1, 0, 0), (0.62796, 0.25768, 29.234)),
        ((0, 1, 0), (0.86644, 0.29483, 142.495)),
        ((0, 0, 1), (0.45201, 0.31321, 264.052)),
        ((1, 1, 0), (0.96798, 0.21101, 109.769)),
    ],
)
def test_primaries_have_their_published_coordinates(rgb: tuple[int, ...], lch: tuple[float, ...]) -> None:
    light, a, b = to_oklab(np.array(rgb, dtype=np.float64))
    assert (light, np.hypot(a, b)) == pytest.approx(lch[:2], abs=1e-4)
    assert np.degrees(np.arctan2(b, a)) % 360 == pytest.approx(lch[2], abs=0.02)


def test_srgb_survives_the_round_trip() -> None:
    rgb = numpy_generator("rgb").random((5000, 3))
    np.testing.assert_allclose(from_oklab(to_oklab(rgb)), rgb, atol=1e-7)
    single = rgb.astype(np.float32)
    np.testing.assert_allclose(from_oklab(to_oklab(single)), single, atol=1e-4)


def test_greys_have_no_chroma_and_their_own_lightness() -> None:
    levels = np.linspace(0, 1, 256)
    lab = to_oklab(np.repeat(levels[:, None], 3, axis=1))
    np.testing.assert_allclose(lab[:, 0], lightness(levels), atol=1e-7)
    np.testing.assert_allclose(lab[:, 1:], 0, atol=1e-7)
    np.testing.assert_allclose(grey(lightness(levels)), levels, atol=1e-12)


def test_colours_beyond_the_screen_lose_chroma_alone_and_no_more_than_they_must() -> None:
    rng = numpy_generator("gamut")
    lab = np.column_stack([rng.random(4000), rng.uniform(-MOST_CHROMA, MOST_CHROMA, (4000, 2))])
    fitted = fitted_chroma(lab)
    assert (fitted[:, 0] == lab[:, 0]).all()
    np.testing.assert_allclose(to_oklab(from_oklab(fitted)), fitted, atol=2e-3)  # shown as it is
    before, after = (np.hypot(*colours[:, 1:].T) for colours in (lab, fitted))
    cut = after < before * (1 - 1e-9)
    assert (fitted[~cut] == lab[~cut]).all()
    np.testing.assert_allclose(fitted[:, 1] * lab[:, 2], fitted[:, 2] * lab[:, 1], atol=1e-12)  # hue
    # A brute-force search along the ray finds no shown colour of more chroma.
    shares = np.linspace(0, 1, 2001)
    for colour, chroma, whole in zip(lab[cut][:50], after[cut][:50], before[cut][:50], strict=True):
        ray = np.column_stack([np.full(2001, colour[0]), shares[:, None] * colour[1:]])
        shown = np.abs(to_oklab(from_oklab(ray)) - ray).max(axis=1) < 1e-5
        assert chroma == pytest.approx(whole * shares[shown].max(), abs=1.5e-3 * whole + 1e-9)


def test_the_published_disc_is_white_in_the_middle_and_pure_at_the_rim() -> None:
    places = np.array([[0.0, 0], [-1, 0], [1, 0], [0, 0.5], [0, -2]])
    colours = hsv_disc(places)
    assert colours[0].tolist() == [1, 1, 1]
    np.testing.assert_allclose(colours[1], [1, 0, 0], atol=1e-9)  # angle pi is hue 1, which is hue 0
    np.testing.assert_allclose(colours[2], [0, 1, 1], atol=1e-9)  # hue 1/2
    assert colours[3].min() == pytest.approx(0.5)  # saturation is the radius
    assert colours[4].min() == pytest.approx(0)  # cut at the rim
