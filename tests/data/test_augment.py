"""The look of views: reproducible per seed, and each operation as often as stated."""

import numpy as np
import pytest
from pydantic import ValidationError

from cfssl.data.augment import Photometric, PhotometricSettings
from cfssl.seeds import numpy_generator

OFF = {"brightness": 0, "contrast": 0}
VIEW = numpy_generator(0).random((24, 24, 1), dtype=np.float32) * 0.6 + 0.2


def test_the_same_seed_gives_the_same_view_whatever_came_before() -> None:
    augment = Photometric(
        PhotometricSettings(blur_probability=0.5, noise_probability=0.5, erase_probability=0.5, gamma=0.2)
    )
    first = augment(VIEW, 7)
    for seed in range(20):
        augment(VIEW, seed)
    np.testing.assert_array_equal(augment(VIEW, 7), first)
    assert not np.array_equal(augment(VIEW, 8), first)


@pytest.mark.parametrize(
    ("settings", "probability"),
    [
        ({"brightness": 0.3, "contrast": 0.3, "jitter_probability": 0.8}, 0.8),
        ({**OFF, "blur_probability": 0.3, "blur_sigma": (0.5, 1.0)}, 0.3),
        ({**OFF, "noise": 0.1, "noise_probability": 0.25}, 0.25),
        ({**OFF, "erase_probability": 0.4}, 0.4),
        ({**OFF, "gamma": 0.3, "gamma_probability": 0.6}, 0.6),
    ],
)
def test_each_operation_happens_as_often_as_stated(settings: dict, probability: float) -> None:
    augment = Photometric(PhotometricSettings(**settings))
    changed = [not np.array_equal(augment(VIEW, seed), VIEW) for seed in range(4000)]
    assert np.mean(changed) == pytest.approx(probability, abs=0.03)  # about four standard errors


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
