"""Thickness and intensity of a stroke without a learned model, for Morpho-MNIST (Castro et al. 2019).

What enters: images of one bright stroke on dark ground, in [-1, 1]. What leaves: thickness in pixels and
intensity in grey levels, (N,) float64. No predictor can be fooled here, and none has to be trained; but a
measure has an error of its own, which `calibrate` makes smaller and `agreement` says. Measured values of real
images against their recorded ones are the floor under the error of any generator.
"""

from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from skimage.morphology import medial_axis, skeletonize

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import mean_figure

Axis = Literal["medial", "skeleton"]
SCALE = 4  # times that an image is enlarged before its stroke is measured


def intensity(images: torch.Tensor) -> np.ndarray:
    """Median grey level, 0 to 255, of the pixels at or above min + (max - min) / 2; images (N, 1, H, W). A
    blank image has that of its only colour."""
    return np.array([np.median(image[image >= _half(image)]) for image in _grey(images)], np.float64)


def thickness(images: torch.Tensor, axis: Axis = "medial") -> np.ndarray:
    """Mean width of the stroke in pixels, NaN for a blank image; images (N, 1, H, W).

    The image is enlarged 4 times (bilinear), thresholded at min + (max - min) / 2, and the distance to the
    background averaged over the stroke's middle: 2 mean(distance) / 4. The middle is the "medial" axis, as in
    published evaluations, or the "skeleton" by thinning (Zhang and Suen 1984), which has no side branches to
    the corners of a stroke, agrees better with the recorded thickness, and is much faster. Where a thick
    stroke closes a loop (6, 9) both measure one blob: these are the largest errors.
    """
    return np.array([_width(image, axis) for image in _grey(images)], np.float64)


class Calibration(NamedTuple):
    """recorded = offset + slope * measured, on average."""

    offset: float
    slope: float

    def __call__(self, measured: np.ndarray) -> np.ndarray:
        return self.offset + self.slope * np.asarray(measured, np.float64)


def calibrate(measured: np.ndarray, recorded: np.ndarray) -> Calibration:
    """The least-squares line from what was measured in real training images to what is recorded of them. Fit
    it on images that are not evaluated. Raises UserError with fewer than three finite values."""
    measured, recorded = _finite(measured, recorded)
    if len(measured) < 3 or np.ptp(measured) == 0:
        raise UserError(
            f"A calibration was asked for on {len(measured)} measured images, expected at least 3 with "
            "different values; measure more real training images."
        )
    slope, offset = np.polyfit(measured, recorded, 1)
    return Calibration(float(offset), float(slope))


def agreement(measured: np.ndarray, recorded: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """{"n", "mae": figure, "bias", "correlation"} of measured and recorded values (N,), images without a
    measured one left out."""
    measured, recorded = _finite(measured, recorded)
    return {
        "n": len(measured),
        "mae": mean_figure(np.abs(measured - recorded), seed=seed),
        "bias": float(np.mean(measured - recorded)),
        "correlation": float(np.corrcoef(measured, recorded)[0, 1]),
    }


def _width(image: np.ndarray, axis: Axis) -> float:
    if image.min() == image.max():
        return float("nan")
    # A rim of background, so that a stroke at the border of the image ends there.
    framed = cv2.copyMakeBorder(image, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=float(image.min()))
    large = cv2.resize(framed, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_LINEAR)
    stroke = large >= _half(image)
    distance = cv2.distanceTransform(stroke.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # The generator decides between equally good pixels of the axis.
    middle = medial_axis(stroke, rng=0) if axis == "medial" else skeletonize(stroke)
    return float(2 * distance[middle].mean(dtype=np.float64) / SCALE)


def _half(image: np.ndarray) -> float:
    return float(image.min()) + 0.5 * (float(image.max()) - float(image.min()))


def _grey(images: torch.Tensor) -> np.ndarray:
    """(N, H, W) float32 in 0 to 255."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise UserError(
            f"Strokes are measured in images of shape (N, 1, H, W), but these have {tuple(images.shape)}; "
            "choose one channel."
        )
    return ((images.double() + 1) * 127.5)[:, 0].float().cpu().numpy()


def _finite(measured: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    measured, recorded = np.asarray(measured, np.float64), np.asarray(recorded, np.float64)
    if measured.shape != recorded.shape:
        raise ValueError(f"{measured.shape} measured values, {recorded.shape} recorded ones")
    keep = np.isfinite(measured)
    return measured[keep], recorded[keep]
