"""How the look of a view is changed: brightness, contrast, colour, gamma, blur, sharpness, solarisation,
noise, erasing, in this order, through albumentations; and the random tone curves of a control.

albumentations owns its random state and never reseeds it in data-loading workers, so that all workers and
epochs would draw the same numbers; and its own seeding gives every operation the same seed, so that blur
would only happen where noise does. Here all operations draw in turn from one state, set for every single view
from a seed that is a function of (run seed, step, item, view): workers, resumption and sharding cannot change
what a view looks like.
"""

import random
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.interpolate import PchipInterpolator

from cfssl.settings import STRICT, NonNegative, PositiveRange, Probability, ShareRange, UnitInterval

KNOTS = 5  # of a tone curve, black among them


@dataclass(frozen=True, config=STRICT)
class PhotometricSettings:
    """Strengths are largest changes (0 switches an operation off) on pixels in [0, 1]: `brightness` is added,
    `contrast` and `saturation` multiplied, `hue` turned by a share of the circle, `noise` a standard
    deviation; sigma is in pixels. `sharpness` is a change of the factor 1 with which an image differs from
    its smoothed self, so that 1 reaches from smoothed to sharpened. `solarize_threshold`: from there on grey
    levels are inverted. `erase_scale` is the share of the side of the one erased rectangle. `saturation`,
    `hue` and `grey_probability` are for images of three channels."""

    brightness: UnitInterval = 0.2
    contrast: UnitInterval = 0.2
    saturation: UnitInterval = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    jitter_probability: Probability = 0.8
    grey_probability: Probability = 0.0
    gamma: NonNegative = 0.0
    gamma_probability: Probability = 0.5
    blur_sigma: PositiveRange = (0.1, 1.0)
    blur_probability: Probability = 0.0
    sharpness: UnitInterval = 1.0
    sharpness_probability: Probability = 0.0
    solarize_threshold: UnitInterval = 0.5
    solarize_probability: Probability = 0.0
    noise: UnitInterval = 0.02
    noise_probability: Probability = 0.0
    erase_scale: ShareRange = (0.1, 0.3)
    erase_probability: Probability = 0.0

    @property
    def colours(self) -> list[str]:
        """The settings in use that need three channels."""
        jitter = [name for name in ("saturation", "hue") if getattr(self, name) and self.jitter_probability]
        return [*jitter, "grey_probability"] if self.grey_probability else jitter


class Photometric:
    """`augmenter(view, seed)`: a float32 (H, W, C) view in [0, 1] to another of the same shape and range."""

    def __init__(self, settings: PhotometricSettings) -> None:
        import albumentations as A  # heavy; set-up of NO_ALBUMENTATIONS_UPDATE is in cfssl/__init__.py

        self.settings = settings
        operations = _jitter(settings)
        if settings.grey_probability:
            operations.append(A.ToGray(p=settings.grey_probability))
        if settings.gamma and settings.gamma_probability:
            # albumentations gives gamma in percent
            low, high = 100 / (1 + settings.gamma), 100 * (1 + settings.gamma)
            operations.append(A.RandomGamma((low, high), p=settings.gamma_probability))
        if settings.blur_probability:
            # blur_limit 0: the kernel follows from sigma
            blur = A.GaussianBlur(blur_limit=0, sigma_limit=settings.blur_sigma, p=settings.blur_probability)
            operations.append(blur)
        if settings.sharpness and settings.sharpness_probability:
            operations.append(_sharpness(settings.sharpness, settings.sharpness_probability))
        if settings.solarize_probability:
            threshold = settings.solarize_threshold
            operations.append(A.Solarize((threshold, threshold), p=settings.solarize_probability))
        if settings.noise and settings.noise_probability:
            noise = A.GaussNoise(std_range=(0, settings.noise), p=settings.noise_probability)
            operations.append(noise)
        if settings.erase_probability:
            scale = settings.erase_scale
            erase = A.CoarseDropout((1, 1), scale, scale, fill=0, p=settings.erase_probability)
            operations.append(erase)
        self.compose = A.Compose(operations) if operations else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Photometric, (self.settings,)  # operations of our own have no name to be found by

    def __call__(self, view: np.ndarray, seed: int) -> np.ndarray:
        if self.compose is None:
            return view
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return np.clip(self.compose(image=view)["image"], 0, 1)


def _jitter(settings: PhotometricSettings) -> list[Any]:
    """Brightness, contrast and colour, which happen together or not at all."""
    import albumentations as A

    parts: list[tuple[type, dict[str, Any]]] = []
    if settings.brightness or settings.contrast:
        limits = {"brightness_limit": settings.brightness, "contrast_limit": settings.contrast}
        parts.append((A.RandomBrightnessContrast, limits))
    if settings.saturation or settings.hue:
        factors = 1 - settings.saturation, 1 + settings.saturation
        colour = {"saturation": factors, "hue": (-settings.hue, settings.hue)}
        parts.append((A.ColorJitter, {"brightness": (1, 1), "contrast": (1, 1), **colour}))
    probability = settings.jitter_probability
    if len(parts) < 2 or not probability:
        return [kind(**limits, p=probability) for kind, limits in parts if probability]
    return [A.Sequential([kind(**limits, p=1) for kind, limits in parts], p=probability)]


def _sharpness(strength: float, probability: float) -> Any:
    """x' = s + f (x - s), where s is x smoothed by (1 1 1; 1 5 1; 1 1 1) / 13 and f uniform in 1 +- strength:
    torchvision's sharpness with a random factor. albumentations only sharpens."""
    import albumentations as A
    import cv2

    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    kernel /= kernel.sum()

    class Sharpness(A.ImageOnlyTransform):
        def get_params(self) -> dict[str, Any]:
            return {"factor": self.py_random.uniform(1 - strength, 1 + strength)}

        def apply(self, img: np.ndarray, factor: float, **_: Any) -> np.ndarray:
            smooth = cv2.filter2D(img, -1, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(img.shape)
            return np.clip(smooth + np.float32(factor) * (img - smooth), 0, 1)

    return Sharpness(p=probability)


def tone_curve(rng: np.random.Generator, strength: float, levels: np.ndarray) -> np.ndarray:
    """A random increasing curve of grey levels: float32 values in [0, 1] of `levels` in [0, 1].

    Black stays black, so that the air around a body and the outside of an image do not part. Knots at
    quarters of the range move by at most `strength`, and a monotone cubic goes through them, so that
    brightness, contrast and gamma all change at random, while no order of grey levels does.
    """
    knots = np.linspace(0, 1, KNOTS)
    moved = np.clip(knots[1:] + strength * rng.uniform(-1, 1, KNOTS - 1), 0, 1)
    curve = PchipInterpolator(knots, [0.0, *np.sort(moved)])
    return np.clip(curve(levels), 0, 1).astype(np.float32)
