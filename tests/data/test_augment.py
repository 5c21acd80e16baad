"""The look of views: reproducible per seed, and each operation as often as stated."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms.v2 import functional

from cfssl.data.augment import Photometric, PhotometricSettings, tone_curve
from cfssl.seeds import numpy_generator

OFF = {"brightness": 0, "contrast": 0}
VIEW = numpy_generator(0).random((24, 24, 1), dtype=np.float32) * 0.6 + 0.2
COLOURED = numpy_generator(1).random((24, 24, 3), dtype=np.float32) * 0.6 + 0.2


def test_the_same_seed_gives_the_same_view_whatever_came_before() -> None:
    augment = Photometric(
        PhotometricSettings(blur_probability=0.5, noise_probability=0.5, erase_probability=0.5, gamma=0.2)
    )
    first = augment(VIEW, 7)
    for seed in range(20):
        augment(VIEW, seed)
    np.testing.assert_array_equal(augment(VIEW, 7), first)
    assert not np.array_equal(augment(VIEW, 8), first)


# Every operation that happens by chance, with all others off.
CHANCES = {
    "jitter_probability": [{"brightness": 0.3, "contrast": 0.3}, {"saturation": 0.4}, {"hue": 0.3}],
    "grey_probability": [{}],
    "gamma_probability": [{"gamma": 0.3}],
    "blur_probability": [{"blur_sigma": (0.5, 1.0)}],
    "sharpness_probability": [{}],
    "solarize_probability": [{}],
    "noise_probability": [{"noise": 0.1}],
    "erase_probability": [{}],
}


def test_no_chance_goes_untested() -> None:
    names = {field.name for field in dataclasses.fields(PhotometricSettings)}
    assert set(CHANCES) == {name for name in names if name.endswith("_probability")}


@pytest.mark.parametrize("probability", [0.1, 0.8])
@pytest.mark.parametrize(
    ("chance", "strength"), [(name, strength) for name, used in CHANCES.items() for strength in used]
)
def test_each_operation_happens_as_often_as_stated(chance: str, strength: dict, probability: float) -> None:
    """A blur of 0.1 blurs 10 %: the published code reads it as 90 %."""
    augment = Photometric(PhotometricSettings(**{**OFF, **strength, chance: probability}))
    changed = [not np.array_equal(augment(COLOURED, seed), COLOURED) for seed in range(3000)]
    assert np.mean(changed) == pytest.approx(probability, abs=0.03)  # about four standard errors


def test_brightness_and_colour_are_jittered_together_or_not_at_all() -> None:
    grey = np.full((8, 8, 3), 0.5, np.float32)
    halves = np.concatenate([grey, grey * np.array([1, 0.5, 0.5], np.float32)])
    settings = PhotometricSettings(brightness=0.3, contrast=0, saturation=0.5, jitter_probability=0.5)
    augment = Photometric(settings)
    views = np.stack([augment(halves, seed) for seed in range(3000)])
    brighter = views[:, 0, 0, 0] != 0.5
    spread = np.ptp(views[:, -1, 0], axis=1)  # of the channels; brightness leaves it, saturation scales it
    coloured = np.abs(spread - 0.25) > 1e-3
    assert brighter.mean() == pytest.approx(0.5, abs=0.035)
    assert (coloured & ~brighter).sum() == 0
    assert (coloured & brighter).sum() / brighter.sum() > 0.95


def test_grey_views_have_equal_channels() -> None:
    view = Photometric(PhotometricSettings(**OFF, grey_probability=1))(COLOURED, 0)
    assert view.shape == COLOURED.shape
    assert (np.ptp(view, axis=2) == 0).all()
    assert np.ptp(view) > 0.1


def test_solarisation_inverts_from_the_threshold_on() -> None:
    view = Photometric(PhotometricSettings(**OFF, solarize_threshold=0.6, solarize_probability=1))(VIEW, 0)
    np.testing.assert_allclose(view, np.where(VIEW >= 0.6, 1 - VIEW, VIEW), atol=1e-6)


@pytest.mark.parametrize("picture", [VIEW, COLOURED])
def test_sharpness_is_torchvisions_with_a_uniform_factor(picture: np.ndarray) -> None:
    augment = Photometric(PhotometricSettings(**OFF, sharpness=0.8, sharpness_probability=1))
    flat = torch.from_numpy(picture).permute(2, 0, 1)
    smoothed = functional.adjust_sharpness(flat, 0).permute(1, 2, 0).numpy()
    inside, factors = np.s_[1:-1, 1:-1], []
    difference = (picture - smoothed)[inside]
    for seed in range(400):
        view = augment(picture, seed)
        change = (view - picture)[inside]
        factors.append(1 + (change * difference).sum() / np.square(difference).sum())
        if view.min() > 0.05 and view.max() < 0.95:  # nothing was clipped
            expected = functional.adjust_sharpness(flat, factors[-1]).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(view[inside], expected[inside], atol=1e-5)
    assert np.mean(factors) == pytest.approx(1, abs=0.1)
    assert np.quantile(factors, [0.25, 0.75]) == pytest.approx([0.6, 1.4], abs=0.15)
    assert min(factors) >= 0.2 - 1e-5
    assert max(factors) <= 1.8 + 1e-5


def test_a_look_travels_to_another_process() -> None:
    augment = Photometric(PhotometricSettings(sharpness_probability=1, noise_probability=0.5))
    received = pickle.loads(pickle.dumps(augment))  # noqa: S301  what a data loader may do with it
    np.testing.assert_array_equal(received(VIEW, 5), augment(VIEW, 5))


LEVELS = np.arange(256) / 255


def test_tone_curves_keep_black_and_the_order_of_grey_levels_at_any_strength() -> None:
    for strength in (0.05, 0.25, 1.0):
        curves = np.stack([tone_curve(numpy_generator(seed), strength, LEVELS) for seed in range(300)])
        assert (curves[:, 0] == 0).all()
        assert (np.diff(curves, axis=1) >= 0).all()
        assert curves.max() <= 1
        # at a knot the curve is the knot, which moves by at most the strength
        at_knots = np.stack(
            [tone_curve(numpy_generator(seed), strength, np.array([0.25, 0.5, 0.75])) for seed in range(300)]
        )
        assert np.abs(at_knots - [0.25, 0.5, 0.75]).max() <= strength + 1e-6
        assert at_knots.std(axis=0).min() > strength / 5


def test_tone_curves_of_no_strength_to_speak_of_are_the_identity() -> None:
    np.testing.assert_allclose(tone_curve(numpy_generator(0), 1e-6, LEVELS), LEVELS, atol=1e-5)


def test_operations_happen_independently_of_each_other() -> None:
    """The trap: albumentations gives every operation the same seed, so that all draw the same numbers."""
    two_levels = np.repeat(np.array([0.25, 0.75], np.float32), 12)[:, None, None].repeat(24, axis=1)
    augment = Photometric(
        PhotometricSettings(
            brightness=0, contrast=0.2, jitter_probability=0.5, erase_probability=0.5, erase_scale=(0.5, 0.5)
        )
    )
    views = np.stack([augment(two_levels, seed) for seed in range(4000)])
    erased = (views == 0).any((1, 2, 3))
    jittered = ~np.isin(views, [0, 0.25, 0.75]).all((1, 2, 3))
    assert (erased & jittered).mean() == pytest.approx(0.25, abs=0.03)
    # nor does where it is erased follow from how strong the jitter is
    both = views[erased & jittered]
    strength = both.max((1, 2, 3))
    top = (both == 0).argmax(1).max((1, 2))
    assert abs(np.corrcoef(strength, top)[0, 1]) < 0.13  # about four standard errors


def test_views_stay_float32_in_the_unit_range() -> None:
    augment = Photometric(PhotometricSettings(brightness=0.9, contrast=0.9, noise=0.5, noise_probability=1))
    for seed in range(50):
        view = augment(VIEW, seed)
        assert view.dtype == np.float32
        assert view.shape == VIEW.shape
        assert view.min() >= 0
        assert view.max() <= 1


def test_nothing_switched_on_leaves_the_view_untouched() -> None:
    assert Photometric(PhotometricSettings(**OFF))(VIEW, 3) is VIEW


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="must not be above"):
        PhotometricSettings(blur_sigma=(2.0, 1.0))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        PhotometricSettings(blur_probability=1.5)
