"""How the look of a view is changed: brightness, contrast, gamma, blur, noise, erasing, through
albumentations.

albumentations owns its random state and never reseeds it in data-loading workers, so that all workers and
epochs would draw the same numbers; and its own seeding gives every operation the same seed, so that blur
would only happen where noise does. Here all operations draw in turn from one state, set for every single view
from a seed that is a function of (run seed, step, item, view): workers, resumption and sharding cannot change
what a view looks like.
"""

import random

import numpy as np
from pydantic.dataclasses import dataclass

from cfssl.settings import STRICT, NonNegative, PositiveRange, Probability, ShareRange, UnitInterval


@dataclass(frozen=True, config=STRICT)
class PhotometricSettings:
    """Strengths are largest changes (0 switches an operation off) on pixels in [0, 1]: `brightness` is added,
    `contrast` multiplied, `noise` a standard deviation; sigma is in pixels; `erase_scale` is the share of the
    side of the one erased rectangle."""

    brightness: UnitInterval = 0.2
    contrast: UnitInterval = 0.2
    jitter_probability: Probability = 0.8
    gamma: NonNegative = 0.0
    gamma_probability: Probability = 0.5
    blur_sigma: PositiveRange = (0.1, 1.0)
    blur_probability: Probability = 0.0
    noise: UnitInterval = 0.02
    noise_probability: Probability = 0.0
    erase_scale: ShareRange = (0.1, 0.3)
    erase_probability: Probability = 0.0


class Photometric:
    """`augmenter(view, seed)`: a float32 (H, W, C) view in [0, 1] to another of the same shape and range."""

    def __init__(self, settings: PhotometricSettings) -> None:
        import albumentations as A  # heavy; set-up of NO_ALBUMENTATIONS_UPDATE is in cfssl/__init__.py

        operations: list[A.BasicTransform] = []
        if (settings.brightness or settings.contrast) and settings.jitter_probability:
            limits = (settings.brightness, settings.contrast)
            operations.append(A.RandomBrightnessContrast(*limits, p=settings.jitter_probability))
        if settings.gamma and settings.gamma_probability:
            # albumentations gives gamma in percent
            low, high = 100 / (1 + settings.gamma), 100 * (1 + settings.gamma)
            operations.append(A.RandomGamma((low, high), p=settings.gamma_probability))
        if settings.blur_probability:
            # blur_limit 0: the kernel follows from sigma
            blur = A.GaussianBlur(blur_limit=0, sigma_limit=settings.blur_sigma, p=settings.blur_probability)
            operations.append(blur)
        if settings.noise and settings.noise_probability:
            noise = A.GaussNoise(std_range=(0, settings.noise), p=settings.noise_probability)
            operations.append(noise)
        if settings.erase_probability:
            scale = settings.erase_scale
            erase = A.CoarseDropout((1, 1), scale, scale, fill=0, p=settings.erase_probability)
            operations.append(erase)
        self.compose = A.Compose(operations) if operations else None

    def __call__(self, view: np.ndarray, seed: int) -> np.ndarray:
        if self.compose is None:
            return view
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return np.clip(self.compose(image=view)["image"], 0, 1)
